"""The image file (and the external data file) as the rest of the format uses it: metadata in and out, and room for
more."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from nbdserver.errors import ImageError, RequestError
from nbdserver.layer import Layer
from nbdserver.request import Flag, Request


class CorruptImage(ImageError):
    """An image's metadata contradicts itself, or the format. ``storage``: whose it is."""

    def __init__(self, storage: Storage, message: str, offset: int | None, found: object, wanted: object) -> None:
        self.storage = storage
        super().__init__(message, path=storage.file.filename, offset=offset, found=found, wanted=wanted)

    def excused(self) -> ImageError:
        """The same where it is not the metadata's fault: the image can still be written."""
        return ImageError(self.message, path=self.path, offset=self.offset, found=self.found, wanted=self.wanted)


class Unopened(Layer):
    """An external data file that was left alone: nobody knows what is in it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return True

    def read(self, request: Request) -> None:
        raise RequestError(errno.EIO, "the external data file has not been opened")


class Storage:
    """``file`` with its size, which changes only here."""

    #: Whether what is stored by `Writer` and read by `Reader` lies encrypted in the file: holes of it are no zeroes.
    is_encrypted = False

    def __init__(self, file: Layer, cluster_size: int) -> None:
        self.file, self.cluster_size = file, cluster_size
        #: How much longer than is needed it is made when it grows.
        self.growth = 0
        self._size = file.size
        #: Free clusters from here on have never held anything: they read as zeroes.
        self._fresh = self._size
        #: Where the file really ends, if it has been made longer than is needed now.
        self._reach = self._size
        self._growing = threading.Lock()

    @property
    def size(self) -> int:
        """The file's size, bytes."""
        return self._size

    def error(
        self, message: str, offset: int | None = None, found: object = None, wanted: object = None
    ) -> CorruptImage:
        """The ImageError for what this image's metadata says."""
        return CorruptImage(self, message, offset, found, wanted)

    def read_table(self, what: str, named_at: int, place: int, length: int) -> bytes:
        """The bytes of the table ``what``, which what is at ``named_at`` says to be at ``place``.

        Raises ImageError if it cannot be there; OSError.
        """
        self.check_place(what, named_at, place)
        there = min(length, self.size - place)  # the last cluster of a file may be cut off
        return self.file.pread(place, there) + bytes(length - there)

    def check_place(self, what: str, named_at: int, place: int) -> None:
        """Raise ImageError if no cluster of the file can begin at ``place``."""
        if place % self.cluster_size:
            raise self.error(what, named_at, f"place {place:#x}", f"a multiple of {self.cluster_size:#x}")
        if not 0 < place < self.size:
            raise self.error(what, named_at, f"place {place:#x}", f"one in the file, which ends at {self.size:#x}")

    def fill_up(self, size: int | None = None) -> None:
        """Have the file reach to ``size``, by default to the end of its last cluster, if it can: what lies in it may
        then be written in place."""
        with contextlib.suppress(OSError):
            self.reserve(0, -(-self.size // self.cluster_size) * self.cluster_size if size is None else size)

    def reserve(self, offset: int, length: int) -> bool:
        """Make the file reach to the end of the range, which has just been taken; whether nothing has ever been there,
        so that it reads as zeroes.

        Raises OSError: ENOSPC if the file cannot grow.
        """
        if offset + length > self.size:
            with self._growing:
                if offset + length > self.size:
                    self._grow(offset + length)
        return offset >= self._fresh

    def freed(self, offset: int, length: int) -> None:
        """The range is free, and what was in it may still be there."""
        with self._growing:
            self._fresh = max(self._fresh, offset + length)

    def _grow(self, size: int) -> None:
        if size > self._reach:
            try:
                self._reach = self._lengthened(size)
            except RequestError as error:
                number = errno.ENOSPC if error.errno == errno.ENOTSUP else error.errno
                raise OSError(number, os.strerror(number), self.file.filename) from error
        self._size = size

    def _lengthened(self, size: int) -> int:
        """Make the file reach to ``size``, and somewhat farther: where it ends then. Raises RequestError."""
        if self.growth:
            with contextlib.suppress(RequestError):  # no room for that: perhaps there is for what is needed
                self.file.resize(size + self.growth)
                return size + self.growth
        self.file.resize(size)
        return size

    def close(self) -> None:
        """Have the file end where it is needed to."""
        self.truncate(self.size)

    def truncate(self, size: int) -> None:
        """Make the file end at ``size`` if it is longer, and can: nothing behind that is in use."""
        with self._growing, contextlib.suppress(OSError, RequestError):
            if size < self._reach:
                self.file.resize(size)
                self._size = self._reach = size

    def reserve_zeroed(self, offset: int, length: int) -> None:
        """`reserve`, and write zeroes: a full file system says so now, not when the metadata is written back."""
        self.reserve(offset, length)
        self.file.pwrite(offset, bytes(length))

    def zero(self, offset: int, length: int) -> None:
        """Make a range of the file zeroes, as cheaply as it can."""
        if length:
            self.file.zero(Request.zero(offset, length, Flag.MAY_UNMAP))

    def discard(self, start: int, end: int) -> None:
        """Give back the storage of the bytes [start, end), if the file has it, and can: it is none the worse if not."""
        end = min(end, self.size)
        with contextlib.suppress(OSError, RequestError):
            if start < end:
                self.file.trim(Request.trim(start, end - start))
