"""Key slots: from a passphrase to the master key.

Specification: "Unlock: key recovery" (``LUKS_OpenKey``): PBKDF2 of the passphrase decrypts a slot's stripes, which
merge to a candidate, which is the master key if its digest is the header's.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
from typing import Final, NamedTuple

from layers.luks.antiforensic import merge
from layers.luks.ciphers import Scheme, SectorCipher, sector_cipher
from layers.luks.header import Header, KeySlot
from layers.ondisk.luks import MK_DIGEST_LENGTH, SECTOR, STRIPES
from nbdserver.errors import ImageError, RequestError
from nbdserver.extent import Transform
from nbdserver.layer import Layer

#: The one scheme that the engine has.
ENGINE_SCHEME: Final = Scheme("xts", "plain64")
ENGINE_CIPHER: Final = "aes-xts-plain64"
ENGINE_KEY_LENGTHS: Final = (32, 64)


class Unlocked(NamedTuple):
    """A disk's cipher with its key, and the same for the engine if that has it."""

    cipher: SectorCipher
    transform: Transform | None


class _Locked(SectorCipher):
    """The cipher of a disk whose key nobody has."""

    def _run(self, encrypting: bool, first: int, data: bytes) -> bytes:
        raise RequestError(errno.EPERM, "the image is encrypted, and was opened without its passphrase")


#: For images that are only described: there is nothing to read them with.
LOCKED: Final = Unlocked(_Locked(), None)


def unlocked(header: Header, file: Layer, passphrase: bytes) -> Unlocked:
    """`unlock`, ready for use. Raises ImageError if the passphrase opens no key slot."""
    key = unlock(header, file, passphrase)
    if key is None:
        raise ImageError(f"no key slot opens with this passphrase{_hint(passphrase)}", path=file.filename)
    return keyed(header.scheme, key, file.filename)


def keyed(scheme: Scheme, key: bytes, path: str | None) -> Unlocked:
    """The ciphers for a master key. Raises ImageError if it is none to use."""
    try:
        cipher = sector_cipher(scheme, key)
    except ValueError as error:
        raise ImageError(f"its master key is {error}", path=path) from error
    if scheme == ENGINE_SCHEME and len(key) in ENGINE_KEY_LENGTHS:
        return Unlocked(cipher, Transform(ENGINE_CIPHER, key, SECTOR))
    return Unlocked(cipher, None)


def unlock(header: Header, file: Layer, passphrase: bytes) -> bytes | None:
    """The master key of the first key slot in ``file`` that the passphrase opens; None if it opens none.

    Takes as long as the header says, seconds to minutes. Raises OSError.
    """
    candidates = (_candidate(header, slot, file, passphrase) for slot in header.slots)
    return next((key for key in candidates if key is not None and _is_master_key(header, key)), None)


def _candidate(header: Header, slot: KeySlot, file: Layer, passphrase: bytes) -> bytes | None:
    """What the slot holds if the passphrase is the right one, else noise."""
    key = hashlib.pbkdf2_hmac(header.hash, passphrase, slot.salt, slot.iterations, header.key_length)
    try:
        cipher = sector_cipher(header.scheme, key)
    except ValueError:  # a key that nobody would have encrypted with
        return None
    stripes = cipher.decrypt(0, file.pread(slot.material_offset, header.material_length))
    return merge(stripes[: header.key_length * STRIPES], header.key_length, header.hash)


def _is_master_key(header: Header, key: bytes) -> bool:
    digest = hashlib.pbkdf2_hmac(header.hash, key, header.digest_salt, header.digest_iterations, MK_DIGEST_LENGTH)
    return hmac.compare_digest(digest, header.digest)


def _hint(passphrase: bytes) -> str:
    """What is most often wrong with a passphrase that does not fit."""
    if not passphrase:
        return ", which is empty"
    return ", which ends in a newline, and that counts" if passphrase.endswith(b"\n") else ""
