"""References: what L2 tables refer to, and their COPIED flags, by whole tables.

Every way from an L1 table to a cluster of the file counts once in that cluster's refcount: an L1 entry counts its L2
table, an L2 entry the clusters that it names. Specification: "Snapshots".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Final

from layers.ondisk.qcow2 import COMPRESSED, COPIED, L1_RESERVED, OFFSET_MASK
from layers.qcow2.cache import Table
from layers.qcow2.clusters import Geometry
from layers.qcow2.storage import Storage

#: The byte of an entry, in the machine's order, that has the flags.
_TOP: Final = array("Q", [COPIED]).tobytes().index(0x80)

#: That byte with COPIED clear, unless the entry is of a compressed cluster, whose bit that is not.
_CLEAR: Final = bytes(byte if byte & COMPRESSED >> 56 else byte & 0x7F for byte in range(256))


def tables(storage: Storage, geometry: Geometry, l1: Iterable[int], what: str) -> Iterator[tuple[int, Table]]:
    """(index, L2 table) for each entry of the L1 table ``what`` that names one, as they are in the file.

    Raises ImageError, OSError.
    """
    for index, entry in enumerate(l1):
        if not entry:
            continue
        name = f"{what}: L1 table, entry {index}"
        if entry & L1_RESERVED:
            raise storage.error(name, None, f"{entry:#018x}", "reserved bits clear")
        place = entry & OFFSET_MASK
        if place % geometry.cluster_size or not 0 < place < storage.size:
            raise storage.error(
                name, None, f"place {place:#x}", f"a cluster of the file, which ends at {storage.size:#x}"
            )
        there = min(geometry.cluster_size, storage.size - place)
        data = storage.file.pread(place, there) + bytes(geometry.cluster_size - there)
        yield index, Table.parse(place, data)


def clusters(geometry: Geometry, words: array[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of the clusters of the file that L2 entries refer to, once for each reference.

    Raises BadEntry for what no valid image contains.
    """
    size = geometry.cluster_size
    for offset, length in geometry.places(words):
        yield offset // size, (offset + length - 1) // size + 1


def clear_copied(geometry: Geometry, words: array[int]) -> bool:
    """Clear COPIED in the L2 entries; whether it was set in any."""
    top = memoryview(words).cast("B")[_TOP :: 8 * geometry.entry_words]
    before = bytes(top)
    after = before.translate(_CLEAR)
    top[:] = after
    return after != before
