"""An image that is being checked: its header and its file, believed as little as possible.

Tables may be anywhere: what lies behind the end of the file reads as zeroes.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from typing import Final

from layers.ondisk.qcow2 import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2, REFCOUNT_TABLE_RESERVED
from layers.qcow2.header import Header
from layers.qcow2.limits import CHECKED_BLOCKS_COUNT, CHECKED_COUNT_MAX
from layers.qcow2.tally import Refcounts
from nbdserver.errors import ImageError
from nbdserver.layer import Layer
from nbdserver.limits import DISK_MAX

#: What stands for a refcount that cannot be read.
UNKNOWN: Final = 3


class Subject:
    """The image in ``file``. Raises ImageError if it is too large to be checked, OSError."""

    def __init__(self, file: Layer, header: Header) -> None:
        self.file, self.header = file, header
        #: The file's size, bytes.
        self.size = file.size
        self.cluster_bits = header.geometry.cluster_bits
        self.cluster_size = header.geometry.cluster_size
        #: Clusters of the file, the last of which may be cut off.
        self.clusters = -(-self.size // self.cluster_size)
        if self.clusters > CHECKED_COUNT_MAX:
            wanted = f"at most {CHECKED_COUNT_MAX} clusters of the file"
            raise ImageError("is too large to be checked", path=file.filename, found=self.clusters, wanted=wanted)
        self.has_data_file = bool(header.incompatible & INCOMPATIBLE_DATA_FILE)
        self.is_extended = bool(header.incompatible & INCOMPATIBLE_EXTENDED_L2)
        #: Bytes of an L2 entry.
        self.entry_size = 16 if self.is_extended else 8
        self.refcounts = Refcounts(header.geometry.refcount_bits)
        self.per_block = header.geometry.block_entries
        #: The refcount table.
        self.table = self.entries(header.refcount_table_offset, header.refcount_table_clusters * self.cluster_size // 8)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file."""
        there = max(min(length, self.size - offset), 0)
        return (self.file.pread(offset, there) if there else b"") + bytes(length - there)

    def entries(self, offset: int, count: int) -> array[int]:
        """A table of ``count`` entries of 64 bits."""
        table = array("Q", self.read(offset, count * 8))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def block_place(self, number: int) -> int:
        """Where the table says that refcount block ``number`` is; 0: there is none."""
        return self.table[number] & ~REFCOUNT_TABLE_RESERVED if number < len(self.table) else 0

    def block(self, number: int) -> bytes | None:
        """Refcount block ``number``; None: there is none. Raises Misplaced if none can be where it is said to be."""
        place = self.block_place(number)
        if not place:
            return None
        if place % self.cluster_size or place > DISK_MAX:
            raise Misplaced
        return self.read(place, self.cluster_size)

    def refcounts_of(self, number: int) -> bytes:
        """What refcount block ``number`` says, as `tally.Refcounts.small` puts it, or UNKNOWN; nothing if there is
        none."""
        try:
            block = self.block(number)
        except Misplaced:
            return bytes([UNKNOWN]) * self.per_block
        return b"" if block is None else self.refcounts.small(block)

    def refcount(self, cluster: int) -> int:
        """What the file says of one cluster: 0, 1, 2 for what is more, or UNKNOWN."""
        number, index = divmod(cluster, self.per_block)
        known = self._blocks.get(number)
        if known is None:
            known = self._blocks[number] = self.refcounts_of(number)
            while len(self._blocks) > CHECKED_BLOCKS_COUNT:
                self._blocks.popitem(last=False)
        return known[index] if known else 0


class Misplaced(Exception):
    """A refcount table entry names a place where no block can be."""
