"""Encrypted qcow2 images: QEMU's and our own, read and written in turns; keys, and what is refused."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.ondisk.luks import HEADER_LENGTH, KEY_SLOT, KEY_SLOTS_AT, MK_DIGEST_ITERATIONS_AT
from layers.ondisk.qcow2 import EXTENSION, EXTENSION_ENCRYPTION
from layers.qcow2 import Qcow2
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import CODE, Intent, lawful
from nbdserver.files import FileOpener, Files
from nbdserver.format import Repair
from nbdserver.graph import Graph, flatten
from nbdserver.layer import ALLOCATION_DEPTH, BASE_ALLOCATION
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag, Request, Vector
from tests.layers.luks_kit import KIB, MIB, check_qcow2, content, create_qcow2, make_qcow2, qcow2, qemu_io, secret
from tests.serving import FULL, SEED, amount, run, run_json
from tests.serving import create as create_plain
from tests.serving import qemu_io as qemu_io_plain

SIZE = 2 * MIB


def opened(path: Path, **keys: Any) -> Qcow2:
    """The layer for an image whose passphrase lies beside it."""
    return Qcow2(File(str(path)), **{"key_file": str(secret(path.parent)), **keys})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image in QEMU's usual scheme, of 4 KiB clusters, with data here and there."""
    path = make_qcow2(tmp_path_factory.mktemp("made") / "image", SIZE, cluster_size=4096)
    qemu_io(path, "write -P 0x11 0 64k", "write -P 0x22 100k 3k", "write -z 200k 8k", options=qcow2(path))
    return path


@pytest.fixture
def image(made: Path, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    shutil.copy(made, path)
    return path


# -- the other side ----------------------------------------------------------------------------------------------------

#: Options of images; what begins with "encrypt_" is of the encryption. And: has a backing file, a snapshot.
IMAGES: dict[str, dict[str, Any]] = {
    "usual": {},
    "aes-128": {"encrypt_cipher_alg": "aes-128"},
    "aes-192": {"encrypt_cipher_alg": "aes-192", "encrypt_hash_alg": "sha1"},
    "xts-plain": {"encrypt_ivgen_alg": "plain"},
    "xts-essiv": {"encrypt_ivgen_alg": "essiv", "encrypt_ivgen_hash_alg": "sha256"},
    "cbc-essiv": {
        "encrypt_cipher_mode": "cbc", "encrypt_ivgen_alg": "essiv", "encrypt_ivgen_hash_alg": "sha256",
        "encrypt_hash_alg": "sha512",
    },
    "cbc-plain64": {"encrypt_cipher_alg": "aes-128", "encrypt_cipher_mode": "cbc", "encrypt_hash_alg": "md5"},
    "ecb": {"encrypt_cipher_mode": "ecb"},
    "clusters of 512": {"cluster_size": 512},
    "clusters of 2M": {"cluster_size": 2 * MIB},
    "version 2": {"compat": "0.10", "cluster_size": 4096},
    "subclusters": {"extended_l2": True, "cluster_size": 16384},
    "narrow refcounts": {"refcount_bits": 1, "cluster_size": 1024},
    "lazy refcounts": {"lazy_refcounts": True, "cluster_size": 4096},
    "data file": {"data_file": "data", "cluster_size": 4096},
    "data file, subclusters": {"data_file": "data", "extended_l2": True},
    "preallocated": {"preallocation": "metadata", "cluster_size": 4096},
    "preallocated, subclusters": {"preallocation": "metadata", "extended_l2": True, "cluster_size": 16384},
    "backing file": {"backing_file": "base", "cluster_size": 4096},
    "backing file, subclusters": {"backing_file": "base", "extended_l2": True},
    "snapshot": {"snapshot": True, "cluster_size": 4096},
    "snapshot, subclusters": {"snapshot": True, "extended_l2": True, "cluster_size": 16384},
}  # fmt: skip

#: Those that qemu-img makes every day; it takes seconds of work for each, to measure how fast it hashes.
QEMU_MAKES = ("cbc-essiv", "subclusters")


def _make(path: Path, *, by_qemu: bool, snapshot: bool = False, **options: Any) -> Path:
    if "backing_file" in options:
        base = create_plain(path.parent / "base", SIZE - 1000 * KIB)
        qemu_io_plain(base, "write -P 0x99 0 900k")
        options["backing_fmt"] = "qcow2"
    if "data_file" in options:
        options["data_file"] = str(path.parent / "data")
    if by_qemu:
        words = {key: ("off", "on")[value] if isinstance(value, bool) else value for key, value in options.items()}
        create_qcow2(path, SIZE, **words)
    else:
        make_qcow2(path, SIZE, **options)
    qemu_io(path, "write -P 0x11 0 300k", "write -P 0x22 4k 512", "write -z 64k 33k", options=qcow2(path))
    if snapshot:
        key = ("--object", f"secret,id=s,file={secret(path.parent)}")
        run("qemu-img", "snapshot", *key, "-c", "before", "--image-opts", qcow2(path))
    return path


@pytest.mark.parametrize("name", IMAGES)
def test_qemu_and_we_write_in_turns(name: str, tmp_path: Path) -> None:
    options, pick = IMAGES[name], random.Random(SEED)
    path = _make(tmp_path / "image", by_qemu=name in QEMU_MAKES or FULL, **options)
    before = content(path, qcow2(path))
    model = bytearray(before)
    for _ in range(amount(2, 10)):
        with open_stack(opened(path)) as disk:
            assert disk.read(0, SIZE) == model
            for _ in range(25):
                _change(disk, model, pick)
            assert disk.read(0, SIZE) == model
        assert content(path, qcow2(path)) == model
        check_qcow2(path)
        at, fill = pick.randrange(SIZE // 512 - 300) * 512, pick.randrange(1, 256)
        qemu_io(path, f"write -P {fill} {at} 77k", f"write -z -u {at + 9216} 20k", options=qcow2(path))
        model[at : at + 77 * KIB] = bytes([fill]) * 77 * KIB
        model[at + 9216 : at + 9216 + 20 * KIB] = bytes(20 * KIB)
    assert content(path, qcow2(path)) == model
    if options.get("snapshot"):
        with open_stack(opened(path, snapshot="before"), read_only=True) as disk:
            assert disk.read(0, SIZE) == before


def _change(disk: Reference, model: bytearray, pick: random.Random) -> None:
    offset = pick.randrange(SIZE)
    length = min(pick.choice((1, 100, 512, 4096, 5000, 65536, 150_000)), SIZE - offset)
    if pick.random() < 0.5:
        offset = offset // 512 * 512
    choice = pick.random()
    if choice < 0.7:
        data = pick.randbytes(length)
        disk.write(offset, data)
    elif choice < 0.9:
        data = bytes(length)
        disk.zero(offset, length, pick.choice((Flag.NONE, Flag.MAY_UNMAP)))
    else:
        disk.trim(offset, length)
        data = disk.read(offset, length)
        held = bytes(model[offset : offset + length])
        assert all(new in (0, old) for new, old in zip(data, held, strict=True)), "trimming left noise"
    model[offset : offset + length] = data


def test_compressed_clusters_are_not_encrypted(image: Path) -> None:
    """qemu-io makes them; qemu-img does not. A write decompresses them, and encrypts."""
    qemu_io(image, "write -c -P 0x33 1M 64k", options=qcow2(image))
    expected = bytearray(content(image, qcow2(image)))
    with open_stack(opened(image)) as disk:
        assert disk.read(0, SIZE) == expected
        disk.write(MIB + 1000, b"data")
        expected[MIB + 1000 : MIB + 1004] = b"data"
    assert content(image, qcow2(image)) == expected


def test_nothing_is_compressed(image: Path) -> None:
    """It would be plaintext."""
    with open_stack(opened(image)) as disk, pytest.raises(RequestError, match="it would not be encrypted"):
        disk.execute(Request.write(0, Vector.of(b"d" * 4096), Flag.WRITE_COMPRESSED))


# -- nothing of the guest is in the file -------------------------------------------------------------------------------

MARKER = b"plaintext of the guest!"


@pytest.mark.parametrize("scheme", ["xts", "cbc"])
def test_no_plaintext_reaches_the_file(scheme: str, tmp_path: Path) -> None:
    """Whole clusters, parts of them, parts of sectors; what is copied on write, from a backing file and for a snapshot;
    zeroing; resizing; and at no time: the file is looked through after every request."""
    base = tmp_path / "base"
    base.write_bytes((MARKER * SIZE)[: SIZE // 2])
    path = make_qcow2(tmp_path / "image", SIZE, backing_file="base", backing_fmt="raw", encrypt_cipher_mode=scheme)
    layer, ours = opened(path), MARKER * 10_000
    with open_stack(layer) as disk:

        def secret_still() -> None:
            assert MARKER[:9] not in path.read_bytes()

        for write in (
            lambda: disk.write(0, ours[: 128 * KIB]),
            lambda: disk.write(200_001, ours[:10]),  # copied around it: the backing file
            lambda: disk.write(300 * KIB, ours[:512]),
            lambda: disk.write(SIZE - 70_000, ours[:70_000]),
            lambda: layer.create_snapshot("one"),
            lambda: disk.write(1000, ours[:100]),  # copied around it: our own
            lambda: disk.write(64 * KIB + 512, ours[: 3 * KIB]),
            lambda: disk.zero(70_000, 300),
            lambda: disk.trim(300 * KIB, 100),
            lambda: layer.resize(SIZE + 100 * KIB),
            lambda: disk.write(SIZE, ours[: 99 * KIB]),
            lambda: layer.delete_snapshot("one"),
            disk.flush,
        ):
            write()
            secret_still()
        expected = disk.read(0, disk.size)
        assert MARKER in expected
    assert MARKER not in path.read_bytes()
    assert content(path, qcow2(path)) == expected


def test_new_clusters_hold_zeroes_that_are_encrypted(image: Path) -> None:
    """Nothing is left to holes of the file, which would be noise."""
    with open_stack(opened(image)) as disk:
        disk.write(MIB + 5000, b"d")
        disk.write(MIB + 65536, b"e" * 512)
        assert disk.read(MIB + 4096, 4096) == bytes(904) + b"d" + bytes(3191)
        assert disk.read(MIB + 65536, 4096) == b"e" * 512 + bytes(3584)
    assert content(image, qcow2(image))[MIB + 4096 : MIB + 8192] == bytes(904) + b"d" + bytes(3191)


def test_trimming_within_a_cluster_leaves_no_noise(image: Path) -> None:
    layer = opened(image)
    with open_stack(layer) as disk:
        disk.trim(512, 1024)
        layer.trim(Request.trim(4096 + 512, 1024))  # what was CODE an instant ago
        assert disk.read(0, 8192) == b"\x11" * 8192


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_growing_preallocated(image: Path, preallocation: str) -> None:
    layer = opened(image)
    with open_stack(layer) as disk:
        expected = disk.read(0, SIZE) + bytes(500 * KIB)
        layer.grow(SIZE + 500 * KIB, preallocation)
        assert disk.read(0, disk.size) == expected
    assert content(image, qcow2(image)) == expected
    check_qcow2(image)


def test_points_in_time(image: Path) -> None:
    layer = opened(image)
    with open_stack(layer) as disk:
        before = disk.read(0, SIZE)
        layer.create_snapshot("one")
        disk.write(0, b"n" * 100 * KIB)
        after = disk.read(0, SIZE)
        layer.create_snapshot("two")
        layer.apply_snapshot("one")
        assert disk.read(0, SIZE) == before
        layer.apply_snapshot("two")
        assert disk.read(0, SIZE) == after
        layer.delete_snapshot("one")
        layer.resize(SIZE // 2)
        layer.resize(SIZE)
        assert disk.read(0, SIZE) == after[: SIZE // 2] + bytes(SIZE // 2)
        layer.make_empty()
        assert disk.read(0, SIZE) == bytes(SIZE)
        disk.write(100, b"d")
    check_qcow2(image)
    with open_stack(opened(image, snapshot="two"), read_only=True) as disk:
        assert disk.read(0, SIZE) == after


def test_a_snapshot_beside_the_live_disk_has_its_key(image: Path) -> None:
    """Without asking for it again: what was read from a descriptor cannot be."""
    source, writer = os.pipe()
    os.write(writer, secret(image.parent).read_bytes())
    os.close(writer)
    layer, graph, files = opened(image, key_file=None, key_fd=source), Graph(), Files()
    graph.open(layer, FileOpener(graph, files))
    before = Reference(layer).read(0, SIZE)
    layer.create_snapshot("one")
    graph.open(view := layer.show_snapshot("one"), FileOpener(graph, files, read_only=True))
    Reference(layer).write(0, b"n" * 100 * KIB)
    assert Reference(view).read(0, SIZE) == before
    graph.close(view)
    graph.close(layer)


# -- extents -----------------------------------------------------------------------------------------------------------


def test_aes_xts_is_a_transform_by_the_place_in_the_file(image: Path) -> None:
    layer = opened(image)
    with open_stack(layer):
        for intent in (Intent.READ, Intent.WRITE):
            leaf = next(flatten(layer, 8192, 4096, intent))
            assert leaf.transform is not None and leaf.writable
            assert leaf.position == leaf.offset != 8192
        assert next(flatten(layer, 8192, 512, Intent.ZERO)).target is CODE


def test_other_schemes_are_code(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "image", SIZE, encrypt_cipher_mode="cbc")
    layer = opened(path)
    with open_stack(layer) as disk:
        disk.write(0, b"d" * 4096)
        leaf = next(flatten(layer, 0, 4096, Intent.READ))
        assert leaf.target is CODE and leaf.layer is not layer


def test_status_knows_no_places(image: Path) -> None:
    """The file does not have the disk's bytes anywhere; and its holes are no zeroes."""
    layer = opened(image)
    with open_stack(layer):
        assert all(entry.child is None for entry in layer.map(0, SIZE))
        key = ("--object", f"secret,id=s,file={secret(image.parent)}")
        theirs = run_json("qemu-img", "map", "--output=json", *key, "--image-opts", "-U", qcow2(image))
        assert not any("offset" in entry for entry in theirs)
        data = [entry.length for entry in layer.map(0, SIZE) if entry.data]
        assert sum(data) == sum(entry["length"] for entry in theirs if entry["data"])
        assert next(iter(layer.status(BASE_ALLOCATION, 0, 4096)))[1] == 0
        assert next(iter(layer.status(ALLOCATION_DEPTH, 0, 4096)))[1] == 1


def test_a_file_that_grows_while_a_place_in_it_is_looked_up(image: Path) -> None:
    """What is answered is held to the size of before."""
    layer = opened(image)
    with open_stack(layer) as disk:
        place = next(flatten(layer, 0, 4096, Intent.READ)).offset
        below = layer.reader.data.file
        answers = lawful(below.resolve(place, 4096, Intent.READ), place, 4096, below.size, "luks")
        disk.write(MIB, b"d" * 256 * KIB)
        assert [extent.length for extent in answers] == [4096]


def test_ranges_are_held_while_code_is_at_work_in_them(image: Path) -> None:
    """What writes part of a sector has been led to a place; the place is not freed before it is done."""
    layer = opened(image)
    with open_stack(layer) as disk:
        leaf = next(flatten(layer, 0, 1, Intent.WRITE, transforms=False))
        assert leaf.target is CODE and leaf.layer is layer.reader.data.file
        waited: list[tuple[int, int]] = []
        leaf.layer.code_uses.wait_unused = lambda offset, length: waited.append((offset, length))  # type: ignore[method-assign]
        disk.trim(0, 4096)
        disk.flush()
        assert waited == [(leaf.offset, 4096)]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_where_the_key_may_be(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK_KEY", secret(image.parent).read_text())
    with open_stack(opened(image, key_file=None, key_env="DISK_KEY")) as disk:
        assert disk.read(0, 10) == b"\x11" * 10


def test_no_key_and_a_wrong_one(image: Path) -> None:
    with pytest.raises(ConfigError, match=f"{image} is encrypted, and there is no key.*key-file, key-env, key-fd"):
        open_stack(Qcow2(File(str(image)))).__enter__()
    wrong = secret(image.parent, b"wrong\n", "wrong")
    with pytest.raises(ImageError, match="no key slot opens with this passphrase, which ends in a newline"):
        open_stack(opened(image, key_file=str(wrong))).__enter__()
    with pytest.raises(ConfigError, match="exactly one source"):
        open_stack(opened(image, key_env="KEY")).__enter__()


def test_a_key_for_an_image_that_is_not_encrypted(tmp_path: Path) -> None:
    path = create_plain(tmp_path / "image", MIB)
    with pytest.raises(ConfigError, match=r"key-file.*is not encrypted"):
        open_stack(opened(path)).__enter__()
    with open_stack(opened(path, key_file=False)):
        pass


def test_without_a_key_it_is_described(image: Path) -> None:
    layer, theirs = opened(image, key_file=False), _told(image)
    with open_stack(layer) as disk:
        assert layer.read_only and disk.size == SIZE
        assert layer.info() == theirs
        assert disk.read(204_800, 4096) == bytes(4096), "zero clusters need no key"
        with pytest.raises(RequestError, match="without its passphrase"):
            disk.read(0, 1)


def _told(path: Path) -> Any:
    return run_json("qemu-img", "info", "--output=json", path)["format-specific"]


def test_what_qemu_tells(tmp_path: Path) -> None:
    options = {"encrypt_cipher_mode": "cbc", "encrypt_ivgen_alg": "essiv", "encrypt_ivgen_hash_alg": "sha256"}
    path = make_qcow2(tmp_path / "image", MIB, **options)
    layer, theirs = opened(path), _told(path)
    with open_stack(layer, read_only=True):
        assert layer.info() == theirs
        assert [*layer.info()["data"]["encrypt"]] == [*theirs["data"]["encrypt"]], "in the same order"


# -- the encryption header among the metadata --------------------------------------------------------------------------


def test_the_header_counts_as_metadata(image: Path) -> None:
    header = _luks_header(image)
    for repair in (Repair.NONE, Repair.LEAKS, Repair.ALL):
        with open_stack(file := File(str(image))):
            found = Qcow2.check(file, repair=repair, opener=file._opener)  # type: ignore[arg-type]
            assert not (found.leaks or found.corruptions or found.check_errors)
    with open_stack(layer := opened(image)) as disk:
        for number in range(3):
            layer.create_snapshot(str(number))
            disk.write(number * 1000, b"d" * 500 * KIB)
        layer.make_empty()
        layer.resize(4 * MIB)
        disk.write(0, b"d" * 4 * MIB)
    assert _luks_header(image) == header
    check_qcow2(image)


SHORT: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: _poke_place(p, None, 0),
    "without its keys": lambda p: _poke_place(p, None, 4096),
    "longer than the file": lambda p: _poke_place(p, None, 1 << 63),
    "behind the end": lambda p: _poke_place(p, 1 << 40),
    "not there": lambda p: _poke(p, _extension_at(p) - 8, b"\0\0\0\1"),
    "no LUKS": lambda p: _poke_header(p, 0, b"LUCK"),
}


@pytest.mark.parametrize("spoil", SHORT.values(), ids=SHORT)
def test_no_repair_frees_a_header_that_cannot_be_placed(spoil: Callable[[Path], object], image: Path) -> None:
    """Its clusters would count as leaked; written over, the key is gone, and all data with it."""
    spoil(image)
    before = image.read_bytes()
    for repair in Repair:
        words = r"LUKS|encryption header|header is cut"
        with open_stack(file := File(str(image))), pytest.raises(ImageError, match=words):
            Qcow2.check(file, repair=repair, opener=file._opener)  # type: ignore[arg-type]
    assert image.read_bytes() == before


def test_refcounts_are_counted_anew_with_it(image: Path) -> None:
    """The header's clusters, lost to the refcounts, are not taken for anything else after a repair."""
    data = bytearray(image.read_bytes())
    table = struct.unpack_from(">Q", data, 48)[0]
    block = struct.unpack_from(">Q", data, table)[0]
    offset, length = _place(image)
    for cluster in range(offset // 4096, -(-(offset + length) // 4096)):
        struct.pack_into(">H", data, block + 2 * cluster, 0)
    image.write_bytes(data)
    header = _luks_header(image)
    with open_stack(file := File(str(image))):
        found = Qcow2.check(file, repair=Repair.ALL, opener=file._opener)  # type: ignore[arg-type]
        assert found.corruptions_fixed == -(-length // 4096)
    with open_stack(opened(image)) as disk:
        disk.write(0, b"d" * SIZE)
    assert _luks_header(image) == header
    check_qcow2(image)


def _extension_at(path: Path) -> int:
    return path.read_bytes().index(EXTENSION.pack(EXTENSION_ENCRYPTION, 16)) + 8


def _place(path: Path) -> tuple[int, int]:
    offset, length = struct.unpack_from(">QQ", path.read_bytes(), _extension_at(path))
    return offset, length


def _luks_header(path: Path) -> bytes:
    offset, length = _place(path)
    return path.read_bytes()[offset : offset + length]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_the_old_aes_is_refused_and_described(tmp_path: Path) -> None:
    path = tmp_path / "image"
    key = ("--object", f"secret,id=s,file={secret(tmp_path)}")
    run("qemu-img", "create", "-q", "-f", "qcow2", *key, "-o", "encrypt.format=aes,encrypt.key-secret=s", path, "1M")
    for keys in ({}, {"key_file": None}):
        with pytest.raises(ImageError, match=r"AES-CBC.*too weak.*convert it with qemu-img"):
            open_stack(opened(path, **keys)).__enter__()
    theirs = _told(path)
    with open_stack(layer := opened(path, key_file=False)):
        assert layer.info()["data"]["encrypt"] == {"format": "aes"}
        assert layer.info() == theirs


def _poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _poke_place(path: Path, offset: int | None = None, length: int | None = None) -> None:
    old = _place(path)
    at = _extension_at(path)
    _poke(path, at, struct.pack(">QQ", old[0] if offset is None else offset, old[1] if length is None else length))


def _poke_header(path: Path, at: int, data: bytes) -> None:
    _poke(path, _place(path)[0] + at, data)


def _l1(path: Path) -> int:
    return int(struct.unpack_from(">Q", path.read_bytes(), 40)[0])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "unaligned": (lambda p: _poke_place(p, _place(p)[0] + 512), "encryption header: its place.*multiple of 4096"),
    "nowhere": (lambda p: _poke_place(p, 0), "encryption header: its place.*not 0"),
    "behind the end": (lambda p: _poke_place(p, 1 << 40), "encryption header: its place.*within the file"),
    "far behind the end": (lambda p: _poke_place(p, (1 << 64) - 4096), "encryption header: its place"),
    "longer than the file": (lambda p: _poke_place(p, None, 1 << 40), "encryption header: its place.*within the file"),
    "as long as can be said": (lambda p: _poke_place(p, None, (1 << 64) - 1), "encryption header: its place"),
    "empty": (lambda p: _poke_place(p, None, 0), "encryption header: length"),
    "cut off": (lambda p: _poke_place(p, None, 500), "header is cut off: found 500 bytes"),
    "without its keys": (lambda p: _poke_place(p, None, 4096), "place of key slot 0.*the file's end, 0x1000"),
    "not there": (lambda p: _poke(p, _extension_at(p) - 8, b"\0\0\0\1"), "names no encryption header"),
    "extension too short": (lambda p: _poke(p, _extension_at(p) - 4, b"\0\0\0\x08"), "extension: length: found 8"),
    "not encrypted": (lambda p: _poke(p, 32, b"\0\0\0\0"), "names an encryption header, but is not encrypted"),
    "AES with a header": (lambda p: _poke(p, 32, b"\0\0\0\1"), "names an encryption header, but is not encrypted"),
    "unknown method": (lambda p: _poke(p, 32, b"\0\0\0\7"), "unsupported encryption method at offset 0x20: found 7"),
    "no LUKS": (lambda p: _poke_header(p, 0, b"LUCK"), "not a LUKS image: wrong magic"),
    "LUKS 2": (lambda p: _poke_header(p, 6, b"\0\2"), "unsupported LUKS version"),
    "another cipher": (lambda p: _poke_header(p, 8, b"serpent\0"), "unsupported cipher.*'serpent'"),
    "too much work": (lambda p: _poke_header(p, 212, b"\xff\xff\xff\xff"), "iterations of key slot 0"),
    "keys behind it": (lambda p: _poke_header(p, 248, b"\0\xff\xff\xff"), "place of key slot 0"),
}


@pytest.mark.parametrize(("spoil", "words"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("key_file", [True, False], ids=["to be used", "to be described"])
def test_refused(spoil: Callable[[Path], object], words: str, key_file: bool, image: Path) -> None:
    spoil(image)
    before = image.read_bytes()
    keys = {} if key_file else {"key_file": False}
    with pytest.raises(ImageError, match=words) as caught, open_stack(opened(image, **keys)):
        pass
    assert str(image) in str(caught.value)
    assert image.read_bytes() == before


def test_broken_headers_have_an_answer(image: Path) -> None:
    """Bytes of the LUKS header, and of what says where it is, that are anything: an error, or right data. (Not how many
    iterations: as many as are believed may take minutes.)"""
    pick, sound, luks = random.Random(SEED), image.read_bytes(), _place(image)[0]
    slots = range(KEY_SLOTS_AT, HEADER_LENGTH, KEY_SLOT.size)
    iterations = {at + number for at in (MK_DIGEST_ITERATIONS_AT, *(slot + 4 for slot in slots)) for number in range(4)}
    places = [luks + at for at in range(HEADER_LENGTH) if at not in iterations]
    places += [32 + at for at in range(4)] + [_extension_at(image) + at for at in range(-8, 16)] * 5
    opened_count = 0
    for _ in range(amount(30, 5_000)):
        data = bytearray(sound)
        for at in pick.sample(places, pick.choice((1, 1, 2, 5))):
            data[at] = pick.choice((0, 1, 255, data[at] ^ 1 << pick.randrange(8), pick.randrange(256)))
        image.write_bytes(data)
        try:
            with open_stack(opened(image), read_only=True) as disk:
                assert disk.read(0, 4096) == b"\x11" * 4096
                opened_count += 1
        except (ImageError, ConfigError) as error:
            assert "image" in str(error)
    assert opened_count


def test_places_in_the_header_are_told_as_places_of_the_file(image: Path) -> None:
    _poke_header(image, 8, b"serpent\0")
    with pytest.raises(ImageError) as caught:
        open_stack(opened(image)).__enter__()
    assert caught.value.offset == _place(image)[0] + 8


def test_a_header_where_other_metadata_is(image: Path) -> None:
    """It may be read; written it would be the end of one of the two."""
    l2 = struct.unpack_from(">Q", image.read_bytes(), _l1(image))[0] & 0x00FFFFFFFFFFFE00
    _poke_place(image, None, l2 + 1 - _place(image)[0])
    with pytest.raises(ImageError, match="encryption header and L1 table, entry 0 overlap"), open_stack(opened(image)):
        pass


def test_data_is_not_written_where_the_header_is(image: Path) -> None:
    """An L2 entry names a cluster of the header: refused, and the image is marked as corrupt."""
    data = image.read_bytes()
    l2 = struct.unpack_from(">Q", data, _l1(image))[0] & 0x00FFFFFFFFFFFE00
    _poke(image, l2, struct.pack(">Q", _place(image)[0] | 1 << 63))
    header = _luks_header(image)
    with open_stack(opened(image)) as disk, pytest.raises(RequestError):
        disk.write(0, b"d" * 512)
    assert _luks_header(image) == header
