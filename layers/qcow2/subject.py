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
from layers.qcow2.limits import CHECKED_COUNT_MAX, CHECKED_PAGES_COUNT, CHECKED_STRAYS_COUNT
from layers.qcow2.tally import Refcounts
from nbdserver.errors import ImageError
from nbdserver.layer import Layer
from nbdserver.limits import DISK_MAX

#: What stands for a refcount that cannot be read.
UNKNOWN: Final = 3

#: What is read of a file at once where single numbers are wanted. A power of two: no refcount crosses its end.
PAGE: Final = 4096


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
        #: Pages of the file that single numbers have been read from, the least recently used first.
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self._strays = 0

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file."""
        there = max(min(length, self.size - offset), 0)
        return (self.file.pread(offset, there) if there else b"") + bytes(length - there)

    def peek(self, offset: int, length: int) -> bytes:
        """A few bytes of the file, next to which others will be asked for."""
        number, start = divmod(offset, PAGE)
        data = self._page(number)
        if start + length > PAGE:
            rest = self.peek((number + 1) * PAGE, start + length - PAGE)
            return data[start:] + rest
        return data[start : start + length]

    def _page(self, number: int) -> bytes:
        data = self._pages.get(number)
        if data is None:
            data = self._pages[number] = self.read(number * PAGE, PAGE)
            if len(self._pages) > CHECKED_PAGES_COUNT:
                self._pages.popitem(last=False)
        return data

    def entries(self, offset: int, count: int) -> array[int]:
        """A table of ``count`` entries of 64 bits."""
        table = array("Q", self.read(offset, count * 8))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def block_place(self, number: int) -> int:
        """Where the table says that refcount block ``number`` is; 0: there is none."""
        return self.table[number] & ~REFCOUNT_TABLE_RESERVED if number < len(self.table) else 0

    def block(self, number: int, count: int) -> bytes | None:
        """The first ``count`` refcounts of block ``number``, as they are in the file; None: there is none.

        Raises Misplaced if none can be where it is said to be.
        """
        place = self.block_place(number)
        if not place:
            return None
        if self._is_misplaced(place):
            raise Misplaced
        return self.read(place, self.refcounts.length(count))

    def refcounts_of(self, number: int, count: int) -> bytes:
        """The first ``count`` refcounts of block ``number``, as `tally.Refcounts.small` puts them, or UNKNOWN; nothing
        if there is none."""
        try:
            block = self.block(number, count)
        except Misplaced:
            return bytes([UNKNOWN]) * count
        return b"" if block is None else self.refcounts.small(block, count)

    def refcount(self, cluster: int) -> int:
        """What the file says of one cluster: 0, 1, 2 for what is more, or UNKNOWN."""
        number, index = divmod(cluster, self.per_block)
        place = self.block_place(number)
        if not place:
            return 0
        if self._is_misplaced(place) or (cluster >= self.clusters and self._is_one_too_many()):
            return UNKNOWN
        page, at = divmod(place + index * self.refcounts.bits // 8, PAGE)
        return min(self.refcounts.at(self._page(page), at, index), 2)

    def _is_misplaced(self, place: int) -> bool:
        return bool(place % self.cluster_size) or place > DISK_MAX

    def _is_one_too_many(self) -> bool:
        """Whether enough refcounts of clusters behind the file's end have been looked up."""
        self._strays += 1
        return self._strays > CHECKED_STRAYS_COUNT


class Misplaced(Exception):
    """A refcount table entry names a place where no block can be."""
