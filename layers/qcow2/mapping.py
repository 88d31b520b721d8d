"""The mapping: L1 and L2 tables, from guest clusters to what holds them.

Specification: "Cluster mapping".
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator

from layers.ondisk.qcow2 import COMPRESSED, COPIED, L1_RESERVED, OFFSET_MASK
from layers.qcow2.cache import Cache, Table
from layers.qcow2.clusters import BadEntry, Kind, Run
from layers.qcow2.header import Header
from layers.qcow2.limits import CACHED_COUNT_MIN
from layers.qcow2.occupied import Occupied
from layers.qcow2.order import Cut
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.references import clear_copied
from layers.qcow2.storage import Storage
from nbdserver.errors import ImageError


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

    def runs(self, first: int, stop: int, *, ahead: bool) -> Iterator[Run]:
        """The runs of the guest clusters [first, stop); with ``ahead`` on to the end of the last one's L2 table.

        Takes the lock, once a table, and never holds it across a ``yield``. Raises ImageError, OSError; not for
        what lies behind ``stop``.
        """
        cluster, per_table = first, self._geometry.l2_entries
        while cluster < stop:
            index, skip = divmod(cluster, per_table)
            limit = min((index + 1) * per_table, self._clusters if ahead else stop)
            with self._lock:
                owned = bool(self._l1.entries[index] & COPIED)
                table = self._table(index)
                entries = table.entries[skip : skip + limit - cluster] if table is not None else None
                place = table.place if table is not None else 0
            if entries is None:
                yield Run(Kind.UNALLOCATED, cluster, limit, 0, owned)
                cluster = limit
                continue
            start, base = 0, cluster
            while cluster < limit:
                try:
                    kind = self._geometry.kind(entries[start])
                except BadEntry as bad:
                    if cluster >= stop:
                        return
                    raise self.bad_entry(cluster, entries[start], str(bad), place) from bad
                after = start + self._geometry.run_length(entries, start)
                yield Run(kind, cluster, base + after, entries[start], owned)
                start, cluster = after, base + after

    def bad_entry(self, cluster: int, entry: int, wanted: str, table: int = 0) -> ImageError:
        """The ImageError for what the L2 entry of a guest cluster says."""
        index, at = divmod(cluster, self._geometry.l2_entries)
        table = table or self._l1.entries[index] & OFFSET_MASK
        return self._storage.error(f"L2 table {index}, entry {at}", table + at * 8, f"{entry:#018x}", wanted)

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
    ) -> None:
        super().__init__(storage, header, cache_size, lock)
        self._refcounts, self._occupied = refcounts, occupied
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
            self._check_counted(old.place, 1, f"L1 table, entry {index}", self._l1.place + index * 8)
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

    def replace(self, cluster: int, entries: array[int], *, discard: bool) -> None:
        """Give guest clusters from ``cluster`` on, within one L2 table, new entries, and retire what they held.

        ``discard``: give back the storage of what becomes free by it. Raises OSError, ImageError, with nothing
        changed.
        """
        index, at = divmod(cluster, self._geometry.l2_entries)
        table = self.own(index)
        old = table.entries[at : at + len(entries)]
        gone = self._gone(cluster, old, entries) if any(old) else []
        table.entries[at : at + len(entries)] = entries
        table.mark(at, len(entries))
        self._cache.change(index, table)
        for offset, length in gone:
            self._refcounts.retire(offset, length, discard=discard)

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
        if clear_copied(table.entries):
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
        size, at = self._geometry.cluster_size, 0
        while at < len(table.entries):
            entry, count = table.entries[at], self._geometry.run_length(table.entries, at)
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
        part = slice(at, at + count)
        table.entries[part] = array("Q", [entry | COPIED for entry in table.entries[part]])
        table.mark(at, count)
        self._cache.change(index, table)

    def correct(self, table: Table) -> None:
        """Have an L2 table of a snapshot, in which nothing but flags has changed, written with the next cut."""
        self._others[table.place] = table

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
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            if before & COMPRESSED:
                place = self._geometry.compressed(before)
            elif before & OFFSET_MASK and (before ^ after) & OFFSET_MASK:
                place = before & OFFSET_MASK, self._geometry.cluster_size
            else:
                continue
            table, at = divmod(cluster + index, self._geometry.l2_entries)
            named_at = (self._l1.entries[table] & OFFSET_MASK) + at * 8
            self._check_data(*place, f"L2 table {table}, entry {at}", named_at)
            gone.append(place)
        return gone

    def _check_data(self, offset: int, length: int, what: str, named_at: int) -> None:
        """Raise ImageError if guest data that is to be let go lies where metadata does, or where nothing counts it."""
        size = self._geometry.cluster_size
        start, stop = offset // size, (offset + length - 1) // size + 1
        if self._occupied.overlaps(start, stop - start):
            raise self._storage.error(what, named_at, f"place {offset:#x}", "one that does not hold metadata")
        self._check_counted(offset, length, what, named_at)

    def _check_counted(self, offset: int, length: int, what: str, named_at: int) -> None:
        size = self._geometry.cluster_size
        for cluster in range(offset // size, (offset + length - 1) // size + 1):
            if self._refcounts.get(cluster) == 0:
                raise self._storage.error(what, named_at, f"place {offset:#x} with refcount 0", "at least 1")

    def _owned_copy(self, entries: array[int]) -> array[int]:
        """A copy of a shared L2 table. In those COPIED means nothing; in the copy it would be believed."""
        copy = entries[:]
        for index, entry in enumerate(entries):
            place = entry & OFFSET_MASK
            if entry & COPIED and self._refcounts.get(place // self._geometry.cluster_size) != 1:
                copy[index] = entry & ~COPIED
        return copy
