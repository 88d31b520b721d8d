"""The layer ``luks``: images that QEMU and cryptsetup made, read and written, and read by QEMU again."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, XTS
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.file import File
from layers.luks import Luks
from layers.luks.antiforensic import merge
from layers.luks.ciphers import Scheme, sector_cipher
from layers.memory import Memory
from layers.ondisk.luks import PAYLOAD_OFFSET_AT
from layers.qcow2 import Qcow2
from layers.raw import Raw
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import CODE, Intent
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Graph, flatten
from nbdserver.layer import ALLOCATION_DEPTH
from nbdserver.reference import Reference, open_stack
from nbdserver.registry import build
from nbdserver.request import Flag, Operation, Request
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.layers.luks_kit import KIB, MIB, PASSPHRASE, amend, content, create, format, luks, qemu_io, secret
from tests.oracle.model import Kind, Model
from tests.oracle.storm import Storm, Weather
from tests.registered import Spy, open_registered, registered
from tests.serving import SEED, amount, backend, run

__all__ = ["backend"]


@pytest.fixture(scope="module")
def xts(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image of 256 KiB in the usual scheme, encrypted zeroes in it."""
    return _zeroed(format(tmp_path_factory.mktemp("xts") / "image", size=256 * KIB))


@pytest.fixture(scope="module")
def cbc(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same in a scheme that the engine does not have."""
    return _zeroed(format(tmp_path_factory.mktemp("cbc") / "image", "-c", "aes-cbc-essiv:sha256", size=256 * KIB))


def _zeroed(path: Path) -> bytes:
    with open_stack(luks(path)) as export:
        export.zero(0, export.size)
    return path.read_bytes()


@pytest.fixture
def image(xts: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(xts)
    return path


# -- the other side ----------------------------------------------------------------------------------------------------

QEMU = [
    # cipher-alg, cipher-mode, ivgen-alg, hash-alg
    ("aes-256", "xts", "plain64", "sha256"),
    ("aes-192", "xts", "plain64", "sha1"),
    ("aes-192", "xts", "essiv", "sha384"),
    ("aes-128", "cbc", "plain", "md5"),
    ("aes-256", "cbc", "plain64", "sha224"),
    ("aes-128", "cbc", "essiv", "sha256"),
    ("aes-256", "cbc", "essiv", "sha512"),
    ("aes-256", "ecb", "plain64", "sha256"),
]

CRYPTSETUP = [
    ("-c", "aes-xts-plain64", "-s", "512"),
    ("-c", "aes-xts-plain64", "-s", "256", "-h", "sha1"),
    ("-c", "aes-xts-plain", "-s", "512", "-h", "ripemd160"),
    ("-c", "aes-cbc-essiv:sha256", "-s", "256", "-h", "sha512"),
    ("-c", "aes-xts-essiv:sha256", "-s", "256"),
    ("-c", "aes-cbc-essiv:sha256", "-s", "128"),
    ("-c", "aes-cbc-essiv:md5", "-s", "256"),
    ("-c", "aes-cbc-plain", "-s", "256"),
    ("-c", "aes-cbc-plain64", "-s", "128", "--key-slot", "5"),
]


@pytest.mark.parametrize(("cipher", "mode", "vectors", "hash"), QEMU, ids="-".join)
def test_images_that_qemu_made(cipher: str, mode: str, vectors: str, hash: str, tmp_path: Path) -> None:
    options = {"cipher_alg": cipher, "cipher_mode": mode, "ivgen_alg": vectors, "hash_alg": hash}
    _goes_both_ways(create(tmp_path / "image", **options))


@pytest.mark.parametrize("options", CRYPTSETUP, ids="".join)
def test_images_that_cryptsetup_made(options: tuple[str, ...], tmp_path: Path) -> None:
    path = format(tmp_path / "image", *options)
    _goes_both_ways(path)
    run("cryptsetup", "luksOpen", "--test-passphrase", "--key-file", secret(tmp_path), path)


def _goes_both_ways(path: Path) -> None:
    qemu_io(path, "write -P 0x11 0 1M", "write -P 0x22 4k 512", "write -P 0x33 300k 100k", "write -z 600k 64k")
    expected = bytearray(content(path))
    assert expected[4096:4608] == b"\x22" * 512
    header = path.read_bytes()[: -len(expected)]
    size = len(expected)
    with open_stack(luks(path)) as export:
        assert export.size == size >= MIB
        assert export.read(0, size) == expected
        assert export.read(4095, 514) == b"\x11" + b"\x22" * 512 + b"\x11"
        for offset, data in ((0, os.urandom(8 * KIB)), (10_001, b"part"), (511, os.urandom(200_001)), (size - 1, b"e")):
            export.write(offset, data)
            expected[offset : offset + len(data)] = data
        export.zero(700_000, 70_000)
        expected[700_000:770_000] = bytes(70_000)
        assert export.read(0, size) == expected
    assert content(path) == expected
    assert path.read_bytes()[: len(header)] == header


def test_what_qemu_does_not_read_but_cryptsetup_makes(tmp_path: Path) -> None:
    """AES-192-CBC, whose stripes end within a sector (QEMU 10 asserts that they do not), and a mode without IVs."""
    for scheme, bits in (("aes-cbc-essiv:sha256", "192"), ("aes-cbc-plain64", "192"), ("aes-ecb", "256")):
        path = format(tmp_path / "image", "-c", scheme, "-s", bits)
        with open_stack(luks(path)) as export:
            export.write(1000, b"data" * 1000)
        with open_stack(luks(path)) as export:
            assert export.read(1000, 4000) == b"data" * 1000
        assert b"datadata" not in path.read_bytes()


def test_the_header_in_an_image_of_its_own(tmp_path: Path) -> None:
    disk, header = tmp_path / "disk", tmp_path / "header"
    disk.write_bytes(bytes(256 * KIB))
    options = ("--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--header", str(header))
    run("cryptsetup", "luksFormat", *options, disk, secret(tmp_path))
    with open_stack(luks(disk, header=File(str(header)))) as export:
        assert export.size == 256 * KIB
        export.write(100, b"data" * 1000)
    whole = tmp_path / "whole"
    whole.write_bytes(header.read_bytes().ljust(2 * MIB, b"\0") + disk.read_bytes())
    with whole.open("r+b") as file:
        file.seek(PAYLOAD_OFFSET_AT)
        file.write((2 * MIB // 512).to_bytes(4, "big"))
    assert content(whole)[100:4100] == b"data" * 1000
    with pytest.raises(ImageError, match="is the detached header"), open_stack(luks(header)):
        pass


# -- ciphers -----------------------------------------------------------------------------------------------------------


def test_ieee_1619_vectors() -> None:
    """XTS-AES-256 as in IEEE 1619-2018, vector 10, and every key length back and forth."""
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    plain = bytes(range(256)) * 2
    cipher = sector_cipher(Scheme("xts", "plain64"), key)
    assert cipher.encrypt(0xFF, plain)[:16].hex() == "1c3b3a102f770386e4836c99e370cf9b"
    for length in (32, 48, 64):
        cipher = sector_cipher(Scheme("xts", "plain64"), key[:length])
        encrypted = cipher.encrypt(7, plain * 3)
        assert encrypted[512:1024] == cipher.encrypt(8, plain)
        assert cipher.decrypt(7, encrypted) == plain * 3


@pytest.mark.parametrize(("mode", "lengths"), [("xts", (32, 64)), ("cbc", (16, 24, 32))])
@pytest.mark.parametrize("count", [1, 2, 7, 128])
def test_many_sectors_at_once_are_what_the_library_makes_of_each(
    mode: str, lengths: tuple[int, ...], count: int
) -> None:
    """Its XTS has no AES-192, which is why this one is made of ECB."""
    pick, first = random.Random(count), (1 << 40) - 3
    data = pick.randbytes(count * 512)
    for length in lengths:
        key = pick.randbytes(length)
        expected = b""
        for number in range(count):
            vector = (first + number).to_bytes(16, "little")
            context = Cipher(AES(key), XTS(vector) if mode == "xts" else CBC(vector)).encryptor()
            expected += context.update(data[number * 512 : (number + 1) * 512])
        cipher = sector_cipher(Scheme(mode, "plain64"), key)
        assert cipher.encrypt(first, data) == expected
        assert cipher.decrypt(first, expected) == data


def test_plain_vectors_wrap_around_and_plain64_do_not() -> None:
    data = bytes(512)
    for vectors, is_alike in (("plain", True), ("plain64", False)):
        cipher = sector_cipher(Scheme("cbc", vectors), bytes(16))
        assert (cipher.encrypt(1 << 32, data) == cipher.encrypt(0, data)) == is_alike


def test_a_single_stripe_is_the_key_itself() -> None:
    assert merge(b"k" * 16, 16, "sha1") == b"k" * 16


# -- passphrases -------------------------------------------------------------------------------------------------------


def test_every_key_slot_is_tried(tmp_path: Path) -> None:
    path = create(tmp_path / "image")
    amend(path, "state=active,new-secret=second,keyslot=7,iter-time=10", second=b"battery staple")
    for passphrase in (PASSPHRASE, b"battery staple"):
        with open_stack(Luks(File(str(path)), key_file=str(secret(tmp_path, passphrase, "this")))) as export:
            assert export.size == MIB
    amend(path, "state=inactive,keyslot=7")
    with pytest.raises(ImageError, match="no key slot opens with this passphrase"):
        _open(path, b"battery staple")


def test_where_a_passphrase_may_be(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK_PASSPHRASE", PASSPHRASE.decode())
    reading, writing = os.pipe()
    os.write(writing, PASSPHRASE)
    os.close(writing)
    sources: list[dict[str, object]] = [
        {"key-file": str(secret(image.parent))},
        {"key-env": "DISK_PASSPHRASE"},
        {"key-fd": reading},
    ]
    for source in sources:
        with open_stack(build("luks", {"file": File(str(image)), **source})) as export:
            assert export.read(0, 16) == bytes(16)
    os.close(reading)


@pytest.mark.parametrize(
    ("passphrase", "hint"),
    [
        (b"wrong", "passphrase$"),
        (b"", "passphrase, which is empty$"),
        (PASSPHRASE + b"\n", "passphrase, which ends in a newline"),
    ],
)
def test_a_wrong_passphrase_says_so(passphrase: bytes, hint: str, image: Path) -> None:
    with pytest.raises(ImageError, match=f"{image}: no key slot opens with this {hint}") as caught:
        _open(image, passphrase)
    assert "correct" not in str(caught.value)


def test_a_passphrase_may_be_any_bytes(tmp_path: Path) -> None:
    passphrase = bytes(range(256)) + b"\n"
    path = format(tmp_path / "image", passphrase=passphrase)
    _open(path, passphrase)


def test_a_passphrase_that_was_typed_has_no_newline(image: Path) -> None:
    command = ("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000")
    subprocess.run([*command, str(image)], input=b"typed\n", check=True, capture_output=True)
    _open(image, b"typed")


SOURCES: dict[str, tuple[dict[str, object], str]] = {
    "none": ({}, "key-file: found none; a secret has exactly one source: key-file, key-env, key-fd"),
    "two": ({"key-file": "key", "key-fd": 3}, "found key-file and key-fd; a secret has exactly one source"),
    "no such file": ({"key-file": "/nowhere/key"}, "key-file: /nowhere/key cannot be read: No such file"),
    "a directory": ({"key-file": "/"}, "key-file: / cannot be read: Is a directory"),
    "no path": ({"key-file": "a\0b"}, "key-file: .*null byte"),
    "endless": ({"key-file": "/dev/zero"}, "key-file: /dev/zero is longer than 8388608 bytes"),
    "no such variable": ({"key-env": "NOT_SET_ANYWHERE"}, "key-env: there is no environment variable 'NOT_SET"),
    "no such descriptor": ({"key-fd": 999}, "key-fd: descriptor 999 cannot be read: Bad file descriptor"),
    "no descriptor": ({"key-fd": -1}, "key-fd: descriptor -1 cannot be"),
    "none that can be": ({"key-fd": 1 << 80}, "key-fd: descriptor [0-9]* cannot be"),
}


@pytest.mark.parametrize(("keys", "words"), SOURCES.values(), ids=SOURCES)
def test_secrets_that_cannot_be_had(keys: dict[str, object], words: str, image: Path) -> None:
    layer = build("luks", {"file": File(str(image)), **keys})
    with pytest.raises(ConfigError, match=words), open_stack(layer):
        pass


def _open(path: Path, passphrase: bytes) -> None:
    with open_stack(Luks(File(str(path)), key_file=str(secret(path.parent, passphrase, "tried")))):
        pass


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["xts", "cbc"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    path = tmp_path_factory.mktemp("opened") / "image"
    path.write_bytes(request.getfixturevalue(request.param))
    with open_stack(luks(path)) as export:
        yield export


@settings(max_examples=amount(100, 2000))
@given(st.lists(st.tuples(st.integers(0, 256 * KIB), st.integers(0, 5000), st.booleans()), max_size=8))
def test_unaligned_requests_are_those_of_a_disk(opened: Reference, requests: list[tuple[int, int, bool]]) -> None:
    model = bytearray(opened.read(0, opened.size))
    for number, (offset, length, is_zero) in enumerate(requests):
        length = min(length, opened.size - offset)
        data = bytes(length) if is_zero else random.Random(number).randbytes(length)
        if is_zero:
            opened.zero(offset, length)
        else:
            opened.write(offset, data)
        model[offset : offset + length] = data
        assert opened.read(max(offset - 1, 0), length) == model[max(offset - 1, 0) :][:length]
    assert opened.read(0, opened.size) == model


def test_writes_at_once_to_parts_of_one_sector(opened: Reference) -> None:
    """Each of 8 writers changes 64 bytes of every sector; nobody undoes another's."""

    def write(number: int) -> None:
        for sector in range(40):
            opened.write(sector * 512 + number * 64, bytes([number + 1]) * 64)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened.read(0, 40 * 512) == b"".join(bytes([number + 1]) * 64 for number in range(8)) * 40


def test_the_flag_is_kept_at_the_file(image: Path) -> None:
    """The client's own memory for reading, bounce memory from the pool for all else; never any other."""
    with open_registered(Luks(spy := Spy(File(str(image))), key_file=str(secret(image.parent)))) as export:
        spy.take()
        for offset, length in ((0, 4096), (1, 4096), (100, 10), (511, 2), (512, 700), (0, 200 * KIB)):
            export.execute(Request.read(offset, registered(length)))
            (hop,) = spy.take(Operation.READ)
            assert hop.is_registered
            assert hop.offset % 512 == hop.length % 512 == 0
            export.execute(Request.write(offset, registered(b"d" * length)))
            assert all(hop.is_registered for hop in spy.take())
        export.zero(100, 100 * KIB)
        assert all(hop.is_registered for hop in spy.take())


def test_other_memory_has_no_flag(image: Path) -> None:
    with open_registered(Luks(spy := Spy(File(str(image))), key_file=str(secret(image.parent)))) as export:
        spy.take()
        export.read(0, 4096)
        assert [hop.is_registered for hop in spy.take()] == [False]
        export.write(0, b"d" * 4096)  # is encrypted into memory of the pool
        assert [hop.is_registered for hop in spy.take()] == [True]


def test_a_fast_zero_is_refused(image: Path) -> None:
    with open_stack(luks(image)) as export, pytest.raises(RequestError):
        export.zero(0, 512, Flag.NO_FALLBACK)


def test_everything_is_data(image: Path) -> None:
    """A hole of the file is none of the disk: its zeroes decrypt to noise."""
    with image.open("r+b") as file:
        file.truncate(2 * MIB + 64 * KIB)
        file.truncate(2 * MIB + 256 * KIB)
    with open_stack(luks(image)) as export:
        assert export.status(0, 256 * KIB) == [(256 * KIB, 0)]
        assert export.status(0, 256 * KIB, ALLOCATION_DEPTH) == [(256 * KIB, 1)]
        assert export.read(64 * KIB, 512) != bytes(512)


def test_part_of_a_sector_at_the_file_s_end_is_left_out(image: Path) -> None:
    with image.open("ab") as file:
        file.write(b"x" * 511)
    with open_stack(luks(image)) as export:
        assert export.size == 256 * KIB


def test_a_disk_of_nothing(image: Path) -> None:
    os.truncate(image, 2 * MIB)
    with open_stack(luks(image)) as export:
        assert export.size == 0
        assert export.read(0, 0) == b""


def test_a_read_only_disk(image: Path) -> None:
    with open_stack(luks(image), read_only=True) as export:
        assert export.read(0, 512) == bytes(512)
        with pytest.raises(RequestError):
            export.write(0, b"d")


def test_resizing(image: Path) -> None:
    """What is new reads as zeroes, as in a file, though the file's zeroes would not."""
    layer = luks(image)
    with open_stack(layer) as export:
        export.write(0, b"d" * 256 * KIB)
        for size in (100, 256 * KIB + 1, 1 << 63):
            with pytest.raises(RequestError):
                layer.resize(size)
        layer.resize(2 * MIB)
        assert export.read(0, 2 * MIB) == b"d" * 256 * KIB + bytes(2 * MIB - 256 * KIB)
        layer.resize(512)
        layer.resize(1024)
        assert export.read(0, export.size) == b"d" * 512 + bytes(512)
    assert content(image) == b"d" * 512 + bytes(512)


def test_in_a_stack(tmp_path: Path) -> None:
    """qcow2, encrypted as a whole, and the encrypted image behind an offset in its file."""
    path, plain = create(tmp_path / "image", 256 * KIB), tmp_path / "plain"
    run("qemu-img", "create", "-q", "-f", "qcow2", plain, "8M")
    with open_stack(luks(path)) as export:
        export.write(0, plain.read_bytes())
    data = os.urandom(3 * MIB)
    with open_stack(Qcow2(luks(path))) as export:
        export.write(1_000_001, data)  # grows the file: what is behind its end must read as zeroes
        export.zero(2 * MIB, MIB)
        expected = export.read(0, 8 * MIB)
    options = f"driver=qcow2,file.driver=luks,file.key-secret=s,file.file.filename={path}"
    assert content(path, options) == expected
    run("qemu-img", "check", "--object", f"secret,id=s,file={secret(tmp_path)}", "--image-opts", options)
    shifted = tmp_path / "shifted"
    shifted.write_bytes(b"x" * 1000 + path.read_bytes())
    window = Raw(File(str(shifted)), offset=1000)
    with open_stack(Qcow2(Luks(window, key_file=str(secret(tmp_path))))) as export:
        assert export.read(0, 8 * MIB) == expected


# -- extents -----------------------------------------------------------------------------------------------------------


def test_aes_xts_is_a_transform(image: Path) -> None:
    layer = luks(image)
    with open_stack(layer):
        for intent in (Intent.READ, Intent.WRITE):
            (leaf,) = flatten(layer, 1024, 512, intent)
            assert leaf.transform is not None
            assert (leaf.transform.cipher, leaf.transform.sector_size) == ("aes-xts-plain64", 512)
            assert (leaf.length, leaf.offset, leaf.position) == (256 * KIB - 1024, 2 * MIB + 1024, 1024)
            assert leaf.writable
        assert [leaf.target for leaf in flatten(layer, 0, 512, Intent.ZERO)] == [CODE]
        assert "key=" not in repr(leaf.transform)


def test_other_schemes_are_code(cbc: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(cbc)
    layer = luks(path)
    with open_stack(layer):
        for intent in Intent:
            assert [leaf.target for leaf in flatten(layer, 0, 512, intent)] == [CODE]


def test_a_partial_write_withholds_its_sectors(image: Path) -> None:
    """While it reads, changes and writes back, nobody is told that he may write there in place."""
    layer = Luks(spy := Spy(File(str(image))), key_file=str(secret(image.parent)))
    graph, told = Graph(), []
    graph.open(layer, FileOpener(graph, Files()))
    graph.subscribe(layer, lambda offset, length: told.append((offset, length)))
    seen = []
    refuse = spy._refuse

    def look(what: object) -> None:
        seen.append([(e.length, e.target is CODE) for e in layer.resolve(0, layer.size, Intent.WRITE)])
        assert [e.writable for e in layer.resolve(0, layer.size, Intent.READ)] == [True, False, True]
        refuse(what)  # type: ignore[arg-type]

    spy._refuse = look  # type: ignore[method-assign, assignment]
    Reference(layer).write(1000, b"d" * 600)
    spy._refuse = refuse  # type: ignore[method-assign]
    assert told == [(512, 1536)]
    assert seen == [[(512, False), (1536, True), (256 * KIB - 2048, False)]] * 3  # two sectors read, one write
    assert [e.target is CODE for e in layer.resolve(0, layer.size, Intent.WRITE)] == [False]
    graph.close(layer)


def test_changes_below_are_translated(image: Path) -> None:
    layer = luks(image)
    with open_stack(layer):
        assert list(layer.translate(layer.file, 0, 2 * MIB)) == []
        assert list(layer.translate(layer.file, 2 * MIB - 10, 1000)) == [(0, 1024)]
        assert list(layer.translate(layer.file, 2 * MIB + 1000, 10 * MIB)) == [(512, 256 * KIB - 512)]
        assert list(layer.translate(Memory(1), 2 * MIB, 512)) == []


# -- served ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["xts", "cbc"])
@pytest.mark.parametrize("grain", [512, 64])
def test_storm(
    nbd_server: NbdServers, tmp_path: Path, backend: str, scheme: str, grain: int, request: pytest.FixtureRequest
) -> None:
    """Through the engine, many at once and overlapping, in sectors and in parts of them."""
    path = tmp_path / "image"
    path.write_bytes(request.getfixturevalue(scheme))
    server, uri = nbd_server.start(luks(path), backend=backend)
    weather = Weather({Kind.READ: 30, Kind.WRITE: 40, Kind.ZERO: 5, Kind.TRIM: 5, Kind.FLUSH: 2}, length_max=16 * KIB)
    with Storm(uri, Model(256 * KIB, grain=grain), seed=SEED, weather=weather) as storm:
        storm.run(seconds=amount(2, 20))
        data = storm.verify()
    server.stop()
    assert content(path) == data


def test_whole_sectors_need_no_python(nbd_server: NbdServers, image: Path, backend: str) -> None:
    server, uri = nbd_server.start(luks(image), backend=backend)
    disk = nbd.NBD()
    disk.connect_uri(uri)
    for _ in range(2):
        before = calls(server)
        for offset in range(0, 256 * KIB, 8 * KIB):
            disk.pwrite(b"d" * 8 * KIB, offset)
            assert disk.pread(4 * KIB, offset + 512) == b"d" * 4 * KIB
    assert calls(server) == before, "in the second round"
    disk.shutdown()
    server.stop()
    assert content(image) == b"d" * 256 * KIB


def calls(server: Server) -> int:
    """How often the export has needed Python."""
    counters = server.stats()["exports"][""]
    return sum(count for name, count in counters.items() if name == "faults" or name.endswith("_calls"))
