"""Persistent bitmaps as the image has them: the directory, its entries, their tables.

::

    header extension ──> bitmap directory ──> bitmap table ──> cluster of bits │ all zeroes │ all ones
                         name, flags,         (one for each bitmap)
                         granularity

While a bitmap's flag ``in_use`` is set, what its table says is out of date: somebody has it in memory, or went away
without storing it. The header's autoclear bit says whether any of this can be believed at all.

Specification: "Bitmaps extension" and "Bitmaps". Bounds are QEMU's: what it cannot open we neither read nor make.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from layers.ondisk.qcow2 import (
    AUTOCLEAR_BITMAPS,
    BITMAP_ALL_ONES,
    BITMAP_AUTO,
    BITMAP_ENTRY,
    BITMAP_EXTRA_COMPATIBLE,
    BITMAP_FLAGS_RESERVED,
    BITMAP_IN_USE,
    BITMAP_TABLE_RESERVED,
    BITMAP_TYPE_DIRTY,
    BITMAPS_FIELDS,
    EXTENSION_BITMAPS,
    OFFSET_MASK,
    BitmapEntryFields,
)
from layers.qcow2.header import Header
from layers.qcow2.limits import (
    BITMAP_DIRECTORY_MAX,
    BITMAP_GRANULARITY_BITS_MAX,
    BITMAP_GRANULARITY_BITS_MIN,
    BITMAP_MAX,
    BITMAP_NAME_MAX,
    BITMAP_TABLES_COUNT_MAX,
    BITMAPS_COUNT_MAX,
    BITMAPS_MAX,
)
from layers.qcow2.storage import Storage
from nbdserver.errors import ImageError


@dataclass(frozen=True)
class Entry:
    """One bitmap, as the directory describes it."""

    name: str
    table_offset: int
    #: Entries of its table.
    table_count: int
    flags: int
    granularity_bits: int
    #: Whose meaning nobody knows; kept as it is.
    extra: bytes = b""

    @property
    def granularity(self) -> int:
        return 1 << self.granularity_bits

    @property
    def is_auto(self) -> bool:
        """Whether it must record every write."""
        return bool(self.flags & BITMAP_AUTO)

    @property
    def is_in_use(self) -> bool:
        return bool(self.flags & BITMAP_IN_USE)

    @property
    def is_usable(self) -> bool:
        """Whether nothing unknown is attached to it that forbids to use it."""
        return not self.extra or bool(self.flags & BITMAP_EXTRA_COMPATIBLE)

    def flagged(self, *, auto: bool, in_use: bool) -> Entry:
        """The same with these flags."""
        kept = self.flags & BITMAP_EXTRA_COMPATIBLE
        return dataclasses.replace(self, flags=kept | BITMAP_AUTO * auto | BITMAP_IN_USE * in_use)

    def encoded(self) -> bytes:
        name = os.fsencode(self.name)
        fields = BitmapEntryFields(
            self.table_offset,
            self.table_count,
            self.flags,
            BITMAP_TYPE_DIRTY,
            self.granularity_bits,
            len(name),
            len(self.extra),
        )
        data = BITMAP_ENTRY.pack(*fields) + self.extra + name
        return data + bytes(-len(data) % 8)


class Directory(NamedTuple):
    """Where the directory is, and what is in it; all 0 and nothing if there is none."""

    offset: int
    size: int
    entries: tuple[Entry, ...]

    def extension(self) -> bytes:
        """The content of the header extension that names it."""
        return BITMAPS_FIELDS.pack(len(self.entries), 0, self.size, self.offset)


def encode(entries: Iterable[Entry]) -> bytes:
    return b"".join(entry.encoded() for entry in entries)


def has_bitmaps(header: Header) -> bool:
    """Whether there are bitmaps that can be believed. Where the autoclear bit is not set, somebody has written to the
    image who knows nothing of them."""
    return EXTENSION_BITMAPS in header.extensions and bool(header.autoclear & AUTOCLEAR_BITMAPS)


def table_count(size: int, granularity: int, cluster_size: int) -> int:
    """Entries of the table of a bitmap of a disk of ``size`` bytes."""
    return -(-size // (granularity * 8 * cluster_size))


def excess(entries: Iterable[Entry], size: int) -> str | None:
    """In words, what all these bitmaps of a disk of ``size`` bytes are too much for; None: for nothing."""
    known = tuple(entries)
    for what, found, most in (
        ("bytes of bitmap directory", len(encode(known)), BITMAP_DIRECTORY_MAX),
        ("bytes of bits", sum(table_count(size, e.granularity, 1) for e in known if not e.is_in_use), BITMAPS_MAX),
        ("entries of bitmap tables", sum(entry.table_count for entry in known), BITMAP_TABLES_COUNT_MAX),
    ):
        if found > most:
            return f"{found} {what}, at most {most} are allowed"
    return None


def read_directory(storage: Storage, header: Header) -> Directory:
    """The directory and everything in it, checked. Raises ImageError, OSError."""
    if not has_bitmaps(header):
        return Directory(0, 0, ())
    extension = header.extensions[EXTENSION_BITMAPS]
    if len(extension) != BITMAPS_FIELDS.size:
        raise storage.error("bitmaps extension: length", None, len(extension), BITMAPS_FIELDS.size)
    count, reserved, size, offset = BITMAPS_FIELDS.unpack(extension)
    for what, found, is_right, wanted in (
        ("number of bitmaps", count, 1 <= count <= BITMAPS_COUNT_MAX, f"1 to {BITMAPS_COUNT_MAX}"),
        ("reserved field", reserved, reserved == 0, "0"),
        ("size of the directory", size, count * 32 <= size <= BITMAP_DIRECTORY_MAX, f"at most {BITMAP_DIRECTORY_MAX}"),
    ):
        if not is_right:
            raise storage.error(f"bitmaps extension: {what}", None, found, wanted)
    if offset % storage.cluster_size or not 0 < offset <= storage.size - size:
        wanted = f"a multiple of {storage.cluster_size:#x} within the file, which ends at {storage.size:#x}"
        raise storage.error("bitmaps extension: directory", None, f"{offset:#x}, of {size} bytes", wanted)
    entries = tuple(_entries(storage, header, offset, storage.file.pread(offset, size), count))
    wrong = excess(entries, header.size)
    if wrong is not None:
        raise storage.error(f"bitmap directory: {wrong}", offset)
    return Directory(offset, size, entries)


def check_recordable(storage: Storage, directory: Directory) -> None:
    """Raise ImageError if there is a bitmap that must record what is written, and that we may not use."""
    for entry in directory.entries:
        if entry.is_auto and not entry.is_in_use and not entry.is_usable:
            raise storage.error(
                f"bitmap {entry.name!r} must record what is written, but has extra data that is not understood: open "
                "the image read-only"
            )


def _entries(storage: Storage, header: Header, offset: int, data: bytes, count: int) -> Iterator[Entry]:
    names = set()
    at = 0
    for number in range(count):
        what = f"bitmap directory, entry {number}"
        if len(data) - at < BITMAP_ENTRY.size:
            raise storage.error(what, offset + at, f"{len(data) - at} bytes left", f"at least {BITMAP_ENTRY.size}")
        fields = BitmapEntryFields._make(BITMAP_ENTRY.unpack_from(data, at))
        length = -(-(BITMAP_ENTRY.size + fields.extra_data_size + fields.name_size) // 8) * 8
        if length > len(data) - at:
            raise storage.error(what, offset + at, f"a length of {length}", f"at most the {len(data) - at} bytes left")
        name_at = at + BITMAP_ENTRY.size + fields.extra_data_size
        name = os.fsdecode(data[name_at : name_at + fields.name_size])
        _check_fields(storage, header, f"bitmap {name!r}", offset + at, fields)
        if name in names:
            raise storage.error(f"{what}: two bitmaps are called {name!r}", offset + at)
        names.add(name)
        yield Entry(
            name,
            fields.table_offset,
            fields.table_size,
            fields.flags,
            fields.granularity_bits,
            data[at + BITMAP_ENTRY.size : name_at],
        )
        at += length
    if at != len(data):
        raise storage.error("bitmap directory", offset, f"{len(data) - at} bytes behind its last entry", "none")


def _check_fields(storage: Storage, header: Header, what: str, at: int, fields: BitmapEntryFields) -> None:
    cluster_size = header.geometry.cluster_size
    bits_min, bits_max = BITMAP_GRANULARITY_BITS_MIN, BITMAP_GRANULARITY_BITS_MAX
    flags, granularity_bits, name_size = fields.flags, fields.granularity_bits, fields.name_size
    for field, found, is_right, wanted in (
        ("type", fields.type, fields.type == BITMAP_TYPE_DIRTY, f"{BITMAP_TYPE_DIRTY} (dirty tracking)"),
        ("granularity_bits", granularity_bits, bits_min <= granularity_bits <= bits_max, f"{bits_min} to {bits_max}"),
        ("flags", f"{flags:#x}", not flags & BITMAP_FLAGS_RESERVED, "reserved bits clear"),
        ("name_size", name_size, 1 <= name_size <= BITMAP_NAME_MAX, f"1 to {BITMAP_NAME_MAX}"),
    ):
        if not is_right:
            raise storage.error(f"{what}: {field}", at, found, wanted)
    storage.check_place(f"{what}: its table", at, fields.table_offset)
    end = -(-storage.size // cluster_size) * cluster_size  # the last cluster may be cut off
    count_max = min(BITMAP_MAX // cluster_size, (end - fields.table_offset) // 8)
    if not 1 <= fields.table_size <= count_max:
        raise storage.error(f"{what}: entries of its table", at + 8, fields.table_size, f"1 to {count_max}")
    needed = table_count(header.size, 1 << granularity_bits, cluster_size)
    if not flags & BITMAP_IN_USE and fields.table_size != needed:  # the size that one in use has may be an old disk's
        raise storage.error(f"{what}: entries of its table", at + 8, fields.table_size, str(needed))


def read_table(storage: Storage, entry: Entry) -> array[int]:
    """The table of a bitmap, checked. Raises ImageError, OSError."""
    what = f"bitmap {entry.name!r}: its table"
    table = array("Q")
    table.frombytes(storage.read_table(what, 0, entry.table_offset, entry.table_count * 8))
    if sys.byteorder == "little":
        table.byteswap()
    for index, value in enumerate(table):
        if value > BITMAP_ALL_ONES:
            place, named_at = value & OFFSET_MASK, entry.table_offset + index * 8
            if value & BITMAP_TABLE_RESERVED or value & BITMAP_ALL_ONES:
                raise storage.error(f"{what}, entry {index}", named_at, f"{value:#018x}", "reserved bits clear")
            storage.check_place(f"{what}, entry {index}", named_at, place)
    return table


def places(storage: Storage, entry: Entry) -> Iterator[tuple[str, int, int]]:
    """(what, first cluster, clusters) of all that a bitmap takes up. Of one in use whose table is broken, only the
    table: what was in its clusters is lost in any case. Raises ImageError, OSError."""
    size = storage.cluster_size
    what = f"bitmap {entry.name!r}"
    yield f"{what}: its table", entry.table_offset // size, -(-entry.table_count * 8 // size)
    try:
        table = read_table(storage, entry)
    except ImageError:
        if entry.is_in_use:
            return
        raise
    for first, count in data_runs(table, size):
        yield f"{what}: its data", first, count


def data_runs(table: array[int], cluster_size: int) -> Iterator[tuple[int, int]]:
    """(first cluster, clusters) of the clusters of bits that a table names, those joined that follow one another."""
    start = count = 0
    for value in table:
        cluster = value // cluster_size
        if not cluster:
            continue
        if count and cluster == start + count:
            count += 1
            continue
        if count:
            yield start, count
        start, count = cluster, 1
    if count:
        yield start, count
