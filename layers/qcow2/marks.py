"""Marks: the bits by which an image says what state it is in, dirty or corrupt.

*Dirty*: refcounts may be wrong, and have to be counted anew before they are used. Only images that ask for lazy
refcounts are ever marked so, before their refcounts fall behind; the mark goes when these have caught up. *Corrupt*:
metadata contradicts itself; nobody may write to the image but to repair it.

Specification: "Header", incompatible features, bits 0 and 1; version 2 has none.
"""

from __future__ import annotations

import threading

from layers.ondisk.qcow2 import INCOMPATIBLE_AT, INCOMPATIBLE_FIELD
from layers.qcow2.header import Header
from layers.qcow2.storage import Storage
from nbdserver.layer import finish


class Marks:
    """The incompatible features of an image that is open for writing. Thread-safe."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._bits = header.incompatible
        self._can = header.version >= 3
        #: Held while the header's first sector is written other than in a flush.
        self.lock = threading.Lock()

    def has(self, bit: int) -> bool:
        """Whether the image is marked."""
        return bool(self._bits & bit)

    def set(self, bit: int) -> None:
        """Mark the image, durably; version 2 cannot be. Raises OSError, RequestError."""
        with self.lock:
            if self._can and not self._bits & bit:
                self._write(self._bits | bit)

    def clear(self, bit: int) -> None:
        """Take a mark away, durably, once what it stood for is."""
        with self.lock:
            if self._bits & bit:
                self._write(self._bits & ~bit)

    def _write(self, bits: int) -> None:
        self._storage.file.pwrite(INCOMPATIBLE_AT, INCOMPATIBLE_FIELD.pack(bits))
        finish(self._storage.file.flush())
        self._bits = bits
