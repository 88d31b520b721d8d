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
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import Extent, Intent, Size
from nbdserver.format import TACIT, Bitmap, Measure, Progress, grow, no_progress, preallocate
from nbdserver.graph import reach
from nbdserver.layer import Layer, Opener, finish
from nbdserver.limits import DISK_MAX
from nbdserver.permissions import Grant, Permission

#: QEMU measures disks in these; other sizes are rounded up.
SECTOR: Final = 512


@dataclasses.dataclass
class Options:
    """QEMU's creation options; the comments are their help."""

    #: What is there from the beginning: nothing, reserved space for all, or zeroes written to all.
    preallocation: Literal["off", "falloc", "full"] = dataclasses.field(default="off", metadata=TACIT)


@dataclasses.dataclass(eq=False)
class Raw(Layer):
    #: Whose bytes they are.
    file: Layer
    #: Where in it the disk begins.
    offset: Size = 0
    #: How long the disk is; by default (None, until it is open) as long as what follows ``offset``.
    size: Size = None  # type: ignore[assignment]

    CreateOptions = Options

    @classmethod
    def create(
        cls, file: Layer, size: int, options: Options, *, opener: Opener, progress: Progress = no_progress
    ) -> None:
        """Make ``file``, which is empty, a disk of ``size`` bytes (see `nbdserver.format.Creates`)."""
        length, file = _whole(size), reach(file)
        grow(file, length)
        if options.preallocation != "off":
            preallocate(file, 0, length, written=options.preallocation == "full", progress=progress)
        finish(file.flush())

    @classmethod
    def measure(
        cls,
        size: int,
        options: Options,
        allocated: Iterable[tuple[int, int]],
        bitmaps: Sequence[Bitmap] | None = None,
    ) -> Measure:
        """Holes count: they are part of the file's size."""
        return Measure(_whole(size), _whole(size))

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

    @property
    def in_place(self) -> bool:
        return self.file.in_place

    def child_grant(self, role: str, own: Grant) -> Grant:
        # The size of what a window looks at is not the window's to change, and must not change under it.
        return Grant(own.used & ~Permission.RESIZE, own.shared & ~Permission.RESIZE) if self._is_window else own

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


def _whole(size: int) -> int:
    length = -(-size // SECTOR) * SECTOR
    if not 0 <= length <= DISK_MAX:
        raise ConfigError(f"found {size}, allowed is 0 to {DISK_MAX // SECTOR * SECTOR}", key="size")
    return length
