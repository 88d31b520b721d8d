"""Stream: what images below the active one hold is copied into it, so that it does without them.

::

    active ──> mid ──> base        ──>   active ──> base
    active ──> mid ──> base        ──>   active

The images below do not change, so a range that has been copied, or written by the guest, is done with. When all is, the
active image is flushed, and its header made to name what is left of the chain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from nbdserver.errors import ConfigError
from nbdserver.format import HasBacking
from nbdserver.jobs import Job
from nbdserver.layer import Layer, finish
from nbdserver.live.chain import check_idle, check_no_snapshots, held, images, name_of, rebase, spelled
from nbdserver.live.copying import PIECE, spans, wind_up
from nbdserver.live.filters import StreamTop
from nbdserver.permissions import ONLOOKER
from nbdserver.server import Export, Server


def start(server: Server, export: Export, base: int | None, *, id: str | None = None, speed: int = 0) -> Job:
    """Begin to copy what images between the active one and ``base`` hold, a number in the export's chain, into it;
    None: all that are below. Raises ConfigError, ImageError, RequestError, OSError, TimeoutError, with nothing
    changed."""
    with server.changing():
        check_idle(server, export)
        chain = images(export.root)
        stream = _Stream(server, chain, len(chain) if base is None else base)
        with contextlib.ExitStack() as undo:
            undo.enter_context(stream.prepared())
            job = server.jobs.start("stream", stream.run, id=id, layers=[*chain, stream.filter], speed=speed)
            stream.ending.push(undo.pop_all())
            return job


class _Stream:
    """One stream. ``ending`` undoes what it took to begin."""

    def __init__(self, server: Server, chain: Sequence[Layer], base: int) -> None:
        self.server, self.active, self.above = server, chain[0], tuple(chain[:base])
        self.base = chain[base] if base < len(chain) else None
        self.filter = StreamTop(self.active, self.above)
        self.ending = contextlib.ExitStack()
        if self.base is not None:
            name_of(self.base)
        check_no_snapshots([self.active])

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        server = self.server
        with contextlib.ExitStack() as ending:
            for image in self.above[1:]:
                ending.enter_context(server.claimed(image, ONLOOKER, user="a stream"))
            with server.opened_layers(self.filter):
                ending.enter_context(server.claimed(self.filter, ONLOOKER, user="a stream"))
                server.replace(self.active, self.filter)
            ending.callback(server.replace, self.filter, self.active)
            yield

    def run(self, job: Job) -> None:
        """The job's body."""
        try:
            self._copy(job)
            finish(self.active.flush())
            with self.server.drained(self.active):
                self._let_go()
        finally:
            wind_up(self.server, self.filter, self.ending)

    def _copy(self, job: Job) -> None:
        size = self.active.size
        for start, end in spans(size):
            job.progress(start, size)
            for run in held(self.above, start, end):
                if run.depth == 0:
                    continue
                for offset in range(run.start, run.end, PIECE):
                    length = min(PIECE, run.end - offset)
                    job.progress(offset, size)
                    job.checkpoint(length)
                    self.filter.copy(offset, length)
        job.progress(size, size)

    def _let_go(self) -> None:
        """Have the active image name what is left of the chain, and stand on that. In a drained section."""
        active, base = self.active, self.base
        assert isinstance(active, HasBacking)
        if base is None:
            active.set_backing(None, None)
            self.server.orphan(active)
        else:
            rebase(self.server, active, self.above[1], base, spelled(base, self.above[-1], active))


def check(chain: Sequence[Layer]) -> None:
    """Raise ConfigError if there is nothing to stream."""
    if len(chain) < 2:
        raise ConfigError(f"{chain[0].filename} has no backing file")
