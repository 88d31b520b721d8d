"""Internal snapshots: made, applied, deleted; and held by those who show one beside the live disk.

::

    active L1 ──┬──> L2 ──┬──> cluster        a snapshot is another L1 table, and a count of one more for everything
    snapshot's ─┘         └──> cluster        that it leads to; what has a count above 1 is copied before it is written

The order of the writes that each of them takes is in `order`. Specification: "Snapshots".
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

from layers.ondisk.qcow2 import COPIED, ICOUNT_NONE, SNAPSHOT_EXTRA
from layers.qcow2 import references
from layers.qcow2.cache import Table, encoded
from layers.qcow2.clusters import Geometry
from layers.qcow2.header import Header
from layers.qcow2.limits import L1_TABLE_MAX, SNAPSHOT_NAME_MAX, SNAPSHOT_TABLE_MAX, SNAPSHOTS_COUNT_MAX
from layers.qcow2.points import Image
from layers.qcow2.snapshot_table import Entry, encode_table, find, new_id
from layers.qcow2.storage import Storage
from nbdserver.errors import RequestError
from nbdserver.limits import DISK_MAX

#: What the active L1 table is called in messages.
ACTIVE = "the disk"


class Snapshots:
    """The snapshots of an image that is open for writing. ``table``: the entries of its snapshot table, and its length.

    Every method raises RequestError (ENOENT, EEXIST, EBUSY, ENOTSUP, ...), OSError, ImageError. What fails before the
    header is written has not happened. What fails in writing it has happened in memory, and comes into the file with
    the next flush that succeeds. Space that cannot be freed then is leaked.
    """

    def __init__(self, image: Image, table: tuple[Sequence[Entry], int], *, discard: bool) -> None:
        self._image, self._discard = image, discard
        entries, self._length = table
        self._entries = [entry.completed(image.head.size) for entry in entries]
        #: How often each snapshot is being shown.
        self._held = Counter[Entry]()

    @property
    def entries(self) -> list[Entry]:
        """The snapshots, oldest first."""
        return list(self._entries)

    @property
    def is_shown(self) -> bool:
        """Whether somebody shows one of them."""
        return any(self._held.values())

    def size(self, id_or_name: str) -> int:
        """The size that the disk had when this snapshot was made, bytes. ENOENT."""
        return disk_size(self._image.storage, self._image.geometry, self._get(id_or_name))

    # -- showing ----------------------------------------------------------------------------------------------------

    def hold(self, id_or_name: str) -> Entry | None:
        """The snapshot that has this ID, or else this name, if there is one; it is not deleted before `release`."""
        with self._image.steady(), self._image.lock:
            entry = find(self._entries, id_or_name)
            if entry is not None:
                self._held[entry] += 1
            return entry

    def release(self, entry: Entry) -> None:
        """End what `hold` began."""
        with self._image.lock:
            self._held[entry] -= 1

    # -- changing ---------------------------------------------------------------------------------------------------

    def create(self, name: str) -> Entry:
        """Make a snapshot of the disk as it is now."""
        image = self._image
        with image.frozen(), contextlib.ExitStack() as undo:
            self._check_new(name)
            l1 = image.active_l1()
            image.check(l1, ACTIVE, times=1)
            entry = self._new_entry(name, image.put(encoded(array("Q", l1)), undo), len(l1))
            entries = [*self._entries, entry]
            table = self._encode(entries)
            place = image.put(table, undo)
            undo.callback(image.regain)
            image.share(l1, ACTIVE)
            undo.callback(image.let_go, l1, ACTIVE)
            image.lend()
            undo.pop_all()
            self._switch(entries, place, len(table))
            return entry

    def apply(self, id_or_name: str) -> Entry:
        """Make the disk what it was, its size included."""
        image = self._image
        with image.frozen(), contextlib.ExitStack() as undo:
            entry = self._get(id_or_name)
            what, size = f"snapshot {entry.name!r}", disk_size(image.storage, image.geometry, entry)
            entries = array("Q", (named & ~COPIED for named in read_l1(image.storage, entry)))
            new, old = _differing(entries, image.active_l1())
            image.check(new, what, times=1)
            image.check(old, ACTIVE, times=0)
            entries.extend([0] * (image.geometry.l1_count(size) - len(entries)))
            place = image.put(encoded(entries), undo)
            image.share(new, what)
            undo.callback(image.let_go, new, what)
            self._clear_copied(new, what)
            undo.pop_all()
            image.become(size, entries, place)
            image.let_go(old, ACTIVE, discard=self._discard)
            return entry

    def empty(self) -> Callable[[], None]:
        """Have the disk hold nothing: with an empty L1 table in the place of the active one. Returns what lets go of
        all that the old one led to (see `nbdserver.format.Empties.empty_at_once`)."""
        image = self._image
        with image.frozen(), contextlib.ExitStack() as undo:
            old = image.active_l1()
            entries = array("Q", bytes(8 * len(old)))
            place = image.put(encoded(entries), undo)
            undo.pop_all()
            image.become(image.head.size, entries, place)
            image.order.flush()
        return functools.partial(self._let_go, old)

    def _let_go(self, l1: Sequence[int]) -> None:
        """Let go of all that an L1 table led to that was the active one."""
        with self._image.alone():
            self._image.check(l1, ACTIVE, times=0)
            self._image.let_go(l1, ACTIVE, discard=self._discard)

    def delete(self, id_or_name: str) -> Entry:
        """Delete a snapshot. EBUSY while it is held."""
        image = self._image
        with image.alone(), contextlib.ExitStack() as undo:
            entry = self._get(id_or_name)
            if self._held[entry]:
                raise RequestError(errno.EBUSY, f"{self._path}: snapshot {entry.name!r} is being exported")
            what, l1 = f"snapshot {entry.name!r}", read_l1(image.storage, entry)
            image.check(l1, what, times=0)
            image.check(image.active_l1(), ACTIVE, times=0)
            entries = [other for other in self._entries if other is not entry]
            table = self._encode(entries)
            place = image.put(table, undo)
            undo.pop_all()
            self._switch(entries, place, len(table))
            image.let_go(l1, what, discard=self._discard)
            image.retire(entry.l1_place, entry.l1_count * 8)
            image.regain()
            image.order.flush()
            return entry

    @property
    def _path(self) -> str | None:
        return self._image.storage.file.filename

    def _get(self, id_or_name: str) -> Entry:
        entry = find(self._entries, id_or_name)
        if entry is None:
            raise RequestError(errno.ENOENT, f"{self._path}: there is no snapshot {id_or_name!r}")
        return entry

    def _check_new(self, name: str) -> None:
        length = len(os.fsencode(name))
        if not 0 < length <= SNAPSHOT_NAME_MAX or "\0" in name:
            raise RequestError(
                errno.EINVAL, f"{self._path}: a snapshot's name has 1 to {SNAPSHOT_NAME_MAX} bytes, none of them NUL"
            )
        if any(entry.name == name for entry in self._entries):
            raise RequestError(errno.EEXIST, f"{self._path}: there is a snapshot {name!r} already")
        if len(self._entries) >= SNAPSHOTS_COUNT_MAX:
            raise RequestError(errno.EFBIG, f"{self._path}: has {len(self._entries)} snapshots, the most there can be")

    def _new_entry(self, name: str, l1_place: int, l1_count: int) -> Entry:
        date_s, date_ns = divmod(time.time_ns(), 1_000_000_000)
        return Entry(
            l1_place=l1_place,
            l1_count=l1_count,
            id=new_id(self._entries),
            name=name,
            date_s=date_s,
            date_ns=date_ns,
            vm_clock_ns=0,
            vm_state_size=0,
            extra=SNAPSHOT_EXTRA.pack(0, self._image.head.size, ICOUNT_NONE),
        )

    def _encode(self, entries: list[Entry]) -> bytes:
        table = encode_table(entries)
        if len(table) > SNAPSHOT_TABLE_MAX:
            wanted = f"{SNAPSHOT_TABLE_MAX} bytes"
            raise RequestError(errno.EFBIG, f"{self._path}: the snapshot table would be longer than {wanted}")
        return table

    def _switch(self, entries: list[Entry], place: int, length: int) -> None:
        """Have the header name another snapshot table, and let go of the old one."""
        image = self._image
        with image.lock:
            image.refcounts.retire(image.head.snapshots_place, self._length, discard=False)
            image.head.snapshots_place, image.head.snapshots_count = place, len(entries)
            self._entries, self._length = entries, length
        image.order.flush()

    def _clear_copied(self, l1: Sequence[int], what: str) -> None:
        """In L2 tables that only snapshots have, COPIED may be anything; in the active ones it is believed."""
        image = self._image
        for _, table in references.tables(image.storage, image.geometry, l1, what):
            if references.clear_copied(image.geometry, table.entries):
                table.mark(0, len(table.entries))
                with image.lock:
                    image.mapping.correct(table)
                image.relieve()


def _differing(new: Sequence[int], old: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two L1 tables without the entries that are the same in both, for which nothing changes."""
    pairs = list(itertools.zip_longest(new, old, fillvalue=0))
    return [one if one != other else 0 for one, other in pairs], [other if one != other else 0 for one, other in pairs]


def shown(storage: Storage, header: Header, entry: Entry) -> Header:
    """The header that an image would have if it were what it was in a snapshot. Raises ImageError."""
    size = disk_size(storage, header.geometry, entry.completed(header.size))
    return dataclasses.replace(header, size=size, l1_offset=entry.l1_place, l1_count=entry.l1_count)


def read_l1(storage: Storage, entry: Entry) -> array[int]:
    """The entries of a snapshot's L1 table. Raises OSError."""
    length = entry.l1_count * 8
    # The last cluster of a file may be cut off, and a table of no entries be anywhere.
    there = max(min(length, storage.size - entry.l1_place), 0)
    data = storage.file.pread(entry.l1_place, there) if there else b""
    return Table.parse(entry.l1_place, data + bytes(length - there)).entries


def disk_size(storage: Storage, geometry: Geometry, entry: Entry) -> int:
    """How large the disk was, bytes. Raises ImageError if it cannot have been."""
    size = entry.disk_size or 0
    count_max = L1_TABLE_MAX // 8
    if size > DISK_MAX or geometry.l1_count(size) > count_max:
        wanted = f"at most {count_max * geometry.l2_entries * geometry.cluster_size}"
        raise storage.error(f"snapshot {entry.name!r}: disk size", None, size, wanted)
    return size
