"""Resizing, both ways: against QEMU, over backing files, with snapshots, preallocated, and when the file fails."""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.errors import RequestError
from nbdserver.format import GrowsPreallocated
from nbdserver.reference import open_stack
from tests.layers.qcow2_check import check as own_check
from tests.layers.qcow2_check import read
from tests.layers.qcow2_kit import Fails, open_recorded
from tests.serving import SEED, amount, check, content, create, qemu_io, run, run_json

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

MATRIX: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 65536},
    {"cluster_size": 16384, "extended_l2": "on"},
    {"cluster_size": 2 * MIB},
    {"data_file": "data"},
    {"data_file": "data", "cluster_size": 512},
    {"data_file": "data", "data_file_raw": "on"},
]
MATRIX_IDS = [" ".join(map(str, options.values())) for options in MATRIX]


def _opened(path: Path, **options: Any) -> Qcow2:
    return Qcow2(File(str(path)), **options)


def _create(path: Path, size: int, options: dict[str, Any], **more: Any) -> Path:
    beside = {"data_file": path.with_name("data")} if "data_file" in options else {}
    return create(path, size, **{**options, **beside}, **more)


def _qemu_size(path: Path) -> int:
    return int(run_json("qemu-img", "info", "--output=json", path)["virtual-size"])


@pytest.mark.parametrize("options", MATRIX, ids=MATRIX_IDS)
def test_random_sizes(options: dict[str, Any], tmp_path: Path) -> None:
    """What the disk grows by reads as zeroes, whatever was there before; the rest stays."""
    size, pick = 1 * MIB, random.Random(f"{SEED} {options}")
    path = _create(tmp_path / "image", size, options)
    model = bytearray(size)
    for _ in range(3):
        layer = _opened(path)
        with open_stack(layer) as disk:
            for _ in range(amount(12, 100)):
                for _ in range(4):
                    length = min(pick.randint(1, 150 * KIB), len(model))
                    offset = pick.randrange(len(model) - length + 1)
                    data = bytes(length) if pick.random() < 0.3 else pick.randbytes(length)
                    (disk.write if any(data) else lambda at, zeroes: disk.zero(at, len(zeroes)))(offset, data)
                    model[offset : offset + length] = data
                size = pick.choice((pick.randint(1, 4096), pick.randint(1, 8192))) * 512
                layer.resize(size)
                del model[size:]
                model.extend(bytes(size - len(model)))
                assert disk.size == size
                if pick.random() < 0.3:
                    disk.flush()
                assert disk.read(0, size) == model
        check(path)
        assert _qemu_size(path) == size
        assert content(path) == model
        if options.get("data_file_raw"):
            assert (tmp_path / "data").read_bytes() == model


@pytest.mark.parametrize(("compat", "cluster"), [("0.10", 4096), ("1.1", 4096), ("1.1", 512)])
@pytest.mark.parametrize("tail", ["nothing", "data", "compressed", "zeroes", "preallocated"])
def test_growth_over_a_longer_backing_file_reads_as_zeroes(
    tail: str, compat: str, cluster: int, tmp_path: Path
) -> None:
    """What the backing file has behind the old end was never on this disk, and must not appear on it."""
    (tmp_path / "base").write_bytes(b"secret!!" * (MIB // 8))
    size = 300 * KIB + 512
    path = create(
        tmp_path / "image", size, backing=tmp_path / "base", backing_format="raw", cluster_size=cluster, compat=compat
    )
    before = bytearray(b"secret!!" * (MIB // 8))[:size]
    if tail in ("data", "compressed"):
        qemu_io(path, f"write {'-c ' if tail == 'compressed' else ''}-P 1 296k {4 * KIB + 512}")
        before[296 * KIB :] = b"\1" * (4 * KIB + 512)
    elif tail == "zeroes" and compat == "1.1":
        qemu_io(path, f"write -z 296k {4 * KIB + 512}")
        before[296 * KIB :] = bytes(4 * KIB + 512)
    layer = _opened(path)
    with open_stack(layer) as disk:
        layer.grow(2 * MIB, "metadata" if tail == "preallocated" else "off")
        assert disk.read(0, 2 * MIB) == before + bytes(2 * MIB - size)
    check(path)
    assert content(path) == before + bytes(2 * MIB - size)


def test_growth_over_a_backing_file_that_reaches_into_the_last_cluster(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * (MIB + 1024))
    path = create(tmp_path / "image", MIB + 512, backing=tmp_path / "base", backing_format="raw")
    layer = _opened(path)
    with open_stack(layer) as disk:
        layer.resize(MIB + 1024)
        assert disk.read(MIB, 1024) == b"b" * 512 + bytes(512)
        layer.resize(2 * MIB)
        assert disk.read(MIB, 2048) == b"b" * 512 + bytes(1536)
    check(path)
    assert content(path) == b"b" * (MIB + 512) + bytes(MIB - 512)


def test_a_shrunk_disk_over_a_backing_file(tmp_path: Path) -> None:
    """Growing again shows neither what was there nor the backing file."""
    (tmp_path / "base").write_bytes(b"b" * 2 * MIB)
    path = create(tmp_path / "image", 2 * MIB, backing=tmp_path / "base", backing_format="raw", cluster_size=4096)
    qemu_io(path, "write -P 1 0 2M")
    layer = _opened(path)
    with open_stack(layer) as disk:
        layer.resize(MIB - 1536)
        layer.resize(2 * MIB)
        assert disk.read(0, 2 * MIB) == b"\1" * (MIB - 1536) + bytes(MIB + 1536)
    check(path)


def test_what_lies_behind_the_end_is_not_shown(tmp_path: Path) -> None:
    """VM state, as QEMU leaves it in the active tables after loading a snapshot: not ours to show."""
    path = create(tmp_path / "image", 128 * KIB, cluster_size=512)  # the state begins with the next L2 table
    run("qemu-io", "-f", "qcow2", "-c", "write -b -P 9 0 64k", path)
    assert own_check(path.read_bytes()).leaks == 0 and b"\x09" * 512 in path.read_bytes()
    layer = _opened(path)
    with open_stack(layer) as disk:
        layer.resize(512 * KIB)
        assert disk.read(0, 512 * KIB) == bytes(512 * KIB)
    check(path)
    assert content(path) == bytes(512 * KIB)


def test_shrinking_gives_the_storage_back(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 8 * MIB)
    qemu_io(path, "write -P 1 0 8M")
    layer = _opened(path)
    with open_stack(layer):
        layer.resize(MIB)
    assert path.stat().st_size < 2 * MIB
    check(path)
    assert content(path) == b"\1" * MIB


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [512, 65536, 2 * MIB])
def test_up_to_the_limits_of_the_format(cluster: int, tmp_path: Path) -> None:
    """The L1 table grows to what QEMU takes, 32 MiB."""
    most = min((32 * MIB // 8) * (cluster // 8) * cluster, (1 << 63) - 512)
    path = create(tmp_path / "image", MIB, cluster_size=cluster)
    qemu_io(path, "write -P 1 0 1M")
    layer = _opened(path)
    with open_stack(layer) as disk:
        with pytest.raises(RequestError, match=f"{most} at most" if most % MIB == 0 else "at most") as caught:
            layer.resize(most + 512)
        assert caught.value.errno == errno.EFBIG
        layer.resize(most // MIB * MIB)
        disk.write(most // MIB * MIB - 5, b"right")
        assert disk.read(MIB - 1, 2) == b"\1\0"
    check(path)
    assert _qemu_size(path) == most // MIB * MIB
    qemu_io(path, f"read -P {ord('t')} {most // MIB * MIB - 1} 1")
    layer = _opened(path)
    with open_stack(layer) as disk:
        layer.resize(MIB)
        assert disk.read(0, MIB) == b"\1" * MIB
    check(path)


@pytest.mark.parametrize("size", [1, 511, MIB + 1])
def test_no_multiple_of_512(size: int, tmp_path: Path) -> None:
    layer = _opened(create(tmp_path / "image", MIB))
    with open_stack(layer), pytest.raises(RequestError, match="multiple of 512") as caught:
        layer.resize(size)
    assert caught.value.errno == errno.EINVAL


def test_to_nothing_and_back(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=4096)
    layer = _opened(path)
    with open_stack(layer) as disk:
        disk.write(0, b"x" * MIB)
        layer.resize(0)
        assert disk.size == 0
        layer.create_snapshot("of nothing")
        layer.resize(MIB)
        assert disk.read(0, MIB) == bytes(MIB)
        layer.apply_snapshot("of nothing")
        assert disk.size == 0
        layer.resize(512)
    check(path)


def test_an_image_open_read_only(tmp_path: Path) -> None:
    layer = _opened(create(tmp_path / "image", MIB))
    with open_stack(layer, read_only=True), pytest.raises(RequestError, match="read-only") as caught:
        layer.resize(2 * MIB)
    assert caught.value.errno == errno.EROFS


# -- with snapshots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [96 << 10, 1 << 40], ids=["is free", "is nowhere"])
def test_what_is_lost_may_be_what_nobody_counts(place: int, tmp_path: Path) -> None:
    """A cluster that counts as free may be another's when it is given back: it is not."""
    path = create(tmp_path / "image", 4 * MIB, cluster_size=4096)
    qemu_io(path, "write -P 1 3M 16k")  # the second L2 table, which goes as a whole
    data = bytearray(path.read_bytes()).ljust(128 << 10, b"\0")
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 + 8 : l1 + 16], "big") & ~(1 << 63)
    data[l2 + 8 : l2 + 16] = (1 << 63 | place).to_bytes(8, "big")
    file, layer = open_recorded(bytes(data))
    with open_stack(layer):
        layer.resize(MIB)
    assert not [
        each for each in file.log if each.name == "discard" and place in range(each.offset, each.offset + each.length)
    ]
    assert not own_check(file.data).errors


def test_snapshots_keep_their_sizes(tmp_path: Path) -> None:
    path, pick = create(tmp_path / "image", MIB, cluster_size=4096), random.Random(SEED)
    layer, known = _opened(path), dict[str, bytes]()
    with open_stack(layer) as disk:
        for number, size in enumerate((3 * MIB, 512 * KIB, 700 * KIB + 512, 5 * MIB, 100 * KIB)):
            disk.write(0, pick.randbytes(disk.size // 2))
            layer.create_snapshot(f"s{number}")
            known[f"s{number}"] = disk.read(0, disk.size)
            layer.resize(size)
            assert disk.read(0, size) == known[f"s{number}"][:size].ljust(size, b"\0")
        for name, before in known.items():
            layer.apply_snapshot(name)
            assert disk.size == len(before) and disk.read(0, disk.size) == before
    check(path)
    for name, before in known.items():
        run("qemu-img", "snapshot", "-a", name, path)
        assert _qemu_size(path) == len(before)
        assert content(path) == before, name
        check(path)


def test_version_2_with_snapshots(tmp_path: Path) -> None:
    """As QEMU: their entries need not say how large the disk was."""
    layer = _opened(create(tmp_path / "image", MIB, compat="0.10"))
    with open_stack(layer) as disk:
        layer.create_snapshot("s")
        with pytest.raises(RequestError, match="version 2") as caught:
            layer.resize(2 * MIB)
        assert caught.value.errno == errno.ENOTSUP
        assert disk.size == MIB


# -- preallocation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", MATRIX, ids=MATRIX_IDS)
def test_preallocated_growth(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = _create(tmp_path / "image", MIB + 512, options)
    layer = _opened(path)
    assert isinstance(layer, GrowsPreallocated)
    told: list[tuple[int, int]] = []
    with open_stack(layer) as disk:
        disk.write(0, b"x" * (MIB + 512))
        disk.trim(0, MIB)  # so that there is something free that is not zeroes
        disk.flush()
        layer.grow(6 * MIB, mode, lambda done, total: told.append((done, total)))
        assert disk.read(MIB, 5 * MIB) == b"x" * 512 + bytes(5 * MIB - 512)
    assert told[-1] == (5 * MIB - 512, 5 * MIB - 512) and told == sorted(told)
    check(path)
    assert content(path)[MIB:] == b"x" * 512 + bytes(5 * MIB - 512)
    mapped = run_json("qemu-img", "map", "--output=json", path)
    first = -(-(MIB + 512) // (2 * MIB)) * 2 * MIB
    assert all(each["present"] and "offset" in each for each in mapped if each["start"] >= first), mapped
    file = tmp_path / "data" if "data_file" in options else path
    assert mode == "metadata" or file.stat().st_blocks * 512 >= 4 * MIB


@pytest.mark.parametrize("mode", ["metadata", "full"])
def test_shrinking_cannot_be_preallocated(mode: str, tmp_path: Path) -> None:
    layer = _opened(create(tmp_path / "image", MIB))
    with open_stack(layer), pytest.raises(RequestError, match="cannot be preallocated") as caught:
        layer.grow(512, mode)
    assert caught.value.errno == errno.EINVAL


def test_no_room_for_it(tmp_path: Path) -> None:
    """Nothing has changed, and what had been taken is free again."""
    from layers.raw import Raw

    path = create(tmp_path / "image", MIB, cluster_size=4096)
    with path.open("r+b") as file:
        file.truncate(2 * MIB)
    layer = Qcow2(Raw(File(str(path)), size=2 * MIB))
    with open_stack(layer) as disk:
        with pytest.raises(OSError) as caught:
            layer.grow(4 * MIB, "full")
        assert caught.value.errno == errno.ENOSPC
        assert disk.size == MIB
        layer.resize(4 * MIB)
        assert disk.read(0, 4 * MIB) == bytes(4 * MIB)
        disk.write(0, b"x" * 1900 * KIB)
    check(path)


# -- when the file fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("size", [50 * KIB + 512, 512 * KIB])
def test_the_file_fails(size: int, error: int, tmp_path: Path) -> None:
    """At each operation in turn: the disk is what it was or what it was to become, and says which."""
    (tmp_path / "base").write_bytes(b"b" * 300 * KIB)
    path = create(tmp_path / "image", 128 * KIB, cluster_size=512, backing=tmp_path / "base", backing_format="raw")
    qemu_io(path, "write -P 1 0 100k")
    run("qemu-img", "snapshot", "-c", "a", path)
    qemu_io(path, "write -P 2 0 40k")
    data, below = path.read_bytes(), (tmp_path / "base").read_bytes()
    old = b"\2" * 40 * KIB + b"\1" * 60 * KIB + b"b" * 28 * KIB
    new = old[:size].ljust(size, b"\0")
    for number in itertools.count():
        file, layer = open_recorded(data, backing=open_recorded(below)[0])
        fails, failed = Fails(number, error), False
        with contextlib.suppress(OSError), open_stack(layer) as disk:  # a failed sync is final: closing fails, too
            file.before = fails
            try:
                layer.resize(size)
            except OSError:
                failed = True
            file.before = lambda operation: None
            assert disk.read(0, disk.size) in (old, new)
        report = own_check(file.data)
        assert not report.errors, (number, report.errors)
        assert read(file.data, below) in (old, new), number
        if not failed:
            assert fails.left >= 0
            break
    assert number > 5


# -- with bitmaps ----------------------------------------------------------------------------------------------------


def test_bitmaps_become_as_large_as_the_disk(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    run("qemu-img", "bitmap", "--add", path, "b")
    layer = _opened(path)
    with open_stack(layer) as disk:
        disk.write(0, b"x" * 70000)
        disk.write(900 * KIB, b"x")
        layer.resize(3 * MIB)
        disk.write(2 * MIB, b"x")
        layer.resize(64 * KIB)
        layer.resize(2 * MIB)
        (bitmap,) = layer.bitmaps()
        assert bitmap.count == 64 * KIB and not bitmap.in_use
    check(path)
    (stored,) = run_json("qemu-img", "info", "--output=json", path)["format-specific"]["data"]["bitmaps"]
    assert stored["flags"] == ["auto"]
