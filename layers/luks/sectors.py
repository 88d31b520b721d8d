"""Disks that lie encrypted in a file, sector by sector: where their bytes are, read and written.

::

    sectors  [0 ......................... size)          sectors of 512 bytes, counted from here for the cipher
               │  AES-XTS: a transform, run by the engine
               │  other modes, and parts of sectors: this code
    file    ──[payload offset ................)──
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator
from typing import ClassVar

from layers.luks.keyslots import Unlocked
from layers.luks.limits import DECRYPT_MAX
from layers.ondisk.luks import SECTOR
from nbdserver.extent import CODE, Extent, Intent
from nbdserver.layer import ALLOCATION_DEPTH, Buffers, Layer, finish
from nbdserver.limits import BOUNCE_MAX
from nbdserver.ranges import RangeLock
from nbdserver.request import Request, Vector


@dataclasses.dataclass(eq=False)
class Sectors(Layer):
    """A disk in ``file``, encrypted; `unlock` says how, before it is used."""

    #: What is encrypted.
    file: Layer

    buffers: ClassVar[Buffers] = Buffers(
        read="bounces: decrypted where it arrives; the rest of a sector that is read in part fills pool memory",
        write="bounces: encrypted into pool memory, the client's own is not ours to change",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Sectors: shared by who reads them here, held alone by who writes them here.
        self._sectors = RangeLock()
        #: (start, end) ranges that nobody but their writer may write: see `_withheld`.
        self._withheld_ranges: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def unlock(self, key: Unlocked, payload_offset: int) -> None:
        """Use this key for what is behind ``payload_offset`` in the file."""
        self._cipher, self._transform = key
        self._payload_offset = payload_offset
        self._size = self._reach()

    def _reach(self) -> int:
        """How large the disk can be in the file as it is: QEMU and dm-crypt know whole sectors only; what of one lies
        at the file's end cannot be decrypted."""
        return (self.file.size - self._payload_offset) // SECTOR * SECTOR

    @property
    def size(self) -> int:
        return self._size

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        # A hole of the file is no hole here: its zeroes decrypt to noise.
        yield length, 1 if context == ALLOCATION_DEPTH else 0

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        return self._extents(offset, self.size, intent)

    def _extents(self, offset: int, stop: int, intent: Intent) -> Iterator[Extent]:
        """Where the bytes [offset, stop) are."""
        if self._transform is None or intent is Intent.ZERO:
            yield Extent(stop - offset, CODE)
            return
        # What begins or ends within a sector the engine leaves to `read` and `write`.
        for start, end, is_withheld in self._spans(offset, stop):
            if is_withheld and intent is Intent.WRITE:
                yield Extent(end - start, CODE)
            else:
                place = self._payload_offset + start
                yield Extent(end - start, self.file, place, writable=not is_withheld, through=self._transform)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether it is withheld), which cover [start, stop)."""
        with self._lock:
            withheld = sorted(self._withheld_ranges)
        for begin, end in withheld:
            if start < begin < stop:
                yield start, begin, False
                start = begin
            if start < min(end, stop) and begin <= start:
                yield start, min(end, stop), True
                start = end
        if start < stop:
            yield start, stop, False

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        if child is not self.file:
            return ()  # what the header says was read once
        start = max(_down(offset - self._payload_offset), 0)
        end = min(_up(offset + length - self._payload_offset), self.size)
        return ((start, end - start),) if start < end else ()

    # -- reading and writing -----------------------------------------------------------------------------------------

    def read(self, request: Request) -> None:
        start, end = _down(request.offset), _up(request.end)
        before, after = request.offset - start, end - request.end
        vector = request.vector
        if before or after:
            padding = self.allocate(2 * SECTOR)
            vector = padding.slice(0, before) + vector + padding.slice(SECTOR, after)
        with self._sectors.shared(start, end - start):
            self._read_sectors(Request.read(start, vector, request.asked_flags))

    def _read_sectors(self, request: Request) -> None:
        """Read whole sectors, decrypted where they arrive."""
        finish(self.file.read(request.moved(self._payload_offset + request.offset)))
        for piece in request.pieces(DECRYPT_MAX):
            piece.vector.fill(self._cipher.decrypt(piece.offset // SECTOR, piece.vector.tobytes()))

    def write(self, request: Request) -> None:
        start, end = _down(request.offset), _up(request.end)
        with self._sectors.exclusive(start, end - start):
            if (start, end) == (request.offset, request.end):
                self._write_sectors(request)
                return
            with self._withheld(start, end):
                before = self._sector(start).slice(0, request.offset - start)
                after = self._sector(end - SECTOR).slice(SECTOR - (end - request.end), end - request.end)
                self._write_sectors(Request.write(start, before + request.vector + after, request.asked_flags))

    def _sector(self, offset: int) -> Vector:
        vector = self.allocate(SECTOR)
        self._read_sectors(Request.read(offset, vector))
        return vector

    def _write_sectors(self, request: Request) -> None:
        """Write whole sectors, encrypted on the way: the client's memory is not ours to change."""
        bounce = self.allocate(min(request.length, BOUNCE_MAX))
        for piece in request.pieces(BOUNCE_MAX):
            encrypted = bounce.slice(0, piece.length)
            encrypted.fill(self._cipher.encrypt(piece.offset // SECTOR, piece.vector.tobytes()))
            finish(self.file.write(piece.with_vector(encrypted).moved(self._payload_offset + piece.offset)))

    @contextlib.contextmanager
    def _withheld(self, start: int, end: int) -> Iterator[None]:
        """For the time of the ``with`` block nobody else writes these sectors, the engine included: what is read of one
        here, changed and written back must not undo what was written to the rest of it meanwhile."""
        if self._transform is None:
            yield
            return
        with self._lock:
            self._withheld_ranges.append((start, end))
        try:
            self.changed(start, end - start)
            # The lock on these sectors is held, but no I/O that runs on the file needs it.
            self.file.wait_unused(self._payload_offset + start, end - start)
            yield
        finally:
            # Nobody is told: who resolves again finds them writable.
            with self._lock:
                self._withheld_ranges.remove((start, end))

    def wait_unused(self, offset: int, length: int) -> None:
        self.code_uses.wait_unused(offset, length)
        self.file.wait_unused(self._payload_offset + offset, length)


def _down(offset: int) -> int:
    """Where the sector begins that ``offset`` lies in."""
    return offset // SECTOR * SECTOR


def _up(offset: int) -> int:
    """The same, or the next sector's begin if it lies behind that."""
    return -(-offset // SECTOR) * SECTOR
