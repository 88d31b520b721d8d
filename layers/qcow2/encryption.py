"""Encryption: guest data that lies encrypted in its clusters, and the LUKS header that says how.

::

    qcow2 ──extent──> Luks ──the same place, through AES-XTS──> file
                                  sectors are numbered by where they are in the file

Metadata, and compressed clusters (which only QEMU's own tools put into such images), are not encrypted. A cluster that
is copied is decrypted and encrypted anew, for its sectors get other numbers; zeroes that are stored are data.

Specification: "Full disk encryption header pointer", "Data encryption".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from layers.luks.header import Header as LuksHeader
from layers.luks.header import read_embedded
from layers.luks.info import describe
from layers.luks.keyslots import LOCKED, Unlocked, unlocked
from layers.luks.sectors import Sectors
from layers.ondisk.luks import SECTOR
from layers.ondisk.qcow2 import CRYPT_AES, CRYPT_LUKS
from layers.qcow2.header import Header
from layers.qcow2.storage import Storage
from nbdserver.errors import ConfigError, ImageError
from nbdserver.extent import Extent, Intent
from nbdserver.layer import Layer, Opener
from nbdserver.request import Request, Vector

#: A key file that stands for no key: the image can be described but not read.
NO_KEY: Final = False


class Part(Layer):
    """The bytes [offset, offset + length) of a file, as far as it has them: for reading a header."""

    def __init__(self, file: Layer, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset = file, offset
        self._length = max(min(length, file.size - offset), 0)

    @property
    def size(self) -> int:
        return self._length

    @property
    def filename(self) -> str | None:
        return self._file.filename

    def read(self, request: Request) -> None:
        assert request.end <= self._length, request
        if request.length:  # it may be nothing, anywhere
            self._file.read(request.moved(self._offset + request.offset))


class Luks(Sectors):
    """What is encrypted in ``storage``, by where it is in there. No layer of the graph, but part of ``owner``."""

    def __init__(self, storage: Storage, key: Unlocked, owner: Layer) -> None:
        super().__init__(storage.file)
        self._storage, self._owner = storage, owner
        self.unlock(key, 0)

    @property
    def size(self) -> int:
        return self._storage.size // SECTOR * SECTOR

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        # No more than was asked for: the file may grow and shrink meanwhile.
        return self._extents(offset, offset + length, intent)

    def allocate(self, length: int) -> Vector:
        return self._owner.allocate(length)

    def changed(self, offset: int, length: int) -> None:
        """Sectors are being written in part. Nobody knows where on the disk they are."""
        self.changes += 1
        self._owner.changed(0, self._owner.size)


class Encrypted(Storage):
    """``storage`` for guest data, which is encrypted in it. Metadata goes to ``storage`` itself."""

    is_encrypted = True

    def __init__(self, storage: Storage, key: Unlocked, owner: Layer) -> None:
        super().__init__(Luks(storage, key, owner), storage.cluster_size)
        self._storage = storage

    @property
    def size(self) -> int:
        return self._storage.size // SECTOR * SECTOR

    def fill_up(self, size: int | None = None) -> None:
        self._storage.fill_up(size)

    def reserve(self, offset: int, length: int) -> bool:
        """`Storage.reserve`. What has never been written reads as noise."""
        self._storage.reserve(offset, length)
        return False

    def truncate(self, size: int) -> None:
        self._storage.truncate(size)

    def zero(self, offset: int, length: int) -> None:
        self.file.zero(Request.zero(offset, length))

    def discard(self, start: int, end: int) -> None:
        self._storage.discard(start, end)


class Encryption:
    """The encryption of one image, open: a key, or none for who only describes it."""

    def __init__(self, method: int, header: LuksHeader | None, key: Unlocked) -> None:
        self._method, self._header, self._key = method, header, key

    @property
    def is_locked(self) -> bool:
        """Whether guest data cannot be read."""
        return self._key is LOCKED

    def storage(self, storage: Storage, owner: Layer) -> Storage:
        """Guest data in ``storage``, for the layer ``owner``."""
        return Encrypted(storage, self._key, owner)

    def info(self) -> dict[str, Any]:
        """QEMU's ``ImageInfoSpecificQCow2Encryption``."""
        return {"format": "aes"} if self._header is None else describe(self._header, is_embedded=True)


def open_encryption(
    file: Layer,
    header: Header,
    opener: Opener,
    *,
    key_file: str | bool | None,
    key_env: str | None,
    key_fd: int | None,
) -> Encryption | None:
    """How the image in ``file`` is encrypted; None if it is not. Raises ImageError; ConfigError if there is no key, or
    one too many; OSError."""
    sources = {"key-file": key_file or None, "key-env": key_env, "key-fd": key_fd}
    given = [key for key, source in sources.items() if source is not None]
    if header.crypt_method == 0:
        if given:
            raise ConfigError(f"{file.filename} is not encrypted", key=given[0])
        return None
    is_described = key_file is NO_KEY
    if header.crypt_method == CRYPT_AES:
        if not is_described:
            raise ImageError(
                "is encrypted with AES-CBC as QEMU did before LUKS, which is too weak to be used (its IVs can be "
                "predicted, and its key is the passphrase itself); convert it with qemu-img convert, to an image with "
                "encrypt.format=luks for example",
                path=file.filename,
            )
        return Encryption(CRYPT_AES, None, LOCKED)
    place, length = header.encryption
    part = Part(file, place, length)
    found = read_embedded(part, place)
    if is_described:
        return Encryption(CRYPT_LUKS, found, LOCKED)
    if not given:
        raise ConfigError(
            f"{file.filename} is encrypted, and there is no key for it: name one of {', '.join(sources)} "
            "(in image options: encrypt.key-secret)",
            key="key-file",
        )
    assert key_file is not True
    passphrase = opener.secret(key_file=key_file or None, key_env=key_env, key_fd=key_fd)
    return Encryption(CRYPT_LUKS, found, unlocked(found, part, passphrase))
