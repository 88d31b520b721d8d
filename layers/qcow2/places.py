"""What an image under check names besides its mapping: the L1 tables of snapshots, and what bitmaps are in.

Read as leniently as a check must: an entry that cannot be right is one finding, not the end, as long as it can be told
where the next one begins. Specification: "Snapshots", "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from layers.ondisk.qcow2 import (
    AUTOCLEAR_BITMAPS,
    BITMAP_ALL_ONES,
    BITMAP_AUTO,
    BITMAP_ENTRY,
    BITMAP_IN_USE,
    BITMAP_TABLE_RESERVED,
    BITMAP_TYPE_DIRTY,
    BITMAPS_FIELDS,
    ENCRYPTION_FIELDS,
    EXTENSION_BITMAPS,
    EXTENSION_ENCRYPTION,
    OFFSET_MASK,
    SNAPSHOT,
    BitmapEntryFields,
    SnapshotFields,
)
from layers.qcow2.findings import Findings, Unchecked
from layers.qcow2.limits import (
    BITMAP_DIRECTORY_MAX,
    BITMAP_GRANULARITY_BITS_MAX,
    BITMAP_GRANULARITY_BITS_MIN,
    BITMAP_MAX,
    BITMAP_NAME_MAX,
    BITMAP_TABLE_COUNT_MAX,
    BITMAPS_COUNT_MAX,
    L1_TABLE_MAX,
    SNAPSHOT_EXTRA_DATA_MAX,
    SNAPSHOT_TABLE_MAX,
)
from layers.qcow2.subject import Subject
from nbdserver.errors import ImageError
from nbdserver.limits import DISK_MAX

#: Version 3 needs these fields of a snapshot's extra data: the VM state's size, and the disk's.
EXTRA_DATA_MIN: Final = 16


class Place(NamedTuple):
    """``length`` bytes of metadata at ``offset``."""

    what: str
    offset: int
    length: int


def snapshots(subject: Subject, findings: Findings) -> tuple[Place, list[Place]]:
    """The snapshot table, and the L1 tables that it names. Raises Unchecked, ImageError if it cannot be read, and
    OSError."""
    start = offset = subject.header.snapshots_offset
    tables = []
    for number in range(subject.header.snapshots_count):
        what = f"snapshot table, entry {number}"
        offset = -(-offset // 8) * 8
        fields = SnapshotFields._make(SNAPSHOT.unpack(subject.read(offset, SNAPSHOT.size)))
        if fields.extra_data_size > SNAPSHOT_EXTRA_DATA_MAX:
            raise _error(subject, f"{what}: extra data", offset + 36, fields.extra_data_size, SNAPSHOT_EXTRA_DATA_MAX)
        if subject.header.version >= 3 and fields.extra_data_size < EXTRA_DATA_MIN:
            findings.corrupt(f"{what}: {fields.extra_data_size} bytes of extra data, wanted {EXTRA_DATA_MIN}")
        if fields.l1_table_offset % subject.cluster_size:
            findings.corrupt(f"{what}: L1 table at {fields.l1_table_offset:#x}, which is not aligned to clusters")
        elif fields.l1_size > L1_TABLE_MAX // 8:
            findings.corrupt(f"{what}: L1 table of {fields.l1_size} entries, allowed are {L1_TABLE_MAX // 8}")
        elif fields.l1_table_offset > DISK_MAX:
            findings.corrupt(f"{what}: L1 table at {fields.l1_table_offset:#x}, where nothing can be")
            raise Unchecked
        elif fields.l1_size:
            tables.append(Place(f"{what}: L1 table", fields.l1_table_offset, fields.l1_size * 8))
        offset += SNAPSHOT.size + fields.extra_data_size + fields.id_size + fields.name_size
        if offset - start > SNAPSHOT_TABLE_MAX:
            raise _error(subject, what, start, f"end {offset:#x}", f"a table of at most {SNAPSHOT_TABLE_MAX} bytes")
    return Place("snapshot table", start, offset - start), tables


def encryption(subject: Subject) -> Iterator[Place]:
    """The encryption header. Raises ImageError if it is said to be where it cannot be."""
    data = subject.header.extensions.get(EXTENSION_ENCRYPTION)
    if data is None:
        return
    if len(data) != ENCRYPTION_FIELDS.size:
        raise _error(subject, "encryption header extension: length", None, len(data), ENCRYPTION_FIELDS.size)
    offset, length = ENCRYPTION_FIELDS.unpack(data)
    if offset % subject.cluster_size:
        raise _error(subject, "encryption header", None, f"place {offset:#x}", "one aligned to clusters")
    yield Place("encryption header", offset, length)


def bitmaps(subject: Subject, findings: Findings) -> Iterator[Place]:
    """The bitmap directory, bitmap tables, and bitmaps. Those that count: the image says that they are up to date.

    Raises Unchecked if it cannot be told where they are, ImageError, OSError.
    """
    data = subject.header.extensions.get(EXTENSION_BITMAPS)
    if data is None or not subject.header.autoclear & AUTOCLEAR_BITMAPS:
        return
    count, offset, length = _bitmaps_extension(subject, data)
    yield Place("bitmap directory", offset, length)
    for what, fields in _bitmap_entries(subject, findings, count, offset, length):
        yield Place(f"{what}: table", fields.table_offset, fields.table_size * 8)
        for number, entry in enumerate(subject.entries(fields.table_offset, fields.table_size)):
            place = entry & OFFSET_MASK
            if entry & BITMAP_TABLE_RESERVED or place % subject.cluster_size or (place and entry & BITMAP_ALL_ONES):
                findings.corrupt(f"{what}: table, entry {number} is {entry:#018x}")
                raise Unchecked
            if place:
                yield Place(f"{what}: table, entry {number}", place, subject.cluster_size)


def _bitmaps_extension(subject: Subject, data: bytes) -> tuple[int, int, int]:
    """(number of bitmaps, offset, length of their directory)."""
    what = "bitmaps extension"
    if len(data) != BITMAPS_FIELDS.size:
        raise _error(subject, f"{what}: length", None, len(data), BITMAPS_FIELDS.size)
    count, reserved, length, offset = BITMAPS_FIELDS.unpack(data)
    if reserved:
        raise _error(subject, f"{what}: reserved field", None, reserved, 0)
    if not 1 <= count <= BITMAPS_COUNT_MAX:
        raise _error(subject, f"{what}: number of bitmaps", None, count, f"1 to {BITMAPS_COUNT_MAX}")
    if offset % subject.cluster_size:
        raise _error(subject, f"{what}: directory", None, f"place {offset:#x}", "one aligned to clusters")
    if length > BITMAP_DIRECTORY_MAX:
        raise _error(subject, f"{what}: directory size", None, length, f"at most {BITMAP_DIRECTORY_MAX}")
    return count, offset, length


def _bitmap_entries(
    subject: Subject, findings: Findings, count: int, offset: int, length: int
) -> Iterator[tuple[str, BitmapEntryFields]]:
    """(what, entry) for each of the bitmap directory."""
    directory, at = subject.read(offset, length), 0
    for number in range(count):
        what = f"bitmap directory, entry {number}"
        if at + BITMAP_ENTRY.size > length:
            findings.corrupt(f"{what} at {offset + at:#x} passes the directory's end, {offset + length:#x}")
            raise Unchecked
        fields = BitmapEntryFields._make(BITMAP_ENTRY.unpack_from(directory, at))
        at += -(-(BITMAP_ENTRY.size + fields.name_size + fields.extra_data_size) // 8) * 8
        wrong = _wrong_bitmap(subject, fields)
        if wrong is not None or at > length:
            findings.corrupt(f"{what}: {wrong or 'passes the end of the directory'}")
            raise Unchecked
        yield what, fields
    if at != length:
        findings.corrupt(f"bitmap directory: {length} bytes, of which {count} bitmaps use {at}")
        raise Unchecked


def _wrong_bitmap(subject: Subject, fields: BitmapEntryFields) -> str | None:
    """What no bitmap can have."""
    length = fields.table_size * subject.cluster_size
    reach = (length * 8) << fields.granularity_bits
    checks = {
        f"table at {fields.table_offset:#x}": fields.table_offset == 0 or fields.table_offset % subject.cluster_size,
        f"table of {fields.table_size} entries": not 1 <= fields.table_size <= BITMAP_TABLE_COUNT_MAX,
        f"flags {fields.flags:#x}": fields.flags & ~(BITMAP_IN_USE | BITMAP_AUTO),
        f"type {fields.type}": fields.type != BITMAP_TYPE_DIRTY,
        f"granularity of {fields.granularity_bits} bits": not BITMAP_GRANULARITY_BITS_MIN
        <= fields.granularity_bits
        <= BITMAP_GRANULARITY_BITS_MAX,
        f"name of {fields.name_size} bytes": fields.name_size > BITMAP_NAME_MAX,
        f"extra data of {fields.extra_data_size} bytes": fields.extra_data_size,
        f"{length} bytes": length > BITMAP_MAX,
        f"reaches over {reach} bytes only": not fields.flags & BITMAP_IN_USE and reach < subject.header.size,
    }
    return next((text for text, is_wrong in checks.items() if is_wrong), None)


def _error(subject: Subject, message: str, offset: int | None, found: object, wanted: object) -> ImageError:
    return ImageError(message, path=subject.file.filename, offset=offset, found=found, wanted=wanted)
