"""What an image's metadata says of its own places, checked before anything is written.

A table that is used for two purposes is where writing destroys images; that is refused here. So is a table outside
the file.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence

from layers.ondisk.qcow2 import COPIED, CRYPT_LUKS, L1_RESERVED, OFFSET_MASK, REFCOUNT_TABLE_RESERVED
from layers.qcow2.bitmap_directory import Directory, places
from layers.qcow2.header import Header
from layers.qcow2.mapping import Mapping
from layers.qcow2.occupied import Occupied
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.snapshot_table import Entry
from layers.qcow2.storage import Storage


class Survey:
    """Goes over the metadata of an image once, as it is opened for writing."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        mapping: Mapping,
        refcounts: Refcounts,
        snapshots: tuple[Sequence[Entry], int],
        bitmaps: Directory,
    ) -> None:
        """``snapshots``: the entries of the snapshot table, and its length."""
        self._storage, self._header, self._mapping, self._refcounts = storage, header, mapping, refcounts
        self._snapshot_entries, self._snapshots_length = snapshots
        self._bitmaps = bitmaps

    def fill(self, occupied: Occupied) -> None:
        """Put every cluster of metadata that is known into ``occupied``. Raises ImageError, OSError."""
        clusters = self._l2_clusters()
        clusters_max = self._header.geometry.clusters(self._storage.size)
        for what, start, count in self._all(but_l2_tables=bool(clusters)):
            if len(clusters) + count > clusters_max:
                raise self._storage.error(f"{what}: no room for it in a file of {self._storage.size} bytes")
            clusters.extend(range(start, start + count))
        twice = occupied.fill(clusters)
        if twice is not None:
            names = [name for name, start, count in self._all() if start <= twice < start + count]
            raise self._storage.error(
                f"{' and '.join(names[:2])} overlap; repair the image with nbdserver image check",
                twice * self._storage.cluster_size,
            )

    def _all(self, *, but_l2_tables: bool = False) -> Iterator[tuple[str, int, int]]:
        """(what, first cluster, clusters) of every table."""
        header, size = self._header, self._storage.cluster_size
        yield "header", 0, 1
        yield "L1 table", header.l1_offset // size, header.geometry.clusters(header.l1_count * 8)
        yield "refcount table", header.refcount_table_offset // size, header.refcount_table_clusters
        if header.crypt_method == CRYPT_LUKS:
            offset, length = header.encryption
            yield "encryption header", offset // size, header.geometry.clusters(length)
        yield from self._refcount_blocks()
        if not but_l2_tables:
            yield from self._l2_tables()
        yield from self._snapshots()
        if self._bitmaps.entries:
            yield "bitmap directory", self._bitmaps.offset // size, header.geometry.clusters(self._bitmaps.size)
        for entry in self._bitmaps.entries:
            yield from places(self._storage, entry)

    def _refcount_blocks(self) -> Iterator[tuple[str, int, int]]:
        for number, place in enumerate(self._refcounts.places):
            if not place:
                continue
            what, named_at = f"refcount table, entry {number}", self._header.refcount_table_offset + number * 8
            if place & REFCOUNT_TABLE_RESERVED:
                raise self._storage.error(what, named_at, f"{place:#x}", "reserved bits clear")
            self._storage.check_place(what, named_at, place)
            yield what, place // self._storage.cluster_size, 1

    def _l2_clusters(self) -> list[int]:
        """The clusters of the L2 tables, in order, if they all are this disk's alone and can be where they are said to
        be: of large disks there are 100,000s. Nothing if one has to be looked at by itself."""
        storage, entries = self._storage, self._mapping.l1_entries
        used = array("Q", filter(None, entries)) if entries.count(0) else entries
        # All of them at once, as the digits of one number.
        ones, digits = (int.from_bytes(words, sys.byteorder) for words in (array("Q", [1]) * len(used), used))
        unusual = L1_RESERVED | storage.cluster_size - 1
        if digits & ones * (COPIED | unusual) != ones * COPIED:
            return []
        # What is shifted out of a digit is zero, and so is what the next one gets of it.
        places = (digits ^ ones * COPIED) >> self._header.geometry.cluster_bits
        clusters = sorted(array("Q", places.to_bytes(len(used) * used.itemsize, sys.byteorder)))
        if not clusters or clusters[0] == 0 or clusters[-1] * storage.cluster_size >= storage.size:
            return []
        return clusters

    def _l2_tables(self) -> Iterator[tuple[str, int, int]]:
        shared = set()
        for index, entry in enumerate(self._mapping.l1_entries):
            if not entry:
                continue
            what, named_at = f"L1 table, entry {index}", self._header.l1_offset + index * 8
            if entry & L1_RESERVED:
                raise self._storage.error(what, named_at, f"{entry:#018x}", "reserved bits clear")
            place = entry & OFFSET_MASK
            self._storage.check_place(what, named_at, place)
            if not entry & COPIED:  # written only as copies: two entries may well name one
                if place in shared:
                    continue
                shared.add(place)
            yield what, place // self._storage.cluster_size, 1

    def _snapshots(self) -> Iterator[tuple[str, int, int]]:
        """The snapshot table, and the L1 tables that it names."""
        size, geometry = self._storage.cluster_size, self._header.geometry
        if self._snapshot_entries:
            yield "snapshot table", self._header.snapshots_offset // size, geometry.clusters(self._snapshots_length)
        for number, entry in enumerate(self._snapshot_entries):
            yield (
                f"snapshot table, entry {number}: L1 table",
                entry.l1_place // size,
                geometry.clusters(entry.l1_count * 8),
            )
