"""The layer: a disk that lies encrypted behind the header.

::

    luks   [0 ......................... size)            sectors of 512 bytes, counted from here for the cipher
             │  AES-XTS: a transform, run by the engine
             │  other modes, and parts of sectors: this code
    file  ──[payload offset ................)──
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import threading
from collections.abc import Iterable, Iterator
from typing import ClassVar, Final

from layers.luks.ciphers import Scheme, SectorCipher, sector_cipher
from layers.luks.header import read_header
from layers.luks.keyslots import unlock
from layers.luks.limits import DECRYPT_MAX
from layers.ondisk.luks import SECTOR
from nbdserver.errors import ImageError, RequestError
from nbdserver.extent import CODE, Extent, Intent, Transform
from nbdserver.layer import ALLOCATION_DEPTH, Buffers, Layer, Opener, finish
from nbdserver.limits import BOUNCE_MAX, DISK_MAX
from nbdserver.permissions import CHANGING, READ, Grant, as_backing
from nbdserver.ranges import RangeLock
from nbdserver.request import Request, Vector

#: The one scheme that the engine has.
ENGINE_SCHEME: Final = Scheme("xts", "plain64")
ENGINE_CIPHER: Final = "aes-xts-plain64"
ENGINE_KEY_LENGTHS: Final = (32, 64)


@dataclasses.dataclass(eq=False)
class Luks(Layer):
    #: The encrypted image.
    file: Layer
    #: The header, where it lies in an image of its own (QEMU's key of this name, cryptsetup's ``--header``).
    header: Layer | None = None
    #: Where the passphrase is: in a file, in an environment variable, behind a descriptor that the server was started
    #: with; exactly one. Every byte counts, as in QEMU's secret objects and cryptsetup's ``--key-file``: a newline at
    #: the end is part of it (what was typed to cryptsetup has none).
    key_file: str | None = None
    key_env: str | None = None
    key_fd: int | None = None

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

    # -- life --------------------------------------------------------------------------------------------------------

    def open(self, opener: Opener) -> None:
        passphrase = opener.secret(key_file=self.key_file, key_env=self.key_env, key_fd=self.key_fd)
        source = self.file if self.header is None else self.header
        header = read_header(source, self.file)
        key = unlock(header, source, passphrase)
        if key is None:
            raise ImageError(f"no key slot opens with this passphrase{_hint(passphrase)}", path=source.filename)
        try:
            self._cipher: SectorCipher = sector_cipher(header.scheme, key)
        except ValueError as error:
            raise ImageError(f"its master key is {error}", path=source.filename) from error
        self._payload_offset = header.payload_offset
        # QEMU and dm-crypt know whole sectors only; what of one lies at a file's end cannot be decrypted.
        self._size = (self.file.size - header.payload_offset) // SECTOR * SECTOR
        self._transform: Transform | None = None
        if header.scheme == ENGINE_SCHEME and len(key) in ENGINE_KEY_LENGTHS:
            self._transform = Transform(ENGINE_CIPHER, key, SECTOR)

    # -- what it is --------------------------------------------------------------------------------------------------

    def child_grant(self, role: str, own: Grant) -> Grant:
        if role == "header":
            return as_backing(own)
        # Sectors that are written in part are read before: nobody else may write there.
        return Grant(own.used | READ, own.shared & ~CHANGING)

    @property
    def size(self) -> int:
        return self._size

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        # A hole of the file is no hole here: its zeroes decrypt to noise.
        yield length, 1 if context == ALLOCATION_DEPTH else 0

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        if self._transform is None or intent is Intent.ZERO:
            yield Extent(self._size - offset, CODE)
            return
        # What begins or ends within a sector the engine leaves to `read` and `write`.
        for start, end, is_withheld in self._spans(offset):
            if is_withheld and intent is Intent.WRITE:
                yield Extent(end - start, CODE)
            else:
                place = self._payload_offset + start
                yield Extent(end - start, self.file, place, writable=not is_withheld, through=self._transform)

    def _spans(self, start: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether it is withheld) from ``start`` to the end of the disk."""
        with self._lock:
            withheld = sorted(self._withheld_ranges)
        for begin, end in withheld:
            if start < begin:
                yield start, begin, False
            if start < end:
                yield max(start, begin), end, True
                start = end
        if start < self._size:
            yield start, self._size, False

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        if child is not self.file:
            return ()  # what the header says was read once
        start = max(_down(offset - self._payload_offset), 0)
        end = min(_up(offset + length - self._payload_offset), self._size)
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

    def resize(self, size: int) -> None:
        """Change the size. What is new is written, so that it reads as zeroes: formats above count on that."""
        if size % SECTOR or not 0 <= size <= DISK_MAX - self._payload_offset:
            raise RequestError(errno.EINVAL, f"an encrypted disk cannot have {size} bytes, only whole sectors")
        self.file.resize(self._payload_offset + size)
        before = self._size
        if size > before:
            self.zero(Request.zero(before, size - before))
        self._size = size
        if size < before:
            self.changed(size, before - size)


def _down(offset: int) -> int:
    """Where the sector begins that ``offset`` lies in."""
    return offset // SECTOR * SECTOR


def _up(offset: int) -> int:
    """The same, or the next sector's begin if it lies behind that."""
    return -(-offset // SECTOR) * SECTOR


def _hint(passphrase: bytes) -> str:
    """What is most often wrong with a passphrase that does not fit."""
    if not passphrase:
        return ", which is empty"
    return ", which ends in a newline, and that counts" if passphrase.endswith(b"\n") else ""
