"""The mapping: L1 and L2 tables, from guest clusters to what holds them.

What entries say is in `clusters`; here is where they are, and that what they no longer name is let go of.

Specification: "Cluster mapping".
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator

from layers.ondisk.qcow2 import COMPRESSED, COPIED, L1_RESERVED, OFFSET_MASK
from layers.qcow2.cache import Cache, Table
from layers.qcow2.clusters import BadEntry, Kind, Run, equal_length
from layers.qcow2.header import Header
from layers.qcow2.host import Host
from layers.qcow2.limits import CACHED_COUNT_MIN, CLUSTERS_AHEAD_MAX, WORDS_MAX
from layers.qcow2.occupied import Occupied
from layers.qcow2.order import Cut
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.references import clear_copied
from layers.qcow2.storage import CorruptImage, Storage


class Mapping:
    """The active L1 table and its L2 tables. ``lock`` is the metadata lock."""

    def __init__(self, storage: Storage, header: Header, cache_size: int, lock: threading.Lock) -> None:
        self._storage, self._geometry, self._lock = storage, header.geometry, lock
        data = storage.file.pread(header.l1_offset, header.l1_count * 8) if header.l1_count else b""
        self._l1 = Table.parse(header.l1_offset, data)
        #: Clusters of the disk.
        self._clusters = header.geometry.clusters(header.size)
        # A snapshot of a disk that was larger when its L1 table was made, or was not: what is missing is unallocated.
        self._l1.entries.extend([0] * (header.geometry.l1_count(header.size) - len(self._l1.entries)))
        self._cache = Cache(max(cache_size // header.geometry.cluster_size, CACHED_COUNT_MIN))

    @property
    def l1_entries(self) -> array[int]:
        """The L1 table, to be read only."""
        return self._l1.entries

    def runs(self, start: int, end: int, *, ahead: bool) -> Iterator[Run]:
        """The runs of the clusters that the bytes [start, end) of the disk are in; with ``ahead`` those of some more
        then, in the last one's L2 table.

        Takes the lock, once a table, and never holds it across a ``yield``. Raises ImageError, OSError; not for
        what lies behind ``end``.
        """
        if start >= end:
            return
        per_table = self._geometry.l2_entries
        cluster, stop = start // self._geometry.cluster_size, self._geometry.clusters(end)
        while cluster < stop:
            cluster, runs = self._runs(cluster, stop)
            try:
                yield from runs
            except BadEntry as bad:
                raise self.bad_entry(bad.start, bad.found, bad.wanted) from bad
        limit = min(-(-stop // per_table) * per_table, stop + CLUSTERS_AHEAD_MAX, self._clusters)
        if ahead and stop < limit:
            _, runs = self._runs(stop, limit)
            with contextlib.suppress(BadEntry):  # who asks for that entry is told
                yield from runs

    def _runs(self, cluster: int, stop: int) -> tuple[int, Iterator[Run]]:
        """The runs of the clusters from ``cluster`` on that its L2 table maps, or, if it is not there, all that follow
        which are not, below ``stop``; and where they end. Raises ImageError, OSError; the runs BadEntry."""
        per_table, width = self._geometry.l2_entries, self._geometry.entry_words
        index, skip = divmod(cluster, per_table)
        limit = min((index + 1) * per_table, stop)
        with self._lock:
            entry = self._l1.entries[index]
            table = self._cache.get(index, self._load) if entry & OFFSET_MASK else None
            words = table.entries[skip * width : (skip + limit - cluster) * width] if table is not None else None
            if limit < stop and not entry:
                limit = min((index + equal_length(self._l1.entries, index)) * per_table, stop)
        if words is not None:
            return limit, self._geometry.runs(words, cluster, bool(entry & COPIED))
        size = self._geometry.cluster_size
        return limit, iter((Run(Kind.UNALLOCATED, cluster * size, limit * size, None, False, 0),))

    def words(self, offset: int, size: int) -> tuple[int, array[int]] | None:
        """The L2 entries of clusters around the byte ``offset``, WORDS_MAX at most, and which one the first is of; None
        if there are none. Of a disk of ``size`` bytes: not of the cluster that it ends in. Raises ImageError, OSError.
        """
        cluster = offset // self._geometry.cluster_size
        index, at = divmod(cluster, self._geometry.l2_entries)
        first = at // WORDS_MAX * WORDS_MAX
        start = cluster - at + first
        count = min(WORDS_MAX, size // self._geometry.cluster_size - start)
        with self._lock:
            if count <= 0 or not self._l1.entries[index] & OFFSET_MASK:
                return None
            return start, self._cache.get(index, self._load).entries[first : first + count]

    def bad_entry(self, start: int, found: str, wanted: str, table: int = 0) -> CorruptImage:
        """The ImageError for what the L2 entry of the guest cluster that begins at ``start`` says."""
        index, at = divmod(start // self._geometry.cluster_size, self._geometry.l2_entries)
        table = table or self._l1.entries[index] & OFFSET_MASK
        offset = table + at * 8 * self._geometry.entry_words
        return self._storage.error(f"L2 table {index}, entry {at}", offset, found, wanted)

    def _table(self, index: int) -> Table | None:
        return self._cache.get(index, self._load) if self._l1.entries[index] & OFFSET_MASK else None

    def _load(self, index: int) -> Table:
        entry, named_at = self._l1.entries[index], self._l1.place + index * 8
        what = f"L1 table, entry {index}"
        if entry & L1_RESERVED:
            raise self._storage.error(what, named_at, f"{entry:#018x}", "reserved bits clear")
        place = entry & OFFSET_MASK
        return Table.parse(place, self._storage.read_table(what, named_at, place, self._geometry.cluster_size))


class WritableMapping(Mapping):
    """A mapping that can change, in memory; `order` brings it into the file.

    Whoever calls what changes it holds the lock.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        cache_size: int,
        lock: threading.Lock,
        *,
        refcounts: Refcounts,
        occupied: Occupied,
        host: Host,
    ) -> None:
        super().__init__(storage, header, cache_size, lock)
        self._refcounts, self._occupied, self._host = refcounts, occupied, host
        #: L2 tables of snapshots, by place, that are not in the cache and are to be written.
        self._others: dict[int, Table] = {}

    @property
    def crowded(self) -> bool:
        """Whether so much has changed that it should be written back."""
        return self._cache.crowded or len(self._others) > CACHED_COUNT_MIN

    @property
    def is_clean(self) -> bool:
        """Whether the file has it all."""
        return self._cache.is_clean and not (self._l1.changed or self._others)

    def own(self, index: int) -> Table:
        """The L2 table ``index``, made or copied first if the active state does not have one to itself.

        Raises OSError (ENOSPC, ...), ImageError.
        """
        entry = self._l1.entries[index]
        old = self._table(index)
        if old is not None and entry & COPIED:
            return old
        if old is not None:
            self._refcounts.check_counted(old.place, 1, f"L1 table, entry {index}", self._l1.place + index * 8)
            entries = self._owned_copy(old.entries)
        else:
            entries = array("Q", bytes(self._geometry.cluster_size))
        start, _ = self._refcounts.take(1)
        place = start * self._geometry.cluster_size
        try:
            self._storage.reserve_zeroed(place, self._geometry.cluster_size)
        except BaseException:
            self._refcounts.give_back(start, 1)
            raise
        self._occupied.add(start)
        table = Table.new(place, entries)
        self._cache.change(index, table)
        self._l1.entries[index] = place | COPIED
        self._l1.mark(index)
        if old is not None:
            self._refcounts.retire(old.place, self._geometry.cluster_size, discard=False)
        return table

    def link(self, start: int, end: int, place: int, *, discard: bool) -> None:
        """Have the whole subclusters [start, end), within one L2 table, stored at ``place``, in host clusters that are
        theirs alone; let go of what they had.

        ``discard``: give back the storage of what becomes free by it. Raises OSError, ImageError, with nothing
        changed.
        """
        self._change(start, end, lambda words: self._geometry.linked(words, start, end, place), discard)

    def link_compressed(self, start: int, entry: int, *, discard: bool) -> None:
        """Have the cluster at ``start`` compressed, where ``entry`` says. ``discard``, errors: as `link`."""
        self._change(start, start + self._geometry.cluster_size, lambda _: self._geometry.packed(entry), discard)

    def zero(self, start: int, end: int, *, unmap: bool, discard: bool) -> None:
        """Have the whole subclusters [start, end), within one L2 table, read as zeroes (in version 2: unallocated).

        Whole clusters lose what they have in the file if they are compressed, or ``unmap`` says so. ``discard``,
        errors: as `link`.
        """
        self._change(start, end, lambda words: self._geometry.zeroed(words, start, end, unmap=unmap), discard)

    def unlink(self, start: int, end: int, *, discard: bool) -> None:
        """Have the whole clusters [start, end), within one L2 table, unallocated. ``discard``, errors: as `link`."""
        self._change(start, end, lambda words: array("Q", bytes(8 * len(words))), discard)

    def _change(self, start: int, end: int, new: Callable[[array[int]], array[int]], discard: bool) -> None:
        first, count = start // self._geometry.cluster_size, self._geometry.clusters(end)
        index, at = divmod(first, self._geometry.l2_entries)
        table, width = self.own(index), self._geometry.entry_words
        part = slice(at * width, (at + count - first) * width)
        old = table.entries[part]
        words = new(old)
        gone = self._gone(first, old, words) if any(old) else []
        table.entries[part] = words
        table.mark(part.start, len(words))
        self._cache.change(index, table)
        for offset, length in gone:
            self._host.retire(offset, length, discard=discard)

    def cut(self, cut: Cut) -> None:
        """Give all that the file lacks to ``cut``."""
        for table in self._cache.changed():
            (cut.prepare if table.unlinked else cut.link)(table)
        for table in self._others.values():
            cut.link(table)
        if self._l1.changed:
            cut.link(self._l1)

    def settle(self) -> None:
        """The file has what the cut took."""
        self._cache.settle()
        self._others = {place: table for place, table in self._others.items() if table.changed}

    # -- points in time ---------------------------------------------------------------------------------------------

    def lend(self, index: int) -> None:
        """Clear COPIED in the L1 entry ``index`` and in its L2 table: a snapshot has them too. ImageError, OSError."""
        table = self._table(index)
        if table is None:
            return
        if clear_copied(self._geometry, table.entries):
            table.mark(0, len(table.entries))
            self._cache.change(index, table)
        if self._l1.entries[index] & COPIED:
            self._l1.entries[index] &= ~COPIED
            self._l1.mark(index)

    def regain(self, index: int) -> None:
        """Set COPIED in the L1 entry ``index`` and in its L2 table where nobody else has them any more."""
        table = self._table(index)
        if table is None:
            return
        size, entries, at = self._geometry.cluster_size, table.entries[:: self._geometry.entry_words], 0
        while at < len(entries):
            entry, count = entries[at], self._geometry.run_length(entries, at)
            if entry & OFFSET_MASK and not entry & (COPIED | COMPRESSED):
                start = (entry & OFFSET_MASK) // size
                for first, stop, refcount in self._refcounts.runs(start, start + count):
                    if refcount == 1:
                        self._set_copied(index, table, at + first - start, stop - first)
            at += count
        if not self._l1.entries[index] & COPIED and self._refcounts.get(table.place // size) == 1:
            self._l1.entries[index] |= COPIED
            self._l1.mark(index)

    def _set_copied(self, index: int, table: Table, at: int, count: int) -> None:
        width = self._geometry.entry_words
        part = slice(at * width, (at + count) * width, width)
        table.entries[part] = array("Q", [entry | COPIED for entry in table.entries[part]])
        table.mark(at * width, count * width)
        self._cache.change(index, table)

    def correct(self, table: Table) -> None:
        """Have an L2 table of a snapshot, in which nothing but flags has changed, written with the next cut."""
        self._others[table.place] = table

    def cut_l1(self, count: int) -> array[int]:
        """Clear the L1 entries from ``count`` on. The whole table with only these: what they lead to stays counted."""
        entries = self._l1.entries
        gone = array("Q", bytes(8 * count)) + entries[count:]
        for index in range(count, len(entries)):
            if entries[index]:
                entries[index] = 0
                self._l1.mark(index)
        return gone

    def resize(self, clusters: int) -> None:
        """Be of a disk of so many clusters."""
        self._clusters = clusters

    def move_l1(self, entries: array[int], place: int, clusters: int) -> None:
        """Have another L1 table, which has been written to ``place``, for a disk of so many clusters.

        The L2 tables in memory stay what they are: if others take their place, nothing may wait to be written.
        """
        before = self._l1.entries
        if entries[: len(before)] != before:
            self._cache.clear()
        self._l1 = Table(place, entries)
        self._clusters = clusters

    def _gone(self, cluster: int, old: array[int], new: array[int]) -> list[tuple[int, int]]:
        """(offset, length) of the places in the file that ``old`` refers to and ``new`` does not."""
        gone = []
        for index, offset, length in self._geometry.gone(old, new):
            table, at = divmod(cluster + index, self._geometry.l2_entries)
            named_at = (self._l1.entries[table] & OFFSET_MASK) + at * 8 * self._geometry.entry_words
            self._host.check(offset, length, f"L2 table {table}, entry {at}", named_at)
            gone.append((offset, length))
        return gone

    def _owned_copy(self, words: array[int]) -> array[int]:
        """A copy of a shared L2 table. In those COPIED means nothing; in the copy it would be believed."""
        copy = words[:]
        for index in range(0, len(words), self._geometry.entry_words):
            if words[index] & COPIED and not self._host.is_alone(words[index] & OFFSET_MASK):
                copy[index] = words[index] & ~COPIED
        return copy
