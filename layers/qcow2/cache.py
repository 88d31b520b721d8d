"""Metadata tables in memory: what changed in them, and a bounded cache of them."""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

#: The unit of change. A disk writes a sector whole or not at all, and no entry crosses one.
SECTOR: Final = 512

#: Changed sectors that are fewer sectors apart than this are written together.
GAP_SECTORS: Final = 8


class Write(NamedTuple):
    """Metadata on its way to the file."""

    offset: int
    data: bytes


class Table:
    """A table of the file: its entries (in native byte order), its place, and which sectors of it have changed."""

    __slots__ = ("changed", "entries", "in_flight", "place", "unlinked")

    def __init__(self, place: int, entries: array[int]) -> None:
        self.place = place
        self.entries = entries
        #: Sectors that differ from the file and are in no cut yet (see `order`).
        self.changed: set[int] = set()
        #: Whether a cut that has it is being written.
        self.in_flight = False
        #: Whether nothing in the file can refer to it yet.
        self.unlinked = False

    @classmethod
    def new(cls, place: int, entries: array[int]) -> Table:
        """A table that the file does not have yet."""
        table = cls(place, entries)
        table.unlinked = True
        table.mark(0, len(entries))
        return table

    @classmethod
    def parse(cls, place: int, data: bytes, typecode: str = "Q") -> Table:
        """The table whose bytes in the file are ``data``."""
        entries = array(typecode)
        entries.frombytes(data)
        _swap(entries)
        return cls(place, entries)

    def mark(self, index: int, count: int = 1) -> None:
        """Note that ``count`` entries from ``index`` have changed."""
        size = self.entries.itemsize
        first, last = index * size // SECTOR, ((index + count) * size - 1) // SECTOR
        if first == last:
            self.changed.add(first)
        else:
            self.changed.update(range(first, last + 1))

    def encode(self, sectors: set[int]) -> Iterator[Write]:
        """The bytes of these sectors, for the file, neighbours joined."""
        per_sector = SECTOR // self.entries.itemsize
        ordered = sorted(sectors)
        start = 0
        for index in range(1, len(ordered) + 1):
            if index == len(ordered) or ordered[index] - ordered[index - 1] >= GAP_SECTORS:
                entries = self.entries[ordered[start] * per_sector : (ordered[index - 1] + 1) * per_sector]
                yield Write(self.place + ordered[start] * SECTOR, encoded(entries))
                start = index


class Cache:
    """Tables by number, at most ``count_max`` of them as long as no more than that have changed.

    What has changed cannot be dropped before it is written; `crowded` says that it is time to.
    """

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        #: Same as in the file, the least recently used first.
        self._clean: OrderedDict[int, Table] = OrderedDict()
        self._kept: dict[int, Table] = {}

    @property
    def crowded(self) -> bool:
        """Whether more than half of it waits to be written."""
        return len(self._kept) * 2 > self._count_max

    @property
    def is_clean(self) -> bool:
        """Whether nothing waits to be written."""
        return not self._kept

    def get(self, number: int, load: Callable[[int], Table]) -> Table:
        """The table ``number``, from memory or by ``load(number)``."""
        table = self._kept.get(number)
        if table is not None:
            return table
        table = self._clean.get(number)
        if table is None:
            table = self._clean[number] = load(number)
            self._trim()
        else:
            self._clean.move_to_end(number)
        return table

    def change(self, number: int, table: Table) -> None:
        """Keep ``table``, which has changed or is new or another, as the table ``number``."""
        self._clean.pop(number, None)
        self._kept[number] = table

    def changed(self) -> Iterator[Table]:
        """The tables that have changes in no cut yet."""
        return (table for table in self._kept.values() if table.changed)

    def settle(self) -> None:
        """Let go of tables that are as in the file."""
        for number, table in list(self._kept.items()):
            if not table.changed and not table.in_flight:
                del self._kept[number]
                self._clean[number] = table
        self._trim()

    def clear(self) -> None:
        """Forget every table: there are others in their place now. Nothing may wait to be written."""
        assert self.is_clean, "would be lost"
        self._clean.clear()

    def _trim(self) -> None:
        while len(self._clean) > max(self._count_max - len(self._kept), 1):
            self._clean.popitem(last=False)


def encoded(entries: array[int]) -> bytes:
    """Entries as they are in the file."""
    entries = entries[:]
    _swap(entries)
    return entries.tobytes()


def _swap(entries: array[int]) -> None:
    """From the file's byte order to the machine's or back."""
    if sys.byteorder == "little" and entries.itemsize > 1:
        entries.byteswap()
