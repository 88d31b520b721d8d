"""Copying data from disk to disk: read by several threads, written in order, zeroes left out.

::

    ranges ──> pieces ──> thread: read, look for zeroes ──┐   in turn   ┌──> write data
                     └──> thread: read, look for zeroes ──┴─────────────┴──> zero; nothing where there are zeroes anyway
                          ...

A target that allocates is written in order, so that it lays the data out as the disk has it; while one thread writes,
the others read.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from nbdserver.errors import ImageError, NbdserverError
from nbdserver.extent import CODE, ZERO, Intent, OpenFile, Special
from nbdserver.files import PlainFile
from nbdserver.format import Progress, no_progress
from nbdserver.graph import execute, flatten
from nbdserver.image.allocation import SECTOR
from nbdserver.layer import Layer
from nbdserver.limits import MIB
from nbdserver.request import Flag, Operation, Request, Vector

#: What is read and written at once: as qemu-img does. Larger is no faster, and no longer stays in a processor's cache.
PIECE: Final = 2 * MIB

#: Pieces of one batch, of which many are small.
BATCH_COUNT_MAX: Final = 512

#: Threads that read and write, and the most of them (`-m`). What is in the page cache needs no more, slow storage may.
WORKERS_DEFAULT: Final = 4
WORKERS_MAX: Final = 16

#: Zeroes of this length that data contains are left out: qemu-img's ``-S``.
SPARSE_DEFAULT: Final = 4096
SPARSE_MAX: Final = 16 * MIB


class Range(NamedTuple):
    """A range to be copied. ``is_zero``: it is known to be zeroes."""

    start: int
    length: int
    is_zero: bool


@dataclasses.dataclass(frozen=True)
class Copy:
    """How to copy from ``source`` to ``target``, from and to the same places. Both are open.

    ``sparse``: data has zeroes left out (or zeroed) that fill at least so many aligned bytes; 0: it is not searched.
    ``fills_holes``: what is known to be zeroes is written, too, rather than left out or zeroed. ``is_zeroed``: the
    target is zeroes where it has not been written. ``flags``: of writes. ``unit``: of compressed writes, what is
    compressed at once: ranges are whole units then, but for the end of the source. ``salvage``: is told of what cannot
    be read, and is zeroes then; None: that is an error. ``rate``: bytes a second. ``in_order``: one piece is written
    after the other. ``offload``: have the kernel copy from file to file where it can, zeroes and all.
    """

    source: Layer
    target: Layer
    sparse: int = SPARSE_DEFAULT
    fills_holes: bool = False
    is_zeroed: bool = False
    flags: Flag = Flag.NONE
    unit: int = 1
    workers: int = WORKERS_DEFAULT
    in_order: bool = True
    salvage: Callable[[str], None] | None = None
    rate: int | None = None
    offload: bool = False

    def run(self, ranges: Iterable[Range], total: int, progress: Progress = no_progress) -> None:
        """Copy the ranges, which ascend and end at ``total``. Flushes nothing.

        Raises the first failure, when all threads have ended.
        """
        _Run(self, ranges, total, progress).run()

    @property
    def step(self) -> int:
        """How much is read and written at once."""
        return self.unit if self.flags & Flag.WRITE_COMPRESSED else PIECE

    def pieces(self, ranges: Iterable[Range]) -> Iterator[Range]:
        """What is copied at once: no zeroes if they need not be written; data is cut at multiples of `step`."""
        for found in ranges:
            if found.is_zero and not self.fills_holes:
                if not self.is_zeroed:
                    yield found
                continue
            start, end = found.start, found.start + found.length
            while start < end:
                stop = min((start // self.step + 1) * self.step, end)
                yield Range(start, stop - start, found.is_zero)
                start = stop

    def batches(self, ranges: Iterable[Range]) -> Iterator[list[Range]]:
        """Pieces that a thread copies at once: little ones cost more to hand out than to copy."""
        batch: list[Range] = []
        length = 0
        for piece in self.pieces(ranges):
            more = 0 if piece.is_zero and not self.fills_holes else piece.length
            if batch and (length + more > self.step or len(batch) == BATCH_COUNT_MAX):
                yield batch
                batch, length = [], 0
            batch.append(piece)
            length += more
        if batch:
            yield batch

    def read(self, piece: Range, data: memoryview) -> None:
        """Read a piece of data."""
        if piece.is_zero:
            data[:] = bytes(len(data))
            return
        try:
            read_still(self.source, piece.start, data)
        except (NbdserverError, OSError) as error:
            if self.salvage is None:
                raise ImageError(f"cannot be read at byte {piece.start}: {error}", path=self.source.filename) from error
            self._salvage(piece, data)

    def requests(self, piece: Range, data: memoryview) -> list[Request]:
        """What to ask of the target for a piece that has been read (into no data at all, if it is to be zeroed)."""
        if not len(data):
            return [Request.zero(piece.start, piece.length, Flag.MAY_UNMAP)]
        requests = []
        for start, stop, is_zero in self._parts(piece, data):
            if not is_zero:
                flags = self._flags(piece.start + stop)
                requests.append(Request.write(piece.start + start, Vector.of(data[start:stop]), flags))
            elif not self.is_zeroed:
                requests.append(Request.zero(piece.start + start, stop - start, Flag.MAY_UNMAP))
        return requests

    def write(self, requests: Iterable[Request], flat: Flat | None) -> None:
        """Do what `requests` said, straight to the file if the target is ``flat``."""
        for request in requests:
            try:
                if flat is None:
                    execute(self.target, request)
                else:
                    flat.execute(request)
            except (NbdserverError, OSError) as error:
                name = self.target.filename
                raise ImageError(f"cannot be written at byte {request.offset}: {error}", path=name) from error

    def _flags(self, end: int) -> Flag:
        """Those for data that ends there. A unit that goes on behind the source is not compressed."""
        return self.flags if end % self.unit == 0 or end == self.target.size else Flag.NONE

    def _parts(self, piece: Range, data: memoryview) -> Iterable[tuple[int, int, bool]]:
        if not self.sparse:
            return ((0, len(data), False),)
        if self.flags & Flag.WRITE_COMPRESSED:
            return zero_runs(data, piece.start, self.unit, self.unit)
        return zero_runs(data, piece.start, 1 << self.sparse.bit_length() - 1, self.sparse)

    def _salvage(self, piece: Range, data: memoryview) -> None:
        """Read sector by sector."""
        for start in range(0, len(data), SECTOR):
            sector = data[start : start + SECTOR]
            try:
                execute(self.source, Request.read(piece.start + start, Vector.of(sector)))
            except (NbdserverError, OSError) as error:
                assert self.salvage is not None
                self.salvage(f"what is at byte {piece.start + start} cannot be read: {error}")
                sector[:] = bytes(len(sector))


class Flat(NamedTuple):
    """A disk that lies in one file as it is, from ``offset`` on."""

    file: OpenFile
    offset: int

    @classmethod
    def of(cls, disk: Layer) -> Flat | None:
        """Where a disk is that nobody else uses, if it is in one place; None: not so."""
        leaf = next(flatten(disk, 0, disk.size, Intent.WRITE), None) if disk.size else None
        if leaf is None or isinstance(leaf.target, Special) or not leaf.writable or leaf.length < disk.size:
            return None
        return None if leaf.transform or leaf.meters else cls(leaf.target, leaf.offset)

    def execute(self, request: Request) -> None:
        """Write, or zero with MAY_UNMAP. Raises OSError."""
        if request.operation is Operation.WRITE:
            self.file.write(self.offset + request.offset, request.vector)
        else:
            self.file.zero(self.offset + request.offset, request.length, may_unmap=True, no_fallback=False)


def read_still(disk: Layer, start: int, data: memoryview) -> None:
    """Read from a disk that nobody writes: `execute`, without what watches over those who do.

    Raises RequestError, OSError, ImageError.
    """
    done = 0
    for leaf in flatten(disk, start, len(data), Intent.READ, transforms=False):
        part = data[done : done + leaf.length]
        if leaf.target is ZERO:
            part[:] = bytes(len(part))
        elif leaf.target is CODE or leaf.meters or isinstance(leaf.target, Special):
            execute(disk, Request.read(start + done, Vector.of(part)))
        else:
            leaf.target.read(leaf.offset, Vector.of(part))
        done += len(part)
        if done == len(data):
            return


def whole_units(ranges: Iterable[Range], unit: int, end: int) -> Iterator[Range]:
    """The same ranges of a disk that ends at ``end``, in whole units: what shares a unit with anything is data, and
    read with it."""
    told = 0
    for start, length, is_zero in ranges:
        stop = start + length
        first, last = -(-start // unit) * unit, stop if stop == end else stop // unit * unit
        if not is_zero or first >= last:
            first = last = min(-(-stop // unit) * unit, end)
        parts = ((start // unit * unit, first, False), (first, last, True), (last, -(-stop // unit) * unit, False))
        for left, right, zero in parts:
            left, right = max(left, told), min(right, end)
            if left < right:
                yield Range(left, right - left, zero)
                told = right


def zero_runs(data: memoryview, position: int, block: int, shortest: int) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, is zero) of ``data``, which lies at ``position`` of a disk: zero are runs of whole blocks, of at
    least ``shortest`` bytes. Blocks are counted from the disk's beginning; what is left at the ends is a block too."""
    told = 0
    for start, stop in _zero_spans(data, position, block):
        if stop - start >= shortest or stop - start == len(data):
            if told < start:
                yield told, start, False
            yield start, stop, True
            told = stop
    if told < len(data):
        yield told, len(data), False


def _zero_spans(data: memoryview, position: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of blocks that are zeroes."""
    first, last = 0, 0
    for start, stop in _candidates(data, position, block):
        if not _is_zero(data, start, stop):
            continue
        if start != last:
            if first < last:
                yield first, last
            first = start
        last = stop
    if first < last:
        yield first, last


def _candidates(data: memoryview, position: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks that begin and end with a zero: few of those with data do. Found without a step of
    Python's for each block."""
    head = min(-position % block, len(data))
    if head and not data[0] and not data[head - 1]:
        yield 0, head
    begins = bytes(data[head::block])
    index = begins.find(0)
    while index >= 0:
        start = head + index * block
        stop = min(start + block, len(data))
        if not data[stop - 1]:
            yield start, stop
        index = begins.find(0, index + 1)


#: Blocks are compared with this.
_ZEROES: Final = bytes(64 * 1024)


def _is_zero(data: memoryview, start: int, stop: int) -> bool:
    # To compare ``bytes`` is memcmp; to compare views is a loop.
    return all(
        bytes(data[at : min(at + len(_ZEROES), stop)]) == _ZEROES[: min(len(_ZEROES), stop - at)]
        for at in range(start, stop, len(_ZEROES))
    )


class _Run:
    """One copy under way."""

    def __init__(self, copy: Copy, ranges: Iterable[Range], total: int, progress: Progress) -> None:
        self._copy = copy
        self._batches = enumerate(copy.batches(ranges))
        self._flat = Flat.of(copy.target)
        self._offloads = copy.offload
        self._total, self._progress = total, progress
        self._lock = threading.Lock()
        self._turn = threading.Condition()
        #: The batch whose turn it is, and how far the disk has been written.
        self._next = 0
        self._done = 0
        #: When all that has been written was due, at the rate that is wanted.
        self._due = time.monotonic()
        self._failures: list[BaseException] = []

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._work, name=f"copy {number}", daemon=True)
            for number in range(self._copy.workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # the user has had enough
            self._fail(error)
            for thread in threads:
                thread.join()
            raise
        if self._failures:
            raise self._failures[0]

    def _work(self) -> None:
        try:
            buffer = memoryview(bytearray(self._copy.step))
            while not self._failures:
                with self._lock:
                    number, batch = next(self._batches, (0, None))
                if batch is None:
                    return
                self._do(number, batch, buffer)
        except BaseException as error:
            self._fail(error)

    def _do(self, number: int, batch: list[Range], buffer: memoryview) -> None:
        copy = self._copy
        requests = []
        for piece in batch:
            if self._offload(piece):
                continue
            length = 0 if piece.is_zero and not copy.fills_holes else piece.length
            data, buffer = buffer[:length], buffer[length:]
            copy.read(piece, data)
            requests += copy.requests(piece, data)
        if copy.in_order:
            with self._turn:
                self._turn.wait_for(lambda: self._next == number or bool(self._failures))
        if self._failures:
            return
        copy.write(requests, self._flat)
        with self._turn:
            self._next += 1
            self._done = max(self._done, batch[-1].start + batch[-1].length)
            self._turn.notify_all()
            self._progress(self._done, self._total)
        if copy.rate:
            self._wait(sum(piece.length for piece in batch) / copy.rate)

    def _offload(self, piece: Range) -> bool:
        """Have the kernel copy a piece of data, if that can be done; False, if it is still to be done."""
        flat = self._flat
        if not self._offloads or piece.is_zero or flat is None or not isinstance(flat.file, PlainFile):
            return False
        done = 0
        for leaf in flatten(self._copy.source, piece.start, piece.length, Intent.READ, transforms=False):
            length = min(leaf.length, piece.length - done)
            if not isinstance(leaf.target, PlainFile) or leaf.meters:
                return False
            try:
                leaf.target.copy_to(leaf.offset, flat.file, flat.offset + piece.start + done, length)
            except OSError:
                self._offloads = False  # whatever it was: if it matters, copying says so
                return False
            done += length
            if done == piece.length:
                break
        return True

    def _wait(self, seconds: float) -> None:
        """Wait until as much as this may be done, on average since the beginning."""
        with self._lock:
            self._due += seconds
            ahead = self._due - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)

    def _fail(self, error: BaseException) -> None:
        with self._turn:
            self._failures.append(error)
            self._turn.notify_all()
