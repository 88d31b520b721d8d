"""New qcow2 images: QEMU finds them sound and makes the same of the same options."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.qcow2.create import Options
from nbdserver.errors import ConfigError, RequestError
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Graph
from nbdserver.reference import open_stack
from tests.layers.qcow2_kit import RecordedFile, crash_states
from tests.serving import check, content, qemu_io, run, run_json

KIB, MIB, GIB, TIB, PIB = (1 << shift for shift in (10, 20, 30, 40, 50))


def make(path: Path, size: int, **options: Any) -> Path:
    """A new image, made by the layer."""
    path.touch()
    file = File(str(path))
    with open_stack(file):
        Qcow2.create(file, size, Options(**options), opener=FileOpener(Graph(), Files()))
    return path


def make_as_qemu(path: Path, size: int, **options: Any) -> Path:
    words = {True: "on", False: "off"}
    pairs = ((key, words[value] if isinstance(value, bool) else value) for key, value in options.items())
    arguments = ",".join(f"{key}={value}" for key, value in pairs)
    run("qemu-img", "create", "-q", "-f", "qcow2", *(("-o", arguments) if arguments else ()), path, str(size))
    return path


def info(path: Path) -> dict[str, Any]:
    """What qemu-img says of an image, without what depends on its name, time, and how its file is cut off."""
    report = dict(run_json("qemu-img", "info", "--output=json", path))
    for key in ("filename", "actual-size", "children"):
        report.pop(key, None)
    return report


#: Sizes and options with which QEMU's layout is ours, to the last byte of the header.
ALIKE = {
    "nothing": (0, {}),
    "a sector": (512, {}),
    "default": (10 * GIB, {}),
    "large": (64 * TIB, {}),
    "version 2": (GIB, {"compat": "0.10"}),
    "v2": (16 * MIB, {"compat": "v2", "cluster_size": 512}),
    "v3": (GIB, {"compat": "v3", "cluster_size": 4096}),
    "clusters of 8K": (GIB, {"cluster_size": 8192}),
    "largest clusters": (10 * GIB, {"cluster_size": 2 * MIB}),
    "narrow refcounts": (GIB, {"refcount_bits": 1}),
    "wide refcounts": (GIB, {"refcount_bits": 64}),
    "lazy refcounts": (GIB, {"lazy_refcounts": True}),
    "zstd": (GIB, {"compression_type": "zstd"}),
    "extended L2 entries": (GIB, {"extended_l2": True}),
    "extended L2 entries, least clusters": (GIB, {"extended_l2": True, "cluster_size": 16384}),
    "preallocated metadata": (64 * MIB, {"preallocation": "metadata"}),
}


@pytest.mark.parametrize(("size", "options"), ALIKE.values(), ids=ALIKE)
def test_images_are_as_qemu_makes_them(tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    ours, theirs = make(tmp_path / "ours", size, **options), make_as_qemu(tmp_path / "theirs", size, **options)
    check(ours)
    assert info(ours) == info(theirs)
    length = options.get("cluster_size", 65536)
    with ours.open("rb") as one, theirs.open("rb") as other:
        assert one.read(length) == other.read(length)


#: Sizes and options with which we lay images out in another way.
SOUND = {
    "many refcount blocks": (4 * GIB, {"cluster_size": 512}),
    "a long refcount table": (4 * GIB, {"cluster_size": 512, "refcount_bits": 64}),
    "a large disk of small clusters": (32 * GIB, {"cluster_size": 512}),
    "the largest disk of usual clusters": (2 * PIB, {}),
    "the largest disk of large clusters": (2048 * PIB, {"cluster_size": 2 * MIB}),
    "metadata": (300 * MIB, {"preallocation": "metadata", "cluster_size": 4096, "refcount_bits": 2}),
    "metadata, small clusters": (16 * MIB + 512, {"preallocation": "metadata", "cluster_size": 512}),
    "metadata, version 2": (20 * MIB, {"preallocation": "metadata", "compat": "0.10"}),
    "metadata, wide refcounts": (10 * MIB, {"preallocation": "metadata", "refcount_bits": 64, "cluster_size": 1024}),
    "falloc": (20 * MIB, {"preallocation": "falloc"}),
    "full": (20 * MIB, {"preallocation": "full", "refcount_bits": 1}),
    "full, extended L2 entries": (20 * MIB, {"preallocation": "full", "extended_l2": True}),
}


@pytest.mark.parametrize(("size", "options"), SOUND.values(), ids=SOUND)
def test_images_are_sound(tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    """QEMU finds them so, and writes to them."""
    ours, theirs = make(tmp_path / "ours", size, **options), make_as_qemu(tmp_path / "theirs", size, **options)
    check(ours)
    assert info(ours) == info(theirs)
    qemu_io(ours, "read -P 0 0 64k", "write -P 7 64k 4k", f"write -P 8 {size - 512} 512", "read -P 7 64k 4k")
    check(ours)


def test_what_is_preallocated_is_where_it_is_on_the_disk_in_order(tmp_path: Path) -> None:
    path = make(tmp_path / "image", 3 * MIB, preallocation="metadata")
    (mapped,) = run_json("qemu-img", "map", "--output=json", path)
    assert (mapped["length"], mapped["data"], mapped["zero"]) == (3 * MIB, True, True)


@pytest.mark.parametrize(("mode", "share"), [("off", 0), ("metadata", 0), ("falloc", 1), ("full", 1)])
def test_preallocation_takes_up_storage(tmp_path: Path, mode: str, share: int) -> None:
    path = make(tmp_path / "image", 16 * MIB, preallocation=mode)
    stored = path.stat().st_blocks * 512 / (16 * MIB)
    assert share <= stored < share + 0.1


def test_a_new_image_is_read_and_written_here(tmp_path: Path) -> None:
    for options in ({}, {"preallocation": "metadata"}, {"compat": "v2", "cluster_size": 512}, {"refcount_bits": 1}):
        path = make(tmp_path / f"image{len(options)}", 8 * MIB, **options)
        with open_stack(Qcow2(File(str(path)))) as disk:
            assert disk.read(0, disk.size) == bytes(disk.size)
            disk.write(5 * MIB - 100, b"x" * 300)
        check(path)
        assert content(path) == bytes(5 * MIB - 100) + b"x" * 300 + bytes(3 * MIB - 200)


def test_a_size_between_sectors_is_rounded_up(tmp_path: Path) -> None:
    assert info(make(tmp_path / "image", 1000))["virtual-size"] == 1024


def test_a_backing_file(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * MIB)
    names = {"backing_file": "base", "backing_fmt": "raw"}
    for options in ({}, {"cluster_size": 4096}, {"compat": "0.10"}, {"extended_l2": True, "preallocation": "metadata"}):
        ours = make(tmp_path / "ours", MIB, **names, **options)
        theirs = make_as_qemu(tmp_path / "theirs", MIB, **names, **options)
        assert ours.read_bytes()[:4096] == theirs.read_bytes()[:4096]
        assert content(ours) == b"b" * MIB


@pytest.mark.parametrize("raw", [False, True])
def test_an_external_data_file(raw: bool, tmp_path: Path) -> None:
    """The file itself is made by who asks for it."""
    for number, options in enumerate(({}, {"preallocation": "metadata"}, {"cluster_size": 4096, "extended_l2": False})):
        data = tmp_path / f"data{number}"
        run("qemu-img", "create", "-q", "-f", "raw", data, str(MIB))
        names = {"data_file": str(data), "data_file_raw": raw}
        ours = make(tmp_path / "ours", MIB, **names, **options)
        theirs = make_as_qemu(tmp_path / "theirs", MIB, **names, **options)
        assert ours.read_bytes()[:4096] == theirs.read_bytes()[:4096]
        assert info(ours) == info(theirs)
        check(ours)
        qemu_io(ours, "write -P 7 0 64k", "write -P 8 512k 512", "read -P 7 0 64k")
        check(ours)
        assert content(ours) == data.read_bytes()
        ours.unlink()


def test_a_block_device_must_be_large_enough(tmp_path: Path) -> None:
    """And what was on it is not seen."""
    file = _Fixed(bytearray(b"\xff" * 2 * MIB))
    Qcow2.create(file, 512 * KIB, Options(preallocation="metadata"), opener=FileOpener(Graph(), Files()))
    path = tmp_path / "image"
    path.write_bytes(file.data)
    check(path)
    assert content(path) == bytes(512 * KIB)
    with pytest.raises(OSError) as caught:
        Qcow2.create(file, 3 * MIB, Options(preallocation="metadata"), opener=FileOpener(Graph(), Files()))
    assert caught.value.errno == errno.ENOSPC


class _Fixed(RecordedFile):
    def resize(self, size: int) -> None:
        raise RequestError(errno.ENOTSUP, "a block device cannot be resized")


def test_progress_is_told_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    file = RecordedFile(bytearray())
    opener = FileOpener(Graph(), Files())
    options = Options(preallocation="full")
    Qcow2.create(file, 20 * MIB, options, opener=opener, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_a_crash_leaves_the_image_or_none(tmp_path: Path) -> None:
    file = RecordedFile(bytearray())
    Qcow2.create(file, 8 * MIB, Options(preallocation="metadata"), opener=FileOpener(Graph(), Files()))
    outcomes = set()
    for number, (_, state) in enumerate(crash_states(b"", file.log, random.Random(1), 60)):
        is_image = bytes(state[:4]) == b"QFI\xfb"
        outcomes.add(is_image)
        if is_image and number % 10 == 0:
            path = tmp_path / "state"
            path.write_bytes(state)
            check(path)
            assert content(path) == bytes(8 * MIB)
    assert outcomes == {True, False}


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "clusters too small": ({"cluster_size": 256}, "cluster_size: found 256, allowed is a power of two from 512"),
    "clusters too large": ({"cluster_size": 4 * MIB}, "cluster_size: found 4194304"),
    "clusters of no power of two": ({"cluster_size": 1000}, "cluster_size: found 1000"),
    "refcounts of no power of two": ({"refcount_bits": 3}, "refcount_bits: found 3"),
    "refcounts of nothing": ({"refcount_bits": 0}, "refcount_bits: found 0"),
    "refcounts too wide": ({"refcount_bits": 128}, "refcount_bits: found 128"),
    "lazy refcounts in version 2": ({"compat": "0.10", "lazy_refcounts": True}, "lazy_refcounts: only .* version 3"),
    "refcount width in version 2": ({"compat": "0.10", "refcount_bits": 8}, "refcount_bits: only .* version 3"),
    "zstd in version 2": ({"compat": "v2", "compression_type": "zstd"}, "compression_type: only .* version 3"),
    "subclusters in version 2": ({"compat": "v2", "extended_l2": True}, "extended_l2: only .* version 3"),
    "data file in version 2": ({"compat": "v2", "data_file": "x"}, "data_file: only .* version 3"),
    "subclusters too small": ({"extended_l2": True, "cluster_size": 8192}, "cluster_size: .*at least 16384"),
    "a raw data file that is none": ({"data_file_raw": True}, "data_file_raw: there is no data_file"),
    "a raw data file and a backing file": (
        {"data_file": "x", "data_file_raw": True, "backing_file": "y", "backing_fmt": "raw"},
        "data_file_raw: .*cannot have a backing file",
    ),
    "a backing format of nothing": ({"backing_fmt": "raw"}, "backing_fmt: there is no backing file"),
    "a backing file of no format": ({"backing_file": "base"}, "backing_fmt: a backing file needs its format"),
    "a backing file without name": ({"backing_file": "", "backing_fmt": "raw"}, "backing_file: found a name of 0"),
    "a backing file of a long name": (
        {"backing_file": "x" * 1024, "backing_fmt": "raw"}, "backing_file: found a name of 1024 bytes"
    ),
    "no room for the backing file's name": (
        {"backing_file": "x" * 1000, "backing_fmt": "raw", "cluster_size": 1024}, "backing_file: .*no room"
    ),
    "preallocation that hides a backing file": (
        {"backing_file": "base", "backing_fmt": "raw", "preallocation": "full"}, "preallocation: .*unless extended_l2"
    ),
    "encryption without a key": ({"encrypt_format": "luks"}, "encrypt.key-secret: missing"),
    "a key that is not there": (
        {"encrypt_format": "luks", "encrypt_key_secret": "s"}, "there is no secret 's'; there are: none"
    ),
    "the old encryption": ({"encrypt_format": "aes"}, "encrypt.format: found 'aes', which is too weak"),
    "encryption of no format": ({"encrypt_cipher_alg": "aes-256"}, "encrypt.cipher-alg: there is no encrypt.format"),
    "another cipher": (
        {"encrypt_format": "luks", "encrypt_cipher_alg": "serpent-256"}, "encrypt.cipher-alg: found 'serpent-256'"
    ),
    "another mode": ({"encrypt_format": "luks", "encrypt_cipher_mode": "ctr"}, "encrypt.cipher-mode: found 'ctr'"),
    "other vectors": ({"encrypt_format": "luks", "encrypt_ivgen_alg": "lmk"}, "encrypt.ivgen-alg: found 'lmk'"),
    "another hash": ({"encrypt_format": "luks", "encrypt_hash_alg": "crc32"}, "encrypt.hash-alg: found 'crc32'"),
    "a hash of no vectors": (
        {"encrypt_format": "luks", "encrypt_ivgen_hash_alg": "sha256"}, "encrypt.ivgen-hash-alg: only ivgen-alg=essiv"
    ),
    "vectors of a hash that makes no key": (
        {"encrypt_format": "luks", "encrypt_ivgen_alg": "essiv", "encrypt_ivgen_hash_alg": "sha512"},
        "encrypt.ivgen-hash-alg: found 'sha512', whose digest is no key",
    ),
    "no time": ({"encrypt_format": "luks", "encrypt_iter_time": 0}, "encrypt.iter-time: found 0"),
    "too much time": ({"encrypt_format": "luks", "encrypt_iter_time": 3_600_001}, "encrypt.iter-time: found 3600001"),
    "a raw data file, encrypted": (
        {"encrypt_format": "luks", "data_file": "data", "data_file_raw": True}, "data_file_raw: .* cannot be encrypted"
    ),
    "an encrypted data file, preallocated": (
        {"encrypt_format": "luks", "data_file": "data", "preallocation": "full"}, "preallocation: .* would be noise"
    ),
    "a disk too large": ({"cluster_size": 512, "size": 128 * GIB + 1}, "size: found .* at most 137438953472"),
    "a negative disk": ({"size": -1}, "size: found -1"),
    "preallocation too large": ({"preallocation": "metadata", "size": PIB, "cluster_size": 64 * KIB,
                                 "refcount_bits": 64}, "preallocation: .*too many"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(options: dict[str, Any], words: str) -> None:
    file, size = RecordedFile(bytearray()), options.pop("size", MIB)
    with pytest.raises(ConfigError, match=f"^{words}"):
        Qcow2.create(file, size, Options(**options), opener=FileOpener(Graph(), Files()))
    assert not file.log
