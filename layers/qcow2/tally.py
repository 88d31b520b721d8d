"""Tallies: how often clusters of the file are referred to, a byte each; and what refcount blocks say of them.

All in bulk: a run of clusters is one operation on bytes, a refcount block is compared as a whole.
"""

from __future__ import annotations

import functools
import re
import sys
from array import array
from collections.abc import Iterator
from typing import Final

#: A count from here on is in `Tally._pages`, which hold so many counts each.
LARGE: Final = 255
PAGE: Final = 4096


class Tally:
    """The counts of the clusters [start, stop). Those of all others are not kept."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        #: Counts up to LARGE; this one means: look it up.
        self._counts = bytearray(stop - start)
        #: Pages of counts of which there are large ones: only images with hundreds of snapshots have any.
        self._pages: dict[int, array[int]] = {}

    def add(self, first: int, stop: int, times: int) -> None:
        """Count the clusters [first, stop) ``times`` more."""
        first, stop = max(first, self.start) - self.start, min(stop, self.stop) - self.start
        if first >= stop:
            return
        if stop - first == 1:
            count = self._counts[first] + times
            if count < LARGE:
                self._counts[first] = count
                return
        elif times < LARGE:
            part = self._counts[first:stop]
            if max(part) + times < LARGE:
                self._counts[first:stop] = part.translate(_plus(times))
                return
        for index in range(first, stop):
            count = self._get(index) + times
            self._counts[index] = min(count, LARGE)
            if count >= LARGE:
                page = self._pages.setdefault(index // PAGE, array("Q"))
                page.extend([0] * (PAGE - len(page)))
                page[index % PAGE] = count

    def add_each(self, clusters: list[int], times: int) -> None:
        """Count each of ``clusters``, which are in the range, ``times`` more."""
        counts, start = self._counts, self.start
        for cluster in clusters:
            count = counts[cluster - start] + times
            if count < LARGE:
                counts[cluster - start] = count
            else:
                self.add(cluster, cluster + 1, times)

    def get(self, cluster: int) -> int:
        """How often ``cluster``, which is in the range, is counted."""
        return self._get(cluster - self.start)

    def ones(self, first: int, stop: int) -> int:
        """How many of the clusters [first, stop), which are in the range, are counted once."""
        return self._counts.count(1, first - self.start, stop - self.start)

    def is_empty(self, first: int, stop: int) -> bool:
        """Whether none of the clusters [first, stop), which are in the range, is counted."""
        return self._counts.count(0, first - self.start, stop - self.start) == stop - first

    def values(self, first: int, stop: int) -> list[int]:
        """The counts of the clusters [first, stop), which are in the range."""
        counts = list(self._counts[first - self.start : stop - self.start])
        for index, count in self.large(first, stop):
            counts[index] = count
        return counts

    def small(self, first: int, stop: int) -> bytearray:
        """The counts of the clusters [first, stop), a byte each; LARGE stands for what is that or more."""
        return self._counts[first - self.start : stop - self.start]

    def excess(self, most: int) -> Iterator[tuple[int, int]]:
        """(cluster, count) of those that are counted more than ``most`` times."""
        if most >= LARGE:
            large = ((self.start + index, count) for index, count in self.large(self.start, self.stop))
            yield from ((cluster, count) for cluster, count in large if count > most)
        elif self._counts and max(self._counts) > most:
            for found in re.finditer(b"[" + re.escape(bytes(range(most + 1, 256))) + b"]", self._counts):
                yield self.start + found.start(), self._get(found.start())

    def large(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """(index from ``first`` on, count) of the counts from LARGE on of the clusters [first, stop)."""
        if not self._pages:
            return
        at, end = first - self.start, stop - self.start
        while (at := self._counts.find(LARGE, at, end)) >= 0:
            yield at + self.start - first, self._get(at)
            at += 1

    def _get(self, index: int) -> int:
        count = self._counts[index]
        return count if count < LARGE else self._pages[index // PAGE][index % PAGE]


class Refcounts:
    """What refcount blocks of refcounts of ``bits`` bits say, and how counts are written into them.

    Specification: "Host cluster management": big-endian; those below 8 bits are packed, lowest bits first.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        #: The largest refcount.
        self.most = (1 << bits) - 1
        self._typecode: Final = {16: "H", 32: "I", 64: "Q"}.get(bits, "B")

    def decode(self, block: bytes, count: int) -> list[int]:
        """The first ``count`` refcounts of a block, of which no more need be given."""
        block = block[: self.length(count)]
        if self.bits < 8:
            per_byte = 8 // self.bits
            values = bytearray(len(block) * per_byte)
            for slot in range(per_byte):
                values[slot::per_byte] = block.translate(_slot(self.bits, slot))
            return list(values[:count])
        entries = array(self._typecode)
        entries.frombytes(block)
        if sys.byteorder == "little":
            entries.byteswap()
        return entries[:count].tolist()

    def encode(self, tally: Tally, first: int, stop: int) -> bytearray:
        """The refcounts of the clusters [first, stop), from the beginning of a block on: the counts, as far as they can
        be told."""
        counts = tally.small(first, stop)
        if self.bits < 8:
            return self._pack(counts)
        width = self.bits // 8
        data = bytearray(len(counts) * width)
        data[width - 1 :: width] = counts
        if width > 1:
            for index, count in tally.large(first, stop):
                data[index * width : (index + 1) * width] = min(count, self.most).to_bytes(width, "big")
        return data

    def pack(self, values: list[int]) -> bytes:
        """Refcounts as a block has them."""
        if self.bits < 8:
            return bytes(self._pack(bytearray(values)))
        entries = array(self._typecode, values)
        if sys.byteorder == "little":
            entries.byteswap()
        return entries.tobytes()

    def length(self, count: int) -> int:
        """How many bytes of a block hold its first ``count`` refcounts."""
        return -(-count * self.bits // 8)

    def small(self, block: bytes, count: int) -> bytes:
        """The first ``count`` refcounts of a block, a byte each: 0, 1, and 2 for what is more."""
        if self.bits <= 8:
            return bytes(self.decode(block, count)).translate(_CLIPPED)
        width = self.bits // 8
        block = block[: count * width]
        low = block[width - 1 :: width].translate(_CLIPPED)
        high = [part for part in (block[at::width] for at in range(width - 1)) if part.count(0) != len(part)]
        if not high:
            return low
        seen = int.from_bytes(low, "big")
        for part in high:
            seen |= int.from_bytes(part.translate(_HIGH), "big")
        return seen.to_bytes(count, "big").translate(_CLIPPED)

    def at(self, data: bytes, offset: int, index: int) -> int:
        """One refcount, number ``index`` of its block: in the byte of ``data`` at ``offset``, or from there on."""
        if self.bits < 8:
            return data[offset] >> index % (8 // self.bits) * self.bits & self.most
        return int.from_bytes(data[offset : offset + self.bits // 8], "big")

    def _pack(self, counts: bytearray) -> bytearray:
        per_byte = 8 // self.bits
        counts.extend(bytes(-len(counts) % per_byte))
        packed = 0
        for slot in range(per_byte):
            packed |= int.from_bytes(counts[slot::per_byte].translate(_shifted(self.bits, slot)), "little")
        return bytearray(packed.to_bytes(len(counts) // per_byte, "little"))


_CLIPPED: Final = bytes(min(value, 2) for value in range(256))

#: Bytes to bytes: more than 1, if there is anything in a refcount's higher bytes.
_HIGH: Final = bytes(min(value, 1) * 2 for value in range(256))


@functools.cache
def _plus(times: int) -> bytes:
    """Bytes to bytes: so much more, LARGE at most."""
    return bytes(min(value + times, LARGE) for value in range(256))


@functools.cache
def _slot(bits: int, slot: int) -> bytes:
    """Bytes to bytes: the refcount of ``bits`` bits in a slot of a byte."""
    return bytes(value >> slot * bits & (1 << bits) - 1 for value in range(256))


@functools.cache
def _shifted(bits: int, slot: int) -> bytes:
    """Bytes to bytes: a refcount, clipped to ``bits`` bits, in a slot of a byte."""
    return bytes(min(value, (1 << bits) - 1) << slot * bits for value in range(256))
