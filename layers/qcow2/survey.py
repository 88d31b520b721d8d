"""What an image's metadata says of its own places, checked before anything is written.

A table that is used for two purposes is where writing destroys images; that is refused here. So is a table outside
the file. Specification: "Snapshots", for the snapshot table.
"""

from __future__ import annotations

from collections.abc import Iterator

from layers.ondisk.qcow2 import COPIED, L1_RESERVED, OFFSET_MASK, REFCOUNT_TABLE_RESERVED, SNAPSHOT, SnapshotFields
from layers.qcow2.header import Header
from layers.qcow2.limits import L1_TABLE_MAX, SNAPSHOT_EXTRA_DATA_MAX, SNAPSHOT_TABLE_MAX
from layers.qcow2.mapping import Mapping
from layers.qcow2.occupied import Occupied
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.storage import Storage


class Survey:
    """Goes over the metadata of an image once, as it is opened for writing."""

    def __init__(self, storage: Storage, header: Header, mapping: Mapping, refcounts: Refcounts) -> None:
        self._storage, self._header, self._mapping, self._refcounts = storage, header, mapping, refcounts

    def fill(self, occupied: Occupied) -> None:
        """Put every cluster of metadata that is known into ``occupied``. Raises ImageError, OSError."""
        clusters: list[int] = []
        clusters_max = self._header.geometry.clusters(self._storage.size)
        for what, start, count in self._all():
            if len(clusters) + count > clusters_max:
                raise self._storage.error(f"{what}: no room for it in a file of {self._storage.size} bytes")
            clusters.extend(range(start, start + count))
        twice = occupied.fill(clusters)
        if twice is not None:
            names = [name for name, start, count in self._all() if start <= twice < start + count]
            raise self._storage.error(
                f"{' and '.join(names[:2])} overlap; repair the image with qemu-img check",
                twice * self._storage.cluster_size,
            )

    def _all(self) -> Iterator[tuple[str, int, int]]:
        """(what, first cluster, clusters) of every table."""
        header, size = self._header, self._storage.cluster_size
        yield "header", 0, 1
        yield "L1 table", header.l1_offset // size, header.geometry.clusters(header.l1_count * 8)
        yield "refcount table", header.refcount_table_offset // size, header.refcount_table_clusters
        yield from self._refcount_blocks()
        yield from self._l2_tables()
        if header.snapshots_count:
            yield from self._snapshots()

    def _refcount_blocks(self) -> Iterator[tuple[str, int, int]]:
        for number, place in enumerate(self._refcounts.places):
            if not place:
                continue
            what, named_at = f"refcount table, entry {number}", self._header.refcount_table_offset + number * 8
            if place & REFCOUNT_TABLE_RESERVED:
                raise self._storage.error(what, named_at, f"{place:#x}", "reserved bits clear")
            self._storage.check_place(what, named_at, place)
            yield what, place // self._storage.cluster_size, 1

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
        offset = start = self._header.snapshots_offset
        size = self._storage.cluster_size
        for number in range(self._header.snapshots_count):
            what = f"snapshot table, entry {number}"
            offset = -(-offset // 8) * 8
            if offset + SNAPSHOT.size > min(self._storage.size, start + SNAPSHOT_TABLE_MAX):
                wanted = f"a table of at most {SNAPSHOT_TABLE_MAX} bytes within the file"
                raise self._storage.error(what, offset, f"end {offset + SNAPSHOT.size:#x}", wanted)
            fields = SnapshotFields._make(SNAPSHOT.unpack(self._storage.file.pread(offset, SNAPSHOT.size)))
            if fields.extra_data_size > SNAPSHOT_EXTRA_DATA_MAX:
                wanted = f"at most {SNAPSHOT_EXTRA_DATA_MAX}"
                raise self._storage.error(f"{what}: extra data", offset + 36, fields.extra_data_size, wanted)
            if fields.l1_size > L1_TABLE_MAX // 8:
                wanted = f"at most {L1_TABLE_MAX // 8}"
                raise self._storage.error(f"{what}: L1 table", offset + 8, fields.l1_size, wanted)
            if fields.l1_size:
                self._storage.check_place(f"{what}: L1 table", offset, fields.l1_table_offset)
                clusters = self._header.geometry.clusters(fields.l1_size * 8)
                yield f"{what}: L1 table", fields.l1_table_offset // size, clusters
            offset += SNAPSHOT.size + fields.extra_data_size + fields.id_size + fields.name_size
        yield "snapshot table", start // size, self._header.geometry.clusters(offset - start)
