"""Writing: in place where that is allowed, else into clusters newly taken; zeroing and trimming.

An allocating write of several clusters::

    hold the guest clusters alone
    take host clusters                                            (metadata lock)
    write [what was before it │ the data │ what was behind it]    no lock; one write for each contiguous piece
    enter them in the L2 tables, announce the change, retire the old ones       (metadata lock)

What fails before the last step leaves nothing behind. When the request returns, everybody sees the new clusters, and
`order` sees to the file.
"""

from __future__ import annotations

import errno
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from layers.ondisk.qcow2 import COPIED, ZERO
from layers.qcow2.clusters import Kind, Run
from layers.qcow2.limits import ZEROES_INLINE_MAX
from layers.qcow2.mapping import WritableMapping
from layers.qcow2.occupied import Occupied
from layers.qcow2.order import Order
from layers.qcow2.reading import Reader
from layers.qcow2.refcounts import Refcounts
from nbdserver.errors import RequestError
from nbdserver.layer import finish
from nbdserver.ranges import RangeLock
from nbdserver.request import NO_VECTOR, Flag, Request, Vector


class Piece(NamedTuple):
    """The guest clusters [first, stop), which are written to the host clusters at ``place``."""

    first: int
    stop: int
    place: int
    #: They are there already: what the request does not cover stays, and no L2 entry changes.
    in_place: bool
    #: The host clusters have been taken for this.
    taken: bool


class Discard(NamedTuple):
    """Whether the file's storage is given back of clusters that zeroing and trimming free, and anything else."""

    request: bool
    other: bool


class Writer:
    """What changes an image. ``changed(offset, length)`` announces a change of the mapping, ``allocate(length)``
    gives memory.

    Every method raises RequestError, OSError, ImageError.
    """

    def __init__(
        self,
        reader: Reader,
        mapping: WritableMapping,
        refcounts: Refcounts,
        occupied: Occupied,
        *,
        lock: threading.Lock,
        clusters: RangeLock,
        discard: Discard,
        changed: Callable[[int, int], None],
        allocate: Callable[[int], Vector],
        order: Order,
    ) -> None:
        self._reader, self._mapping, self.refcounts, self._occupied = reader, mapping, refcounts, occupied
        self._storage, self._geometry = reader.storage, reader.geometry
        self._lock, self._clusters = lock, clusters
        self._discard, self._changed, self._allocate = discard, changed, allocate
        self._order = order
        #: Whether nothing may be overwritten in place, whatever the image says: a snapshot is being made.
        self.frozen = False

    def flush(self) -> None:
        """Make everything that has completed durable."""
        self._order.flush()

    def close(self) -> None:
        """Bring everything into the file."""
        self._order.close()

    def is_overwritable(self, run: Run) -> bool:
        """Whether the host clusters of ``run`` hold its data and may be overwritten where they are."""
        return not self.frozen and run.kind is Kind.NORMAL and run.copied and self._is_in_place(run)

    def whole(self, start: int, end: int) -> tuple[int, int]:
        """What of the bytes [start, end) can be made zero by L2 entries: the whole clusters in it, [first, stop).

        At the end of the disk, the last cluster is whole as far as it goes.
        """
        size = self._geometry.cluster_size
        if not self._geometry.has_zero and start < self._reader.below_size:
            return end, end  # all that version 2 could do is show the backing file again
        first = min(-(-start // size) * size, end)
        return first, end if end == self._reader.size else max(end // size * size, first)

    # -- write ------------------------------------------------------------------------------------------------------

    def write(self, request: Request) -> None:
        """Write any range."""
        self._relieve()
        with self._held(request):
            self._write(request)

    def _write(self, request: Request) -> None:
        """Write a range whose clusters are held."""
        runs = list(self._mapping.runs(*self._span(request), ahead=False))
        pieces = self._reserve(runs)
        linked = 0  # guest clusters below this have their pieces for good
        try:
            for piece in _merged(pieces, self._geometry.cluster_size):
                self._put(request, piece, runs)
            with self._lock:
                for cluster, entries in self._links(pieces):
                    self._mapping.replace(cluster, entries, discard=self._discard.other)
                    linked = cluster + len(entries)
                    self._announce(cluster, linked)
        except BaseException:
            with self._lock:
                self._give_back(pieces, linked)
            raise

    def _reserve(self, runs: list[Run]) -> list[Piece]:
        """Where to write each of ``runs``, in order; takes the clusters that it needs, and the L2 tables."""
        pieces: list[Piece] = []
        with self._lock:
            try:
                for index in self._tables_to_own(runs):
                    self._mapping.own(index)
                for run in runs:
                    pieces.extend(self._places(run))
            except BaseException:
                self._give_back(pieces, 0)
                raise
        return pieces

    def _tables_to_own(self, runs: list[Run]) -> range:
        """The L2 tables that will change. (They are made before data clusters are taken, which so are contiguous.)"""
        change = [run for run in runs if not self.is_overwritable(run)]
        if not change:
            return range(0)
        self._order.check()
        per_table = self._geometry.l2_entries
        return range(change[0].first // per_table, (change[-1].stop - 1) // per_table + 1)

    def _places(self, run: Run) -> Iterator[Piece]:
        if run.copied and run.kind in (Kind.NORMAL, Kind.ZERO_ALLOCATED):
            if not self._is_in_place(run):
                wanted = f"a place in the file, which ends at {self._storage.size:#x}, that does not hold metadata"
                raise self._mapping.bad_entry(run.first, run.entry, wanted)
            yield Piece(run.first, run.stop, run.place, run.kind is Kind.NORMAL, False)
            return
        first = run.first
        while first < run.stop:
            start, count = self.refcounts.take(run.stop - first)
            yield Piece(first, first + count, start * self._geometry.cluster_size, False, True)
            first += count

    def _give_back(self, pieces: list[Piece], linked: int) -> None:
        for piece in pieces:
            first = max(piece.first, linked)
            if piece.taken and first < piece.stop:
                start = piece.place // self._geometry.cluster_size + first - piece.first
                self.refcounts.give_back(start, piece.stop - first)

    def _put(self, request: Request, piece: Piece, runs: list[Run]) -> None:
        """Write what ``request`` has for ``piece``, and, into new clusters, what surrounds it in the first and last."""
        size = self._geometry.cluster_size
        piece_start, piece_end = piece.first * size, piece.stop * size
        start, end = max(request.offset, piece_start), min(request.end, piece_end)
        vector = request.vector.slice(start - request.offset, end - start)
        place = piece.place + start - piece_start
        if not piece.in_place:
            is_zeroed = self._storage.reserve(piece.place, piece_end - piece_start)
            before = self._surrounding(runs[0], piece_start, start, piece.place, is_zeroed)
            after = self._surrounding(runs[-1], end, piece_end, place + end - start, is_zeroed)
            vector, place = before + vector + after, place - before.length
        finish(self._storage.file.write(Request.write(place, vector)))

    def _surrounding(self, run: Run, start: int, end: int, place: int, is_zeroed: bool) -> Vector:
        """What the bytes [start, end) of the disk, in one cluster of ``run``, were: to be written to ``place``.

        Empty if there is nothing to write: zeroes that are there already, or so many that the file makes them.
        """
        if start == end or (is_zeroed and self._reader.is_zero(run, start)):
            return NO_VECTOR
        if self._reader.is_zero(run, start) and end - start > ZEROES_INLINE_MAX:
            self._storage.zero(place, end - start)
            return NO_VECTOR
        vector = self._allocate(end - start)
        on_disk = min(end, self._reader.size) - start
        if on_disk > 0:
            self._reader.read_run(run, Request.read(start, vector.slice(0, on_disk)))
        if on_disk < vector.length:
            vector.slice(max(on_disk, 0), vector.length - max(on_disk, 0)).zero()
        return vector

    def _links(self, pieces: list[Piece]) -> Iterator[tuple[int, array[int]]]:
        """(guest cluster, L2 entries), within one L2 table each, that name the pieces."""
        size, per_table = self._geometry.cluster_size, self._geometry.l2_entries
        for piece in pieces:
            first = piece.first
            while first < piece.stop and not piece.in_place:
                stop = min((first // per_table + 1) * per_table, piece.stop)
                entry = COPIED | piece.place + (first - piece.first) * size
                yield first, array("Q", range(entry, entry + (stop - first) * size, size))
                first = stop

    # -- zero and trim ----------------------------------------------------------------------------------------------

    def zero(self, request: Request) -> None:
        """Make any range read as zeroes. MAY_UNMAP frees what it can; NO_FALLBACK raises ENOTSUP where zeroes would
        have to be written."""
        for part in self._by_table(request):
            self._relieve()
            with self._held(part):
                first, stop = self.whole(part.offset, part.end)
                self._zero_data(_part(part, part.offset, first))
                self._zero_data(_part(part, stop, part.end))
                self._zero_whole(_part(part, first, stop), unmap=bool(part.flags & Flag.MAY_UNMAP))

    def trim(self, request: Request) -> None:
        """Free the whole clusters of a range; they read as zeroes then. Version 2 keeps what hides a backing file."""
        for part in self._by_table(request):
            self._relieve()
            with self._held(part):
                self._zero_whole(_part(part, *self.whole(part.offset, part.end)), unmap=True)

    def _zero_whole(self, part: Request, *, unmap: bool) -> None:
        """Have L2 entries say that clusters are zero."""
        if not part.length:
            return
        for run in self._mapping.runs(*self._span(part), ahead=False):
            entries = self._zeroed(run, unmap=unmap)
            if entries is not None:
                self._order.check()
                with self._lock:
                    self._mapping.replace(run.first, entries, discard=self._discard.request)
                    self._announce(run.first, run.stop)
            elif run.kind is Kind.NORMAL:
                size = self._geometry.cluster_size
                self._zero_data(_part(part, run.first * size, min(run.stop * size, part.end)))

    def _zeroed(self, run: Run, *, unmap: bool) -> array[int] | None:
        """The entries that make ``run`` zeroes; None if it is, or if there are none."""
        if not self._geometry.has_zero:
            is_freed = run.kind is Kind.COMPRESSED or (run.kind is Kind.NORMAL and unmap)
            return array("Q", [0]) * (run.stop - run.first) if is_freed else None
        if run.kind is Kind.NORMAL and not unmap:
            size, first = self._geometry.cluster_size, run.entry | ZERO
            return array("Q", range(first, first + (run.stop - run.first) * size, size))
        if run.kind is Kind.ZERO_ALLOCATED:
            is_zero = not unmap
        else:
            is_zero = self._reader.is_zero(run, run.first * self._geometry.cluster_size)
        return None if is_zero else array("Q", [ZERO]) * (run.stop - run.first)

    def _zero_data(self, part: Request) -> None:
        """Zero bytes, in place or by writing zeroes."""
        if not part.length:
            return
        for run, start, end in self._reader.spans(part.offset, part.length):
            if self._reader.is_zero(run, start):
                continue
            if self.is_overwritable(run):
                flags = part.flags & (Flag.MAY_UNMAP | Flag.NO_FALLBACK)
                finish(self._storage.file.zero(Request.zero(self._reader.place(run, start), end - start, flags)))
            elif part.flags & Flag.NO_FALLBACK:
                raise RequestError(errno.ENOTSUP, "zeroes would have to be written here")
            else:
                self._write_zeroes(start, end)

    def _write_zeroes(self, start: int, end: int) -> None:
        step = max(ZEROES_INLINE_MAX, self._geometry.cluster_size)
        zeroes = self._allocate(min(step, end - start))
        zeroes.zero()
        while start < end:
            length = min(step - start % step, end - start)
            self._write(Request.write(start, zeroes.slice(0, length)))
            start += length

    def make_empty(self) -> None:
        """Have the active state hold nothing. Each L2 entry is right by itself, whether its sector got out or not: it
        names what it did, or nothing."""
        per_table, end = self._geometry.l2_entries, self._geometry.clusters(self._reader.size)
        for first in range(0, end, per_table):
            self._relieve()
            count = min(per_table, end - first)
            with self._clusters.exclusive(first, count):
                for run in self._mapping.runs(first, first + count, ahead=False):
                    if run.kind is not Kind.UNALLOCATED:
                        self._unlink(run)

    def _unlink(self, run: Run) -> None:
        """Have L2 entries say that there is nothing."""
        self._order.check()
        with self._lock:
            nothing = array("Q", [0]) * (run.stop - run.first)
            self._mapping.replace(run.first, nothing, discard=self._discard.request)
            self._announce(run.first, run.stop)

    # -- common to all ----------------------------------------------------------------------------------------------

    def _relieve(self) -> None:
        """Write metadata back if too much waits for it. Before anything is held: a flush waits for others."""
        if self._mapping.crowded or self.refcounts.crowded:
            self._order.flush()

    def _held(self, request: Request) -> AbstractContextManager[None]:
        """Hold the guest clusters of a request alone."""
        first, stop = self._span(request)
        return self._clusters.exclusive(first, stop - first)

    def _span(self, request: Request) -> tuple[int, int]:
        """The guest clusters [first, stop) that a request touches."""
        return request.offset // self._geometry.cluster_size, self._geometry.clusters(request.end)

    def _by_table(self, request: Request) -> Iterator[Request]:
        """A request in parts of one L2 table each, so that no part holds much, or for long."""
        step = self._geometry.cluster_size * self._geometry.l2_entries
        start = request.offset
        while start < request.end:
            end = min((start // step + 1) * step, request.end)
            yield _part(request, start, end)
            start = end

    def _announce(self, first: int, stop: int) -> None:
        """Say that the guest clusters [first, stop) map to something else now. Under the metadata lock."""
        start = first * self._geometry.cluster_size
        self._changed(start, min(stop * self._geometry.cluster_size, self._reader.size) - start)

    def _is_in_place(self, run: Run) -> bool:
        """Whether the host clusters of ``run`` are in the file, and not where metadata is."""
        start, count = run.place // self._geometry.cluster_size, run.stop - run.first
        is_in_file = (start + count) * self._geometry.cluster_size <= self._storage.size
        return is_in_file and not self._occupied.overlaps(start, count)


def _part(request: Request, start: int, end: int) -> Request:
    """The bytes [start, end) of the disk of a request for a wider range."""
    return request.slice(start - request.offset, end - start)


def _merged(pieces: list[Piece], cluster_size: int) -> Iterator[Piece]:
    """The same pieces, those joined that one write can do."""
    last: Piece | None = None
    for piece in pieces:
        if (
            last is not None
            and last.in_place == piece.in_place
            and last.place + (last.stop - last.first) * cluster_size == piece.place
        ):
            last = last._replace(stop=piece.stop)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
