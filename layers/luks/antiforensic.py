"""The anti-forensic splitter: a key spread over stripes, all of which are needed to have it back.

Specification: "Anti-forensic information splitting". Splitting makes key slots, merging opens them.
"""

from __future__ import annotations

import hashlib
import os
import struct


def merge(stripes: bytes, length: int, hash: str) -> bytes:
    """The key of ``length`` bytes that was split into ``stripes``, which are that long each."""
    assert stripes and len(stripes) % length == 0, (len(stripes), length)
    *spread, last = (stripes[start : start + length] for start in range(0, len(stripes), length))
    mixed = bytes(length)
    for stripe in spread:
        mixed = _diffuse(_xor(mixed, stripe), hash)
    return _xor(mixed, last)


def split(key: bytes, count: int, hash: str) -> bytes:
    """``count`` stripes of which `merge` makes the key: all are random but the last."""
    stripes, mixed = bytearray(), bytes(len(key))
    for _ in range(count - 1):
        stripe = os.urandom(len(key))
        stripes += stripe
        mixed = _diffuse(_xor(mixed, stripe), hash)
    return bytes(stripes + _xor(mixed, key))


def _diffuse(data: bytes, hash: str) -> bytes:
    """Each piece of a digest's length replaced by the digest of its number and itself, the last one cut to fit."""
    size = hashlib.new(hash).digest_size
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    digests = (hashlib.new(hash, struct.pack(">I", number) + piece).digest() for number, piece in enumerate(pieces))
    return b"".join(digests)[: len(data)]


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")
