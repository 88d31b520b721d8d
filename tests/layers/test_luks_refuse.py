"""What is refused of a LUKS image, one cause each: by name, before a passphrase is tried, and with nothing written."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from layers.file import File
from layers.luks.header import HASHES
from layers.ondisk.luks import (
    CIPHER_MODE_AT,
    CIPHER_NAME_AT,
    HASH_SPEC_AT,
    ITERATIONS_AT,
    KEY_BYTES_AT,
    KEY_SLOT,
    KEY_SLOT_ACTIVE,
    KEY_SLOTS_AT,
    MATERIAL_OFFSET_AT,
    MK_DIGEST_ITERATIONS_AT,
    PAYLOAD_OFFSET_AT,
    STRIPES_AT,
)
from nbdserver.errors import ImageError
from nbdserver.reference import open_stack
from tests.layers.luks_kit import KIB, MIB, create, format, luks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with the key slots 0 and 1 in use."""
    path = format(tmp_path_factory.mktemp("made") / "image", size=64 * KIB)
    data = bytearray(path.read_bytes())
    _number(_slot(1), KEY_SLOT_ACTIVE)(data)
    _number(_slot(1) + ITERATIONS_AT, 1000)(data)
    return bytes(data)


@pytest.fixture
def image(made: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(made)
    return path


Spoil = Callable[[bytearray], None]


def _number(offset: int, value: int, format: str = ">I") -> Spoil:
    return lambda data: struct.pack_into(format, data, offset, value)


def _name(offset: int, name: bytes) -> Spoil:
    return lambda data: struct.pack_into("32s", data, offset, name)


def _slot(number: int) -> int:
    return KEY_SLOTS_AT + number * KEY_SLOT.size


def _all(*spoils: Spoil) -> Spoil:
    def spoil(data: bytearray) -> None:
        for one in spoils:
            one(data)

    return spoil


def _cut(length: int) -> Spoil:
    def spoil(data: bytearray) -> None:
        del data[length:]

    return spoil


#: In the image that is spoiled, 512 bits of key, a slot's stripes take 500 sectors, and begin 504 apart.
HEADERS: dict[str, tuple[Spoil, str]] = {
    "empty": (_cut(0), "is not a LUKS image: wrong magic at offset 0x0: found nothing, wanted 4c554b53babe"),
    "magic": (_name(0, b"SKUL\xba\xbe"), "wrong magic at offset 0x0: found 534b554cbabe"),
    "LUKS2": (_number(6, 2, ">H"), "unsupported LUKS version at offset 0x6: found 2, wanted 1"),
    "cut off": (_cut(591), "header is cut off: found 591 bytes, wanted at least 592"),
    "cipher": (_name(CIPHER_NAME_AT, b"serpent"), "unsupported cipher at offset 0x8: found 'serpent', wanted aes"),
    "cipher endless": (_name(CIPHER_NAME_AT, b"a" * 32), "name at offset 0x8: .*wanted ASCII, ended by a NUL byte"),
    "cipher unprintable": (_name(CIPHER_NAME_AT, b"\xff"), "name at offset 0x8"),
    "mode": (_name(CIPHER_MODE_AT, b"ctr-plain64"), "unsupported cipher mode at offset 0x28: found 'ctr', wanted xts"),
    "no mode": (_name(CIPHER_MODE_AT, b""), "unsupported cipher mode at offset 0x28: found ''"),
    "mode endless": (_name(CIPHER_MODE_AT, b"xts-plain64" * 3), "name at offset 0x28"),
    "IVs": (_name(CIPHER_MODE_AT, b"cbc-benbi"), "unsupported IV generator at offset 0x28: found 'benbi', wanted"),
    "no IVs": (_name(CIPHER_MODE_AT, b"xts"), "unsupported IV generator at offset 0x28: found ''"),
    "essiv of nothing": (_name(CIPHER_MODE_AT, b"xts-essiv"), "unsupported hash at offset 0x28: found ''"),
    "essiv of sha1": (_name(CIPHER_MODE_AT, b"xts-essiv:sha1"), "hash for essiv at offset 0x28: found sha1, wanted"),
    "hash": (_name(HASH_SPEC_AT, b"whirlpool"), "unsupported hash at offset 0x48: found 'whirlpool', wanted sha1 or"),
    "no key": (_number(KEY_BYTES_AT, 0), "key length of xts at offset 0x6c: found 0, wanted 32 or 48 or 64"),
    "key of another mode": (_number(KEY_BYTES_AT, 16), "key length of xts at offset 0x6c: found 16"),
    "key too long": (_number(KEY_BYTES_AT, 0xFFFFFFFF), "key length of xts at offset 0x6c: found 4294967295"),
    "payload in the header": (_number(PAYLOAD_OFFSET_AT, 1), "payload offset at offset 0x68: found 0x200, wanted"),
    "payload in a key slot": (
        _number(PAYLOAD_OFFSET_AT, 4035), "payload offset .*: found 0x1f8600, wanted behind key slot 7: 0x1f8800"
    ),
    "payload outside": (
        _number(PAYLOAD_OFFSET_AT, 4096 + 129), "payload offset .*: found 0x210200, wanted one in the file, which ends"
    ),
    "payload far outside": (_number(PAYLOAD_OFFSET_AT, 0xFFFFFFFF), "payload offset .*: found 0x1fffffffe00"),
    "payload detached": (_number(PAYLOAD_OFFSET_AT, 0), "is the detached header of a disk in another file"),
    "slot's state": (_number(_slot(2), 0xDEAF), "state of key slot 2 at offset 0x130: found 0xdeaf, wanted 0xac71f3"),
    "few stripes": (_number(_slot(0) + STRIPES_AT, 0), "stripes of key slot 0 at offset 0xfc: found 0, wanted 4000"),
    "many stripes": (_number(_slot(1) + STRIPES_AT, 1 << 31), "stripes of key slot 1 .*: found 2147483648"),
    "stripes not in use": (_number(_slot(7) + STRIPES_AT, 4001), "stripes of key slot 7 .*: found 4001"),
    "slot in the header": (_number(_slot(0) + MATERIAL_OFFSET_AT, 1), "place of key slot 0 at offset 0xf8: .*clear"),
    "slot in another": (
        _number(_slot(1) + MATERIAL_OFFSET_AT, 507), "place of key slot 1 .*: found 0x3f600 .*clear of key slot 0"
    ),
    "slot around another": (_number(_slot(3) + MATERIAL_OFFSET_AT, 8), "place of key slot 3 .*clear of key slot 0"),
    "slot in the payload": (
        _number(_slot(7) + MATERIAL_OFFSET_AT, 4000), "payload offset .*wanted behind key slot 7"
    ),
    "slot outside": (_number(_slot(1) + MATERIAL_OFFSET_AT, 0xFFFFFFFF), "place of key slot 1 .*clear of the file"),
    "no slot": (_all(_number(_slot(0), 0xDEAD), _number(_slot(1), 0xDEAD)), "has no key slot in use"),
    "no iterations": (_number(_slot(0) + ITERATIONS_AT, 0), "iterations of key slot 0 at offset 0xd4: found 0,"),
    "no digest iterations": (_number(MK_DIGEST_ITERATIONS_AT, 0), "iterations of the master key's digest .*0xa4"),
    "endless": (_number(_slot(0) + ITERATIONS_AT, 0xFFFFFFFF), "iterations of key slot 0 .*found 4294967295,"),
    "endless digest": (_number(MK_DIGEST_ITERATIONS_AT, 0xFFFFFFFF), "iterations of the master key's digest"),
    "endless together": (
        _all(_number(_slot(0) + ITERATIONS_AT, 40_000_000), _number(_slot(1) + ITERATIONS_AT, 30_000_000)),
        "iterations of key slot 1 at offset 0x104: found 30000000, wanted 1 to 271",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), HEADERS.values(), ids=HEADERS)
def test_headers(spoil: Spoil, words: str, image: Path) -> None:
    data = bytearray(image.read_bytes())
    spoil(data)
    image.write_bytes(data)
    began = time.monotonic()
    with pytest.raises(ImageError, match=words) as caught, open_stack(luks(image)):
        pass
    assert time.monotonic() - began < 5
    assert str(image) in str(caught.value)
    assert image.read_bytes() == data


def test_the_image_that_is_spoiled_opens(image: Path) -> None:
    with open_stack(luks(image)) as export:
        assert export.size == 64 * KIB


@pytest.mark.parametrize("offset", [0x70, 0x84, 0xD8, 0x1100], ids=["digest", "salt", "slot's salt", "stripes"])
def test_what_no_key_fits(offset: int, image: Path) -> None:
    data = bytearray(image.read_bytes())
    data[offset] ^= 1
    image.write_bytes(data)
    with pytest.raises(ImageError, match="no key slot opens with this passphrase"), open_stack(luks(image)):
        pass


@pytest.mark.parametrize("cipher", ["serpent-256", "twofish-256", "cast5-128"])
def test_ciphers_of_qemu_s_that_we_do_not_have(cipher: str, tmp_path: Path) -> None:
    path = create(tmp_path / "image", cipher_alg=cipher, cipher_mode="cbc" if "cast" in cipher else "xts")
    with pytest.raises(ImageError, match=f"unsupported cipher .*{cipher.partition('-')[0]}"), open_stack(luks(path)):
        pass


def test_a_hash_that_openssl_was_built_without(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layers.luks.header.HASHES", (*HASHES, "sha9"))
    data = bytearray(image.read_bytes())
    _name(HASH_SPEC_AT, b"sha9")(data)
    image.write_bytes(data)
    with pytest.raises(ImageError, match="does not offer at offset 0x48: found sha9"), open_stack(luks(image)):
        pass


def test_a_key_slot_not_in_use_may_lie_outside_a_detached_header(made: bytes, tmp_path: Path) -> None:
    """cryptsetup ends such a file with the last slot, but one that was copied may end with the last in use."""
    disk, header = tmp_path / "disk", tmp_path / "header"
    data = bytearray(made)
    _number(PAYLOAD_OFFSET_AT, 0)(data)
    header.write_bytes(data[: (512 + 500) * 512])
    disk.write_bytes(data[2 * MIB :])
    with open_stack(luks(disk, header=File(str(header)))) as export:
        assert export.size == 64 * KIB
