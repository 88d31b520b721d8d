"""``image convert``: the same disk in another image, holes as holes; and what qemu-img's options mean."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.image.allocation import SECTOR
from nbdserver.image.copying import Range, whole_units, zero_runs
from tests.image.kit import KIB, MIB, Sample, image, image_json, qemu_img
from tests.serving import SEED, check, content, create, loop_device, qemu_io, run

# -- of any format into any other ----------------------------------------------------------------------------------


def test_every_image_converts_as_qemu_converts_it(zoo: dict[str, Sample], tmp_path: Path) -> None:
    for name, sample in zoo.items():
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        image("convert", "-f", sample.format, sample.path, ours)
        run("qemu-img", "convert", "-f", sample.format, "-O", "raw", sample.path, theirs)
        data, expected = ours.read_bytes(), theirs.read_bytes()
        assert data == expected[: len(data)] and not any(expected[len(data) :]), name
        assert len(expected) - len(data) < SECTOR, "qemu-img fills up the last sector"
        assert ours.stat().st_blocks <= theirs.stat().st_blocks + 8, name


def test_every_image_converts_to_qcow2(zoo: dict[str, Sample], tmp_path: Path) -> None:
    for name, sample in zoo.items():
        path = tmp_path / "disk.qcow2"
        image("convert", "-O", "qcow2", sample.path, path)
        check(path)
        run("qemu-img", "compare", "-f", sample.format, "-F", "qcow2", sample.path, path)
        theirs = tmp_path / "theirs"
        run("qemu-img", "convert", "-f", sample.format, "-O", "qcow2", sample.path, theirs)
        assert path.stat().st_size <= theirs.stat().st_size, name


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=2M,preallocation=metadata", "compat=0.10"])
def test_creation_options(options: str, zoo: dict[str, Sample], tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image("convert", "-O", "qcow2", "-o", options, zoo["chain"].path, path)
    check(path)
    assert hashlib.sha1(content(path)).digest() == hashlib.sha1(content(zoo["chain"].path)).digest()


def test_several_images_one_after_the_other(zoo: dict[str, Sample], tmp_path: Path) -> None:
    parts = [zoo[name].path for name in ("chain", "raw", "small clusters")]
    path = tmp_path / "disk.qcow2"
    image("convert", "-O", "qcow2", *parts, path)
    check(path)
    run("qemu-img", "convert", "-O", "raw", *parts, tmp_path / "theirs")
    assert content(path) == (tmp_path / "theirs").read_bytes()


# -- compressed ------------------------------------------------------------------------------------------------------


def _is_as_good(ours: Path, theirs: Path) -> None:
    """Both files hold the same disk; ours is sound, and takes up no more than a few percent more."""
    check(ours)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    found, theirs_found = (json.loads(qemu_img("check", "--output=json", path).out) for path in (ours, theirs))
    cluster = image_json("info", ours)["cluster-size"]
    assert ours.stat().st_size <= 1.05 * theirs.stat().st_size + 2 * cluster
    # qemu-img finds no zeroes in a cluster that is not aligned to 4 KiB; where the limit is, two zlibs may disagree.
    assert found.get("allocated-clusters", 0) <= theirs_found.get("allocated-clusters", 0)
    assert found.get("compressed-clusters", 0) >= 0.99 * theirs_found.get("compressed-clusters", 0) - 1


def test_every_image_is_compressed_as_by_qemu(zoo: dict[str, Sample], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for name, sample in zoo.items():
        image("convert", "-c", "-f", sample.format, "-O", "qcow2", sample.path, ours)
        run("qemu-img", "convert", "-c", "-f", sample.format, "-O", "qcow2", sample.path, theirs)
        _is_as_good(ours, theirs)
        if name != "raw, odd size":  # of which qemu-img fills up the last sector, and compresses it
            run("qemu-img", "compare", "-s", "-f", "qcow2", "-F", "qcow2", ours, theirs)


@pytest.mark.parametrize(
    "words",
    [
        "-o compression_type=zstd",
        "-o compression_type=zstd,extended_l2=on",
        "-o cluster_size=4k -W -m 8",
        "-o cluster_size=512",
        "-o cluster_size=2M,refcount_bits=1",
        "-o compat=0.10 -m 1",
        "-S 0",
    ],
)
def test_compressed_with_options(words: str, tmp_path: Path) -> None:
    """Text, noise and zeroes; the disk ends within a cluster."""
    pick, data = random.Random(f"{SEED} {words}"), bytearray()
    while len(data) < 3 * MIB:
        length = pick.randint(1, 40) * 4096
        data += pick.choice((b"to be compressed " * (length // 17 + 1), pick.randbytes(length), bytes(length)))
    source, ours, theirs = tmp_path / "source", tmp_path / "ours", tmp_path / "theirs"
    source.write_bytes(data[: len(data) // 512 * 512])
    image("convert", "-c", "-f", "raw", "-O", "qcow2", *words.split(), source, ours)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *words.split(), source, theirs)
    _is_as_good(ours, theirs)
    assert content(ours) == source.read_bytes()


def test_an_overlay_is_compressed(zoo: dict[str, Sample], tmp_path: Path) -> None:
    base = _blocks(tmp_path)
    changed = tmp_path / "changed"
    changed.write_bytes(bytes(100 * KIB) + b"changed " * 8192 + base.read_bytes()[100 * KIB + 64 * KIB :])
    top = create(tmp_path / "top", 3 * MIB + 512, backing=base, backing_format="raw")
    qemu_io(top, "write -P 7 100k 300k", "write -z 1M 128k")
    path = tmp_path / "disk"
    image("convert", "-c", "-O", "qcow2", "-B", base, "-F", "raw", top, path)
    check(path)
    assert content(path) == content(top)
    assert image_json("check", path)["compressed-clusters"] >= 4


def test_what_can_have_nothing_compressed_is_left_alone(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", 4 * MIB, data_file="beside")
    qemu_io(path, "write -P 1 0 1M")
    before = content(path)
    refused = image("convert", "-c", "-n", "-f", "raw", "-O", "qcow2", _blocks(tmp_path), path, status=1)
    assert "disk: nothing is compressed in an external data file" in refused.stderr
    assert content(path) == before


def test_an_image_that_is_there_is_written_over_compressed(tmp_path: Path) -> None:
    """Where there is data already, too; qemu-img fails there with EIO."""
    source, path = _blocks(tmp_path), create(tmp_path / "disk", 4 * MIB)
    qemu_io(path, "write -P 1 0 4M")
    image("convert", "-c", "-n", "-f", "raw", "-O", "qcow2", source, path)
    check(path)
    data = source.read_bytes()
    assert content(path) == data + b"\1" * (4 * MIB - len(data))


# -- zeroes ----------------------------------------------------------------------------------------------------------


def _blocks(directory: Path, *, seed: int = 0) -> Path:
    """Data and zeroes in pieces of 512 bytes to 20 KiB."""
    pick = random.Random(f"{SEED} {seed}")
    data = bytearray()
    while len(data) < 3 * MIB:
        length = pick.randint(1, 40) * 512
        data += pick.randbytes(length) if pick.random() < 0.6 else bytes(length)
    path = directory / "blocks.raw"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("sparse", ["4k", "512", "64k", "96k", "0"])
def test_zeroes_in_the_data_become_holes(sparse: str, tmp_path: Path) -> None:
    source, ours, theirs = _blocks(tmp_path), tmp_path / "ours", tmp_path / "theirs"
    image("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", "-S", sparse, source, ours)
    options = ("-o", "cluster_size=512", "-S", sparse)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, source, theirs)
    check(ours)
    assert content(ours) == source.read_bytes()
    # What is longer than that but not aligned to it is a matter of taste.
    assert abs(ours.stat().st_size - theirs.stat().st_size) <= 0.05 * theirs.stat().st_size


def test_nothing_is_left_out_if_nothing_is_to_be(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(3 * MIB)
    image("convert", "-f", "raw", "-S", "0", source, target)
    assert target.stat().st_blocks * 512 >= 3 * MIB and target.read_bytes() == bytes(3 * MIB)


@pytest.mark.parametrize("seed", range(20))
def test_zero_runs_against_a_model(seed: int) -> None:
    pick = random.Random(f"{SEED} {seed}")
    block, shortest = pick.choice([(1, 1), (2, 2), (4, 4), (4, 6), (8, 8)])
    position = pick.randint(0, 20)
    data = bytes(pick.choice((0, 0, 0, 1)) for _ in range(pick.randint(1, 60)))
    blocks = [
        (at, list(offsets))
        for at, offsets in itertools.groupby(range(len(data)), lambda offset: (position + offset) // block)
    ]
    zero = [not any(data[offset] for offset in offsets) for _, offsets in blocks]
    expected = bytearray(len(data))
    for is_zero, found in itertools.groupby(zip(zero, blocks, strict=True), lambda pair: pair[0]):
        offsets = [offset for _, (_, part) in found for offset in part]
        if is_zero and (len(offsets) >= shortest or len(offsets) == len(data)):
            expected[offsets[0] : offsets[-1] + 1] = b"\1" * len(offsets)
    shown, at = bytearray(len(data)), 0
    for start, stop, is_zero in zero_runs(memoryview(data), position, block, shortest):
        assert start == at < stop
        shown[start:stop] = bytes([is_zero]) * (stop - start)
        at = stop
    assert at == len(data) and shown == expected


@pytest.mark.parametrize("seed", range(20))
def test_whole_units_against_a_model(seed: int) -> None:
    pick = random.Random(f"{SEED} {seed}")
    unit, end = pick.choice((1, 4, 5)), pick.randint(1, 60)
    kinds = [pick.choice("dz-") for _ in range(end // 3 + 1)]
    disk = "".join(kind * 3 for kind in kinds)[:end]
    ranges, at = [], 0
    for kind, same in itertools.groupby(disk):
        length = len(list(same))
        if kind != "-":
            ranges.append(Range(at, length, kind == "z"))
        at += length
    shown = ["-"] * end
    for start, length, is_zero in whole_units(ranges, unit, end):
        assert start % unit == 0 and ((start + length) % unit == 0 or start + length == end)
        assert set(shown[start : start + length]) == {"-"}, "nothing twice"
        shown[start : start + length] = ("z" if is_zero else "d") * length
    for start in range(0, end, unit):
        there = set(disk[start : start + unit])
        wanted = there.pop() if len(there) == 1 else "d"
        assert set(shown[start : start + unit]) == {wanted}


# -- targets ---------------------------------------------------------------------------------------------------------


def test_into_an_image_that_is_there(zoo: dict[str, Sample], tmp_path: Path) -> None:
    source = zoo["qcow2"].path
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * 9 * MIB)
    image("convert", "-n", source, target)
    assert target.read_bytes() == content(source) + b"\xaa" * MIB
    small = tmp_path / "small"
    small.write_bytes(bytes(MIB))
    assert "too small" in image("convert", "-n", source, small, status=1).stderr


def test_a_target_that_is_said_to_be_zero_is_not_zeroed(zoo: dict[str, Sample], tmp_path: Path) -> None:
    target = tmp_path / "target"
    with target.open("wb") as file:
        file.truncate(8 * MIB)
    image("convert", "-n", "--target-is-zero", zoo["qcow2"].path, target)
    assert target.read_bytes() == content(zoo["qcow2"].path)
    assert target.stat().st_blocks * 512 < 2 * MIB


def test_an_overlay_gets_what_the_topmost_image_has(tmp_path: Path) -> None:
    """As qemu-img takes it: the new backing file shows what the old one did."""
    base = create(tmp_path / "base", 6 * MIB)
    qemu_io(base, "write -P 1 0 6M")
    top = create(tmp_path / "top", 8 * MIB, backing=base)
    qemu_io(top, "write -P 2 1M 1M", "write -z 3M 1M", "write -P 3 7M 64k")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    image("convert", "-O", "qcow2", "-B", "base", "-F", "qcow2", top, ours)
    run("qemu-img", "convert", "-O", "qcow2", "-B", "base", "-F", "qcow2", top, theirs, cwd=tmp_path)
    check(ours)
    assert content(ours) == content(top)
    assert image("map", "--json", ours).stdout == qemu_img("map", "--output=json", ours).out
    assert ours.stat().st_size <= theirs.stat().st_size


def test_the_target_is_never_the_source(zoo: dict[str, Sample], tmp_path: Path) -> None:
    path, link = create(tmp_path / "disk", MIB), tmp_path / "link"
    link.hardlink_to(path)
    before = path.read_bytes()
    for target in (path, link):
        assert "has it open already" in image("convert", "-O", "qcow2", path, target, status=1).stderr
    over = create(tmp_path / "over", MIB, backing=path)
    assert "has it open already" in image("convert", "-O", "qcow2", over, path, status=1).stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source"], "a target"),
        (["-S", "1000", "source", "target"], "multiple of 512"),
        (["-n", "-o", "cluster_size=4k", "source", "target"], "-n"),
        (["--target-is-zero", "source", "target"], "-n"),
        (["-c", "source", "target"], "cannot be compressed"),
        (["-c", "-O", "qcow2", "-o", "preallocation=metadata", "source", "target"], "cannot be preallocated"),
        (
            ["-c", "-O", "qcow2", "-o", "data_file=data", "source", "target"],
            "nothing is compressed in an external data file",
        ),
        (["-l", "snapshot", "source", "target"], "has no internal snapshots"),
        (["-l", "snapshot", "source", "source", "target"], "cannot be joined"),
        (["-m", "17", "source", "target"], "17"),
        (["-C", "-S", "64k", "source", "target"], "-C"),
        (["-C", "-c", "-O", "qcow2", "source", "target"], "-C"),
        (["-O", "luks", "source", "target"], "cannot be made"),
        (["none", "target"], "none: cannot be opened"),
        (["source", "none/target"], "none/target: cannot be made"),
        (["--bitmaps", "source", "target"], "no bitmaps"),
        (["-b", "base", "-F", "raw", "source", "target"], "no such option"),
    ],
)
def test_what_is_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("source").write_bytes(bytes(MIB))
    assert message in image("convert", *words, status=1).stderr
    assert not Path("target").exists()


# -- trouble ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_ends_it_or_is_zero(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", 4 * MIB)
    qemu_io(path, "write -P 1 0 1M", "write -c -P 2 2M 64k", "write -P 3 3M 64k")
    data = bytearray(path.read_bytes())
    place = data.rindex(bytes([3]) * 512) + 512 - 64 * KIB  # the compressed cluster lies before the last one
    at = next(at for at in range(place - 64 * KIB, place) if any(data[at : at + 8]))
    data[at : at + 16] = b"\xff" * 16
    path.write_bytes(data)
    target = tmp_path / "target"
    result = image("convert", path, target, status=1)
    assert f"{path}: cannot be read at byte {2 * MIB}" in result.stderr
    result = image("convert", "--salvage", path, target)
    assert f"warning: what is at byte {2 * MIB} cannot be read" in result.stderr
    assert target.read_bytes() == b"\1" * MIB + bytes(2 * MIB) + b"\3" * 64 * KIB + bytes(960 * KIB)


def test_allocation_that_cannot_be_read_is_zero_too(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", 300 * KIB, cluster_size=512)
    qemu_io(path, "write -P 1 0 300k")
    data = bytearray(path.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    data[l1 + 7 + 3 * 8] |= 2  # a reserved bit
    path.write_bytes(data)
    target = tmp_path / "target"
    assert image("convert", path, target, status=1).stderr
    assert "allocation" in image("convert", "--salvage", path, target).stderr
    start, end = 3 * 32 * KIB, 4 * 32 * KIB
    found = target.read_bytes()
    assert found[:start] == b"\1" * start and not any(found[start:end]) and set(found[end:]) == {1}


def test_a_full_target_is_an_error(zoo: dict[str, Sample], tmp_path: Path) -> None:
    target = Path("/dev/full")
    assert image("convert", "-n", zoo["raw"].path, target, status=1).stderr


def test_the_rate_is_limited(tmp_path: Path) -> None:
    import time

    source = tmp_path / "source"
    source.write_bytes(b"x" * 4 * MIB)
    begin = time.monotonic()
    image("convert", "-r", "8M", source, tmp_path / "target")
    assert time.monotonic() - begin > 0.4


def test_progress_goes_to_stderr(zoo: dict[str, Sample], tmp_path: Path) -> None:
    result = image("convert", "-p", zoo["raw"].path, tmp_path / "target")
    assert "(100.00/100%)" in result.stderr and result.stdout == ""
    assert image("convert", "-p", "-q", zoo["raw"].path, tmp_path / "target").stderr == ""


# -- ways to copy ----------------------------------------------------------------------------------------------------


def test_the_kernel_copies(zoo: dict[str, Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy_file_range = os.copy_file_range

    def copy(source: int, target: int, count: int, *offsets: int) -> int:
        copied.append(count)
        return copy_file_range(source, target, min(count, 70_000), *offsets)

    monkeypatch.setattr(os, "copy_file_range", copy)
    for name in ("raw", "qcow2", "chain", "metadata"):
        copied.clear()
        target = tmp_path / "target"
        image("convert", "-C", zoo[name].path, target)
        assert image("compare", "-F", "raw", zoo[name].path, target).stdout == "Images are identical.\n"
        assert copied, name
    copied.clear()
    image("convert", "-C", "-O", "qcow2", zoo["raw"].path, tmp_path / "disk.qcow2")
    assert not copied and content(tmp_path / "disk.qcow2") == content(zoo["raw"].path, format="raw")


@pytest.mark.parametrize("fails_at", [1, 3])
def test_where_the_kernel_cannot_copy_we_do(
    fails_at: int, zoo: dict[str, Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)
    copy_file_range = os.copy_file_range

    def copy(source: int, target: int, count: int, *offsets: int) -> int:
        if next(calls) >= fails_at:
            raise OSError(errno.EXDEV, "another file system")
        return copy_file_range(source, target, count, *offsets)

    monkeypatch.setattr(os, "copy_file_range", copy)
    target = tmp_path / "target"
    image("convert", "-C", zoo["raw"].path, target)
    assert target.read_bytes() == zoo["raw"].path.read_bytes()


@pytest.mark.parametrize("words", ["-m 1", "-m 16", "-W", "-t writeback", "-t directsync -T none"])
def test_it_does_not_matter_how(words: str, zoo: dict[str, Sample], tmp_path: Path) -> None:
    target = tmp_path / "target"
    image("convert", *words.split(), "-O", "qcow2", zoo["chain"].path, target)
    check(target)
    assert content(target) == content(zoo["chain"].path)


def test_it_is_synced_if_that_is_wanted(
    zoo: dict[str, Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    image("convert", "-O", "qcow2", zoo["raw"].path, tmp_path / "target")
    assert not synced
    image("convert", "-O", "qcow2", "-t", "writeback", zoo["raw"].path, tmp_path / "target")
    assert synced


def test_a_block_device_is_written_zeroes_and_all(zoo: dict[str, Sample], tmp_path: Path) -> None:
    path = tmp_path / "device"
    with loop_device_of_garbage(path) as device:
        image("convert", zoo["qcow2"].path, device)
        assert path.read_bytes()[: 8 * MIB] == content(zoo["qcow2"].path)
        path.write_bytes(b"\xaa" * 16 * MIB)
        image("convert", "-O", "qcow2", zoo["qcow2"].path, device)
        assert image("compare", device, zoo["qcow2"].path).stdout == "Images are identical.\n"
        result = image("create", "-f", "qcow2", "-o", "preallocation=metadata", device, "20M", status=1)
        assert "No space left on device" in result.stderr
        assert image_json("info", device)["format"] == "raw", "what was there is no image any more"


@contextlib.contextmanager
def loop_device_of_garbage(path: Path) -> Iterator[str]:
    path.write_bytes(b"\xaa" * 16 * MIB)
    with loop_device(path, sector_size=512) as device:
        yield device


def test_what_has_been_made_is_described(zoo: dict[str, Sample], tmp_path: Path) -> None:
    path = tmp_path / "target"
    made = image_json("convert", "-O", "qcow2", zoo["raw"].path, path)
    assert made == image_json("info", path) and made["virtual-size"] == 6 * MIB
    made = image_json("create", "-f", "qcow2", path, "3M")
    assert made == image_json("info", path) and made["virtual-size"] == 3 * MIB
