"""Commit: what some images of a chain hold is written into the one below them, which then takes their place.

::

    active ──> mid ──> base          the images *above* the base are committed: mid, or active and mid
       │        │       ↑
       └ guest  └───────┘ job        the job writes where these hide the base, so that what is shown stays the same

**Nothing is lost that the guest writes meanwhile.** A bitmap is marked before a write is answered (`CommitTop`). A pass
takes the bitmap, and from then on another one is marked; then it reads what the first says was written, which by then
is readable; what is written after that is in the second. The last pass is made in a drained section.

**Nobody else may look.** What the base, and the images between, show by themselves is no disk anybody had. Their users
are told so, or else the commit is refused: they exclude each other (`nbdserver.permissions`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from nbdserver.errors import ConfigError, NbdserverError
from nbdserver.extent import DirtyBitmap
from nbdserver.format import Empties, HasBacking
from nbdserver.jobs import Job
from nbdserver.layer import Layer, finish
from nbdserver.live.chain import check_idle, check_no_snapshots, held, images, name_of, rebase, spelled
from nbdserver.live.copying import copy, dirty_spans, spans, wind_up
from nbdserver.live.filters import CommitTop
from nbdserver.permissions import ALL, NONE, ONLOOKER, READ, Grant, Permission
from nbdserver.server import Export, Server

_log = logging.getLogger("nbdserver")

#: What the job does to the base, and leaves to others; and leaves to others of the images between.
COMMITS: Final = Grant(READ | Permission.WRITE | Permission.RESIZE, NONE)
PASSES_BY: Final = Grant(NONE, ALL & ~READ)

#: Seconds between two looks at what a guest has written since, once there is little.
POLL_S: Final = 0.2


def start(server: Server, export: Export, top: int, base: int, *, id: str | None = None, speed: int = 0) -> Job:
    """Begin to commit the images ``top`` to ``base`` (exclusive) of the export's chain, by their numbers from above,
    into that one. Of the active image (``top`` 0) that goes on until it is completed; then the base is the disk. Raises
    ConfigError, ImageError, RequestError, OSError, TimeoutError, with nothing changed."""
    with server.changing(), server.drained(images(export.root)[base]):
        check_idle(server, export)
        chain = images(export.root)
        kind = _CommitActive if top == 0 else _CommitBetween
        commit = kind(server, chain, top, base)
        with contextlib.ExitStack() as undo:
            undo.enter_context(commit.prepared())
            job = server.jobs.start("commit", commit.run, id=id, layers=[*chain, *commit.filters], speed=speed)
            commit.ending.push(undo.pop_all())
            return job


class _Commit:
    """One commit. ``filters``: those it has put in; ``ending`` undoes, in a drained section, what it took to begin."""

    def __init__(self, server: Server, chain: Sequence[Layer], top: int, base: int) -> None:
        self.server, self.above, self.base = server, chain[top:base], chain[base]
        self.overlay = chain[top - 1] if top else None
        self.filters: list[Layer] = []
        self.ending = contextlib.ExitStack()
        self._claims = contextlib.ExitStack()
        name_of(self.base)
        check_no_snapshots(self.above)

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """The images are ready to be committed. In a drained section of the base."""
        server, base = self.server, self.base
        with contextlib.ExitStack() as ending:
            ending.enter_context(server.hiding(self.above))
            ending.callback(self._restore)
            ending.enter_context(self._claims)
            for image in self.above[1:]:
                self._claims.enter_context(server.claimed(image, PASSES_BY, user="a commit"))
            self._claims.enter_context(server.claimed(base, COMMITS, user="a commit"))
            server.reopen(base, read_only=False)
            if base.read_only:
                raise ConfigError(f"{base.filename} cannot be written")
            if base.size < self.above[0].size:
                base.resize(self.above[0].size)
            yield

    def _restore(self) -> None:
        """Leave the base as it is to be: read-only below another image."""
        self.server.reopen(self.base, read_only=True)

    def run(self, job: Job) -> None:
        """The job's body."""
        try:
            self.work(job)
        finally:
            wind_up(self.server, self.base, self.ending)

    def work(self, job: Job) -> None:
        raise NotImplementedError

    def copy_all(self, job: Job) -> None:
        """Write everything into the base that the images above it hold."""
        size = self.above[0].size
        for start, end in spans(size):
            job.progress(start, size)
            copy(self.above[0], self.base, held(self.above, start, end), job)
        job.progress(size, size)


class _CommitBetween(_Commit):
    """Images below the active one, which nobody writes."""

    def work(self, job: Job) -> None:
        self.copy_all(job)
        finish(self.base.flush())
        overlay = self.overlay
        assert isinstance(overlay, HasBacking)
        with self.server.drained(self.base), self._writable(overlay):
            # The overlay is one of those who may look now.
            self.ending.close()
            rebase(self.server, overlay, self.above[0], self.base, spelled(self.base, self.above[-1], overlay))

    @contextlib.contextmanager
    def _writable(self, image: Layer) -> Iterator[None]:
        if not image.read_only:
            yield
            return
        self.server.reopen(image, read_only=False)
        try:
            yield
        finally:
            self.server.reopen(image, read_only=True)


class _CommitActive(_Commit):
    """The active image, and perhaps some below it."""

    def __init__(self, server: Server, chain: Sequence[Layer], top: int, base: int) -> None:
        super().__init__(server, chain, top, base)
        self.active = self.above[0]
        if not isinstance(self.active, Empties):
            raise ConfigError(f"{self.active.filename}: an image of the format {self.active.type} cannot be emptied")
        self.filter = CommitTop(self.active)
        self._is_over = False

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        server, filter = self.server, self.filter
        with super().prepared(), contextlib.ExitStack() as ending:
            with server.opened_layers(filter):
                ending.enter_context(server.claimed(filter, ONLOOKER, user="a commit"))
                server.replace(self.active, filter)
            ending.callback(self._take_out)
            self.filters.append(filter)
            yield

    def _take_out(self) -> None:
        if not self._is_over:
            self.server.replace(self.filter, self.active)

    def _restore(self) -> None:
        if not self._is_over:
            super()._restore()

    def work(self, job: Job) -> None:
        self.copy_all(job)
        self._catch_up(job)
        job.set_ready()
        while not job.is_completing:
            self._catch_up(job)
            job.sleep(POLL_S)
        finish(self.base.flush())  # most of it: guests will wait for the rest
        finish(self.active.flush())
        self._catch_up(job)
        with self.server.drained(self.filter):
            self._pass(job, checkpoint=False)
            give_back = self._pivot()
        try:
            give_back()
        except (NbdserverError, OSError) as error:
            _log.warning(
                "%s: space that it has given up is lost, until it is repaired: %s", self.active.filename, error
            )

    def _catch_up(self, job: Job) -> None:
        """Copy what has been written, as long as each pass leaves less than half of what the last did: the guest may
        write faster than that."""
        left = self.filter.dirty_bytes
        while left:
            self._pass(job)
            before, left = left, self.filter.dirty_bytes
            if 2 * left > before:
                return

    def _pass(self, job: Job, *, checkpoint: bool = True) -> None:
        """Copy what has been written since the last one."""
        written: DirtyBitmap = self.filter.take()
        for start, end in dirty_spans(written):
            copy(self.active, self.base, held(self.above, start, end), job if checkpoint else None)

    def _pivot(self) -> Callable[[], None]:
        """Have the base be the disk. In a drained section, with all that was written in it. Returns what gives back the
        storage of the active image, which nobody uses any more.

        By its own name, the active image shows the disk all the while: itself; or itself on the base, where all of it
        is, too; or, empty, the base.
        """
        finish(self.base.flush())
        assert isinstance(self.active, HasBacking) and isinstance(self.active, Empties)
        if len(self.above) > 1:
            name = spelled(self.base, self.above[-1], self.active)
            self.active.set_backing(name, name_of(self.base).format)
        give_back = self.active.empty_at_once()
        self._claims.close()
        self.server.replace(self.filter, self.base)
        self._is_over = True
        return give_back
