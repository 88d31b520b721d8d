"""Requests, vectors, and the registered-buffer flag that cannot lie.

A request's memory is a *vector* of segments. A segment is a range of a *buffer*; a buffer either names the
live, registered pool slot it is (`Registration`) or nothing. REGISTERED_BUF is **derived** from that: it is set
exactly when there is at least one segment and all of them lie in live, registered slots. There is no setter;
slicing, shifting or replacing the vector recomputes it.

Flag names and values are QEMU's ``BDRV_REQ_*`` (include/block/block-common.h) without the prefix.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, IntFlag
from typing import NamedTuple, Protocol


class Flag(IntFlag):
    """Request flags, QEMU's ``BdrvRequestFlags``."""

    NONE = 0
    COPY_ON_READ = 0x1
    ZERO_WRITE = 0x2
    MAY_UNMAP = 0x4
    REGISTERED_BUF = 0x8
    FUA = 0x10
    WRITE_COMPRESSED = 0x20
    WRITE_UNCHANGED = 0x40
    SERIALISING = 0x80
    NO_FALLBACK = 0x100
    PREFETCH = 0x200
    NO_WAIT = 0x400
    NO_QUEUE = 0x800


class Operation(Enum):
    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"


class Registration(NamedTuple):
    """Which slot of which registered pool a buffer is; ``generation`` tells its incarnations apart."""

    pool: int
    slot: int
    generation: int


class Buffer(Protocol):
    """Memory that a segment points into: `Memory`, or a slot of the engine's pool."""

    @property
    def view(self) -> memoryview:
        """All its bytes, writable, format 'B'. Holding the view keeps the memory."""

    @property
    def registration(self) -> tuple[int, int, int] | None:
        """The registered slot this is *now* (a `Registration`), or None."""


class Memory:
    """Ordinary memory: a bytearray, or any object with the buffer protocol. Never registered."""

    __slots__ = ("view",)

    def __init__(self, data: bytearray | bytes | memoryview | int) -> None:
        source = bytearray(data) if isinstance(data, int) else data
        self.view = memoryview(source).cast("B")

    @property
    def registration(self) -> Registration | None:
        return None


class Segment(NamedTuple):
    """``length`` bytes of ``buffer`` from ``start``."""

    buffer: Buffer
    start: int
    length: int

    @property
    def view(self) -> memoryview:
        return self.buffer.view[self.start : self.start + self.length]


class Vector:
    """An immutable list of segments (the memory they point at is not immutable): QEMU's QEMUIOVector."""

    __slots__ = ("length", "segments")

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = tuple(segments)
        self.length = sum([segment.length for segment in self.segments])

    @classmethod
    def of(cls, data: bytearray | bytes | memoryview | int) -> Vector:
        """A vector of one segment over ordinary memory: ``data`` itself, or that many fresh zero bytes."""
        memory = Memory(data)
        return cls((Segment(memory, 0, len(memory.view)),))

    @property
    def registered(self) -> bool:
        """Whether there is at least one segment and every segment lies in a live, registered slot."""
        for segment in self.segments:
            if segment.buffer.registration is None:
                return False
        return bool(self.segments)

    @property
    def unregistered(self) -> str | None:
        """The kind of memory for which `registered` is False, in words; None if it is True."""
        if self.registered:
            return None
        for segment in self.segments:
            if segment.buffer.registration is None:
                is_ordinary = isinstance(segment.buffer, Memory)
                return "ordinary memory" if is_ordinary else "memory outside the registered pool"
        return "no memory"

    def slice(self, start: int, length: int) -> Vector:
        """The same memory, ``length`` bytes from ``start``. Asserts that they are in bounds."""
        assert 0 <= start and 0 <= length and start + length <= self.length, (start, length, self.length)
        if start == 0 and length == self.length:
            return self
        if len(self.segments) == 1:
            buffer, first, _ = self.segments[0]
            return Vector((Segment(buffer, first + start, length),)) if length else NO_VECTOR
        return Vector(self._sliced(start, length))

    def _sliced(self, start: int, length: int) -> Iterator[Segment]:
        for segment in self.segments:
            if length == 0:
                return
            if start >= segment.length:
                start -= segment.length
                continue
            take = min(segment.length - start, length)
            yield Segment(segment.buffer, segment.start + start, take)
            start, length = 0, length - take

    def views(self) -> list[memoryview]:
        """The segments as writable memoryviews, in order."""
        return [segment.view for segment in self.segments]

    def tobytes(self) -> bytes:
        """A copy of the contents."""
        return b"".join(self.views())

    def fill(self, data: bytes | bytearray | memoryview, start: int = 0) -> None:
        """Copy ``data`` into the memory from ``start``. Asserts that it fits."""
        source = memoryview(data).cast("B")
        position = 0
        for view in self.slice(start, len(source)).views():
            view[:] = source[position : position + len(view)]
            position += len(view)

    def zero(self) -> None:
        """Fill the memory with zeroes."""
        for view in self.views():
            view[:] = bytes(len(view))

    def is_zero(self) -> bool:
        """Whether every byte is zero: QEMU's ``qemu_iovec_is_zero``."""
        # A bytearray compares itself with a view at the speed of memcmp; two views go byte by byte.
        return all(
            _ZEROES[: len(view) - start] == view[start : start + _COMPARED]
            for view in self.views()
            for start in range(0, len(view), _COMPARED)
        )

    def difference(self, other: Vector) -> int | None:
        """Where the first byte lies that is not as in ``other``, which is as long; None if all are alike."""
        assert self.length == other.length, (self.length, other.length)
        for start in range(0, self.length, _COMPARED):
            length = min(_COMPARED, self.length - start)
            here, there = self.slice(start, length).tobytes(), other.slice(start, length).tobytes()
            if here != there:
                return start + next(at for at in range(length) if here[at] != there[at])
        return None

    def __add__(self, other: Vector) -> Vector:
        return Vector(self.segments + other.segments)

    def __repr__(self) -> str:
        return f"Vector({self.length} bytes in {len(self.segments)}{', registered' if self.registered else ''})"


NO_VECTOR = Vector(())

#: Contents are compared in pieces of this, so that an early difference is found early.
_COMPARED = 1 << 16
_ZEROES = bytearray(_COMPARED)


@dataclass(frozen=True, slots=True)
class Request:
    """One operation on a layer: ``length`` bytes at ``offset``; READ fills the vector, WRITE takes from it.

    ``vector.length == length`` for READ and WRITE; ZERO and TRIM have none. Made with `Request.read` and its
    siblings; derive others with `slice`, `moved`, `with_vector`, `with_flags`. Asserts on misuse.
    """

    operation: Operation
    offset: int
    length: int
    vector: Vector = NO_VECTOR
    #: The flags that were asked for. Never contains REGISTERED_BUF: see `flags`.
    asked_flags: Flag = Flag.NONE

    def __post_init__(self) -> None:
        assert self.offset >= 0 and self.length >= 0
        # Most have none, and operations on flags take a microsecond.
        if self.asked_flags is not Flag.NONE:
            assert not self.asked_flags & Flag.REGISTERED_BUF, "REGISTERED_BUF is derived from the vector, never set"
        if self.operation in (Operation.READ, Operation.WRITE):
            assert self.vector.length == self.length, (self.vector.length, self.length)
        else:
            assert self.vector.length == 0

    @classmethod
    def read(cls, offset: int, vector: Vector, flags: Flag = Flag.NONE) -> Request:
        return cls(Operation.READ, offset, vector.length, vector, flags)

    @classmethod
    def write(cls, offset: int, vector: Vector, flags: Flag = Flag.NONE) -> Request:
        return cls(Operation.WRITE, offset, vector.length, vector, flags)

    @classmethod
    def zero(cls, offset: int, length: int, flags: Flag = Flag.NONE) -> Request:
        return cls(Operation.ZERO, offset, length, NO_VECTOR, flags)

    @classmethod
    def trim(cls, offset: int, length: int, flags: Flag = Flag.NONE) -> Request:
        return cls(Operation.TRIM, offset, length, NO_VECTOR, flags)

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def flags(self) -> Flag:
        """The flags as a layer sees them: those asked for, and REGISTERED_BUF when the vector earns it."""
        return self.asked_flags | (Flag.REGISTERED_BUF if self.vector.registered else Flag.NONE)

    def slice(self, start: int, length: int) -> Request:
        """The part of ``length`` bytes that begins ``start`` bytes into this request, over the same memory."""
        if start == 0 and length == self.length:
            return self
        vector = self.vector.slice(start, length) if self.vector.length else NO_VECTOR
        return replace(self, offset=self.offset + start, length=length, vector=vector)

    def pieces(self, length_max: int) -> Iterator[Request]:
        """The request in slices of ``length_max`` bytes, the last one perhaps shorter."""
        for start in range(0, self.length, length_max):
            yield self.slice(start, min(length_max, self.length - start))

    def moved(self, offset: int) -> Request:
        """The same request at another offset (of another layer)."""
        if offset == self.offset:
            return self
        return Request(self.operation, offset, self.length, self.vector, self.asked_flags)

    def with_vector(self, vector: Vector) -> Request:
        """The same request with other memory of the same length."""
        return replace(self, vector=vector)

    def with_flags(self, flags: Flag) -> Request:
        """The same request with exactly these flags asked for (REGISTERED_BUF stays derived)."""
        return replace(self, asked_flags=flags & ~Flag.REGISTERED_BUF)


# -- debugging: the flag against the addresses -----------------------------------------------------------------------


@dataclass(slots=True)
class Debug:
    """What is checked beyond what production needs (NBDSERVER_DEBUG_FLAGS=1). ``flags``: at every hop, that
    REGISTERED_BUF is what a lookup of the memory's addresses says. ``permissions``: that a layer does to its children
    only what it has been granted (`nbdserver.permissions`)."""

    flags: bool
    permissions: bool


_is_debugged = os.environ.get("NBDSERVER_DEBUG_FLAGS", "0") not in ("", "0")
debug = Debug(flags=_is_debugged, permissions=_is_debugged)


class Region(Protocol):
    """Whoever has memory that is registered with the kernel."""

    @property
    def registered_region(self) -> tuple[int, int]:
        """Its (address, length), now; length 0: nothing is registered."""


_regions: weakref.WeakSet[Region] = weakref.WeakSet()
_regions_lock = threading.Lock()


def add_region(region: Region) -> None:
    """Have `check_flag` know of registered memory, for as long as ``region`` lives."""
    with _regions_lock:
        _regions.add(region)


def check_flag(vector: Vector, where: str) -> None:
    """Assert that ``vector`` counts as registered exactly if all its addresses lie in registered regions."""
    with _regions_lock:
        regions = [region.registered_region for region in _regions]
    found = bool(vector.segments) and all(_is_within(segment, regions) for segment in vector.segments)
    if found != vector.registered:
        raise AssertionError(f"{where}: REGISTERED_BUF is {vector.registered}, the addresses of {vector} say {found}")


def _is_within(segment: Segment, regions: Iterable[tuple[int, int]]) -> bool:
    view = segment.buffer.view
    if view.readonly or not view.nbytes:
        return False  # registered memory is neither
    start = ctypes.addressof(ctypes.c_char.from_buffer(view)) + segment.start
    return any(base <= start and start + segment.length <= base + length for base, length in regions)
