"""Guest clusters: the sizes that a header implies, and what an L2 entry says.

::

    guest offset    L1 index │ L2 index │ offset in the cluster
                       │          │
    L1 table ───────> entry       │
                       └─> L2 table ──> entry ──> host cluster │ compressed bytes │ zeroes │ nothing

Specification: "Cluster mapping".
"""

from __future__ import annotations

from array import array
from enum import Enum
from typing import NamedTuple

from layers.ondisk.qcow2 import COMPRESSED, COMPRESSED_SECTOR, COPIED, L2_RESERVED, OFFSET_END, OFFSET_MASK, ZERO


class Kind(Enum):
    """What an L2 entry says of its guest cluster."""

    UNALLOCATED = "unallocated"
    ZERO = "zero"
    #: Reads as zeroes, with a host cluster kept for it.
    ZERO_ALLOCATED = "allocated zero"
    NORMAL = "normal"
    COMPRESSED = "compressed"


class Run(NamedTuple):
    """The guest clusters [first, stop), which are alike: same kind, same flags, host clusters contiguous.

    A compressed cluster is a run by itself.
    """

    kind: Kind
    first: int
    stop: int
    #: The first cluster's L2 entry.
    entry: int
    #: Whether the L2 table belongs to the active state alone: its L1 entry has COPIED.
    owned: bool

    @property
    def place(self) -> int:
        """Where in the file the first host cluster is; 0 if there is none. Not for compressed clusters."""
        return self.entry & OFFSET_MASK

    @property
    def copied(self) -> bool:
        """Whether the host clusters belong to these guest clusters alone, as the image tells it."""
        return self.owned and bool(self.entry & COPIED)


class Geometry:
    """The sizes that follow from a header's cluster size and refcount width. Never changes.

    ``has_zero``: whether there are zero clusters, as from version 3 on.
    """

    def __init__(self, cluster_bits: int, refcount_order: int, *, has_zero: bool) -> None:
        self.cluster_bits, self.has_zero = cluster_bits, has_zero
        self.cluster_size = 1 << cluster_bits
        #: Entries of an L2 table, which is one cluster.
        self.l2_entries = self.cluster_size // 8
        self.refcount_bits = 1 << refcount_order
        #: Refcounts in a refcount block, which is one cluster.
        self.block_entries = self.cluster_size * 8 // self.refcount_bits

    def clusters(self, length: int) -> int:
        """How many clusters ``length`` bytes take up."""
        return -(-length // self.cluster_size)

    def kind(self, entry: int) -> Kind:
        """What ``entry`` says. Raises BadEntry for what no valid image contains."""
        if entry & COMPRESSED:
            self._check_compressed(entry)
            return Kind.COMPRESSED
        place = entry & OFFSET_MASK
        if entry & L2_RESERVED:
            raise BadEntry("reserved bits set")
        if place & (self.cluster_size - 1):
            raise BadEntry(f"a host cluster aligned to {self.cluster_size}")
        if entry & ZERO:
            if not self.has_zero:
                raise BadEntry("no zero cluster, which version 2 has not")
            return Kind.ZERO_ALLOCATED if place else Kind.ZERO
        return Kind.NORMAL if place else Kind.UNALLOCATED

    def l1_count(self, length: int) -> int:
        """How many L1 entries a disk of ``length`` bytes needs."""
        return -(-self.clusters(length) // self.l2_entries)

    def run_length(self, entries: array[int], start: int) -> int:
        """How many entries from ``start`` on are alike, as a `Run` wants them."""
        entry = entries[start]
        if entry & COMPRESSED:
            return 1
        step = self.cluster_size if entry & OFFSET_MASK else 0
        index, stop = start + 1, len(entries)
        expected = entry + step
        while index < stop and entries[index] == expected:
            index += 1
            expected += step
        return index - start

    def compressed(self, entry: int) -> tuple[int, int]:
        """(offset, length) of the compressed bytes; the last sector may hold other things behind them.

        Specification: "Compressed Clusters Descriptor".
        """
        shift = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        more_sectors = (entry & (COMPRESSED - 1)) >> shift
        return offset, (more_sectors + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR

    def _check_compressed(self, entry: int) -> None:
        if entry & COPIED:
            raise BadEntry("no COPIED flag on a compressed cluster")
        if self.compressed(entry)[0] >= OFFSET_END:
            raise BadEntry(f"compressed data below {OFFSET_END:#x}")


class BadEntry(Exception):
    """An L2 entry that no valid image contains; the text says what was wanted."""
