"""The header: parsed, and believed only as far as it can be checked.

Specification: "PHDR layout", "key slot layout". As QEMU does, all eight key slots are held to the rules, those that are
not in use as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final, NoReturn

from layers.luks.ciphers import KEY_LENGTHS, VECTORS, Scheme
from layers.luks.limits import HASH_ROUNDS_COUNT_MAX
from layers.ondisk.luks import (
    CIPHER_MODE_AT,
    CIPHER_NAME_AT,
    HASH_SPEC_AT,
    HEADER,
    HEADER_LENGTH,
    ITERATIONS_AT,
    KEY_BYTES_AT,
    KEY_SLOT,
    KEY_SLOT_ACTIVE,
    KEY_SLOT_INACTIVE,
    KEY_SLOTS_AT,
    KEY_SLOTS_COUNT,
    MAGIC,
    MATERIAL_OFFSET_AT,
    MK_DIGEST_ITERATIONS_AT,
    MK_DIGEST_LENGTH,
    PAYLOAD_OFFSET_AT,
    SECTOR,
    STRIPES,
    STRIPES_AT,
    VERSION,
    VERSION_AT,
    HeaderFields,
    KeySlotFields,
)
from nbdserver.errors import ImageError
from nbdserver.layer import Layer

#: Hashes that QEMU or cryptsetup put into LUKS1 headers and Python may have; whether it does depends on its OpenSSL.
HASHES: Final = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "md5")

#: Digest lengths that AES takes as a key, which essiv needs.
ESSIV_DIGEST_LENGTHS: Final = (16, 24, 32)


@dataclass(frozen=True)
class KeySlot:
    """A key slot in use. ``material_offset``: where in the image its stripes are."""

    number: int
    iterations: int
    salt: bytes
    material_offset: int


@dataclass(frozen=True)
class Header:
    """What an image's header says, every number bounded and every place within the file and apart from the others."""

    scheme: Scheme
    hash: str
    payload_offset: int
    key_length: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    #: The key slots in use: at least one.
    slots: tuple[KeySlot, ...]
    #: Where in the image the stripes of every key slot are, or would be.
    material_offsets: tuple[int, ...]

    @property
    def material_length(self) -> int:
        """Bytes of a key slot's stripes, in whole sectors."""
        return material_length(self.key_length)


def material_length(key_length: int) -> int:
    """Bytes that the stripes of a key take up, in whole sectors."""
    return _ceil(key_length * STRIPES, SECTOR) * SECTOR


def read_header(file: Layer, payload: Layer) -> Header:
    """Read and check the header in ``file`` of the disk in ``payload``: the same layer, unless the header is detached.

    Raises ImageError, OSError.
    """
    return _Parser(file, payload.size, is_detached=file is not payload).parse()


def read_embedded(part: Layer, offset: int) -> Header:
    """The same of a header that is in an image of another format, which says where the payload is: ``part`` of it, from
    ``offset`` on. (What the header says of the payload means nothing.)"""
    return _Parser(part, None, is_detached=False, base=offset).parse()


def used_length(part: Layer, offset: int) -> int:
    """How many bytes the header in ``part`` and the key slots that it has in use take up, whatever else is wrong with
    it; for those who must keep them. ``offset``, errors: as `read_embedded`."""
    return _Parser(part, None, is_detached=False, base=offset).used_length()


class _Parser:
    def __init__(self, file: Layer, payload_size: int | None, *, is_detached: bool, base: int = 0) -> None:
        self._path, self._base = file.filename, base
        self._file_size = file.size
        self._payload_size = payload_size
        self._is_detached = is_detached
        self._head = file.pread(0, min(HEADER_LENGTH, self._file_size))

    def parse(self) -> Header:
        self._check_kind()
        fields = HeaderFields._make(HEADER.unpack_from(self._head))
        scheme = self._scheme(fields)
        hash = self._hash(fields.hash_spec, HASH_SPEC_AT)
        if fields.key_bytes not in KEY_LENGTHS[scheme.mode]:
            wanted = _or(map(str, KEY_LENGTHS[scheme.mode]))
            self._refuse(f"key length of {scheme.mode}", KEY_BYTES_AT, fields.key_bytes, wanted)
        slots = self._slots()
        self._check_places(fields, slots)
        self._check_rounds(fields, slots, hash)
        return Header(
            scheme=scheme,
            hash=hash,
            payload_offset=fields.payload_offset_sectors * SECTOR,
            key_length=fields.key_bytes,
            digest=fields.mk_digest,
            digest_salt=fields.mk_digest_salt,
            digest_iterations=fields.mk_digest_iterations,
            uuid=fields.uuid.partition(b"\0")[0].decode("ascii", "backslashreplace"),
            slots=tuple(
                KeySlot(number, slot.iterations, slot.salt, slot.material_offset_sectors * SECTOR)
                for number, slot in _active(slots)
            ),
            material_offsets=tuple(slot.material_offset_sectors * SECTOR for slot in slots),
        )

    def used_length(self) -> int:
        self._check_kind()
        fields = HeaderFields._make(HEADER.unpack_from(self._head))
        slots = _active(self._slots())
        ends = (slot.material_offset_sectors * SECTOR + material_length(fields.key_bytes) for _, slot in slots)
        return max((HEADER_LENGTH, *ends))

    def _slots(self) -> list[KeySlotFields]:
        return [
            KeySlotFields._make(KEY_SLOT.unpack_from(self._head, _slot_at(number))) for number in range(KEY_SLOTS_COUNT)
        ]

    def _check_kind(self) -> None:
        if self._head[: len(MAGIC)] != MAGIC:
            found = self._head[: len(MAGIC)].hex() or "nothing"
            self._refuse("is not a LUKS image: wrong magic", 0, found, MAGIC.hex())
        version = int.from_bytes(self._head[VERSION_AT : VERSION_AT + 2], "big")
        if version != VERSION:
            self._refuse("unsupported LUKS version", VERSION_AT, version, VERSION)
        if len(self._head) < HEADER_LENGTH:
            self._refuse("header is cut off", None, f"{self._file_size} bytes", f"at least {HEADER_LENGTH}")

    # -- names ---------------------------------------------------------------------------------------------------------

    def _scheme(self, fields: HeaderFields) -> Scheme:
        """Of a cipher mode such as "xts-plain64", "cbc-essiv:sha256" or "ecb"."""
        self._one_of("cipher", self._text(fields.cipher_name, CIPHER_NAME_AT), ("aes",), CIPHER_NAME_AT)
        mode, _, rest = self._text(fields.cipher_mode, CIPHER_MODE_AT).partition("-")
        vectors, _, hash = rest.partition(":")
        self._one_of("cipher mode", mode, KEY_LENGTHS, CIPHER_MODE_AT)
        if mode == "ecb":  # has no vectors, though QEMU names some
            return Scheme(mode, "plain64")
        self._one_of("IV generator", vectors, VECTORS, CIPHER_MODE_AT)
        if vectors != "essiv":  # dm-crypt and QEMU overlook a hash that others name
            return Scheme(mode, vectors)
        hash = self._known_hash(hash, CIPHER_MODE_AT)
        length = hashlib.new(hash).digest_size
        if length not in ESSIV_DIGEST_LENGTHS:
            wanted = f"one whose digest is an AES key: of {_or(map(str, ESSIV_DIGEST_LENGTHS))} bytes"
            self._refuse("unsupported hash for essiv", CIPHER_MODE_AT, hash, wanted)
        return Scheme(mode, vectors, hash)

    def _hash(self, field: bytes, offset: int) -> str:
        return self._known_hash(self._text(field, offset), offset)

    def _known_hash(self, name: str, offset: int) -> str:
        self._one_of("hash", name, HASHES, offset)
        try:
            hashlib.new(name)
        except ValueError:
            self._refuse("hash that this machine's OpenSSL does not offer", offset, name)
        return name

    def _one_of(self, what: str, found: str, allowed: Collection[str], offset: int) -> None:
        if found not in allowed:
            self._refuse(f"unsupported {what}", offset, repr(found), _or(allowed))

    def _text(self, field: bytes, offset: int) -> str:
        """A name up to its NUL byte."""
        name, end, _ = field.partition(b"\0")
        if not end or not name.isascii():
            self._refuse("name", offset, repr(field), "ASCII, ended by a NUL byte")
        return name.decode("ascii")

    # -- places --------------------------------------------------------------------------------------------------------

    def _check_places(self, fields: HeaderFields, slots: list[KeySlotFields]) -> None:
        """Header, key slots and payload must lie apart from one another, and within the file."""
        length = material_length(fields.key_bytes)
        taken = [(0, HEADER_LENGTH, "the header")]
        for number, slot in enumerate(slots):
            at = _slot_at(number)
            if slot.state not in (KEY_SLOT_ACTIVE, KEY_SLOT_INACTIVE):
                wanted = f"{KEY_SLOT_ACTIVE:#x} (active) or {KEY_SLOT_INACTIVE:#x} (inactive)"
                self._refuse(f"state of key slot {number}", at, f"{slot.state:#x}", wanted)
            if slot.stripes != STRIPES:
                self._refuse(f"stripes of key slot {number}", at + STRIPES_AT, slot.stripes, STRIPES)
            start = slot.material_offset_sectors * SECTOR
            end = start + length
            what = f"key slot {number}"
            for other_start, other_end, other in taken:
                if start < other_end and other_start < end:
                    self._overlap(what, at + MATERIAL_OFFSET_AT, start, end, f"{other}, which ends at {other_end:#x}")
            if slot.state == KEY_SLOT_ACTIVE and end > self._file_size:
                self._overlap(what, at + MATERIAL_OFFSET_AT, start, end, f"the file's end, {self._file_size:#x}")
            taken.append((start, end, what))
        self._check_payload(fields.payload_offset_sectors * SECTOR, taken)

    def _check_payload(self, payload: int, taken: list[tuple[int, int, str]]) -> None:
        if self._payload_size is None:
            return
        if not self._is_detached:
            if payload == 0:
                self._refuse("is the detached header of a disk in another file: name that as file, this as header")
            for _, end, what in taken:
                if payload < end:
                    self._refuse("payload offset", PAYLOAD_OFFSET_AT, f"{payload:#x}", f"behind {what}: {end:#x}")
        if payload > self._payload_size:
            wanted = f"one in the file, which ends at {self._payload_size:#x}"
            self._refuse("payload offset", PAYLOAD_OFFSET_AT, f"{payload:#x}", wanted)

    def _overlap(self, what: str, at: int, start: int, end: int, other: str) -> NoReturn:
        self._refuse(f"place of {what}", at, f"{start:#x} to {end:#x}", f"one clear of {other}")

    # -- work ----------------------------------------------------------------------------------------------------------

    def _check_rounds(self, fields: HeaderFields, slots: list[KeySlotFields], hash: str) -> None:
        """Trying a passphrase on all slots must take a bounded time."""
        active = list(_active(slots))
        if not active:
            self._refuse("has no key slot in use, so no passphrase opens it")
        digest_size = hashlib.new(hash).digest_size
        # (what, its offset, iterations, how many hashes each is of); the digest is made again for each slot.
        work = [
            (
                "the master key's digest",
                MK_DIGEST_ITERATIONS_AT,
                fields.mk_digest_iterations,
                len(active) * _ceil(MK_DIGEST_LENGTH, digest_size),
            )
        ] + [
            (
                f"key slot {number}",
                _slot_at(number) + ITERATIONS_AT,
                slot.iterations,
                _ceil(fields.key_bytes, digest_size),
            )
            for number, slot in active
        ]
        left = HASH_ROUNDS_COUNT_MAX
        for what, at, iterations, hashes in work:
            if not 1 <= iterations <= left // hashes:
                self._refuse(f"iterations of {what}", at, iterations, f"1 to {left // hashes}")
            left -= iterations * hashes

    def _refuse(self, message: str, offset: int | None = None, found: object = None, wanted: object = None) -> NoReturn:
        at = None if offset is None else self._base + offset
        raise ImageError(message, path=self._path, offset=at, found=found, wanted=wanted)


def _active(slots: list[KeySlotFields]) -> Iterator[tuple[int, KeySlotFields]]:
    return ((number, slot) for number, slot in enumerate(slots) if slot.state == KEY_SLOT_ACTIVE)


def _slot_at(number: int) -> int:
    return KEY_SLOTS_AT + number * KEY_SLOT.size


def _ceil(length: int, unit: int) -> int:
    """How many units hold ``length``."""
    return -(-length // unit)


def _or(words: Collection[str] | Iterator[str]) -> str:
    return " or ".join(words)
