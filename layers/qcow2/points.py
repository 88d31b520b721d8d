"""Points in time: what making, applying and deleting snapshots, and resizing, have in common.

Whoever changes what the disk *is* holds all guest clusters, so that no request is under way by code; `Image.frozen`
takes away the permission to write in place, too, and waits for those who are at it. (The caller has drained the
exports, so that nobody waits for long.)

References are counted by whole L1 tables: `Image.share` raises the refcounts of all that one leads to, `Image.let_go`
lowers them. Either may be interrupted by a flush at any time: refcounts that are too high harm nobody.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from layers.ondisk.qcow2 import COPIED, OFFSET_MASK
from layers.qcow2 import references
from layers.qcow2.clusters import BadEntry, Geometry
from layers.qcow2.head import Head
from layers.qcow2.intervals import counted
from layers.qcow2.limits import REFERENCES_COUNT_MAX
from layers.qcow2.mapping import WritableMapping
from layers.qcow2.occupied import Occupied
from layers.qcow2.order import Order
from layers.qcow2.reading import Reader
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.storage import Storage
from layers.qcow2.writing import Writer
from nbdserver.errors import RequestError
from nbdserver.ranges import RangeLock

#: More than all clusters of any disk.
_EVERYTHING = 1 << 64

#: References to clusters, each a half-open run of them.
_Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Image:
    """The parts of an image that is open for writing. ``lock`` is the metadata lock, ``clusters`` the guest clusters',
    ``changed(offset, length)`` announces a change of the mapping.

    Every method raises RequestError, OSError, ImageError.
    """

    storage: Storage
    geometry: Geometry
    head: Head
    lock: threading.Lock
    clusters: RangeLock
    reader: Reader
    mapping: WritableMapping
    refcounts: Refcounts
    occupied: Occupied
    writer: Writer
    order: Order
    changed: Callable[[int, int], None]

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Have nobody be `alone`."""
        with self.clusters.shared(0, _EVERYTHING):
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold all guest clusters. Everything that has completed before is in the file then."""
        with self.clusters.exclusive(0, _EVERYTHING):
            self.order.flush()
            yield

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """`alone`, with nothing being written in place, nor read where it was found before."""
        with self.clusters.exclusive(0, _EVERYTHING):
            self.writer.frozen = True
            try:
                self.changed(0, self.reader.size)
                self.reader.data.file.wait_unused(0, self.reader.data.size)
                self.order.flush()
                yield
            finally:
                self.writer.frozen = False

    def active_l1(self) -> list[int]:
        """The entries of the active L1 table, without flags."""
        with self.lock:
            return [entry & ~COPIED for entry in self.mapping.l1_entries]

    # -- tables -----------------------------------------------------------------------------------------------------

    def put(self, table: bytes, undo: contextlib.ExitStack) -> int:
        """Write a table to clusters in a row, newly taken: its place. Nothing refers to it yet; it is durable after the
        first step of a flush. ``undo`` frees the clusters again."""
        count, size = self.geometry.clusters(len(table)), self.geometry.cluster_size
        if not count:
            return 0
        with self.lock:
            self.order.check()
            start = self.refcounts.take_contiguous(count)
            undo.callback(self._give_back, start, count)
            self.occupied.add(start, count)
        self.storage.reserve(start * size, count * size)
        self.storage.file.pwrite(start * size, table + bytes(count * size - len(table)))
        return start * size

    def _give_back(self, start: int, count: int) -> None:
        with self.lock:
            self.refcounts.give_back(start, count)

    def retire(self, place: int, length: int) -> None:
        """Let go of a table that nothing in the file names any more."""
        with self.lock:
            self.refcounts.retire(place, length, discard=False)

    def become(self, size: int, l1: array[int], place: int) -> None:
        """Be the disk of ``size`` bytes whose L1 table is at ``place``. What the old one led to remains counted."""
        was = self.reader.size
        with self.lock:
            self.refcounts.retire(self.head.l1_place, self.head.l1_count * 8, discard=False)
            self.mapping.move_l1(l1, place, self.geometry.clusters(size))
            self.head.size, self.head.l1_place, self.head.l1_count = size, place, len(l1)
            self.reader.size = size
            self.occupied.merge((entry & OFFSET_MASK) // self.geometry.cluster_size for entry in l1 if entry)
            self.changed(0, max(was, size))

    # -- references -------------------------------------------------------------------------------------------------

    def check(self, l1: Sequence[int], what: str, *, times: int) -> None:
        """Raise ImageError if an L1 table leads to what it cannot; RequestError (ENOTSUP) if ``times`` more of each of
        its references could not be counted."""
        for _, runs in self._batches(l1, what):
            with self.lock:
                for start, stop, there in counted(runs):
                    self._check_bounds(what, start, *self.refcounts.bounds(start, stop), there * times)

    def _check_bounds(self, what: str, start: int, least: int, greatest: int, more: int) -> None:
        offset, bits = start * self.geometry.cluster_size, self.geometry.refcount_bits
        if least == 0:
            message = f"{what} refers to clusters that count as free (repair it with nbdserver image check): those"
            raise self.storage.error(message, offset)
        if greatest + more > self.refcounts.refcount_max:
            raise RequestError(
                errno.ENOTSUP,
                f"{self.storage.file.filename}: refcounts of {bits} {'bit' if bits == 1 else 'bits'} cannot count one "
                f"snapshot more: of the clusters at offset {offset:#x} there are {greatest} users already",
            )

    def share(self, l1: Sequence[int], what: str) -> None:
        """Count everything that an L1 table leads to once more. If that fails, it has not been."""
        done = 0
        try:
            for end, runs in self._batches(l1, what):
                with self.lock:
                    for start, stop, times in counted(runs):
                        self.refcounts.share(start, stop, times)
                done = end
                self.relieve()
        except BaseException:
            self.let_go(l1[:done], what)
            raise

    def let_go(self, l1: Sequence[int], what: str, *, discard: bool = False) -> None:
        """Count everything that an L1 table, which nothing names any more, leads to once less, as soon as that is so in
        the file: it is flushed. ``discard``: give the storage back of what becomes free."""
        size = self.geometry.cluster_size
        for _, runs in self._batches(l1, what):
            with self.lock:
                for start, stop in sorted(runs):
                    self.refcounts.retire(start * size, (stop - start) * size, discard=discard)
            self.order.flush()
        self.order.flush()

    def lend(self) -> None:
        """Clear COPIED in all active tables."""
        for index in range(len(self.mapping.l1_entries)):
            with self.lock:
                self.mapping.lend(index)
            self.relieve()

    def regain(self) -> None:
        """Set COPIED in the active tables wherever a refcount says so."""
        for index in range(len(self.mapping.l1_entries)):
            with self.lock:
                self.mapping.regain(index)
            self.relieve()

    def relieve(self) -> None:
        """Write metadata back if too much waits for it."""
        if self.mapping.crowded or self.refcounts.crowded:
            self.order.flush()

    def _batches(self, l1: Sequence[int], what: str) -> Iterator[tuple[int, _Runs]]:
        """(how many entries of ``l1`` are done, the references that some more of them make), read from the file."""
        runs: _Runs = []
        for index, table in references.tables(self.storage, self.geometry, l1, what):
            name = f"{what}: L2 table {index}"
            data = list(self._data(table.entries, name, table.place))
            runs.extend(data)
            runs.append((table.place // self.geometry.cluster_size, table.place // self.geometry.cluster_size + 1))
            if len(runs) >= REFERENCES_COUNT_MAX:
                yield index + 1, runs
                runs = []
        if runs:
            yield len(l1), runs

    def _data(self, entries: array[int], name: str, named_at: int) -> _Runs:
        """The references of one L2 table to clusters that are counted. Raises ImageError."""
        if self.geometry.has_data_file:
            return []
        try:
            runs = list(references.clusters(self.geometry, entries))
        except BadEntry as bad:
            raise self.storage.error(name, named_at, None, str(bad)) from bad
        for start, stop in runs:
            if self.occupied.overlaps(start, stop - start):
                place = f"place {start * self.geometry.cluster_size:#x}"
                raise self.storage.error(name, named_at, place, "one that does not hold metadata")
        return runs
