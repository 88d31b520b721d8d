"""``copy-on-read``: what is read out of a backing file is written into the image above it, and is local from then on.

::

    read, range is in the image   ──> mapped: the image's own extents, no code (the direct path)
    read, range comes from below  ──> CODE: read it, write it into the image, from the same memory
    write                         ──> where it is in the image already: mapped; else CODE, one at a time with copies

QEMU's filter ``copy-on-read``. Where a range is, the image says: its block status for ALLOCATION_DEPTH.

**No stale copy over a newer write.** A copy reads old bytes and writes them a moment later; in between nobody may
write them. Writes by code wait for it (`RangeLock`). Writes that go by a mapping cannot, and though the range is not
mapped when the copy begins, it may become so at any time: a write next to it allocates the cluster they share. So a
copy announces its range before it looks whether the range is still unallocated, and `resolve` looks for announced
ranges after it has looked at the allocation: one of the two sees the other. An announced range is CODE.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator
from typing import ClassVar

from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import CODE, Extent, Intent
from nbdserver.flags import PASSED_ON
from nbdserver.layer import ALLOCATION_DEPTH, Buffers, Layer, Opener, finish
from nbdserver.permissions import Grant, Permission
from nbdserver.ranges import RangeLock
from nbdserver.request import Flag, Request


@dataclasses.dataclass(eq=False)
class CopyOnRead(Layer):
    #: The image, with its chain of backing files.
    file: Layer

    is_filter: ClassVar[bool] = True
    supported_read_flags: ClassVar[Flag] = Flag.COPY_ON_READ | Flag.PREFETCH
    supported_write_flags: ClassVar[Flag] = PASSED_ON
    buffers: ClassVar[Buffers] = Buffers(
        read="keeps: it is filled from below, and written into the image",
        write="keeps: the image is given it",
        zero="none: the image zeroes",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Held alone by whoever copies or, by code, writes.
        self._ranges = RangeLock()
        #: Protects what is announced: ranges, none overlapping another, that are being copied perhaps.
        self._lock = threading.Lock()
        self._announced: list[range] = []

    def open(self, opener: Opener) -> None:
        if self.file.read_only:
            raise ConfigError("is read-only, but what is read must be copied into it", key="file")

    def child_grant(self, role: str, own: Grant) -> Grant:
        return own._replace(used=own.used | Permission.WRITE_UNCHANGED)

    @property
    def size(self) -> int:
        return self.file.size

    # -- where the bytes live ---------------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        # To a zero request it matters where it ends; all others are told as much as the image has to say.
        end = offset + length if intent is Intent.ZERO else self.size
        for start, stop, is_below in self._runs(offset, length, end):
            if is_below:
                yield Extent(stop - start, CODE)
            else:
                yield from self._local(start, stop)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self.file.status(context, offset, length)

    def _runs(self, offset: int, length: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether the bytes come from below the image) for ``length`` bytes, or more, up to ``end``."""
        wanted = offset + length
        while offset < wanted:
            try:
                for run, depth in self.file.status(ALLOCATION_DEPTH, offset, end - offset):
                    stop = min(offset + run, end)
                    yield offset, stop, depth > 1
                    offset = stop
            except (ImageError, RequestError, OSError):
                if offset < wanted:
                    raise
                return  # what is wrong ahead is for those to hear who ask for it

    def _local(self, start: int, end: int) -> Iterator[Extent]:
        """Bytes that are in the image, or nowhere: the image's own, but for what is announced."""
        with self._lock:
            announced = sorted((held.start, held.stop) for held in self._announced)
        for first, stop in announced:
            first, stop = max(first, start), min(stop, end)
            if first >= stop:
                continue
            if start < first:
                yield Extent(first - start, self.file, start, writable=True)
            yield Extent(stop - first, CODE)
            start = stop
        if start < end:
            yield Extent(end - start, self.file, start, writable=True)

    # -- by code ----------------------------------------------------------------------------------------------------

    def read(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length), self._announce(request):
            for start, stop, is_below in self._runs(request.offset, request.length, request.end):
                part = request.slice(start - request.offset, stop - start).with_flags(Flag.NONE)
                if is_below or Flag.PREFETCH not in request.asked_flags:
                    finish(self.file.read(part))
                if is_below:
                    self._keep(part)

    def _keep(self, part: Request) -> None:
        """Write what has been read into the image; zeroes as such."""
        # From the request's own memory: the client sees it only after this, so that nothing need be bounced.
        if part.vector.is_zero():
            finish(self.file.zero(Request.zero(part.offset, part.length, Flag.WRITE_UNCHANGED)))
        else:
            finish(self.file.write(Request.write(part.offset, part.vector, Flag.WRITE_UNCHANGED)))

    @contextlib.contextmanager
    def _announce(self, request: Request) -> Iterator[None]:
        held = range(request.offset, request.end)
        with self._lock:
            self._announced.append(held)
        try:
            yield
        finally:
            with self._lock:
                self._announced.remove(held)
            # Who resolved the range meanwhile was told CODE, whatever it is now.
            self.changed(request.offset, request.length)

    def write(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length):
            finish(self.file.write(request))

    def zero(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length):
            finish(self.file.zero(request))

    def trim(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length):
            finish(self.file.trim(request))

    def resize(self, size: int) -> None:
        self.file.resize(size)
