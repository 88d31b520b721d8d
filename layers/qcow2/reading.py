"""Reading: the runs of a range, and the bytes of what is no plain place."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

from layers.qcow2.clusters import Kind, Run
from layers.qcow2.compression import BadData, decompress
from layers.qcow2.header import Header
from layers.qcow2.limits import DECOMPRESSED_KEPT_MAX
from layers.qcow2.mapping import Mapping
from layers.qcow2.storage import Storage
from nbdserver.extent import ZERO, Extent, Packed
from nbdserver.layer import BASE_ALLOCATION, STATE_ZERO, Layer, finish
from nbdserver.request import Request


class Reader:
    """An image as it is now. ``data``: the file that guest data is in, ``storage`` or another. ``backing``: what
    unallocated clusters show; None: zeroes."""

    def __init__(
        self,
        storage: Storage,
        data: Storage,
        header: Header,
        mapping: Mapping,
        lock: threading.Lock,
        backing: Layer | None,
    ) -> None:
        self.storage, self.data, self.geometry, self.mapping = storage, data, header.geometry, mapping
        self.size, self.backing = header.size, backing
        self.compression = header.compression
        self._lock = lock
        self._decompressed: OrderedDict[int, bytes] = OrderedDict()

    @property
    def below_size(self) -> int:
        """How much of the disk the backing file reaches over."""
        return min(self.backing.size, self.size) if self.backing is not None else 0

    def below(self, start: int, end: int) -> Iterator[Extent]:
        """What lies under the unallocated bytes [start, end)."""
        edge = min(max(self.below_size, start), end)
        if self.backing is not None and start < edge:
            yield Extent(edge - start, self.backing, start)
        if edge < end:
            yield Extent(end - edge, ZERO)

    def packed(self, offset: int) -> Packed | None:
        """`Layer.packed`."""
        if self.data.is_encrypted or (found := self.mapping.words(offset, self.size)) is None:
            return None
        start, words = found
        is_alone = self.backing is None
        return self.geometry.table(words, start, self.data.file, self.data.size, is_alone=is_alone)

    def spans(self, offset: int, length: int, *, ahead: bool = False) -> Iterator[tuple[Run, int, int]]:
        """(run, start, end): the runs of the range, and which of its bytes, [start, end), each of them holds.

        With ``ahead`` it goes on as `Mapping.runs` does. Raises ImageError, OSError.
        """
        limit = self.size if ahead else offset + length
        for run in self.mapping.runs(offset, offset + length, ahead=ahead):
            # Not max and min, which are calls: every page fault comes by here.
            start = run.start if run.start > offset else offset
            end = run.end if run.end < limit else limit
            if start < end:
                yield run, start, end

    def place(self, run: Run, offset: int) -> int:
        """Where in the data file the byte ``offset`` of the disk is, which a run with host clusters holds."""
        assert run.place is not None
        return run.place + offset - run.start

    def stored(self, run: Run, start: int, end: int) -> Iterator[Extent]:
        """Where the bytes [start, end) of a run with host clusters are; what the file does not reach to is zeroes."""
        place = self.place(run, start)
        edge = min(max(self.data.size - place + start, start), end)
        if start < edge:
            yield Extent(edge - start, self.data.file, place)
        if edge < end:
            yield Extent(end - edge, ZERO)

    def is_zero(self, run: Run, start: int) -> bool:
        """Whether the bytes of ``run`` from ``start`` on read as zeroes for there being nothing in them."""
        if run.kind is Kind.UNALLOCATED:
            return start >= self.below_size
        return run.kind is Kind.ZERO

    def shows_zeroes(self, run: Run, start: int, end: int) -> bool:
        """Whether the bytes [start, end) of ``run`` are known to read as zeroes; the backing file is asked, too."""
        if self.is_zero(run, start):
            return True
        if run.kind is not Kind.UNALLOCATED or self.backing is None:
            return False
        edge = min(end, self.below_size)
        for length, flags in self.backing.status(BASE_ALLOCATION, start, edge - start):
            if not flags & STATE_ZERO:
                return False
            start += length
            if start >= edge:
                return True
        return False

    def read(self, request: Request) -> None:
        """Read any range. Raises ImageError, OSError, RequestError."""
        for run, start, end in self.spans(request.offset, request.length):
            self.read_run(run, request.slice(start - request.offset, end - start))

    def read_run(self, run: Run, part: Request) -> None:
        """Read a range that ``run`` holds."""
        if run.kind is Kind.NORMAL:
            self._read_extents(self.stored(run, part.offset, part.end), part)
        elif run.kind is Kind.COMPRESSED:
            skip = part.offset - run.start
            part.vector.fill(memoryview(self._decompress(run))[skip : skip + part.length])
        elif run.kind is Kind.UNALLOCATED:
            self._read_extents(self.below(part.offset, part.end), part)
        else:
            part.vector.zero()

    def _read_extents(self, extents: Iterator[Extent], part: Request) -> None:
        done = 0
        for extent in extents:
            vector = part.vector.slice(done, extent.length)
            if isinstance(extent.target, Layer):
                finish(extent.target.read(Request.read(extent.offset, vector)))
            else:
                vector.zero()
            done += extent.length

    def remember(self, entry: int, plain: bytes) -> None:
        """What the compressed cluster of a new L2 entry holds. Under the metadata lock.

        Another that was in the same place may have had the same entry. Nobody can be reading that any more: clusters
        of the disk are held for it, and its place was not free before all of them had lost it.
        """
        self._decompressed[entry] = plain
        self._decompressed.move_to_end(entry)
        while len(self._decompressed) > max(DECOMPRESSED_KEPT_MAX // len(plain), 1):
            self._decompressed.popitem(last=False)

    def _decompress(self, run: Run) -> bytes:
        """The whole cluster. Compressed bytes are never changed while an L2 entry names them, which so identifies
        them."""
        with self._lock:
            known = self._decompressed.get(run.entry)
        if known is not None:
            return known
        offset, length = self.geometry.compressed(run.entry)
        length = min(length, self.storage.size - offset)  # the last sector may be cut off
        data = self.storage.file.pread(offset, length) if length > 0 else b""
        try:
            plain = decompress(data, self.compression, self.geometry.cluster_size)
        except BadData as bad:
            wanted = f"a cluster of compressed data at {offset:#x} ({bad})"
            raise self.mapping.bad_entry(run.start, f"{run.entry:#018x}", wanted).excused() from bad
        with self._lock:
            self.remember(run.entry, plain)
        return plain
