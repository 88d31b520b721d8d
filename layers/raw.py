"""``raw``: the bytes of another layer as they are, or a window of them.

::

    raw     [0 ............ size)
              │              │
    file ──[offset .. offset + size)──

What QEMU's ``raw`` driver does with its ``offset`` and ``size`` (docs/interop, BlockdevOptionsRaw).
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterable

from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import Extent, Intent, Size
from nbdserver.layer import Layer, Opener
from nbdserver.limits import DISK_MAX


@dataclasses.dataclass(eq=False)
class Raw(Layer):
    #: Whose bytes they are.
    file: Layer
    #: Where in it the disk begins.
    offset: Size = 0
    #: How long the disk is; by default (None, until it is open) as long as what follows ``offset``.
    size: Size = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._is_window = self.size is not None

    def open(self, opener: Opener) -> None:
        there = self.file.size - self.offset
        if self.offset < 0 or there < 0:
            raise ConfigError(f"found {self.offset}, but the file has {self.file.size} bytes", key="offset")
        if not self._is_window:
            self.size = there
        if not 0 <= self.size <= there:
            raise ConfigError(f"found {self.size}, but {there} bytes follow the offset {self.offset}", key="size")

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        return (Extent(self.size - offset, self.file, self.offset + offset, writable=True),)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        start = max(offset - self.offset, 0)
        end = min(offset + length - self.offset, self.size)
        return ((start, end - start),) if start < end else ()

    def resize(self, size: int) -> None:
        if self._is_window:
            raise RequestError(errno.ENOTSUP, "a raw disk whose size is set in the configuration cannot be resized")
        if size > DISK_MAX - self.offset:
            raise RequestError(errno.EINVAL, f"a disk of {size} bytes at offset {self.offset} is too large")
        self.file.resize(self.offset + size)
        self.size = size
