"""``detect-zeroes``: writes of nothing but zeroes become zero requests, so that the format below need not store them.

::

    write, all zeroes ──> zero             no payload goes down, and none is stored where that can be helped
    write, any other  ──> write            the same memory, so REGISTERED_BUF stays as it was
    read, zero, trim  ──> mapped           no code on the way

QEMU's option ``detect-zeroes`` (BlockdevOptions) as a layer: a request is looked at as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, Literal

from nbdserver.extent import CODE, Extent, Intent
from nbdserver.layer import Buffers, Layer, finish
from nbdserver.request import Flag, Request


@dataclasses.dataclass(eq=False)
class DetectZeroes(Layer):
    #: Whose bytes they are.
    file: Layer
    #: "on" finds zeroes, "unmap" also lets the storage they had be given back, "off" maps everything straight through.
    detect_zeroes: Literal["off", "on", "unmap"] = "on"

    is_filter: ClassVar[bool] = True
    supported_write_flags: ClassVar[Flag] = Flag.FUA | Flag.MAY_UNMAP | Flag.WRITE_COMPRESSED | Flag.WRITE_UNCHANGED
    buffers: ClassVar[Buffers] = Buffers(
        read="none: always mapped",
        write="keeps: what is not all zeroes is passed on; zeroes become a zero request, which has no memory",
        zero="none: always mapped",
    )

    @property
    def size(self) -> int:
        return self.file.size

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        passes = self.detect_zeroes == "off" or intent is Intent.ZERO
        if intent is Intent.WRITE and not passes:
            return (Extent(self.size - offset, CODE),)
        return (Extent(self.size - offset, self.file, offset, writable=passes),)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def write(self, request: Request) -> None:
        if self.detect_zeroes == "off" or not request.vector.is_zero():
            finish(self.file.write(request))
            return
        unmap = Flag.MAY_UNMAP if self.detect_zeroes == "unmap" else Flag.NONE
        flags = request.asked_flags & ~Flag.WRITE_COMPRESSED | unmap
        finish(self.file.zero(Request.zero(request.offset, request.length, flags)))

    def resize(self, size: int) -> None:
        self.file.resize(size)
