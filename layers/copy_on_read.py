"""``copy-on-read``: what is read out of a backing file is written into the image above it, and is local from then on.

::

    read, range is in the image   ──> mapped: the image's own extents, no code (the direct path)
    read, range comes from below  ──> CODE: read it, write it into the image, from the same memory
    write                         ──> where it is in the image already: mapped; else CODE, one at a time with copies

QEMU's filter ``copy-on-read``. Where a range is, the image says: its block status for ALLOCATION_DEPTH.

That no copy goes over a newer write is `nbdserver.copier`'s doing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar

from nbdserver.copier import Copier
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import CODE, Extent, Intent
from nbdserver.layer import ALLOCATION_DEPTH, Buffers, Layer, Opener, finish
from nbdserver.permissions import Grant, Permission
from nbdserver.request import Flag, Request


@dataclasses.dataclass(eq=False)
class CopyOnRead(Copier):
    #: The image, with its chain of backing files.
    file: Layer

    is_filter: ClassVar[bool] = True
    supported_read_flags: ClassVar[Flag] = Flag.COPY_ON_READ | Flag.PREFETCH
    buffers: ClassVar[Buffers] = Buffers(
        read="keeps: it is filled from below, and written into the image",
        write="keeps: the image is given it",
        zero="none: the image zeroes",
    )

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
                yield from self.local(start, stop)

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

    # -- by code ----------------------------------------------------------------------------------------------------

    def read(self, request: Request) -> None:
        with self.copying(request.offset, request.length):
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

    def resize(self, size: int) -> None:
        self.file.resize(size)
