"""Key slots: from a passphrase to the master key.

Specification: "Unlock: key recovery" (``LUKS_OpenKey``): PBKDF2 of the passphrase decrypts a slot's stripes, which
merge to a candidate, which is the master key if its digest is the header's.
"""

from __future__ import annotations

import hashlib
import hmac

from layers.luks.antiforensic import merge
from layers.luks.ciphers import sector_cipher
from layers.luks.header import Header, KeySlot
from layers.ondisk.luks import MK_DIGEST_LENGTH, STRIPES
from nbdserver.layer import Layer


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
