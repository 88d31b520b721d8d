"""Making a header: a new master key, in one key slot, and where things go.

::

    0        4096                                                    payload offset
    | header | key slot 0 | key slot 1 (empty) | ... | key slot 7 | payload ...

The layout is QEMU's. Specification: "LUKS operations", "initialize a LUKS partition", "add new password".
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from dataclasses import dataclass
from typing import Final

from layers.luks.antiforensic import split
from layers.luks.ciphers import KEY_LENGTHS, VECTORS, Scheme, sector_cipher
from layers.luks.header import ESSIV_DIGEST_LENGTHS, HASHES, material_length
from layers.luks.keyslots import Unlocked, keyed
from layers.luks.limits import HASH_ROUNDS_COUNT_MAX, ITER_TIME_MAX_MS, ITERATIONS_MIN, KEY_ALIGNMENT
from layers.ondisk.luks import (
    HEADER,
    KEY_SLOT,
    KEY_SLOT_ACTIVE,
    KEY_SLOT_INACTIVE,
    KEY_SLOTS_COUNT,
    MAGIC,
    MK_DIGEST_LENGTH,
    SALT_LENGTH,
    SECTOR,
    STRIPES,
    VERSION,
    HeaderFields,
    KeySlotFields,
)
from nbdserver.errors import ConfigError

#: Bits of the keys that AES takes, by what QEMU calls it then.
CIPHERS: Final = {"aes-128": 128, "aes-192": 192, "aes-256": 256}

#: How much of a key's time its digest takes, as QEMU and cryptsetup have it: an eighth.
DIGEST_SHARE: Final = 8

#: QEMU's QCRYPTO_BLOCK_LUKS_DEFAULT_ITER_TIME_MS.
ITER_TIME_DEFAULT_MS: Final = 2000

#: Hashing is measured over at least so long, seconds: enough that the clock's steps do not count.
MEASURED: Final = 0.05


@dataclass(frozen=True)
class Recipe:
    """What a header is to say: QEMU's creation options, with its defaults. Raises ConfigError (key: the option) for
    what no image can have."""

    cipher_alg: str | None = None
    cipher_mode: str | None = None
    ivgen_alg: str | None = None
    ivgen_hash_alg: str | None = None
    hash_alg: str | None = None
    iter_time_ms: int | None = None

    def __post_init__(self) -> None:
        _one_of("cipher-alg", self.cipher_alg, CIPHERS)
        _one_of("cipher-mode", self.cipher_mode, KEY_LENGTHS)
        _one_of("ivgen-alg", self.ivgen_alg, VECTORS)
        _one_of("ivgen-hash-alg", self.ivgen_hash_alg, HASHES)
        _one_of("hash-alg", self.hash_alg, HASHES)
        if self.iter_time_ms is not None and not 1 <= self.iter_time_ms <= ITER_TIME_MAX_MS:
            raise ConfigError(
                f"found {self.iter_time_ms}, allowed is 1 to {ITER_TIME_MAX_MS} milliseconds", key="iter-time"
            )
        for key, name in (("hash-alg", self.hash), ("ivgen-hash-alg", self.scheme.hash or self.hash)):
            if name not in hashlib.algorithms_available:
                raise ConfigError(f"found {name!r}, which this machine's OpenSSL does not offer", key=key)
        if self.ivgen_hash_alg is not None and self.ivgen_alg != "essiv":
            raise ConfigError("only ivgen-alg=essiv has a hash", key="ivgen-hash-alg")
        hash = self.scheme.hash
        if hash is not None and hashlib.new(hash).digest_size not in ESSIV_DIGEST_LENGTHS:
            raise ConfigError(f"found {hash!r}, whose digest is no key that AES takes", key="ivgen-hash-alg")

    @property
    def scheme(self) -> Scheme:
        vectors = self.ivgen_alg or "plain64"
        return Scheme(
            self.cipher_mode or "xts", vectors, (self.ivgen_hash_alg or "sha256") if vectors == "essiv" else None
        )

    @property
    def hash(self) -> str:
        """The hash of passphrases and keys."""
        return self.hash_alg or "sha256"

    @property
    def key_length(self) -> int:
        """Bytes of the master key; XTS takes two keys."""
        return CIPHERS[self.cipher_alg or "aes-256"] // 8 * (2 if self.scheme.mode == "xts" else 1)

    @property
    def slot_length(self) -> int:
        """Bytes from one key slot's stripes to the next one's."""
        return -(-material_length(self.key_length) // KEY_ALIGNMENT) * KEY_ALIGNMENT

    @property
    def length(self) -> int:
        """Bytes of the header with its key slots."""
        return KEY_ALIGNMENT + KEY_SLOTS_COUNT * self.slot_length


def _one_of(key: str, found: str | None, allowed: object) -> None:
    assert isinstance(allowed, dict | tuple)
    if found is not None and found not in allowed:
        raise ConfigError(f"found {found!r}, allowed is {' or '.join(allowed)}", key=key)


def make_header(recipe: Recipe, passphrase: bytes) -> tuple[bytes, Unlocked]:
    """The first `Recipe.length` bytes of an image, without the zeroes at their end; and the new master key, ready for
    use. Takes as long as the recipe says. Raises ConfigError."""
    length = recipe.key_length
    key = _new_key(recipe)
    iterations = _iterations(recipe)
    slot_salt, digest_salt = os.urandom(SALT_LENGTH), os.urandom(SALT_LENGTH)
    digest_iterations = max(iterations // DIGEST_SHARE, ITERATIONS_MIN)
    slot_key = hashlib.pbkdf2_hmac(recipe.hash, passphrase, slot_salt, iterations, length)
    stripes = split(key, STRIPES, recipe.hash).ljust(material_length(length), b"\0")
    fields = HeaderFields(
        magic=MAGIC,
        version=VERSION,
        cipher_name=b"aes",
        cipher_mode=_mode(recipe.scheme).encode(),
        hash_spec=recipe.hash.encode(),
        payload_offset_sectors=recipe.length // SECTOR,
        key_bytes=length,
        mk_digest=hashlib.pbkdf2_hmac(recipe.hash, key, digest_salt, digest_iterations, MK_DIGEST_LENGTH),
        mk_digest_salt=digest_salt,
        mk_digest_iterations=digest_iterations,
        uuid=str(uuid.uuid4()).encode(),
    )
    slots = [
        KeySlotFields(
            state=KEY_SLOT_INACTIVE if number else KEY_SLOT_ACTIVE,
            iterations=0 if number else iterations,
            salt=b"" if number else slot_salt,
            material_offset_sectors=(KEY_ALIGNMENT + number * recipe.slot_length) // SECTOR,
            stripes=STRIPES,
        )
        for number in range(KEY_SLOTS_COUNT)
    ]
    head = HEADER.pack(*fields) + b"".join(KEY_SLOT.pack(*slot) for slot in slots)
    material = sector_cipher(recipe.scheme, slot_key).encrypt(0, stripes)
    return head.ljust(KEY_ALIGNMENT, b"\0") + material, keyed(recipe.scheme, key, None)


def _new_key(recipe: Recipe) -> bytes:
    """A master key; for XTS, one of two halves that differ."""
    while True:
        key = os.urandom(recipe.key_length)
        half = len(key) // 2
        if recipe.scheme.mode != "xts" or key[:half] != key[half:]:
            return key


def _mode(scheme: Scheme) -> str:
    return f"{scheme.mode}-{scheme.vectors}" + (f":{scheme.hash}" if scheme.hash else "")


def _iterations(recipe: Recipe) -> int:
    """How many iterations take `Recipe.iter_time_ms` here. Raises ConfigError if nobody would believe so many."""
    wanted = (recipe.iter_time_ms or ITER_TIME_DEFAULT_MS) / 1000
    count = ITERATIONS_MIN
    while True:
        start = time.thread_time()
        hashlib.pbkdf2_hmac(recipe.hash, b"measured", bytes(SALT_LENGTH), count, recipe.key_length)
        taken = time.thread_time() - start
        if taken >= min(MEASURED, wanted):
            break
        count *= 2
    iterations = max(int(count * wanted / taken), ITERATIONS_MIN)
    hashes = -(-recipe.key_length // hashlib.new(recipe.hash).digest_size)
    if iterations * hashes > HASH_ROUNDS_COUNT_MAX // 2:
        most = HASH_ROUNDS_COUNT_MAX // 2 // hashes * taken / count * 1000
        raise ConfigError(f"found {recipe.iter_time_ms}, allowed is up to {int(most)} on this machine", key="iter-time")
    return iterations
