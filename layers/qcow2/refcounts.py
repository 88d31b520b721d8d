"""Refcounts: which clusters of the file are in use, taking new ones, and setting old ones free.

::

    refcount table ──> refcount block ──> one number a cluster: 0 free, 1 used, more: shared with snapshots
    (in the header)    (one cluster)

A cluster that is taken counts 1 at once, in memory. One that is let go is *retired*: it still counts, and stays what it
was, until `order` has made the change that unlinked it durable; only then is its count lowered. So the counts in
memory, and those in the file, never fall short of the references that a crash may leave behind.

A missing refcount block is put into the first cluster of the range that it counts. When the table is too short, a
longer one is laid out behind all that is counted, followed by the blocks that count both.

Specification: "Host cluster management". Whoever calls holds the metadata lock.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from array import array
from collections.abc import Iterator
from typing import Final

from layers.ondisk.qcow2 import OFFSET_END, REFCOUNT_TABLE_AT, REFCOUNT_TABLE_FIELDS, REFCOUNT_TABLE_RESERVED
from layers.qcow2.cache import Cache, Table, Write
from layers.qcow2.clusters import Geometry
from layers.qcow2.freespace import FreeRuns
from layers.qcow2.header import Header
from layers.qcow2.limits import CACHED_COUNT_MIN, FREED_COUNT_MAX, FREED_MAX, REFCOUNT_TABLE_MAX
from layers.qcow2.occupied import Occupied
from layers.qcow2.order import Cut, Retired
from layers.qcow2.storage import Storage


class Refcounts:
    """The refcount table and blocks of an image, and the allocator that follows from them."""

    def __init__(self, storage: Storage, header: Header, occupied: Occupied, cache_size: int) -> None:
        self._storage, self._geometry, self._occupied = storage, header.geometry, occupied
        self._width = _Width(header.geometry)
        size = header.geometry.cluster_size
        place, length = header.refcount_table_offset, header.refcount_table_clusters * size
        self._table = Table.parse(place, storage.read_table("refcount table", REFCOUNT_TABLE_AT, place, length))
        #: The header names another table than this.
        self._header_is_stale = False
        self._cache = Cache(max(cache_size // size, CACHED_COUNT_MIN))
        #: Where to look for free clusters next: all below it are in use or in ``_free``.
        self._cursor = 0
        self._free = FreeRuns()
        #: Where the next compressed data goes, in a cluster with others of it; 0: to a new cluster.
        self._tail = 0
        self._retired: list[Retired] = []
        self._retired_count = 0

    @property
    def places(self) -> list[int]:
        """Where the refcount blocks are in the file, by number; 0 for those that are missing."""
        return list(self._table.entries)

    @property
    def table_clusters(self) -> range:
        """The clusters of the refcount table."""
        size = self._geometry.cluster_size
        return range(self._table.place // size, self._table.place // size + len(self._table.entries) * 8 // size)

    @property
    def crowded(self) -> bool:
        """Whether so much has changed or is retired that it should be written back."""
        retired = self._retired_count
        return self._cache.crowded or retired > FREED_COUNT_MAX or retired * self._geometry.cluster_size > FREED_MAX

    @property
    def may_lag(self) -> bool:
        """Whether the file may be left without what has changed, as far as this is concerned."""
        return not (self._cache.crowded or self._table.changed or self._header_is_stale)

    @property
    def is_changed(self) -> bool:
        """Whether there is something in no cut yet that the file lacks."""
        return next(self._cache.changed(), None) is not None

    @property
    def is_clean(self) -> bool:
        """Whether the file has it all, and nothing is retired."""
        return self._cache.is_clean and not (self._table.changed or self._header_is_stale or self._retired)

    def get(self, cluster: int) -> int:
        """The refcount of ``cluster``. Raises ImageError, OSError."""
        number, index = divmod(cluster, self._geometry.block_entries)
        block = self._block(number)
        return self._width.get(block.entries, index) if block is not None else 0

    @property
    def refcount_max(self) -> int:
        """The highest refcount that there can be."""
        return (1 << self._geometry.refcount_bits) - 1

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        """(least, greatest) of the refcounts of the clusters [start, stop). Raises ImageError, OSError."""
        found = []
        for number, index, count in self._by_block(start, stop):
            block = self._block(number)
            found.append(self._width.bounds(block.entries, index, count) if block is not None else (0, 0))
        return min(least for least, _ in found), max(greatest for _, greatest in found)

    def used_end(self) -> int:
        """The first cluster behind all that are in use. Raises ImageError, OSError."""
        blocks = -(-len(self._table.entries.tobytes().rstrip(b"\0")) // 8)
        for number in reversed(range(blocks)):
            block = self._block(number)
            if block is not None:
                used = self._width.used_end(block.entries)
                if used:
                    return number * self._geometry.block_entries + used
        return 0

    def check_counted(self, offset: int, length: int, what: str, named_at: int) -> None:
        """Raise ImageError if what ``what``, at ``named_at``, refers to is not counted as used."""
        size = self._geometry.cluster_size
        for cluster in range(offset // size, (offset + length - 1) // size + 1):
            if self.get(cluster) == 0:
                raise self._storage.error(what, named_at, f"place {offset:#x} with refcount 0", "at least 1")

    def count_used(self, clusters: int, enough: int) -> int:
        """How many of the first ``clusters`` clusters are in use; counts no further than to ``enough``."""
        used = 0
        for number in range(min(-(-clusters // self._geometry.block_entries), len(self._table.entries))):
            block = self._block(number)
            if block is not None:
                used += self._width.count_used(block.entries, clusters - number * self._geometry.block_entries)
            if used >= enough:
                break
        return used

    # -- taking and giving back -------------------------------------------------------------------------------------

    def take(self, count: int) -> tuple[int, int]:
        """Take up to ``count`` contiguous free clusters: (first, how many). They count 1 from now on.

        Raises OSError (EFBIG: the format can count no more), ImageError.
        """
        start, count = self._free.take(count) or self._scan(count)
        self._check_free(start, count)
        self._set(start, count, 1)
        return start, count

    def take_bytes(self, length: int) -> int:
        """Take ``length`` bytes, fewer than a cluster has, for compressed data, next to other such data if there is
        room: where they begin. Each of the clusters that they are in counts one more.

        Raises as `take`.
        """
        size, place = self._geometry.cluster_size, self._tail
        room = -place % size
        if room and self.get(place // size) == self.refcount_max:
            room = 0
        shared = range(place // size, place // size + (room > 0))
        if room < length:
            start, _ = self.take(1)
            if not room or place + room != start * size:
                place, shared = start * size, range(0)
            try:
                if (start + 1) * size > self._geometry.compressed_end:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self._storage.file.filename)
                self._add(shared.start, shared.stop, 1)
            except BaseException:
                self.give_back(start, 1)
                raise
        else:
            self._add(shared.start, shared.stop, 1)
        end = place + length
        self._tail = end if end % size else 0
        return place

    def give_back_bytes(self, place: int, length: int) -> None:
        """Let go of bytes that were taken and that nothing has referred to since. They are free when their clusters
        are."""
        size = self._geometry.cluster_size
        self.drop(place // size, (place + length - 1) // size + 1, 1)

    def _abandon_tail(self, start: int, stop: int) -> None:
        """Put nothing more into the clusters [start, stop)."""
        if start <= self._tail // self._geometry.cluster_size < stop:
            self._tail = 0

    def share(self, start: int, stop: int, times: int) -> None:
        """Raise the refcounts of the clusters [start, stop) by ``times``. Raises OSError; ImageError, with nothing
        raised, if one of them is 0, or would be higher than there can be."""
        least, greatest = self.bounds(start, stop)
        if least == 0 or greatest + times > self.refcount_max:
            raise self._storage.error(
                "refcounts are wrong; repair the image with nbdserver image check: those of the clusters",
                start * self._geometry.cluster_size,
                f"{least} to {greatest}",
                f"1 to {self.refcount_max - times}",
            )
        self._add(start, stop, times)

    def take_contiguous(self, count: int) -> int:
        """Take ``count`` clusters, the first of which it gives, one after the other: for tables that need it.

        Raises as `take`; ENOSPC if the file cannot grow.
        """
        start = self._free.take_whole(count)
        if start is None:
            return self._take_ahead(count)
        self._check_free(start, count)
        self._set(start, count, 1)
        return start

    def _take_ahead(self, count: int) -> int:
        """Take clusters in front of the cursor. Blocks that this needs lie behind them, so as not to part them."""
        start = self._cursor
        while True:
            missing = self._missing_blocks(start, count)
            last = (start + count + len(missing) - 1) // self._geometry.block_entries
            if last >= len(self._table.entries):
                self._lengthen_table(last)
                continue
            used = self._first_used(start, start + count + len(missing))
            if used is None:
                break
            start = self._next_free(used)
        self._check_free(start, count + len(missing))
        size = self._geometry.cluster_size
        if missing:
            self._storage.reserve_zeroed((start + count) * size, len(missing) * size)
            self._occupied.add(start + count, len(missing))
        for index, number in enumerate(missing):
            self._add_block(number, start + count + index)
        self._set(start, count + len(missing), 1)
        return start

    def _missing_blocks(self, start: int, count: int) -> list[int]:
        """The blocks there are none of yet, that count ``count`` clusters from ``start`` on and, behind these, them."""
        missing: list[int] = []
        while True:
            last = (start + count + len(missing) - 1) // self._geometry.block_entries
            numbers = range(start // self._geometry.block_entries, last + 1)
            found = [n for n in numbers if n >= len(self._table.entries) or not self._table.entries[n]]
            if len(found) == len(missing):
                return found
            missing = found

    def _first_used(self, start: int, stop: int) -> int | None:
        """The first of the clusters [start, stop) that counts as used, if any does; missing blocks count nothing."""
        while start < stop:
            number, index = divmod(start, self._geometry.block_entries)
            block = self._block(number)
            here = min(stop - start, self._geometry.block_entries - index)
            if block is not None:
                if self._width.get(block.entries, index):
                    return start
                here = self._width.run(block.entries, index, here)
            start += here
        return None

    def _next_free(self, start: int) -> int:
        """The first cluster from ``start`` on that does not count as used; where a block is missing, none does."""
        while True:
            number, index = divmod(start, self._geometry.block_entries)
            block = self._block(number)
            if block is None:
                return start
            index = self._width.find_free(block.entries, index)
            start = number * self._geometry.block_entries + index
            if index < self._geometry.block_entries:
                return start

    def give_back(self, start: int, count: int) -> None:
        """Free clusters that were taken and that nothing, in memory or in the file, has referred to since."""
        self.drop(start, start + count, 1)

    def retire(self, offset: int, length: int, *, discard: bool) -> None:
        """Let go of one reference to the clusters that the bytes touch, once the change that did is durable.

        ``discard``: give the storage back, too, if that was the last reference.
        """
        if not length:
            return
        size = self._geometry.cluster_size
        start, stop = offset // size, (offset + length - 1) // size + 1
        self._retired_count += stop - start
        last = self._retired[-1] if self._retired else None
        if last is not None and last.stop == start and last.discard == discard:
            self._retired[-1] = Retired(last.start, stop, discard)
        else:
            self._retired.append(Retired(start, stop, discard))

    def drop(self, start: int, stop: int, times: int) -> None:
        """Lower the refcounts of the clusters [start, stop) by ``times``, and make those free that come to 0."""
        if self.bounds(start, stop)[0] > times:
            self._add(start, stop, -times)
            return
        for first, end, refcount in list(self.runs(start, stop)):
            if refcount == 0:
                continue  # two entries named what counted only once: it is free already, and may not become so twice
            self._set(first, end - first, max(refcount - times, 0))
            if refcount > times:
                continue
            self._abandon_tail(first, end)
            self._occupied.remove(first, end - first)
            self._storage.freed(first * self._geometry.cluster_size, (end - first) * self._geometry.cluster_size)
            if first < self._cursor:
                forgotten = self._free.add(first, min(end, self._cursor) - first)
                self._cursor = min(forgotten or self._cursor, self._cursor)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first, stop, refcount) of runs of one refcount in the clusters [start, stop); 0 where there is no block."""
        for number, index, count in self._by_block(start, stop):
            block, end = self._block(number), index + count
            while index < end:
                length = self._width.run(block.entries, index, end - index) if block is not None else end - index
                yield start, start + length, self._width.get(block.entries, index) if block is not None else 0
                index, start = index + length, start + length

    def _by_block(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(block, index, count): the clusters [start, stop), by the blocks that count them."""
        while start < stop:
            number, index = divmod(start, self._geometry.block_entries)
            count = min(stop - start, self._geometry.block_entries - index)
            yield number, index, count
            start += count

    def _scan(self, count: int) -> tuple[int, int]:
        """The next free clusters from the cursor on, which moves behind them."""
        per_block = self._geometry.block_entries
        while True:
            number, index = divmod(self._cursor, per_block)
            block = self._block(number) or self._make_block(number)
            index = self._width.find_free(block.entries, index)
            if index < per_block:
                count = self._width.run(block.entries, index, min(count, per_block - index))
                self._cursor = number * per_block + index + count
                return number * per_block + index, count
            self._cursor = (number + 1) * per_block

    def _check_free(self, start: int, count: int) -> None:
        size = self._geometry.cluster_size
        if (start + count) * size > OFFSET_END:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self._storage.file.filename)
        if self._occupied.overlaps(start, count):
            raise self._storage.error(
                "refcounts are wrong: metadata is in clusters that count as free; repair it with nbdserver image check",
                start * size,
            )

    def _set(self, start: int, count: int, value: int) -> None:
        """Set refcounts whose blocks exist."""
        for number, index, here in self._by_block(start, start + count):
            block = self._block(number)
            assert block is not None
            self._note(number, block, *self._width.fill(block.entries, index, here, value))

    def _add(self, start: int, stop: int, times: int) -> None:
        """Add to refcounts, whose blocks exist; no sum is below 0 or above the highest there can be."""
        for number, index, here in self._by_block(start, stop):
            block = self._block(number)
            assert block is not None
            self._note(number, block, *self._width.add(block.entries, index, here, times))

    def _note(self, number: int, block: Table, first: int, stop: int) -> None:
        """The items [first, stop) of a block have changed."""
        block.mark(first, stop - first)
        self._cache.change(number, block)

    # -- table and blocks -------------------------------------------------------------------------------------------

    def _block(self, number: int) -> Table | None:
        if number < len(self._table.entries) and self._table.entries[number]:
            return self._cache.get(number, self._load)
        return None

    def _load(self, number: int) -> Table:
        place = self._table.entries[number]
        what, named_at = f"refcount table entry {number}", self._table.place + number * 8
        if place & REFCOUNT_TABLE_RESERVED:
            raise self._storage.error(what, named_at, f"{place:#x}", "reserved bits clear")
        data = self._storage.read_table(what, named_at, place, self._geometry.cluster_size)
        return Table.parse(place, data, self._width.typecode)

    def _make_block(self, number: int) -> Table:
        if number >= len(self._table.entries):
            return self._lengthen_table(number)
        start = number * self._geometry.block_entries
        self._check_free(start, 1)
        self._storage.reserve_zeroed(start * self._geometry.cluster_size, self._geometry.cluster_size)
        self._occupied.add(start)
        block = self._add_block(number, start)
        self._set(start, 1, 1)
        return block

    def _add_block(self, number: int, cluster: int) -> Table:
        """Enter a new, empty block, in a cluster that is reserved for it already."""
        size = self._geometry.cluster_size
        block = Table.new(cluster * size, array(self._width.typecode, bytes(size)))
        self._cache.change(number, block)
        self._table.entries[number] = block.place
        self._table.mark(number)
        return block

    def _lengthen_table(self, number: int) -> Table:
        """Make a table that has an entry ``number``, where no cluster is counted yet; the block for that entry."""
        size, old = self._geometry.cluster_size, self._table
        table_clusters, blocks = self._plan_table(number)
        start = number * self._geometry.block_entries
        self._check_free(start, table_clusters + blocks)
        self._storage.reserve_zeroed(start * size, (table_clusters + blocks) * size)
        self._occupied.add(start, table_clusters + blocks)
        entries = old.entries + array("Q", bytes(table_clusters * size - len(old.entries) * 8))
        self._table = Table.new(start * size, entries)
        self._header_is_stale = True
        for index in range(blocks):
            self._add_block(number + index, start + table_clusters + index)
        self._set(start, table_clusters + blocks, 1)
        self.retire(old.place, len(old.entries) * 8, discard=False)
        block = self._block(number)
        assert block is not None
        return block

    def _plan_table(self, number: int) -> tuple[int, int]:
        """(clusters of a longer table, how many blocks count them and themselves), from block ``number`` on."""
        size, per_block = self._geometry.cluster_size, self._geometry.block_entries
        clusters = len(self._table.entries) * 8 // size
        while True:
            clusters += clusters // 2 + 1
            if clusters * size > REFCOUNT_TABLE_MAX:
                clusters = REFCOUNT_TABLE_MAX // size
            blocks = -(-clusters // (per_block - 1))
            if number + blocks <= clusters * size // 8:
                return clusters, blocks
            if clusters * size == REFCOUNT_TABLE_MAX:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self._storage.file.filename)

    # -- writing back -----------------------------------------------------------------------------------------------

    def cut(self, cut: Cut, *, lag: bool = False) -> None:
        """Give all that the file lacks to ``cut``, or with ``lag`` nothing; and all that is retired.

        What is retired is going to be free, and discarded, unless it counts more than that now: so no more compressed
        data is put beside it.
        """
        cut.retired, self._retired, self._retired_count = self._retired, [], 0
        for run in cut.retired:
            self._abandon_tail(run.start, run.stop)
        if lag:
            return
        for block in self._cache.changed():
            cut.prepare(block)
        if self._table.unlinked:
            cut.prepare(self._table)
        elif self._table.changed:
            cut.publish(self._table)
        if self._header_is_stale:
            clusters = len(self.table_clusters)
            cut.publish_header(
                Write(REFCOUNT_TABLE_AT, REFCOUNT_TABLE_FIELDS.pack(self._table.place, clusters)), self._table
            )

    def settle(self, cut: Cut) -> None:
        """The file has all of ``cut``."""
        if cut.published is self._table:
            self._header_is_stale = False
        self._cache.settle()

    def retire_again(self, retired: list[Retired]) -> None:
        """What `cut` took has not become free: the next one takes it again."""
        self._retired[:0] = retired
        self._retired_count += sum(run.stop - run.start for run in retired)


class _Width:
    """Refcounts of 1 to 64 bits in a refcount block's array; those below 8 bits are packed, lowest bits first."""

    def __init__(self, geometry: Geometry) -> None:
        self._bits = geometry.refcount_bits
        self._entries = geometry.block_entries
        self.typecode: Final = {8: "B", 16: "H", 32: "I", 64: "Q"}.get(self._bits, "B")
        self._per_byte = max(8 // self._bits, 1)
        self._mask = (1 << self._bits) - 1
        packed = range(256) if self._bits < 8 else ()
        #: A byte with a 0 in it.
        free = bytes(byte for byte in packed if any(self._unpack(byte, slot) == 0 for slot in range(self._per_byte)))
        self._free_byte = re.compile(b"[" + re.escape(free) + b"]") if free else None
        #: How many of a byte's refcounts are not 0.
        self._used = [sum(self._unpack(byte, slot) != 0 for slot in range(self._per_byte)) for byte in packed]

    def get(self, entries: array[int], index: int) -> int:
        if self._bits >= 8:
            return entries[index]
        return self._unpack(entries[index // self._per_byte], index % self._per_byte)

    def fill(self, entries: array[int], index: int, count: int, value: int) -> tuple[int, int]:
        """Set ``count`` refcounts; which of the array's items, [first, stop), have them."""
        if self._bits >= 8:
            entries[index : index + count] = array(self.typecode, [value]) * count
            return index, index + count
        for each in range(index, index + count):
            shift = each % self._per_byte * self._bits
            byte = entries[each // self._per_byte]
            entries[each // self._per_byte] = byte & ~(self._mask << shift) | value << shift
        return index // self._per_byte, (index + count - 1) // self._per_byte + 1

    def add(self, entries: array[int], index: int, count: int, times: int) -> tuple[int, int]:
        """Add ``times`` to ``count`` refcounts, none of which leaves its bounds by it; which of the array's items,
        [first, stop), have them."""
        first, stop, others = self._whole_items(index, count)
        if first < stop:
            # As one long number, in which, within bounds, nothing carries over from one refcount to the next.
            ones = sum(1 << slot * self._bits for slot in range(self._per_byte)).to_bytes(
                entries.itemsize, sys.byteorder
            )
            number = int.from_bytes(entries[first:stop].tobytes(), sys.byteorder)
            number += int.from_bytes(ones * (stop - first), sys.byteorder) * times
            entries[first:stop] = array(
                self.typecode, number.to_bytes((stop - first) * entries.itemsize, sys.byteorder)
            )
        for each in others:
            self.fill(entries, each, 1, self.get(entries, each) + times)
        return index // self._per_byte, (index + count - 1) // self._per_byte + 1

    def bounds(self, entries: array[int], index: int, count: int) -> tuple[int, int]:
        """(least, greatest) of ``count`` refcounts."""
        first, stop, others = self._whole_items(index, count)
        items = entries[first:stop]
        if self._bits >= 8:
            return min(items), max(items)
        found = {self._unpack(byte, slot) for byte in set(items) for slot in range(self._per_byte)}
        found.update(self.get(entries, each) for each in others)
        return min(found), max(found)

    def _whole_items(self, index: int, count: int) -> tuple[int, int, list[int]]:
        """Of ``count`` refcounts: the items of the array [first, stop) that hold nothing else, and the refcounts that
        share an item with others."""
        first, stop = -(-index // self._per_byte), (index + count) // self._per_byte
        if first >= stop:
            return first, first, list(range(index, index + count))
        before, behind = range(index, first * self._per_byte), range(stop * self._per_byte, index + count)
        return first, stop, [*before, *behind]

    def used_end(self, entries: array[int]) -> int:
        """How many refcounts there are up to the last one that is not 0."""
        used_bytes = len(entries.tobytes().rstrip(b"\0"))
        index = min(-(-used_bytes // entries.itemsize) * entries.itemsize * 8 // self._bits, self._entries)
        while index and self.get(entries, index - 1) == 0:
            index -= 1
        return index

    def find_free(self, entries: array[int], start: int) -> int:
        """The first refcount of 0 from ``start`` on; the number of refcounts if there is none."""
        if self._free_byte is None:
            try:
                return entries.index(0, start)
            except ValueError:
                return self._entries
        while start < self._entries:
            if start % self._per_byte == 0:
                found = self._free_byte.search(entries, start // self._per_byte)
                if found is None:
                    return self._entries
                start = found.start() * self._per_byte
            if self.get(entries, start) == 0:
                return start
            start += 1
        return start

    def run(self, entries: array[int], start: int, count: int) -> int:
        """How many of ``count`` refcounts from ``start`` on are the same."""
        value, stop = self.get(entries, start), start + count
        if self._bits >= 8 and entries[start:stop] == array(self.typecode, [value]) * count:
            return count
        index = start + 1
        while index < stop and self.get(entries, index) == value:
            index += 1
        return index - start

    def count_used(self, entries: array[int], first: int) -> int:
        """How many of the first ``first`` refcounts (or of all, if there are fewer) are not 0."""
        if first >= self._entries:
            if self._bits >= 8:
                return self._entries - entries.count(0)
            return sum(map(self._used.__getitem__, entries))
        return sum(self.get(entries, index) != 0 for index in range(first))

    def _unpack(self, byte: int, slot: int) -> int:
        return byte >> slot * self._bits & self._mask
