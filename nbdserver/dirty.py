"""Dirty bitmaps and logs in plain Python, for layers that no engine serves: the contract is in `nbdserver.extent`.

Bits lie in pages, numbers of PAGE_BITS bits each, which are there only where a bit is set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Final

from nbdserver.extent import DirtyBitmap, DirtyLog

PAGE_BITS: Final = 1 << 15
_FULL: Final = (1 << PAGE_BITS) - 1


class Bitmap(DirtyBitmap):
    """A bit for each ``granularity`` bytes, a power of two, of a disk of ``size``."""

    def __init__(self, size: int, granularity: int) -> None:
        assert granularity > 0 and granularity & granularity - 1 == 0, granularity
        self._size, self._granularity = size, granularity
        self._pages: dict[int, int] = {}
        self._lock = threading.RLock()

    @property
    def size(self) -> int:
        return self._size

    @property
    def granularity(self) -> int:
        return self._granularity

    @property
    def _count(self) -> int:
        return -(-self._size // self._granularity)

    def mark(self, offset: int, length: int) -> None:
        end = min(offset + length, self._size)
        if offset < end:
            self._set(offset // self._granularity, (end - 1) // self._granularity + 1)

    def merge(self, other: DirtyBitmap) -> None:
        with self._lock:
            for offset, length in _dirty(other):
                self.mark(offset, length)

    def clear(self) -> None:
        with self._lock:
            self._pages.clear()

    def resize(self, size: int) -> None:
        with self._lock:
            self._size = size
            last, within = divmod(self._count, PAGE_BITS)
            self._pages = {number: page for number, page in self._pages.items() if number <= last}
            if last in self._pages:
                self._pages[last] &= (1 << within) - 1

    def count(self) -> int:
        with self._lock:
            return sum(page.bit_count() for page in self._pages.values())

    def runs(self, offset: int, length: int, count_max: int) -> list[tuple[int, bool]]:
        runs: list[tuple[int, bool]] = []
        end = offset + length
        with self._lock:
            while offset < end and len(runs) < count_max:
                dirty, stop = self._run(offset // self._granularity) if offset < self._size else (False, None)
                at = end if stop is None else min(stop * self._granularity, self._size if dirty else end, end)
                runs.append((at - offset, dirty))
                offset = at
        return runs

    def data(self, start: int, length: int) -> bytes:
        bits = length * 8
        first = start * 8
        value = 0
        with self._lock:
            for number in range(first // PAGE_BITS, (first + bits - 1) // PAGE_BITS + 1):
                shift = number * PAGE_BITS - first
                page = self._pages.get(number, 0)
                value |= page << shift if shift >= 0 else page >> -shift
        return (value & (1 << bits) - 1).to_bytes(length, "little")

    def load(self, start: int, data: bytes) -> None:
        first, value = start * 8, int.from_bytes(data, "little")
        value &= (1 << max(self._count - first, 0)) - 1
        with self._lock:
            while value:
                number, within = divmod(first, PAGE_BITS)
                part = value << within & _FULL
                if part:
                    self._pages[number] = self._pages.get(number, 0) | part
                value >>= PAGE_BITS - within
                first += PAGE_BITS - within

    def _set(self, first: int, stop: int) -> None:
        """Set the bits [first, stop)."""
        with self._lock:
            for number in range(first // PAGE_BITS, (stop - 1) // PAGE_BITS + 1):
                base = number * PAGE_BITS
                low, high = max(first - base, 0), min(stop - base, PAGE_BITS)
                is_whole = high - low == PAGE_BITS  # all of them one number, which takes memory once
                self._pages[number] = _FULL if is_whole else self._pages.get(number, 0) | (1 << high) - (1 << low)

    def _run(self, bit: int) -> tuple[bool, int | None]:
        """Whether ``bit`` is set, and the first one behind it that is otherwise; None: there is none."""
        dirty = bool(self._pages.get(bit // PAGE_BITS, 0) >> bit % PAGE_BITS & 1)
        while bit < self._count:
            number, within = divmod(bit, PAGE_BITS)
            page = self._pages.get(number, 0)
            others = (page ^ _FULL if dirty else page) >> within
            if others:
                return dirty, bit + (others & -others).bit_length() - 1
            bit = (number + 1) * PAGE_BITS
        return dirty, self._count if dirty else None


def _dirty(bitmap: DirtyBitmap) -> Iterator[tuple[int, int]]:
    """The (offset, length) runs of set bits, whole granules."""
    offset = 0
    while offset < bitmap.size:
        for length, dirty in bitmap.runs(offset, bitmap.size - offset, 1024):
            if dirty:
                yield offset, -(-length // bitmap.granularity) * bitmap.granularity
            offset += length


class Log(DirtyLog):
    """Marks in any number of bitmaps."""

    def __init__(self) -> None:
        self._bitmaps: tuple[DirtyBitmap, ...] = ()

    def set(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        self._bitmaps = tuple(bitmaps)

    def mark(self, offset: int, length: int) -> None:
        for bitmap in self._bitmaps:
            bitmap.mark(offset, length)
