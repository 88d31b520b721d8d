"""Sector ciphers: AES in the modes, and with the initialisation vectors, that dm-crypt has and LUKS1 names.

A `Scheme` is what a header says, "xts-plain64" or "cbc-essiv:sha256"; with a key it makes a `SectorCipher`.
Specification: "Cipher and Hash specification registry"; for the vectors, Linux's ``dm-crypt`` documentation.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from layers.ondisk.luks import SECTOR

BLOCK: Final = 16

#: The lengths that a mode's key may have: AES-128, AES-192, AES-256; XTS takes two of them.
KEY_LENGTHS: Final[Mapping[str, tuple[int, ...]]] = {"xts": (32, 48, 64), "cbc": (16, 24, 32), "ecb": (16, 24, 32)}

VECTORS: Final = ("plain", "plain64", "essiv")

#: Words of 64 bits in a block, and in a sector.
BLOCK_WORDS: Final = BLOCK // 8
SECTOR_WORDS: Final = SECTOR // 8

#: From a sector's number, and how many sectors, to their initialisation vectors, one after the other.
Vectors = Callable[[int, int], bytes]


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
        return _Cbc(key, vectors)
    half = len(key) // 2
    if key[:half] == key[half:]:
        raise ValueError("an XTS key of two equal halves")
    return _Xts(key, vectors)


class _Ecb(SectorCipher):
    """Every block by itself."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(AES(key), ECB())

    def context(self, encrypting: bool) -> CipherContext:
        """What takes blocks, any number at a time."""
        return self._cipher.encryptor() if encrypting else self._cipher.decryptor()

    def _run(self, encrypting: bool, first: int, data: bytes) -> bytes:
        return self.context(encrypting).update(data)


class _Cbc(SectorCipher):
    """Every block is combined with the encrypted one before it, the first with the vector."""

    def __init__(self, key: bytes, vectors: Vectors) -> None:
        self._aes, self._vectors = _Ecb(key), vectors

    def _run(self, encrypting: bool, first: int, data: bytes) -> bytes:
        vectors = self._vectors(first, len(data) // SECTOR)
        return self._encrypted(vectors, data) if encrypting else self._decrypted(vectors, data)

    def _decrypted(self, vectors: bytes, data: bytes) -> bytes:
        before = array("Q", bytes(BLOCK) + data[:-BLOCK])
        _put(before, 0, vectors)
        return _xor(self._aes.decrypt(0, data), before.tobytes())

    def _encrypted(self, vectors: bytes, data: bytes) -> bytes:
        words, context = array("Q", data), self._aes.context(True)
        for block in range(SECTOR // BLOCK):
            vectors = context.update(_xor(_get(words, block), vectors))
            _put(words, block, vectors)
        return words.tobytes()


class _Xts(SectorCipher):
    """Every block is masked, before and after: with the encrypted vector, times x in GF(2^128) for each block on.

    IEEE 1619, which leaves out AES-192; QEMU and dm-crypt do not.
    """

    #: x^128 = x^7 + x^2 + x + 1.
    _REST: Final = 0x87

    def __init__(self, key: bytes, vectors: Vectors) -> None:
        half = len(key) // 2
        self._data, self._masks, self._vectors = _Ecb(key[:half]), _Ecb(key[half:]), vectors

    def _run(self, encrypting: bool, first: int, data: bytes) -> bytes:
        mask = self._mask(first, len(data) // SECTOR)
        masked = self._data._run(encrypting, 0, _xor(data, mask))
        return _xor(masked, mask)

    def _mask(self, first: int, count: int) -> bytes:
        """What the blocks of ``count`` sectors are masked with."""
        values = int.from_bytes(self._masks.encrypt(0, self._vectors(first, count)), "little")
        lowest = _lowest(count)
        highest = lowest << 127
        mask = array("Q", bytes(count * SECTOR))
        for block in range(SECTOR // BLOCK):
            _put(mask, block, values.to_bytes(count * BLOCK, "little"))
            carried = values & highest
            values = (values ^ carried) << 1 ^ (carried >> 127) * self._REST
        return mask.tobytes()


# -- the same block of many sectors at once ----------------------------------------------------------------------------
#
# What is done to one sector after the other costs Python more than AES; so each step is done to all sectors at once,
# whose values lie in one long number or one array.


@functools.lru_cache(8)
def _lowest(count: int) -> int:
    """``count`` numbers of 128 bits as one, of each of which the lowest bit is set."""
    return int.from_bytes((b"\1" + bytes(BLOCK - 1)) * count, "little")


def _get(sectors: array[int], block: int) -> bytes:
    """Block number ``block`` of every sector."""
    blocks = array("Q", bytes(len(sectors) // SECTOR_WORDS * BLOCK))
    for word in range(BLOCK_WORDS):
        blocks[word::BLOCK_WORDS] = sectors[block * BLOCK_WORDS + word :: SECTOR_WORDS]
    return blocks.tobytes()


def _put(sectors: array[int], block: int, data: bytes) -> None:
    """Set block number ``block`` of every sector."""
    blocks = array("Q", data)
    for word in range(BLOCK_WORDS):
        sectors[block * BLOCK_WORDS + word :: SECTOR_WORDS] = blocks[word::BLOCK_WORDS]


def _vectors(scheme: Scheme, key: bytes) -> Vectors:
    if scheme.vectors == "plain":
        return lambda first, count: _numbers([number & 0xFFFF_FFFF for number in range(first, first + count)])
    if scheme.vectors == "plain64":
        return lambda first, count: _numbers(range(first, first + count))
    assert scheme.vectors == "essiv" and scheme.hash is not None, scheme
    # The sector's number, encrypted with the hashed key: AES of the digest's length, whatever the key's own is.
    salted = _Ecb(hashlib.new(scheme.hash, key).digest())
    return lambda first, count: salted.encrypt(0, _numbers(range(first, first + count)))


def _numbers(numbers: Sequence[int]) -> bytes:
    """Numbers as blocks, little-endian."""
    words = array("Q", bytes(len(numbers) * BLOCK))
    words[::BLOCK_WORDS] = array("Q", numbers)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")
