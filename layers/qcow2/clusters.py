"""Guest clusters: the sizes that a header implies, and what L2 entries say, and are made to say.

::

    guest offset    L1 index │ L2 index │ subcluster │ offset in it
                       │          │           └────────────────────────────┐
    L1 table ───────> entry       │                                        │
                       └─> L2 table ──> entry ──> host cluster │ compressed bytes │ nothing
                                                  and bitmap ──> stored │ zeroes │ nothing

A cluster is made of 32 *subclusters*, each with a state of its own, if the image has extended L2 entries (two words
each); else it is one subcluster of its own size, whose state is in the entry.

With an external data file, guest data is in there, each byte at its own offset, and counts as allocated with an offset
of 0 if it is marked as COPIED.

Specification: "Cluster mapping", "Extended L2 Entries".
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from layers.ondisk.qcow2 import (
    ALLOCATED_ALL,
    COMPRESSED,
    COMPRESSED_SECTOR,
    COPIED,
    L2_RESERVED,
    OFFSET_END,
    OFFSET_MASK,
    SUBCLUSTERS_COUNT,
    ZERO,
    ZERO_ALL,
)
from layers.qcow2.limits import BITMAPS_KEPT_MAX
from nbdserver.extent import Packed
from nbdserver.layer import Layer


class Kind(Enum):
    """What is in bytes of the disk. All but compressed ones may have a host cluster, in use or not."""

    #: What the backing file has.
    UNALLOCATED = "unallocated"
    ZERO = "zero"
    #: What their host cluster has.
    NORMAL = "normal"
    COMPRESSED = "compressed"


class Run(NamedTuple):
    """The bytes [start, end) of the disk, whole subclusters, which are alike: same kind, host clusters contiguous.

    A compressed cluster is a run by itself. The last run may pass the end of the disk.
    """

    kind: Kind
    start: int
    end: int
    #: Where in the data file their host clusters have room for them; None if they have none.
    place: int | None
    #: Whether the host clusters belong to these guest clusters alone, as the image tells it.
    copied: bool
    #: The (first) cluster's L2 entry.
    entry: int


class Geometry:
    """The sizes that follow from a header, and the meaning of L2 entries. Never changes.

    ``has_zero``: whether there are zero clusters, as from version 3 on. ``extended``: whether L2 entries are.
    ``has_data_file``: whether guest data is in an external data file.
    """

    def __init__(
        self,
        cluster_bits: int,
        refcount_order: int,
        *,
        has_zero: bool,
        extended: bool = False,
        has_data_file: bool = False,
    ) -> None:
        self.cluster_bits, self.has_zero, self.has_data_file = cluster_bits, has_zero, has_data_file
        self.cluster_size = 1 << cluster_bits
        self.subclusters = SUBCLUSTERS_COUNT if extended else 1
        self.subcluster_size = self.cluster_size // self.subclusters
        #: Words of 64 bits of an L2 entry.
        self.entry_words = 2 if extended else 1
        #: Entries of an L2 table, which is one cluster.
        self.l2_entries = self.cluster_size // (8 * self.entry_words)
        #: How much of the disk an L2 table maps.
        self.table_span = self.cluster_size * self.l2_entries
        self.refcount_bits = 1 << refcount_order
        #: Where compressed data must end: a descriptor's offset has no more bits, the other ones count its sectors.
        self.compressed_end = 1 << 62 - (cluster_bits - 8)
        #: Refcounts in a refcount block, which is one cluster.
        self.block_entries = self.cluster_size * 8 // self.refcount_bits
        #: What is set in an entry that has a host cluster.
        self._placed = OFFSET_MASK | COPIED if has_data_file else OFFSET_MASK
        #: What is set, of an entry with a host cluster, if that has no other user: in a data file it never has.
        self._alone = self._placed if has_data_file else COPIED
        self._reserved = L2_RESERVED | ZERO if extended else L2_RESERVED
        #: What no entry has set, but those of compressed clusters: reserved bits, and offsets within a cluster.
        self._unusual = COMPRESSED | self._reserved | OFFSET_MASK & (self.cluster_size - 1)

    def clusters(self, length: int) -> int:
        """How many clusters ``length`` bytes take up."""
        return -(-length // self.cluster_size)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The bytes [start, end), widened to whole clusters."""
        return start // self.cluster_size * self.cluster_size, self.clusters(end) * self.cluster_size

    # -- what entries say -------------------------------------------------------------------------------------------

    def runs(self, words: array[int], cluster: int, owned: bool) -> Iterator[Run]:
        """The runs of the guest clusters from ``cluster`` on, ``words`` being their L2 entries.

        ``owned``: whether their L2 table belongs to the active state alone: its L1 entry has COPIED. Raises BadEntry
        for what no valid image contains.
        """
        if self.entry_words > 1:
            yield from self._extended_runs(words[::2], words[1::2], cluster, owned)
            return
        size, start, index, stop = self.cluster_size, cluster * self.cluster_size, 0, len(words)
        while index < stop:
            entry = words[index]
            kind, place = self._host(entry, start)
            if entry & ZERO and kind is not Kind.COMPRESSED:
                kind = Kind.ZERO
                if not self.has_zero:
                    raise BadEntry("no zero cluster, which version 2 has not", start, entry)
            length = self.run_length(words, index)
            index += length
            end = start + length * size
            yield Run(kind, start, end, place, owned and place is not None and entry & self._alone != 0, entry)
            start = end

    def _extended_runs(self, entries: array[int], bitmaps: array[int], cluster: int, owned: bool) -> Iterator[Run]:
        size, index, stop = self.cluster_size, 0, len(entries)
        while index < stop:
            entry, bitmap = entries[index], bitmaps[index]
            start = (cluster + index) * size
            kind, place = self._host(entry, start)
            copied = owned and place is not None and entry & self._alone != 0
            _check_bitmap(kind, place, bitmap, start, entry)
            if kind is Kind.COMPRESSED:
                yield Run(kind, start, start + size, None, False, entry)
                index += 1
                continue
            parts = subclusters(bitmap)
            first, index = index, index + 1
            if len(parts) == 1:
                limit = first + self.run_length(entries, first)
                while index < limit and bitmaps[index] == bitmap:
                    index += 1
                yield Run(parts[0].kind, start, (cluster + index) * size, place, copied, entry)
                continue
            unit = self.subcluster_size
            for part in parts:
                skip = part.first * unit
                at = None if place is None else place + skip
                yield Run(part.kind, start + skip, start + part.stop * unit, at, copied, entry)

    def _host(self, entry: int, start: int) -> tuple[Kind, int | None]:
        """What the first word of the entry for the cluster at ``start`` names: (kind, place)."""
        if entry & self._unusual:
            self._check_compressed(entry, start)
            return Kind.COMPRESSED, None
        if not entry & self._placed:
            return Kind.UNALLOCATED, None
        place = entry & OFFSET_MASK
        if self.has_data_file and place != start:
            raise BadEntry(f"place {start:#x}, the same as in the disk, in an external data file", start, entry)
        return Kind.NORMAL, place

    def table(self, words: array[int], cluster: int, file: Layer, size: int, *, is_alone: bool) -> Packed | None:
        """What L2 entries of the clusters from ``cluster`` on say of reading, for others to read off: the places in
        ``file``, of which ``size`` bytes are there. ``is_alone``: nothing shows below. None: it cannot be said so."""
        if self.entry_words > 1 or self.has_data_file:
            return None
        known = self._unusual | ZERO
        zeroes: tuple[tuple[int, int], ...] = ((known, ZERO),) if self.has_zero else ()
        if is_alone:
            zeroes += ((known | OFFSET_MASK, 0),)
        return Packed(cluster * self.cluster_size, self.cluster_size, words, file, OFFSET_MASK, known, size, zeroes)

    def l1_count(self, length: int) -> int:
        """How many L1 entries a disk of ``length`` bytes needs."""
        return -(-self.clusters(length) // self.l2_entries)

    def run_length(self, entries: array[int], start: int) -> int:
        """How many entries (first words) from ``start`` on are alike, as a `Run` wants them."""
        entry = entries[start]
        if entry & COMPRESSED:
            return 1
        if not entry & self._placed:
            return equal_length(entries, start)
        index, stop = start + 1, len(entries)
        expected = entry + self.cluster_size
        while index < stop and entries[index] == expected:
            index += 1
            expected += self.cluster_size
        return index - start

    def compressed(self, entry: int) -> tuple[int, int]:
        """(offset, length) of the compressed bytes; the last sector may hold other things behind them.

        Specification: "Compressed Clusters Descriptor".
        """
        offset = entry & (self.compressed_end - 1)
        more_sectors = (entry & (COMPRESSED - 1)) // self.compressed_end
        return offset, (more_sectors + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR

    def compressed_entry(self, offset: int, length: int) -> int:
        """The (first word of the) entry for compressed bytes, fewer than a cluster has and below `compressed_end`."""
        more_sectors = (offset + length - 1) // COMPRESSED_SECTOR - offset // COMPRESSED_SECTOR
        return COMPRESSED | more_sectors * self.compressed_end | offset

    def _check_compressed(self, entry: int, start: int) -> None:
        """Raise BadEntry for an unusual entry that is no compressed cluster's."""
        if not entry & COMPRESSED:
            is_reserved = entry & self._reserved
            raise BadEntry(
                "reserved bits clear" if is_reserved else f"a host cluster aligned to {self.cluster_size}", start, entry
            )
        if self.has_data_file:
            raise BadEntry("no compressed cluster, which an external data file has not", start, entry)
        if entry & COPIED:
            raise BadEntry("no COPIED flag on a compressed cluster", start, entry)
        if self.compressed(entry)[0] >= OFFSET_END:
            raise BadEntry(f"compressed data below {OFFSET_END:#x}", start, entry)

    def places(self, words: array[int]) -> Iterator[tuple[int, int]]:
        """(offset, length) of the bytes that entries refer to in the file that guest data is in, once for each
        reference. Raises BadEntry."""
        entries, index = words[:: self.entry_words], 0
        while index < len(entries):
            entry, count = entries[index], self.run_length(entries, index)
            kind, place = self._host(entry, index * self.cluster_size)
            if kind is Kind.COMPRESSED:
                yield self.compressed(entry)
            elif place is not None:
                yield place, count * self.cluster_size
            index += count

    def gone(self, old: array[int], new: array[int]) -> Iterator[tuple[int, int, int]]:
        """(index, offset, length): which entries of ``old`` refer to something in the file that guest data is in, and
        those of ``new`` do not, and to what."""
        named, width = self._placed | COMPRESSED, self.entry_words
        for index, (before, after) in enumerate(zip(old[::width], new[::width], strict=True)):
            if before & named and self._names_another(before, after):
                if before & COMPRESSED:
                    yield index, *self.compressed(before)
                else:
                    yield index, before & OFFSET_MASK, self.cluster_size

    def _names_another(self, before: int, after: int) -> bool:
        """Whether ``after`` does not refer to what ``before`` refers to. Compressed data begins at any byte, so that of
        its descriptor every bit counts."""
        if (before | after) & COMPRESSED:
            return before != after
        return not after & self._placed or bool((before ^ after) & OFFSET_MASK)

    # -- what entries are made to say -------------------------------------------------------------------------------

    def linked(self, words: array[int], start: int, end: int, place: int) -> array[int]:
        """The L2 entries of the clusters that [start, end) touches, ``words`` so far, with these whole subclusters
        stored at ``place``, in host clusters that are theirs alone."""
        size = self.cluster_size
        count = len(words) // self.entry_words
        first = COPIED | place - start % size
        entries = array("Q", range(first, first + count * size, size))
        if self.entry_words == 1:
            return entries
        linked = words[:]
        linked[::2] = entries
        linked[1::2] = array("Q", [ALLOCATED_ALL]) * count
        for index in {0, count - 1}:
            mask, before = self._mask(index, start, end), words[2 * index + 1]
            is_moved = words[2 * index] != entries[index]
            assert not is_moved or not before & ALLOCATED_ALL & ~mask, "stored elsewhere, and not copied"
            linked[2 * index + 1] = (before | mask) & ~(mask << SUBCLUSTERS_COUNT)
        return linked

    def packed(self, entry: int) -> array[int]:
        """The L2 entry, as `compressed_entry` makes its first word: subclusters a compressed cluster has none."""
        return array("Q", [entry, 0][: self.entry_words])

    def zeroed(self, words: array[int], start: int, end: int, *, unmap: bool) -> array[int]:
        """The L2 entries of the clusters that [start, end) touches, ``words`` so far, with these whole subclusters
        reading as zeroes. Whole clusters lose what they had in the file if it is compressed, or ``unmap`` says so.

        Version 2 knows no zeroes: clusters become unallocated.
        """
        if self.entry_words == 1:
            if not self.has_zero:
                return array("Q", bytes(len(words) * 8))
            if unmap:
                return array("Q", [ZERO]) * len(words)
            return array("Q", [ZERO if entry & COMPRESSED else entry | ZERO for entry in words])
        zeroed = words[:]
        for index in range(len(words) // 2):
            mask = self._mask(index, start, end)
            if mask != ALLOCATED_ALL:
                assert not words[2 * index] & COMPRESSED, "a part of a compressed cluster"
                zeroed[2 * index + 1] = (zeroed[2 * index + 1] | mask << SUBCLUSTERS_COUNT) & ~mask
                continue
            zeroed[2 * index + 1] = ZERO_ALL
            if unmap or words[2 * index] & COMPRESSED:
                zeroed[2 * index] = 0
        return zeroed

    def _mask(self, index: int, start: int, end: int) -> int:
        """A bit for each subcluster of [start, end) that is in the ``index``-th of the clusters that this touches."""
        origin = (start // self.cluster_size + index) * self.cluster_size
        first = max(start - origin, 0) // self.subcluster_size
        stop = min(-(-(end - origin) // self.subcluster_size), self.subclusters)
        return (1 << stop) - (1 << first)


class Part(NamedTuple):
    """The subclusters [first, stop) of a cluster, which are of one kind."""

    kind: Kind
    first: int
    stop: int


@functools.lru_cache(maxsize=BITMAPS_KEPT_MAX)
def subclusters(bitmap: int) -> tuple[Part, ...]:
    """What a valid subcluster bitmap says, in order."""
    allocated, zero = bitmap & ALLOCATED_ALL, bitmap >> SUBCLUSTERS_COUNT
    parts: list[Part] = []
    for index in range(SUBCLUSTERS_COUNT):
        if allocated >> index & 1:
            kind = Kind.NORMAL
        else:
            kind = Kind.ZERO if zero >> index & 1 else Kind.UNALLOCATED
        if parts and parts[-1].kind is kind:
            parts[-1] = parts[-1]._replace(stop=index + 1)
        else:
            parts.append(Part(kind, index, index + 1))
    return tuple(parts)


def _check_bitmap(kind: Kind, place: int | None, bitmap: int, start: int, entry: int) -> None:
    if kind is Kind.COMPRESSED:
        if bitmap:
            raise BadEntry("no subcluster bitmap on a compressed cluster", start, entry, bitmap)
    elif place is None:
        if bitmap & ALLOCATED_ALL:
            raise BadEntry("no allocated subcluster without a host cluster", start, entry, bitmap)
    elif bitmap >> SUBCLUSTERS_COUNT & bitmap:
        raise BadEntry("no subcluster both allocated and zero", start, entry, bitmap)


class BadEntry(Exception):
    """An L2 entry that no valid image contains, of the cluster at ``start``; ``wanted`` says what it should be."""

    def __init__(self, wanted: str, start: int, entry: int, bitmap: int | None = None) -> None:
        super().__init__(wanted)
        self.wanted, self.start = wanted, start
        self.found = f"{entry:#018x}" if bitmap is None else f"{entry:#018x} with bitmap {bitmap:#018x}"


def equal_length(entries: array[int], start: int) -> int:
    """How many entries from ``start`` on equal the first of them. What is empty is mostly empty to the end of its
    table, and who allocates there asks at every write: so longer and longer pieces are compared at once."""
    index, stop, piece = start + 1, len(entries), 16
    while index < stop:
        count = min(piece, stop - index)
        if entries[index : index + count] != entries[start : start + 1] * count:
            if count == 1:
                break
            piece = count // 2
            continue
        index += count
        piece *= 4
    return index - start
