"""``compress``: every write into the format below is a compressed one.

::

    read                     ──> mapped
    write, whole clusters    ──> the same memory, with WRITE_COMPRESSED
    write, parts of clusters ──> read, changed and written whole, alone on the cluster (`blocks`)
    zero, trim               ──> whole clusters as they are; else zeroes are written, as above

QEMU's filter ``compress`` (block/filter-compress.c). Requests are made to fit as there: the format's clusters are the
blocks that the layer's code takes. What is read and written back must not change in between, so that nobody else may
write the format meanwhile: QEMU does not see to that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import ClassVar

from nbdserver.errors import ConfigError
from nbdserver.extent import CODE, NO_LIMITS, BlockLimits, Extent, Intent
from nbdserver.flags import PASSED_ON
from nbdserver.format import Compresses
from nbdserver.graph import bare
from nbdserver.layer import Buffers, Layer, Opener, finish
from nbdserver.permissions import Grant, Permission
from nbdserver.request import Flag, Request


@dataclasses.dataclass(eq=False)
class Compress(Layer):
    #: What compresses: a format that can, perhaps below filters that let it.
    file: Layer

    is_filter: ClassVar[bool] = True
    supported_write_flags: ClassVar[Flag] = PASSED_ON
    buffers: ClassVar[Buffers] = Buffers(
        read="none: always mapped",
        write="bounces: the format is given it, and beside it pool memory with what else is in its clusters",
        zero="bounces: whole clusters the format zeroes; zeroes in parts of clusters are written, from pool memory",
    )

    def open(self, opener: Opener) -> None:
        layer = self._bottom
        if not isinstance(layer, Compresses):
            raise ConfigError(f"layers of the type {layer.type!r} cannot compress", key="file")
        if layer.why_uncompressed is not None:
            raise ConfigError(f"{layer.filename}: {layer.why_uncompressed}", key="file")

    @property
    def _bottom(self) -> Layer:
        """The format; or what does not let it compress."""
        layer = bare(self.file)
        while layer.is_filter and Flag.WRITE_COMPRESSED in layer.supported_write_flags:
            layer = bare(dict(layer.children())["file"])
        return layer

    def child_grant(self, role: str, own: Grant) -> Grant:
        return own._replace(shared=own.shared & ~Permission.WRITE) if own.writes else own

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def limits(self) -> BlockLimits:
        below = self._bottom  # asked every time: another image may have been put in its place
        return _limits(below.cluster_size) if isinstance(below, Compresses) else NO_LIMITS

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        if intent is Intent.READ:
            return (Extent(self.size - offset, self.file, offset),)
        return (Extent(self.size - offset, CODE),)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self.file.status(context, offset, length)

    def read(self, request: Request) -> None:
        finish(self.file.read(request))

    def write(self, request: Request) -> None:
        finish(self.file.write(request.with_flags(request.asked_flags | Flag.WRITE_COMPRESSED)))

    def zero(self, request: Request) -> None:
        finish(self.file.zero(request.with_flags(request.asked_flags & ~Flag.WRITE_COMPRESSED)))

    def trim(self, request: Request) -> None:
        finish(self.file.trim(request))

    def resize(self, size: int) -> None:
        self.file.resize(size)


@functools.cache
def _limits(cluster_size: int) -> BlockLimits:
    return BlockLimits(request_alignment=cluster_size, opt_transfer=cluster_size)
