"""The layer: a disk that lies encrypted behind the header, which `layers.luks.sectors` reads and writes."""

from __future__ import annotations

import dataclasses
import errno
from typing import Any, Literal

from layers.luks.header import read_header
from layers.luks.info import describe
from layers.luks.keyslots import LOCKED, unlocked
from layers.luks.sectors import Sectors
from layers.ondisk.luks import SECTOR
from nbdserver.errors import RequestError
from nbdserver.layer import Layer, Opener
from nbdserver.limits import DISK_MAX
from nbdserver.permissions import CHANGING, READ, Grant, as_backing
from nbdserver.request import Request


@dataclasses.dataclass(eq=False)
class Luks(Sectors):
    #: The header, where it lies in an image of its own (QEMU's key of this name, cryptsetup's ``--header``).
    header: Layer | None = None
    #: Where the passphrase is: in a file, in an environment variable, behind a descriptor that the server was started
    #: with; exactly one. Every byte counts, as in QEMU's secret objects and cryptsetup's ``--key-file``: a newline at
    #: the end is part of it (what was typed to cryptsetup has none).
    #: ``key_file`` false: none; the image can be described but not read.
    key_file: str | Literal[False] | None = None
    key_env: str | None = None
    key_fd: int | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    def open(self, opener: Opener) -> None:
        source = self.file if self.header is None else self.header
        if self.key_file is False:
            key, header = LOCKED, read_header(source, self.file)
        else:
            passphrase = opener.secret(key_file=self.key_file, key_env=self.key_env, key_fd=self.key_fd)
            header = read_header(source, self.file)
            key = unlocked(header, source, passphrase)
        self._found = header
        self.unlock(key, header.payload_offset)

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def read_only(self) -> bool:
        return self.key_file is False or super().read_only

    @property
    def is_encrypted(self) -> bool:
        return True

    def info(self) -> dict[str, Any]:
        """`nbdserver.format.Describes`."""
        return {"type": "luks", "data": describe(self._found, is_detached=self.header is not None)}

    def child_grant(self, role: str, own: Grant) -> Grant:
        if role == "header":
            return as_backing(own)
        # Sectors that are written in part are read before: nobody else may write there.
        return Grant(own.used | READ, own.shared & ~CHANGING)

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
