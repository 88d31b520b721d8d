"""Extents: where a range of a disk lives, and the law every answer of ``resolve`` obeys.

An extent is a page-table entry::

    disk range  ->  (child layer, offset) | (open file, offset) | ZERO | CODE   [+ writable]

``CODE`` means "call the layer": the bytes exist only through its ``read`` and ``write``.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from nbdserver.layer import Layer
    from nbdserver.request import Vector

#: A number of bytes among a layer's keys: in ``exports.toml`` an integer, or a string with a unit, "64K", "1G".
Size = Annotated[int, "size"]


class Intent(Enum):
    """What the asker is going to do with the place it is told."""

    READ = "read"
    #: What may be overwritten in place with no metadata change. The same place READ names, else CODE.
    WRITE = "write"
    #: What may be made zero in place (by the file) with no metadata change, else CODE.
    ZERO = "zero"


class Special(Enum):
    """Targets that are no place: zeroes, and "call the layer"."""

    ZERO = "zero"
    CODE = "code"


ZERO: Final = Special.ZERO
CODE: Final = Special.CODE


#: How a file is cached: through the page cache, and durable when answered or only when flushed; past it (O_DIRECT); or
#: never made durable. And what carries out I/O that would block. QEMU's names.
CACHES: Final = ("writeback", "writethrough", "none", "unsafe")
AIOS: Final = ("io_uring", "threads")


class FileMode(NamedTuple):
    """How a file is used: ``cache`` is one of CACHES, ``aio`` one of AIOS, and ``max_transfer`` is `BlockLimits`'."""

    cache: str = "writeback"
    aio: str = "io_uring"
    max_transfer: int = 0


FILE_MODE: Final = FileMode()


@dataclass(frozen=True)
class BlockLimits:
    """What requests to a file, or to a layer's code, are held to: they are cut and padded to fit (`nbdserver.blocks`).

    QEMU's struct of this name. Bytes; 0 is no limit, and no wish. Asserts that they can be kept.
    """

    #: What offsets and lengths are multiples of, but for what ends at the end of the layer: a power of two. An open
    #: file takes requests as they are, and pads itself what must be.
    request_alignment: int = 1
    #: The most that is read or written at once.
    max_transfer: int = 0
    #: What is best read or written at once: a power of two. Only told to clients, as the preferred block size.
    opt_transfer: int = 0
    #: The most that is zeroed at once, and what ranges to be zeroed are best aligned to.
    max_pwrite_zeroes: int = 0
    pwrite_zeroes_alignment: int = 0
    #: The same of discarding.
    max_pdiscard: int = 0
    pdiscard_alignment: int = 0
    #: Whether seeking takes time, as a device says of itself. Only told to clients.
    rotational: bool = False

    def __post_init__(self) -> None:
        for value in (self.request_alignment, self.opt_transfer):
            assert value & (value - 1) == 0, f"{self}: no power of two"
        assert self.request_alignment >= 1
        for value in dataclasses.astuple(self):
            assert value == 0 or (value > 0 and value % self.request_alignment == 0) or value == 1, f"{self}: {value}"
        assert self.max_pwrite_zeroes == 0 or self.max_pwrite_zeroes >= self.pwrite_zeroes_alignment
        assert self.max_pdiscard == 0 or self.max_pdiscard >= self.pdiscard_alignment


NO_LIMITS: Final = BlockLimits()


@dataclass(frozen=True)
class Transform:
    """What is done to bytes between a layer and the place its extent aims at; the engine runs it.

    ``cipher``: "aes-xts-plain64". ``key``: both halves. Positions are the layer's own offsets, ``sector_size`` bytes a
    sector; requests for parts of sectors go to the layer's code.
    """

    cipher: str
    key: bytes = field(repr=False)
    sector_size: int = 512


class Limit(NamedTuple):
    """A leaky bucket: units a second on average (0: no limit), and in a burst of ``length`` seconds (0: no burst)."""

    average: float = 0.0
    max: float = 0.0
    length: float = 1.0


class MeterLimits(NamedTuple):
    """What a meter holds requests to: bytes and requests a second, in all, of reads, of writes.

    A request of more than ``iops_size`` bytes counts as several (0: never).
    """

    bps_total: Limit
    bps_read: Limit
    bps_write: Limit
    iops_total: Limit
    iops_read: Limit
    iops_write: Limit
    iops_size: int = 0


class Meter(Protocol):
    """What requests must wait for before they go on (a throttle). Made by `layer.Opener.meter`; thread-safe."""

    def charge(self, length: int, write: bool) -> None:
        """Account for a request of ``length`` bytes, having waited until it may run. Blocks."""


class DirtyBitmap(Protocol):
    """Which parts of a disk have been written: a bit for each ``granularity`` bytes of ``size``.

    Made by `layer.Opener.dirty_bitmap`, all clear; thread-safe. Bytes, unless said otherwise.
    """

    @property
    def size(self) -> int: ...

    @property
    def granularity(self) -> int:
        """A power of two."""

    def mark(self, offset: int, length: int) -> None:
        """Set the bits of all that the range touches; what passes the end has none."""

    def merge(self, other: DirtyBitmap) -> None:
        """Set the bits that are set in ``other``, which is of the same make, and whose granularity may be another."""

    def clear(self) -> None:
        """Clear every bit."""

    def resize(self, size: int) -> None:
        """The disk has another size: what it grows by is clear, what it loses is forgotten."""

    def count(self) -> int:
        """How many bits are set."""

    def runs(self, offset: int, length: int, count_max: int) -> list[tuple[int, bool]]:
        """(length, is dirty) runs from ``offset`` on, neighbours unlike, that cover the range exactly; but at most
        ``count_max`` of them. What passes the end is clean."""

    def data(self, start: int, length: int) -> bytes:
        """``length`` bytes from byte ``start`` on (multiples of 8) of all bits in a row: eight a byte, the lowest
        first. Zeroes behind the last."""

    def load(self, start: int, data: bytes) -> None:
        """Set the bits that are set in ``data``, which lies as `data` gives it."""


class DirtyLog(Protocol):
    """What writes to a layer are marked in, whichever way they come: when they have completed (or failed, perhaps
    half-way) and before they are answered. Made by `layer.Opener.dirty_log`, for `layer.Layer.dirty_log`; thread-safe.
    """

    def set(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Mark in these bitmaps from now on, and in no others."""

    def mark(self, offset: int, length: int) -> None:
        """``length`` bytes at ``offset`` of the layer have been written, zeroed or trimmed."""


class OpenFile(Protocol):
    """An open file, block device or memory: the leaf that every mapping ends at.

    Offered by `nbdserver.files.PlainFile` (plain Python) and by the engine. All methods may block, release
    the GIL while they do, and raise ``OSError``. Offsets and lengths are bytes.
    """

    @property
    def name(self) -> str:
        """The path, for messages."""

    @property
    def size(self) -> int:
        """Its size now, bytes."""

    @property
    def stored(self) -> int:
        """How much storage it takes up now (``st_blocks``), bytes."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused (EBADF/EPERM) by the operating system."""

    @property
    def limits(self) -> BlockLimits:
        """What requests to it are cut to."""

    def read(self, offset: int, vector: Vector) -> None:
        """Fill the whole vector; what lies past the end of the file reads as zeroes."""

    def write(self, offset: int, vector: Vector) -> None:
        """Write the whole vector, growing the file if it ends past its end."""

    def zero(self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool) -> None:
        """Make the range read as zeroes, growing the file if need be.

        ``may_unmap`` permits a hole; ``no_fallback`` raises ENOTSUP rather than write zeroes out.
        """

    def discard(self, offset: int, length: int) -> None:
        """Give the range's storage back if the file system can; the contents become undefined."""

    def sync(self) -> None:
        """Make every completed write durable (fdatasync). After one failure every later call fails too."""

    def resize(self, size: int) -> None:
        """Truncate or extend (with zeroes) to ``size`` bytes."""

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Consecutive (length, is_data) runs covering the range exactly, from SEEK_DATA/SEEK_HOLE."""

    def use(self, offset: int, length: int) -> AbstractContextManager[object]:
        """Announce, for the time of the ``with`` block, that the range is being read or written here.

        Against `wait_unused` it works as a hazard pointer does: announce, look again whether the range is still
        what it was resolved to be, and only then touch it.
        """

    def wait_unused(self, offset: int, length: int) -> None:
        """Return when no use of the range, and no I/O of the engine's on it, that began before this call is
        still running. Never call it inside ``use``, nor while holding a lock that I/O might need.
        """

    def close(self) -> None:
        """Close the descriptor and so drop its locks. Idempotent."""


class Extent(NamedTuple):
    """``length`` bytes of a layer live at ``offset`` of ``target``.

    ``writable``: they may be overwritten there in place, with no metadata change. Meaningless (False) for ZERO
    and CODE. ``offset`` is 0 for ZERO and CODE. ``through``: what happens to requests on the way there; whoever sets
    a transform is called (as for CODE) for what cannot be had through it.
    """

    length: int
    target: Layer | OpenFile | Special
    offset: int = 0
    writable: bool = False
    through: Transform | Meter | None = None

    def cut(self, start: int, length: int) -> Extent:
        """The sub-range of ``length`` bytes that begins ``start`` bytes into this extent."""
        if isinstance(self.target, Special):
            return Extent(length, self.target, through=self.through)
        return Extent(length, self.target, self.offset + start, self.writable, self.through)


class Packed(NamedTuple):
    """Where many units of a layer in a row can be read, told as the layer's own table tells it, so that nobody need go
    through its words one by one in Python: see `Layer.packed`."""

    #: Of the layer: where the first unit begins.
    offset: int
    #: Bytes of a unit: a power of two, at least 4. What places are multiples of.
    unit: int
    #: One of 64 bits for each unit (typecode "Q").
    words: array[int]
    #: What the places are in.
    target: Layer
    #: The bits of a word that are its place. A word with any of the bits ``refused`` names none, nor does a place of 0,
    #: nor one of which the unit passes ``limit``: of such units nothing is said.
    places: int
    refused: int
    limit: int
    #: Words that with one of these masks have its value: (mask, value). These units are zeroes.
    zeroes: tuple[tuple[int, int], ...]


class ExtentLawError(AssertionError):
    """A layer answered ``resolve`` unlawfully: a bug in the layer, never the world's fault."""


def lawful(extents: Iterable[Extent], offset: int, length: int, size: int, who: str) -> Iterator[Extent]:
    """Pass on what ``resolve(offset, length)`` of a layer of ``size`` bytes answered, holding it to the law.

    The law: contiguous from ``offset``, every length > 0, at least ``length`` bytes in all, and nothing past
    ``size``. Longer than asked is welcome. Lazy: what the caller does not consume is not checked.

    Raises ExtentLawError.
    """
    position = offset
    for extent in extents:
        if extent.length <= 0:
            raise ExtentLawError(f"{who}: extent of length {extent.length} at {position:#x}")
        if position + extent.length > size:
            raise ExtentLawError(f"{who}: extent ends at {position + extent.length:#x}, past the size {size:#x}")
        if extent.offset < 0:
            raise ExtentLawError(f"{who}: extent at {position:#x} has offset {extent.offset}")
        position += extent.length
        yield extent
    if position < offset + length:
        raise ExtentLawError(f"{who}: answered up to {position:#x}, asked up to {offset + length:#x}")


def clip(extents: Iterable[Extent], length: int) -> Iterator[Extent]:
    """The first ``length`` bytes of an answer, cut exactly."""
    left = length
    for extent in extents:
        if extent.length >= left:
            yield extent.cut(0, left) if extent.length > left else extent
            return
        left -= extent.length
        yield extent
