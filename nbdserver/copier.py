"""Filters that copy into the image below them while it is being written.

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
from collections.abc import Iterator
from typing import ClassVar

from nbdserver.extent import CODE, Extent
from nbdserver.flags import PASSED_ON
from nbdserver.layer import Layer, finish
from nbdserver.ranges import RangeLock
from nbdserver.request import Flag, Request


@dataclasses.dataclass(eq=False)
class Copier(Layer):
    """Passes on what it is called to write, one by one with the copies that its subclass makes."""

    #: The image that is copied into.
    file: Layer

    supported_write_flags: ClassVar[Flag] = PASSED_ON

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Held alone by whoever copies or, by code, writes.
        self._ranges = RangeLock()
        #: Protects what is announced: ranges, none overlapping another, that are being copied perhaps.
        self._lock = threading.Lock()
        self._announced: list[range] = []

    @contextlib.contextmanager
    def copying(self, offset: int, length: int) -> Iterator[None]:
        """Have a range alone, to copy of it what is found to be unallocated from now on."""
        copied = range(offset, offset + length)
        with self._ranges.exclusive(offset, length):
            with self._lock:
                self._announced.append(copied)
            try:
                yield
            finally:
                with self._lock:
                    self._announced.remove(copied)
                # Who resolved the range meanwhile was told CODE, whatever it is now.
                self.changed(offset, length)

    def local(self, start: int, end: int) -> Iterator[Extent]:
        """Bytes that were found to be the image's own, or nobody's: mapped, but for what is announced."""
        with self._lock:
            announced = sorted((copied.start, copied.stop) for copied in self._announced)
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

    def write(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length):
            finish(self.file.write(request))

    def zero(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length):
            finish(self.file.zero(request))

    def trim(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length):
            finish(self.file.trim(request))
