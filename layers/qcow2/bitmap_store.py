"""Bitmaps into the file and out of it, so that a crash at any instant leaves the old directory or the new one.

Nothing that the directory in the file names is changed, but for the flags that say that bitmaps are in use. Everything
else is a *change*: new clusters are taken and written, the header is made to name the new directory, and what only the
old one named is let go (``|`` is a sync; see `order` for the first and last step)::

    bits, tables, directory; their refcounts  |  the header extension  |  release of the old ones

The first bitmap makes the header extension appear, and only then is the autoclear bit set; with the last bitmap first
the bit goes and then the extension. Between the two steps there are no bitmaps, as before or after.

A change that fails before the header is touched leaves nothing behind. One that fails then leaves both the old and the
new clusters taken, for nobody knows which the header names; there will be no other change.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence

from layers.ondisk.qcow2 import (
    AUTOCLEAR_AT,
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_FIELD,
    BITMAP_ALL_ONES,
    EXTENSION_BITMAPS,
)
from layers.qcow2.bitmap_directory import Directory, Entry, encode, places, read_table, table_count
from layers.qcow2.extensions import set_extension
from layers.qcow2.limits import BITMAP_PIECE
from layers.qcow2.occupied import Occupied
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.storage import Storage
from nbdserver.extent import DirtyBitmap
from nbdserver.layer import finish


def load(storage: Storage, entry: Entry, bits: DirtyBitmap) -> None:
    """Set in ``bits``, which are clear, what the image has stored of a bitmap. Raises ImageError, OSError."""
    size, table = storage.cluster_size, read_table(storage, entry)
    covered = size * 8 * entry.granularity
    index = 0
    while index < len(table):
        stop = index + 1
        if table[index] == BITMAP_ALL_ONES:
            bits.mark(index * covered, covered)
        elif table[index]:
            while stop < len(table) and table[stop] == table[stop - 1] + size and (stop - index) * size < BITMAP_PIECE:
                stop += 1
            length = (stop - index) * size
            there = min(length, storage.size - table[index])  # the last cluster of a file may be cut off
            bits.load(index * size, storage.file.pread(table[index], there) + bytes(length - there))
        index = stop


class BitmapStore:
    """Changes the bitmaps in the file of an image that is open for writing. ``flush`` brings the metadata into the file
    and makes all that was written durable.

    Its methods raise OSError, RequestError, ImageError.
    """

    def __init__(
        self,
        storage: Storage,
        directory: Directory,
        autoclear: int,
        *,
        lock: threading.Lock,
        refcounts: Refcounts,
        occupied: Occupied,
        flush: Callable[[], None],
    ) -> None:
        self.storage, self.directory, self._autoclear = storage, directory, autoclear
        self.lock, self.refcounts, self.occupied, self.flush = lock, refcounts, occupied, flush
        self._failure: BaseException | None = None

    def mark_in_use(self, names: set[str]) -> None:
        """Set the flag of these bitmaps, durably, where they lie: all else that is written is what is there."""
        entries = tuple(
            entry.flagged(auto=entry.is_auto, in_use=True) if entry.name in names else entry
            for entry in self.directory.entries
        )
        self.storage.file.pwrite(self.directory.offset, encode(entries))
        finish(self.storage.file.flush())
        self.directory = self.directory._replace(entries=entries)

    @contextlib.contextmanager
    def change(self) -> Iterator[Change]:
        """A change, of which nothing is left if the block ends before it is committed."""
        if self._failure is not None:
            raise OSError(errno.EIO, f"the image's bitmaps could not be changed: {self._failure}")
        change = Change(self)
        try:
            yield change
        except BaseException:
            change.undo()
            raise

    def switch(self, directory: Directory) -> None:
        """Make the header name another directory, which is durable."""
        try:
            if directory.entries:
                set_extension(self.storage.file, EXTENSION_BITMAPS, directory.extension())
                self._set_autoclear(self._autoclear | AUTOCLEAR_BITMAPS)
            else:
                self._set_autoclear(self._autoclear & ~AUTOCLEAR_BITMAPS)
                set_extension(self.storage.file, EXTENSION_BITMAPS, None)
        except BaseException as error:
            self._failure = error
            raise
        self.directory = directory

    def _set_autoclear(self, features: int) -> None:
        if features != self._autoclear:
            self.storage.file.pwrite(AUTOCLEAR_AT, AUTOCLEAR_FIELD.pack(features))
            finish(self.storage.file.flush())
            self._autoclear = features


class Change:
    """One change of the bitmaps; made by `BitmapStore.change`."""

    def __init__(self, store: BitmapStore) -> None:
        self._store, self._storage = store, store.storage
        #: (first, how many) of the clusters that have been taken for it.
        self._taken: list[tuple[int, int]] = []
        #: (offset, length) of what is no longer referred to afterwards.
        self._gone: list[tuple[int, int]] = []
        self._is_decided = False

    def store(self, entry: Entry, bits: DirtyBitmap) -> Entry:
        """Write the bits of a bitmap to new clusters; its entry, whose table names them."""
        table = self._write_bits(bits)
        if sys.byteorder == "little":
            table.byteswap()
        return Entry(
            entry.name, self._write(table.tobytes()), len(table), entry.flags, entry.granularity_bits, entry.extra
        )

    def drop(self, entry: Entry) -> None:
        """Let the clusters go of a bitmap that is in the directory now, when it no longer is."""
        size = self._storage.cluster_size
        self._gone.extend((first * size, count * size) for _, first, count in places(self._storage, entry))

    def commit(self, entries: Sequence[Entry]) -> None:
        """Have the directory consist of these entries from now on, durably."""
        old, data = self._store.directory, encode(entries)
        new = Directory(self._write(data) if entries else 0, len(data), tuple(entries))
        self._store.flush()
        self._is_decided = True
        self._store.switch(new)
        with self._store.lock:
            if old.entries:
                self._store.refcounts.retire(old.offset, old.size, discard=True)
            for offset, length in self._gone:
                self._store.refcounts.retire(offset, length, discard=True)

    def undo(self) -> None:
        """Give the clusters back, unless the header may name them."""
        if not self._is_decided:
            with self._store.lock:
                for start, count in self._taken:
                    self._store.refcounts.give_back(start, count)

    def _write_bits(self, bits: DirtyBitmap) -> array[int]:
        """Write what is neither all clear nor all set; the table."""
        size = self._storage.cluster_size
        table = array("Q", bytes(8 * table_count(bits.size, bits.granularity, size)))
        mixed = []
        for index, value in _clusters(bits, size):
            if value is None:
                mixed.append(index)
            else:
                table[index] = value
        while mixed:
            with self._store.lock:
                start, count = self._take(min(len(mixed), max(BITMAP_PIECE // size, 1)))
            data = b"".join(bits.data(index * size, size) for index in mixed[:count])
            self._put(start * size, data)
            for number, index in enumerate(mixed[:count]):
                table[index] = (start + number) * size
            del mixed[:count]
        return table

    def _write(self, data: bytes) -> int:
        """Write a table, in one piece; where it is."""
        size = self._storage.cluster_size
        count = -(-len(data) // size)
        with self._store.lock:
            start = self._store.refcounts.take_contiguous(count)
            self._note(start, count)
        self._put(start * size, data + bytes(count * size - len(data)))
        return start * size

    def _take(self, count: int) -> tuple[int, int]:
        start, count = self._store.refcounts.take(count)
        self._note(start, count)
        return start, count

    def _note(self, start: int, count: int) -> None:
        self._taken.append((start, count))
        self._store.occupied.add(start, count)

    def _put(self, offset: int, data: bytes) -> None:
        self._storage.reserve(offset, len(data))
        self._storage.file.pwrite(offset, data)


def _clusters(bits: DirtyBitmap, cluster_size: int) -> Iterator[tuple[int, int | None]]:
    """(index, table entry) of the clusters of a bitmap's data that are not all clear; None: there are bits to write."""
    covered = cluster_size * 8 * bits.granularity
    offset = 0
    while offset < bits.size:
        length, is_dirty = bits.runs(offset, bits.size - offset, 1)[0]
        first, stop = offset // covered, (offset + length) // covered
        if offset + length == bits.size and not is_dirty:
            return
        if first == stop:  # also the last one, if part of it lies behind the last bit, and must be clear
            yield first, None
            stop += 1
        elif is_dirty:
            yield from ((index, BITMAP_ALL_ONES) for index in range(first, stop))
        offset = stop * covered
