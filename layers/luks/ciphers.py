"""Sector ciphers: AES in the modes, and with the initialisation vectors, that dm-crypt has and LUKS1 names.

A `Scheme` is what a header says, "xts-plain64" or "cbc-essiv:sha256"; with a key it makes a `SectorCipher`.
Specification: "Cipher and Hash specification registry"; for the vectors, Linux's ``dm-crypt`` documentation.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, ECB, XTS

from layers.ondisk.luks import SECTOR

BLOCK: Final = 16

#: The lengths that a mode's key may have: AES-128, AES-192, AES-256; XTS takes two of them.
KEY_LENGTHS: Final[Mapping[str, tuple[int, ...]]] = {"xts": (32, 48, 64), "cbc": (16, 24, 32), "ecb": (16, 24, 32)}

VECTORS: Final = ("plain", "plain64", "essiv")

#: From a sector's number to its initialisation vector.
Vectors = Callable[[int], bytes]


@dataclass(frozen=True)
class Scheme:
    """How AES is used: the mode, what makes the vectors, and for essiv the hash that makes its key."""

    mode: str
    vectors: str
    hash: str | None = None


class SectorCipher(ABC):
    """A cipher with its key. Thread-safe."""

    def encrypt(self, first: int, data: bytes) -> bytes:
        """Whole sectors, of which the first has the number ``first``."""
        return self._run(True, first, data)

    def decrypt(self, first: int, data: bytes) -> bytes:
        """The way back."""
        return self._run(False, first, data)

    @abstractmethod
    def _run(self, encrypting: bool, first: int, data: bytes) -> bytes: ...


def sector_cipher(scheme: Scheme, key: bytes) -> SectorCipher:
    """The cipher for a key of one of KEY_LENGTHS. Raises ValueError for an XTS key whose halves are the same, which
    would undo what the second is for."""
    vectors = _vectors(scheme, key)
    if scheme.mode == "ecb":
        return _Ecb(key)
    if scheme.mode == "cbc":
        return _Chained(key, lambda number: CBC(vectors(number)))
    half = len(key) // 2
    if key[:half] == key[half:]:
        raise ValueError("an XTS key of two equal halves")
    if half == 24:
        return _Xts192(key, vectors)
    return _Chained(key, lambda number: XTS(vectors(number)))


class _Ecb(SectorCipher):
    """Every block by itself."""

    def __init__(self, key: bytes) -> None:
        self._aes = AES(key)

    def _run(self, encrypting: bool, first: int, data: bytes) -> bytes:
        return _context(Cipher(self._aes, ECB()), encrypting).update(data)


class _Chained(SectorCipher):
    """A mode in which a sector's blocks depend on its number and on one another."""

    def __init__(self, key: bytes, mode: Callable[[int], CBC | XTS]) -> None:
        self._aes, self._mode = AES(key), mode

    def _run(self, encrypting: bool, first: int, data: bytes) -> bytes:
        done = bytearray()
        for number, start in enumerate(range(0, len(data), SECTOR), first):
            context = _context(Cipher(self._aes, self._mode(number)), encrypting)
            done += context.update(data[start : start + SECTOR])
        return bytes(done)


class _Xts192(SectorCipher):
    """XTS over AES-192, which QEMU and dm-crypt do but IEEE 1619, and so the library, leaves out: made of ECB.

    Every block is masked, before and after: with the encrypted vector, times x in GF(2^128) for each block on.
    """

    #: x^128 + x^7 + x^2 + x + 1.
    _MODULUS: Final = 1 << 128 | 0x87

    def __init__(self, key: bytes, vectors: Vectors) -> None:
        half = len(key) // 2
        self._data, self._masks, self._vectors = _Ecb(key[:half]), _Ecb(key[half:]), vectors

    def _run(self, encrypting: bool, first: int, data: bytes) -> bytes:
        mask = self._mask(first, len(data) // SECTOR)
        masked = self._data._run(encrypting, 0, _xor(data, mask))
        return _xor(masked, mask)

    def _mask(self, first: int, count: int) -> bytes:
        """What the blocks of ``count`` sectors are masked with."""
        seeds = self._masks.encrypt(0, b"".join(map(self._vectors, range(first, first + count))))
        mask = bytearray()
        for start in range(0, len(seeds), BLOCK):
            value = int.from_bytes(seeds[start : start + BLOCK], "little")
            for _ in range(SECTOR // BLOCK):
                mask += value.to_bytes(BLOCK, "little")
                value <<= 1
                if value >> 128:
                    value ^= self._MODULUS
        return bytes(mask)


def _vectors(scheme: Scheme, key: bytes) -> Vectors:
    if scheme.vectors == "plain":
        return lambda number: (number & 0xFFFF_FFFF).to_bytes(BLOCK, "little")
    if scheme.vectors == "plain64":
        return _plain64
    assert scheme.vectors == "essiv" and scheme.hash is not None, scheme
    # The sector's number, encrypted with the hashed key: AES of the digest's length, whatever the key's own is.
    salted = _Ecb(hashlib.new(scheme.hash, key).digest())
    return lambda number: salted.encrypt(0, _plain64(number))


def _plain64(number: int) -> bytes:
    return number.to_bytes(BLOCK, "little")


def _context(cipher: Cipher, encrypting: bool) -> CipherContext:  # type: ignore[type-arg]
    return cipher.encryptor() if encrypting else cipher.decryptor()


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")
