"""The snapshot table: which internal snapshots an image has, and where their L1 tables are.

::

    entry ──> entry ──> ...     each: fixed fields, extra data, ID, name; padded to 8 bytes
      └─> L1 table (as the active one was)

What is not understood of the extra data is kept as it is. Specification: "Snapshots".
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable

from layers.ondisk.qcow2 import ICOUNT_NONE, SNAPSHOT, SNAPSHOT_EXTRA, SNAPSHOT_EXTRA_FIELD, SnapshotFields
from layers.qcow2.limits import L1_TABLE_MAX, SNAPSHOT_EXTRA_DATA_MAX, SNAPSHOT_TABLE_MAX, SNAPSHOT_TABLE_READ
from layers.qcow2.storage import Storage
from nbdserver.format import Snapshot

#: Where the fields of the extra data are.
STATE_SIZE, DISK_SIZE, ICOUNT = 0, 8, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One snapshot. ID and name are what the bytes of the file are as a file name would be."""

    l1_place: int
    l1_count: int
    id: str
    name: str
    date_s: int
    date_ns: int
    vm_clock_ns: int
    #: The fixed field; what counts is `state_size`.
    vm_state_size: int
    extra: bytes

    @property
    def state_size(self) -> int:
        """How much VM state it has, behind the disk's end, bytes."""
        size = self._extra_field(STATE_SIZE)
        return self.vm_state_size if size is None else size

    @property
    def disk_size(self) -> int | None:
        """The disk's size, bytes; None: an old image does not say."""
        return self._extra_field(DISK_SIZE)

    @property
    def info(self) -> Snapshot:
        """The snapshot as the contract describes it."""
        icount = self._extra_field(ICOUNT)
        return Snapshot(
            id=self.id,
            name=self.name,
            vm_state_size=self.state_size,
            date_ns=self.date_s * 1_000_000_000 + self.date_ns,
            vm_clock_ns=self.vm_clock_ns,
            disk_size=self.disk_size,
            icount=None if icount == ICOUNT_NONE else icount,
        )

    def completed(self, size: int) -> Entry:
        """The same with all extra data that is defined, as it has to be in version 3; ``size`` if it has no disk size.

        As QEMU completes it whenever it writes a snapshot table.
        """
        defined = SNAPSHOT_EXTRA.pack(self.state_size, size, ICOUNT_NONE)
        whole_fields = len(self.extra) // SNAPSHOT_EXTRA_FIELD.size * SNAPSHOT_EXTRA_FIELD.size
        if whole_fields >= len(defined):
            return self
        return dataclasses.replace(self, extra=self.extra[:whole_fields] + defined[whole_fields:])

    def encode(self) -> bytes:
        """The entry as it is in the file, without padding."""
        id, name = os.fsencode(self.id), os.fsencode(self.name)
        fields = SnapshotFields(
            self.l1_place,
            self.l1_count,
            len(id),
            len(name),
            self.date_s,
            self.date_ns,
            self.vm_clock_ns,
            self.vm_state_size,
            len(self.extra),
        )
        return SNAPSHOT.pack(*fields) + self.extra + id + name

    def _extra_field(self, at: int) -> int | None:
        if len(self.extra) < at + SNAPSHOT_EXTRA_FIELD.size:
            return None
        value: int = SNAPSHOT_EXTRA_FIELD.unpack_from(self.extra, at)[0]
        return value


def find(entries: Iterable[Entry], id_or_name: str) -> Entry | None:
    """The snapshot with this ID, or else the first one with this name."""
    known = list(entries)
    by_id = (entry for entry in known if entry.id == id_or_name)
    return next(by_id, None) or next((entry for entry in known if entry.name == id_or_name), None)


def new_id(entries: Iterable[Entry]) -> str:
    """An ID that no snapshot has: a number one higher than all of theirs, as QEMU gives them."""
    numbers = (re.match(r"\d+", entry.id, re.ASCII) for entry in entries)
    return str(max((int(number[0]) for number in numbers if number is not None), default=0) + 1)


def encode_table(entries: Iterable[Entry]) -> bytes:
    """The table as it is in the file."""
    table = bytearray()
    for entry in entries:
        table += bytes(-len(table) % 8)
        table += entry.encode()
    return bytes(table)


def read_table(storage: Storage, place: int, count: int) -> tuple[list[Entry], int]:
    """The ``count`` entries of the table at ``place``, and its length in bytes. Raises ImageError, OSError."""
    window = _Window(storage, place)
    entries = []
    offset = 0
    for number in range(count):
        offset = -(-offset // 8) * 8
        what = f"snapshot table, entry {number}"
        fields = SnapshotFields._make(SNAPSHOT.unpack(window.bytes(what, offset, SNAPSHOT.size)))
        if fields.extra_data_size > SNAPSHOT_EXTRA_DATA_MAX:
            wanted = f"at most {SNAPSHOT_EXTRA_DATA_MAX}"
            raise storage.error(f"{what}: extra data", place + offset + 36, fields.extra_data_size, wanted)
        _check_l1(storage, what, place + offset, fields)
        offset += SNAPSHOT.size
        extra, id, name = fields.extra_data_size, fields.id_size, fields.name_size
        data = window.bytes(what, offset, extra + id + name)
        offset += len(data)
        entries.append(
            Entry(
                l1_place=fields.l1_table_offset,
                l1_count=fields.l1_size,
                id=os.fsdecode(data[extra : extra + id]),
                name=os.fsdecode(data[extra + id :]),
                date_s=fields.date_sec,
                date_ns=fields.date_nsec,
                vm_clock_ns=fields.vm_clock_nsec,
                vm_state_size=fields.vm_state_size,
                extra=data[:extra],
            )
        )
    return entries, offset


def _check_l1(storage: Storage, what: str, named_at: int, fields: SnapshotFields) -> None:
    if fields.l1_size > L1_TABLE_MAX // 8:
        raise storage.error(f"{what}: L1 table", named_at + 8, fields.l1_size, f"at most {L1_TABLE_MAX // 8}")
    if fields.l1_size:
        storage.check_place(f"{what}: L1 table", named_at, fields.l1_table_offset)
        end = fields.l1_table_offset + fields.l1_size * 8
        file_end = -(-storage.size // storage.cluster_size) * storage.cluster_size
        if end > file_end:
            wanted = f"within the file, which ends at {storage.size:#x}"
            raise storage.error(f"{what}: L1 table", named_at, f"{fields.l1_table_offset:#x} to {end:#x}", wanted)


class _Window:
    """The file from a place on, read as far as it is wanted."""

    def __init__(self, storage: Storage, place: int) -> None:
        self._storage, self._place = storage, place
        self._data = bytearray()

    def bytes(self, what: str, offset: int, length: int) -> bytes:
        end = offset + length
        there = min(self._storage.size - self._place, SNAPSHOT_TABLE_MAX)
        if end > there:
            wanted = f"a table of at most {SNAPSHOT_TABLE_MAX} bytes within the file"
            raise self._storage.error(what, self._place + offset, f"end {self._place + end:#x}", wanted)
        while len(self._data) < end:
            step = min(SNAPSHOT_TABLE_READ, there - len(self._data))
            self._data += self._storage.file.pread(self._place + len(self._data), step)
        return bytes(self._data[offset:end])
