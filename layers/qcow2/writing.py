"""Writing: in place where that is allowed, else into clusters newly taken; zeroing and trimming.

An allocating write of several clusters::

    hold the guest clusters alone
    take host clusters                                            (metadata lock)
    write [what was before it │ the data │ what was behind it]    no lock; one write for each contiguous piece
    link them in the L2 tables, announce the change, retire the old ones        (metadata lock)

What surrounds the data in its first and last subcluster is copied along with it; of a cluster that must move, also
whatever else is stored in it. What fails before the last step leaves nothing behind. When the request returns,
everybody sees the new clusters, and `order` sees to the file.

In an image without a backing file there is a shorter way (`Writer.make_room`): clusters of the host file that nothing
has ever been in are zeroes, as what they stand for is. They are linked before anything is written, and more of them
than that needs (`_Ahead`); who wants to write finds a place, and needs nobody's code.

If an external data file is to be a raw image by itself (``is_raw``), zeroing and trimming are done in there, and never
by an entry.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from layers.ondisk.qcow2 import OFFSET_END
from layers.qcow2.clusters import Kind, Run
from layers.qcow2.compression import compress
from layers.qcow2.host import DataFile, Host
from layers.qcow2.limits import ALLOCATION_AHEAD_MAX, ALLOCATION_AHEAD_SHARE, COPIED_OVER_MAX, ZEROES_INLINE_MAX
from layers.qcow2.mapping import WritableMapping
from layers.qcow2.order import Order
from layers.qcow2.reading import Reader
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.storage import Storage
from nbdserver.errors import ImageError, RequestError
from nbdserver.layer import finish
from nbdserver.ranges import RangeLock
from nbdserver.request import NO_VECTOR, Flag, Request, Vector


class Piece(NamedTuple):
    """The bytes [start, end) of the disk, which are written to ``place``."""

    start: int
    end: int
    place: int
    #: They are there already: no L2 entry changes.
    in_place: bool = False
    #: The host clusters have been taken for this.
    taken: bool = False


#: Takes up storage for new clusters: (where guest data is, the place, how many bytes, whether they are zeroes already).
Fill = Callable[[Storage, int, int, bool], None]


class Discard(NamedTuple):
    """Whether the file's storage is given back of clusters that zeroing and trimming free, and anything else."""

    request: bool
    other: bool


class _Ahead:
    """How much to allocate at once: ``least`` bytes; more where writes follow one another, and where much has been
    allocated already."""

    def __init__(self, least: int) -> None:
        self.least = self._unit = least
        #: Where what was allocated last ends (at first far away), and how long it is; how much was allocated in all.
        self._end, self._length, self._total = -OFFSET_END, least, 0

    def around(self, start: int, end: int, table_span: int, disk_end: int) -> tuple[int, int] | None:
        """The bytes [first, stop) to allocate for [start, end), whole clusters, within one L2 table and the disk; None
        if those are in several tables."""
        table = start // table_span * table_span
        limit = min(table + table_span, disk_end)
        if end > limit:
            return None
        if 0 <= start - self._end < self._unit:
            longer = min(2 * self._length, max(ALLOCATION_AHEAD_MAX, self.least))
            first, length = max(self._end, table), max(longer, self._unit)
        else:
            first, length = max(start // self._unit * self._unit, table), self._unit
        return first, max(min(first + length, limit), end)

    def took(self, first: int, stop: int) -> None:
        """[first, stop) has been allocated."""
        self._end, self._length = stop, stop - first
        self._total += stop - first
        if 2 * self._unit <= min(self._total // ALLOCATION_AHEAD_SHARE, ALLOCATION_AHEAD_MAX):
            self._unit *= 2


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
        host: Host,
        *,
        lock: threading.Lock,
        clusters: RangeLock,
        discard: Discard,
        is_raw: bool,
        ahead: int,
        changed: Callable[[int, int], None],
        allocate: Callable[[int], Vector],
        order: Order,
    ) -> None:
        self._reader, self._mapping, self.refcounts, self._host = reader, mapping, refcounts, host
        self._data, self._geometry = host.storage, reader.geometry
        self._lock, self._clusters = lock, clusters
        self._discard, self._changed, self._allocate = discard, changed, allocate
        #: Whether guest data is in an external data file that is a raw image of the disk.
        self.is_raw = is_raw
        self._data_file = host if isinstance(host, DataFile) else None
        self._order = order
        self._ahead = _Ahead(ahead // self._geometry.cluster_size * self._geometry.cluster_size)
        #: Whether nothing may be overwritten in place, whatever the image says: a snapshot is being made.
        self.frozen = False
        #: Whether the image has turned out to be corrupt, so that nothing is written any more.
        self.is_condemned = False

    def flush(self) -> None:
        """Make everything that has completed durable."""
        self._order.flush()

    def close(self) -> None:
        """Bring everything into the file; of a corrupt image, nothing."""
        if not self.is_condemned:
            self._order.close()

    def paused(self) -> AbstractContextManager[None]:
        """Have no metadata written."""
        return self._order.paused()

    def condemn(self, error: ImageError) -> None:
        """Write nothing any more: the image is corrupt."""
        self._order.condemn(error)
        self.is_condemned = True

    def is_overwritable(self, run: Run) -> bool:
        """Whether the host clusters of ``run`` hold its data and may be overwritten where they are."""
        is_stored = run.kind is Kind.NORMAL and run.copied
        return is_stored and not (self.frozen or self.is_condemned) and self._is_in_place(run)

    def whole(self, start: int, end: int) -> tuple[int, int]:
        """What of the bytes [start, end) can be made zero by L2 entries: the whole subclusters in it, [first, stop).

        At the end of the disk, the last one is whole as far as it goes.
        """
        if self.is_raw:
            return end, end
        if not self._geometry.has_zero and start < self._reader.below_size:
            return end, end  # all that version 2 could do is show the backing file again
        return self._aligned(start, end, self._geometry.subcluster_size)

    def _aligned(self, start: int, end: int, size: int) -> tuple[int, int]:
        first = min(-(-start // size) * size, end)
        return first, end if end == self._reader.size else max(end // size * size, first)

    # -- write ------------------------------------------------------------------------------------------------------

    def write(self, request: Request) -> None:
        """Write any range."""
        self._relieve()
        with self._held(request):
            self._write(request)

    def make_room(self, start: int, end: int) -> tuple[int, int] | None:
        """Have the bytes [start, end) stored as the zeroes that they are, and some around them, if none of them is yet
        and that can be done without writing: the bytes [first, stop) that are now, by us or by others; or None."""
        self._relieve()
        if not self._ahead.least:
            return None
        self._order.check()
        start, end = self._geometry.span(start, end)
        window = self._ahead.around(start, end, self._geometry.table_span, self._end)
        if window is None:
            return None
        with self._clusters.attempt(window[0], window[1] - window[0]) as is_free:
            if is_free:
                return self._allocate_around(start, end, *window)
        with self._clusters.exclusive(start, end - start):  # somebody else may be about to do it
            return None if self._empty_around(start, end, start, end) else (start, end)

    def _empty_around(self, start: int, end: int, first: int, stop: int) -> tuple[int, int] | None:
        """What of the whole clusters [first, stop) is unallocated in one piece with [start, end); None: not all of
        these are."""
        for run in self._mapping.runs(first, stop, ahead=False):
            if run.end > start:
                is_empty = run.start <= start and end <= run.end and run.kind is Kind.UNALLOCATED and run.place is None
                return (run.start, run.end) if is_empty else None
        return None

    def _allocate_around(self, start: int, end: int, first: int, stop: int) -> tuple[int, int] | None:
        """Allocate [start, end), and all around it in [first, stop) that is empty, too: whole clusters of one L2 table,
        which are held. What that was; None if there are no clusters in a row that nothing has ever been in."""
        empty = self._empty_around(start, end, first, stop)
        if empty is None:
            return None
        size = self._geometry.cluster_size
        with self._lock:
            self._order.check()
            self._mapping.own(start // self._geometry.table_span)
            place, count = self._host.take(start, self._geometry.clusters(empty[1] - empty[0]))
            first = max(empty[0], min(start, empty[1] - count * size))  # there may be fewer in a row
            taken = Piece(first, first + count * size, place, taken=True)
            try:
                is_zeroed = taken.end >= end and self._host.reserve(place, count * size)
            except OSError:  # no room: perhaps there is for what is written
                is_zeroed = False
            if not is_zeroed:
                self._give_back([taken], 0)
                return None
            self._mapping.link(first, taken.end, place, discard=self._discard.other)
            self._announce(first, taken.end)
            self._ahead.took(first, taken.end)
        return first, taken.end

    def _write(self, request: Request) -> None:
        """Write a range whose clusters are held."""
        runs = list(self._mapping.runs(*self._geometry.span(request.offset, request.end), ahead=False))
        pieces = self._reserve(request, runs)
        linked = 0  # what is below this on the disk has its pieces for good
        try:
            for piece in _merged(pieces):
                self._put(request, piece, runs)
            with self._lock:
                for piece in pieces:
                    for start, end in self._by_table(piece.start, piece.end if not piece.in_place else 0):
                        place = piece.place + start - piece.start
                        self._mapping.link(start, end, place, discard=self._discard.other)
                        linked = end
                        self._announce(start, end)
        except BaseException:
            with self._lock:
                self._give_back(pieces, linked)
            raise

    def _reserve(self, request: Request, runs: list[Run]) -> list[Piece]:
        """Where to write what of the clusters of ``request``, which ``runs`` are of, in order; takes the host clusters
        that it needs, and the L2 tables."""
        pieces: list[Piece] = []
        with self._lock:
            try:
                for index in self._tables_to_own(request, runs):
                    self._mapping.own(index)
                reached = 0  # the guest clusters below this have been dealt with
                for run in runs:
                    if run.copied:
                        pieces.extend(self._kept(request, run))
                        continue
                    while (start := max(run.start, reached)) < run.end:
                        place, count = self._host.take(start, self._geometry.clusters(run.end - start))
                        reached = start + count * self._geometry.cluster_size
                        pieces.append(self._taken(request, runs, start, reached, place))
            except BaseException:
                self._give_back(pieces, 0)
                raise
        return pieces

    def _tables_to_own(self, request: Request, runs: list[Run]) -> range:
        """The L2 tables that will change. (They are made before data clusters are taken, which so are contiguous.)"""
        change = [
            run for run in runs
            if run.start < request.end and request.offset < run.end and not self.is_overwritable(run)
        ]  # fmt: skip
        if not change:
            return range(0)
        self._order.check()
        step = self._geometry.table_span
        return range(max(change[0].start, request.offset) // step, (min(change[-1].end, request.end) - 1) // step + 1)

    def _kept(self, request: Request, run: Run) -> Iterator[Piece]:
        """The piece for a run that stays where it is: nothing is read or written of what is stored there already."""
        start, end = max(run.start, request.offset), min(run.end, request.end)
        if start >= end:
            return
        if not self._is_in_place(run):
            if self._data_file is not None:
                raise self._data_file.too_short()
            wanted = f"a place in the file, which ends at {self._data.size:#x}, that does not hold metadata"
            raise self._mapping.bad_entry(run.start, f"{run.entry:#018x}", wanted)
        in_place = run.kind is Kind.NORMAL
        if not in_place:
            start, end = self._widened(start, end)
        yield Piece(start, end, self._reader.place(run, start), in_place)

    def _taken(self, request: Request, runs: list[Run], start: int, end: int, place: int) -> Piece:
        """The piece for the clusters [start, end), which are to be at ``place``: all of ``request``, and all that is
        stored in them."""
        first, stop = self._widened(max(start, request.offset), min(end, request.end))
        for run in runs:
            if run.kind in (Kind.NORMAL, Kind.COMPRESSED) and run.start < end and start < run.end:
                first, stop = min(first, max(run.start, start)), max(stop, min(run.end, end))
        stop = min(stop, self._end)
        return Piece(first, stop, place + first - start, taken=True)

    def _widened(self, start: int, end: int) -> tuple[int, int]:
        """The bytes [start, end), widened to whole subclusters; in a data file, at most to the end of the disk."""
        size = self._geometry.subcluster_size
        return start // size * size, min(-(-end // size) * size, self._end)

    @property
    def _end(self) -> int:
        """Where room for guest data ends, as an offset of the disk: an external data file may be a raw image of it."""
        size = self._reader.size
        return size if self._geometry.has_data_file else self._geometry.clusters(size) * self._geometry.cluster_size

    def _give_back(self, pieces: list[Piece], linked: int) -> None:
        size = self._geometry.cluster_size
        for piece in pieces:
            start, end = self._geometry.span(piece.start, piece.end)
            first = max(start, self._geometry.clusters(linked) * size)
            if piece.taken and first < end:
                self._host.give_back(piece.place - piece.start % size + first - start, (end - first) // size)

    def _put(self, request: Request, piece: Piece, runs: list[Run]) -> None:
        """Write what ``request`` has for ``piece``, and what surrounds that in it."""
        start, end = max(request.offset, piece.start), min(request.end, piece.end)
        vector, place = request.vector.slice(start - request.offset, end - start), piece.place
        if not piece.in_place:
            is_zeroed = self._host.reserve(piece.place, piece.end - piece.start) and piece.taken
            if piece.start < start and end < piece.end and end - start < COPIED_OVER_MAX:
                # One read for what is before and what is behind costs less than two.
                copy = self._surrounding(runs, piece.start, piece.end, place, is_zeroed)
                if copy is not NO_VECTOR:
                    before = copy.slice(0, start - piece.start)
                    vector = before + vector + copy.slice(end - piece.start, piece.end - end)
                else:
                    place += start - piece.start
            else:
                before = self._surrounding(runs, piece.start, start, place, is_zeroed)
                place += start - piece.start
                after = self._surrounding(runs, end, piece.end, place + end - start, is_zeroed)
                vector, place = before + vector + after, place - before.length
        finish(self._data.file.write(Request.write(place, vector)))

    def _surrounding(self, runs: list[Run], start: int, end: int, place: int, is_zeroed: bool) -> Vector:
        """What the bytes [start, end) of the disk were, which ``runs`` hold: to be written to ``place``.

        Empty if there is nothing to write: zeroes that are there already, or so many that the file makes them.
        """
        if start == end:
            return NO_VECTOR
        parts = [(run, max(run.start, start), min(run.end, end)) for run in runs if run.start < end and start < run.end]
        if is_zeroed and all(self._reader.shows_zeroes(run, first, stop) for run, first, stop in parts):
            return NO_VECTOR
        if end - start > ZEROES_INLINE_MAX and all(self._reader.is_zero(run, first) for run, first, _ in parts):
            self._data.zero(place, end - start)
            return NO_VECTOR
        vector = self._allocate(end - start)
        for run, first, stop in parts:
            on_disk = max(min(stop, self._reader.size), first)
            self._reader.read_run(run, Request.read(first, vector.slice(first - start, on_disk - first)))
            vector.slice(on_disk - start, stop - on_disk).zero()
        return vector

    # -- compressed -------------------------------------------------------------------------------------------------

    @property
    def why_uncompressed(self) -> str | None:
        """Why the image can have no compressed clusters; None: it can."""
        if self._data_file is not None:
            return "nothing is compressed in an external data file"
        if self._data.is_encrypted:
            return "nothing is compressed in an encrypted image: it would not be encrypted"
        return None

    def write_compressed(self, request: Request) -> None:
        """Write whole clusters, at the end of the disk as far as it goes. Those that compression makes no smaller are
        written as they are.

        EINVAL for parts of clusters, ENOTSUP if guest data is in an external data file: as in QEMU. ENOTSUP also if it
        is encrypted, for what is compressed is not (QEMU's tools let it out like that).
        """
        size = self._geometry.cluster_size
        if self.why_uncompressed is not None:
            raise RequestError(errno.ENOTSUP, self.why_uncompressed)
        if request.offset % size or (request.end % size and request.end != self._reader.size):
            raise RequestError(
                errno.EINVAL,
                f"compressed is what has whole clusters of {size}, not {request.length} bytes at {request.offset:#x}",
            )
        for part in request.pieces(size):
            self._relieve()
            plain = part.vector.tobytes().ljust(size, b"\0")
            data = compress(plain, self._reader.compression)
            with self._held(part):
                if data is None:
                    self._write(part)  # and nothing is allocated ahead: what follows may well be compressed
                else:
                    self._pack(part, plain, data)

    def _pack(self, part: Request, plain: bytes, data: bytes) -> None:
        """Have the cluster ``part``, which is held, be ``plain``, compressed to ``data``."""
        with self._lock:
            self._order.check()
            self._mapping.own(part.offset // self._geometry.table_span)
            place = self.refcounts.take_bytes(len(data))
        is_linked = False
        try:
            self._host.reserve(place, len(data))
            finish(self._data.file.write(Request.write(place, Vector.of(data))))
            with self._lock:
                entry = self._geometry.compressed_entry(place, len(data))
                self._mapping.link_compressed(part.offset, entry, discard=self._discard.other)
                is_linked = True
                self._reader.remember(entry, plain)
                self._announce(part.offset, part.end)
        finally:
            if not is_linked:
                with self._lock:
                    self.refcounts.give_back_bytes(place, len(data))

    # -- zero and trim ----------------------------------------------------------------------------------------------

    def zero(self, request: Request) -> None:
        """Make any range read as zeroes. MAY_UNMAP frees what it can; NO_FALLBACK raises ENOTSUP where zeroes would
        have to be written."""
        for start, end in self._by_table(request.offset, request.end):
            part = _part(request, start, end)
            self._relieve()
            with self._held(part):
                self._zero(part)

    def trim(self, request: Request) -> None:
        """Free the whole clusters of a range; they read as zeroes then. Of the rest, the file's storage is given back
        where it is. Version 2 keeps what hides a backing file."""
        for start, end in self._by_table(request.offset, request.end):
            part = _part(request, start, end)
            self._relieve()
            with self._held(part):
                first, stop = self._aligned(*self.whole(start, end), self._geometry.cluster_size)
                self._trim_in_place(start, first)
                self._trim_in_place(stop, end)
                self._zero_whole(_part(part, first, stop), unmap=True)

    def clear(self, start: int, end: int) -> None:
        """Make bytes of the disk read as zeroes, and free what they have. Their clusters are held."""
        for first, last in self._by_table(start, end):
            self._relieve()
            self._zero(Request.zero(first, last - first, Flag.MAY_UNMAP))

    def _zero(self, part: Request) -> None:
        """Zero a range within one L2 table, whose clusters are held."""
        first, stop = self.whole(part.offset, part.end)
        self._zero_data(_part(part, part.offset, first))
        self._zero_data(_part(part, stop, part.end))
        self._zero_whole(_part(part, first, stop), unmap=bool(part.flags & Flag.MAY_UNMAP))

    def _zero_whole(self, part: Request, *, unmap: bool) -> None:
        """Have L2 entries say that whole subclusters are zero, as far as they can."""
        for start, end, runs in self._groups(part.offset, part.end):
            # The last cluster ends with the disk.
            stop = self._geometry.clusters(end) * self._geometry.cluster_size if end == self._reader.size else end
            is_part = bool((start | stop) % self._geometry.cluster_size)
            if any(self._needs_data(run, is_part, unmap) for run in runs):
                self._zero_data(_part(part, start, end))
            elif any(
                (unmap and not is_part and run.place is not None)
                or not self._reader.is_zero(run, max(run.start, start))
                for run in runs
            ):
                self._order.check()
                with self._lock:
                    self._mapping.zero(start, stop, unmap=unmap, discard=self._discard.request)
                    self._announce(start, stop)

    def _needs_data(self, run: Run, is_part: bool, unmap: bool) -> bool:
        """Whether no entry can say that this is zero: part of a compressed cluster; in version 2, what is kept."""
        if run.kind is Kind.COMPRESSED:
            return is_part
        return run.kind is Kind.NORMAL and not self._geometry.has_zero and not unmap

    def _groups(self, start: int, end: int) -> Iterator[tuple[int, int, list[Run]]]:
        """(first, last, runs): the bytes [start, end) by whole clusters, so far as they are. Each group is one run,
        or those of one cluster."""
        group: list[Run] = []
        for run in self._mapping.runs(start, end, ahead=False):
            if run.start < end and start < run.end:
                group.append(run)
            if group and run.end % self._geometry.cluster_size == 0:
                yield max(group[0].start, start), min(group[-1].end, end), group
                group = []

    def _zero_data(self, part: Request) -> None:
        """Zero bytes, in place or by writing zeroes."""
        flags = part.flags & (Flag.MAY_UNMAP | Flag.NO_FALLBACK)
        if self.is_raw and part.length:  # what is allocated is there; all else shows zeroes already
            finish(self._data.file.zero(Request.zero(part.offset, part.length, flags)))
            return
        for run, start, end in self._reader.spans(part.offset, part.length):
            if self._reader.is_zero(run, start):
                continue
            if self.is_overwritable(run):
                finish(self._data.file.zero(Request.zero(self._reader.place(run, start), end - start, flags)))
            elif flags & Flag.NO_FALLBACK:
                raise RequestError(errno.ENOTSUP, "zeroes would have to be written here")
            else:
                self.write_zeroes(start, end)

    def write_zeroes(self, start: int, end: int) -> None:
        """Make bytes of the disk zeroes that are stored. Their clusters are held."""
        if start == end:
            return
        step = max(ZEROES_INLINE_MAX, self._geometry.cluster_size)
        zeroes = self._allocate(min(step, end - start))
        zeroes.zero()
        while start < end:
            length = min(step - start % step, end - start)
            self._write(Request.write(start, zeroes.slice(0, length)))
            start += length

    def _trim_in_place(self, start: int, end: int) -> None:
        if self._discard.request and not self._data.is_encrypted:  # a hole would be noise, not zeroes
            for run, first, stop in self._reader.spans(start, end - start):
                if self.is_overwritable(run):
                    place = self._reader.place(run, first)
                    self._data.discard(place, place + stop - first)

    def make_empty(self) -> None:
        """Have the active state hold nothing. Each L2 entry is right by itself, whether its sector got out or not: it
        names what it did, or nothing."""
        if self.is_raw:
            raise RequestError(errno.ENOTSUP, "an external data file that is a raw image cannot be emptied")
        for start, end in self._by_table(0, self._geometry.clusters(self._reader.size) * self._geometry.cluster_size):
            self._relieve()
            with self._clusters.exclusive(start, end - start):
                self.empty(start, end, discard=self._discard.request)

    def empty(self, start: int, end: int, *, discard: bool) -> None:
        """Have whole clusters within one L2 table, which are held, hold nothing. ``discard``: give storage back."""
        for first, stop, runs in self._groups(start, end):
            if any(run.kind is not Kind.UNALLOCATED or run.place is not None for run in runs):
                self._order.check()
                with self._lock:
                    self._mapping.unlink(first, stop, discard=discard)
                    self._announce(first, stop)

    # -- preallocation ----------------------------------------------------------------------------------------------

    def preallocate(self, start: int, end: int, fill: Fill, progress: Callable[[int], None]) -> None:
        """Have host clusters for whole clusters, which are held and have nothing stored, so that they read as what
        ``fill`` puts there. ``progress`` is told how far it is."""
        for first, last in self._by_table(start, end):
            self._relieve()
            while first < last:
                first = self._preallocate(first, last, fill)
            progress(last)

    def _preallocate(self, start: int, end: int, fill: Fill) -> int:
        """Do so for clusters from ``start`` on; where those end."""
        size = self._geometry.cluster_size
        with self._lock:
            self._order.check()
            self._mapping.own(start // self._geometry.table_span)
            place, count = self._host.take(start, self._geometry.clusters(end - start))
        stop = min(start + count * size, self._end)
        try:
            fill(self._data, place, stop - start, self._host.reserve(place, stop - start))
            with self._lock:
                self._mapping.link(start, stop, place, discard=False)
        except BaseException:
            with self._lock:
                self._host.give_back(place, count)
            raise
        return stop

    # -- common to all ----------------------------------------------------------------------------------------------

    def _relieve(self) -> None:
        """Write metadata back if too much waits for it. Before anything is held: a flush waits for others."""
        bared = self._data_file is not None and self._data_file.crowded
        if bared or self._mapping.crowded or self.refcounts.crowded:
            self._order.flush()

    def _held(self, request: Request) -> AbstractContextManager[None]:
        """Hold the guest clusters of a request alone."""
        start, end = self._geometry.span(request.offset, request.end)
        return self._clusters.exclusive(start, end - start)

    def _by_table(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The bytes [start, end) in parts of one L2 table each, so that no part holds much, or for long."""
        step = self._geometry.table_span
        while start < end:
            stop = min((start // step + 1) * step, end)
            yield start, stop
            start = stop

    def _announce(self, start: int, end: int) -> None:
        """Say that the bytes [start, end) of the disk map to something else now. Under the metadata lock."""
        end = min(end, self._reader.size)
        if start < end:
            self._changed(start, end - start)

    def _is_in_place(self, run: Run) -> bool:
        """Whether the host clusters of ``run`` are in the file, and not where metadata is."""
        return run.place is not None and self._host.has(run.place, run.end - run.start)


def _part(request: Request, start: int, end: int) -> Request:
    """The bytes [start, end) of the disk of a request for a wider range."""
    return request.slice(start - request.offset, end - start)


def _merged(pieces: list[Piece]) -> Iterator[Piece]:
    """The same pieces, those joined that one write can do."""
    last: Piece | None = None
    for piece in pieces:
        if (
            last is not None
            and last.in_place == piece.in_place
            and last.end == piece.start
            and last.place + (last.end - last.start) == piece.place
        ):
            last = last._replace(end=piece.end)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
