"""What an image under check names besides its mapping: the L1 tables of snapshots, and what bitmaps are in.

Read as leniently as a check must: an entry that cannot be right is one finding, not the end, as long as it can be told
where the next one begins. Specification: "Snapshots", "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from layers.luks.header import used_length
from layers.ondisk.qcow2 import CRYPT_LUKS, ENCRYPTION_FIELDS, EXTENSION_ENCRYPTION, SNAPSHOT, SnapshotFields
from layers.qcow2.bitmap_directory import data_runs, read_directory, read_table
from layers.qcow2.encryption import Part
from layers.qcow2.findings import Findings, Unchecked
from layers.qcow2.limits import L1_TABLE_MAX, SNAPSHOT_EXTRA_DATA_MAX, SNAPSHOT_TABLE_MAX
from layers.qcow2.storage import Storage
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
        fields = SnapshotFields._make(SNAPSHOT.unpack(subject.peek(offset, SNAPSHOT.size)))
        if fields.extra_data_size > SNAPSHOT_EXTRA_DATA_MAX:
            raise _error(subject, f"{what}: extra data", offset + 36, fields.extra_data_size, SNAPSHOT_EXTRA_DATA_MAX)
        if subject.header.version >= 3 and fields.extra_data_size < EXTRA_DATA_MIN:
            findings.corrupt(f"{what}: {fields.extra_data_size} bytes of extra data, wanted {EXTRA_DATA_MIN}")
            findings.has_incomplete = True
        if fields.l1_table_offset % subject.cluster_size:
            findings.corrupt(f"{what}: L1 table at {fields.l1_table_offset:#x}, which is not aligned to clusters")
        elif fields.l1_size > L1_TABLE_MAX // 8:
            findings.corrupt(f"{what}: L1 table of {fields.l1_size} entries, allowed are {L1_TABLE_MAX // 8}")
        elif fields.l1_size and fields.l1_table_offset > DISK_MAX:
            findings.corrupt(f"{what}: L1 table at {fields.l1_table_offset:#x}, where nothing can be")
            raise Unchecked
        elif fields.l1_size:
            tables.append(Place(f"{what}: L1 table", fields.l1_table_offset, fields.l1_size * 8))
        offset += SNAPSHOT.size + fields.extra_data_size + fields.id_size + fields.name_size
        if offset - start > SNAPSHOT_TABLE_MAX:
            raise _error(subject, what, start, f"end {offset:#x}", f"a table of at most {SNAPSHOT_TABLE_MAX} bytes")
    return Place("snapshot table", start, offset - start), tables


def encryption(subject: Subject) -> Iterator[Place]:
    """The encryption header. Raises ImageError if it is said to be where it cannot be, or to be shorter than it is:
    what is lost of it takes all data with it, so that nothing of it may pass for free."""
    is_luks = subject.header.crypt_method == CRYPT_LUKS
    data = subject.header.extensions.get(EXTENSION_ENCRYPTION)
    if data is None:
        if is_luks:
            raise _error(subject, "is encrypted with LUKS and names no encryption header", None, None, None)
        return
    if len(data) != ENCRYPTION_FIELDS.size:
        raise _error(subject, "encryption header extension: length", None, len(data), ENCRYPTION_FIELDS.size)
    offset, length = ENCRYPTION_FIELDS.unpack(data)
    if offset % subject.cluster_size:
        raise _error(subject, "encryption header", None, f"place {offset:#x}", "one aligned to clusters")
    if is_luks:
        end = max(subject.size - offset, 0)
        least = used_length(Part(subject.file, offset, min(length, end)), offset)
        if not least <= length <= end:
            raise _error(subject, "encryption header: length", None, length, f"{least} to {end}")
    yield Place("encryption header", offset, length)


def bitmaps(subject: Subject, findings: Findings) -> Iterator[Place]:
    """The bitmap directory, bitmap tables, and bitmaps. Those that count: the image says that they are up to date.

    Raises Unchecked if it cannot be told where they are, ImageError, OSError.
    """
    storage = Storage(subject.file, subject.cluster_size)
    directory = read_directory(storage, subject.header)
    if directory.entries:
        yield Place("bitmap directory", directory.offset, directory.size)
    for entry in directory.entries:
        yield Place(f"table of bitmap {entry.name!r}", entry.table_offset, entry.table_count * 8)
        try:
            table = read_table(storage, entry)
        except ImageError as error:
            findings.corrupt(error.args[0])
            raise Unchecked from error
        for first, count in data_runs(table, subject.cluster_size):
            yield Place(f"bitmap {entry.name!r}", first * subject.cluster_size, count * subject.cluster_size)


def _error(subject: Subject, message: str, offset: int | None, found: object, wanted: object) -> ImageError:
    return ImageError(message, path=subject.file.filename, offset=offset, found=found, wanted=wanted)
