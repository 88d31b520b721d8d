"""Extended L2 entries: subclusters are allocated, copied and zeroed each by itself."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.qcow2.clusters import Kind, Run
from nbdserver.errors import RequestError
from nbdserver.extent import CODE, ZERO, Intent
from nbdserver.reference import open_stack
from nbdserver.request import Flag
from tests.layers.qcow2_check import Image, read
from tests.layers.qcow2_check import check as own_check
from tests.layers.qcow2_kit import open_recorded
from tests.serving import check, content, create, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20
CLUSTER, SUB = 64 * KIB, 2 * KIB
COPIED = 1 << 63


def _create(directory: Path, size: int = MIB, *, backed: bool = False, **options: Any) -> Path:
    """An image of subclusters; its backing file is all of ones."""
    backing = directory / "backing"
    backing.write_bytes(b"\1" * size)
    kind = {"backing": backing, "backing_format": "raw"} if backed else {}
    return create(directory / "image", size, extended_l2="on", **kind, **options)


def _opened(path: Path, **options: Any) -> Qcow2:
    return Qcow2(File(str(path)), **options)


def _entry(path: Path, cluster: int = 0) -> tuple[int, int]:
    image = Image(path.read_bytes())
    (l1_entry,) = image.numbers(image.l1_offset, 1)
    return list(image.entries(l1_entry & 0x00FFFFFFFFFFFE00))[cluster]


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


# -- writing --------------------------------------------------------------------------------------------------------


def test_a_write_allocates_only_the_subclusters_it_touches(tmp_path: Path) -> None:
    path = _create(tmp_path, backed=True)
    with open_stack(_opened(path)) as disk:
        disk.write(5 * SUB + 100, b"x" * SUB)
        assert disk.read(4 * SUB, 4 * SUB) == b"\1" * (SUB + 100) + b"x" * SUB + b"\1" * (2 * SUB - 100)
    assert _entry(path)[1] == _bits(5, 6)
    check(path)
    assert content(path)[4 * SUB : 8 * SUB] == b"\1" * (SUB + 100) + b"x" * SUB + b"\1" * (2 * SUB - 100)


def test_only_the_subclusters_it_touches_are_read_and_written(tmp_path: Path) -> None:
    path = _create(tmp_path, backed=True)
    file, layer = open_recorded(path.read_bytes(), backing=open_recorded(b"\1" * MIB)[0])
    with open_stack(layer) as disk:
        disk.write(5 * SUB + 100, b"x" * SUB)
        data = [operation for operation in file.log if b"x" in operation.data]
        assert [operation.length for operation in data] == [2 * SUB]
        backing = layer.backing.layer  # type: ignore[union-attr]
        reads: list[int] = []
        backing.before = lambda operation: reads.append(operation.length)
        disk.write(10 * SUB, b"y" * SUB)
        assert reads == [], "whole subclusters need nothing of what was there"
        disk.write(12 * SUB + 7, b"y")
        assert reads == [SUB], "what is around it, in one go"
    assert not own_check(file.data).errors


def test_a_further_subcluster_goes_into_the_same_cluster(tmp_path: Path) -> None:
    path = _create(tmp_path, backed=True)
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"a" * SUB)
        size = path.stat().st_size
        for number in range(1, 32):
            disk.write(number * SUB, bytes([number]) * SUB)
        assert path.stat().st_size == size
        (run_,) = disk.root.reader.mapping.runs(0, CLUSTER, ahead=False)  # type: ignore[attr-defined]
        assert run_.kind is Kind.NORMAL and run_.end == CLUSTER
    check(path)
    assert content(path)[SUB : 2 * SUB] == b"\1" * SUB


@pytest.mark.parametrize("backed", [False, True])
def test_a_shared_cluster_moves_with_all_that_it_stores(backed: bool, tmp_path: Path) -> None:
    path = _create(tmp_path, backed=backed)
    qemu_io(path, f"write -P 3 {4 * SUB} {SUB}", f"write -P 4 {20 * SUB} {SUB}", f"write -z {31 * SUB} {SUB}")
    run("qemu-img", "snapshot", "-c", "s", path)
    then = content(path)
    with open_stack(_opened(path)) as disk:
        disk.write(10 * SUB + 5, b"new")
        expected = bytearray(then)
        expected[10 * SUB + 5 : 10 * SUB + 8] = b"new"
        assert disk.read(0, MIB) == expected
    check(path)
    # What lies between is copied with it, what lies outside is not.
    assert _entry(path)[1] == _bits(*range(4, 21)) | _bits(31) << 32
    assert content(path) == expected
    run("qemu-img", "snapshot", "-a", "s", path)
    assert content(path) == then


def test_compressed_clusters_have_no_subclusters(tmp_path: Path) -> None:
    path = _create(tmp_path, backed=True)
    qemu_io(path, "write -c -P 7 0 64k", "write -c -P 8 64k 64k")
    with open_stack(_opened(path)) as disk:
        disk.write(3 * SUB, b"x")
        assert disk.read(0, CLUSTER) == b"\7" * 3 * SUB + b"x" + b"\7" * (29 * SUB - 1)
        disk.zero(CLUSTER + SUB, SUB)  # a part of one: no bitmap can say that
        assert disk.read(CLUSTER, CLUSTER) == b"\10" * SUB + bytes(SUB) + b"\10" * 30 * SUB
        found = disk.read(0, MIB)
    assert _entry(path)[1] == _entry(path, 1)[1] == 0xFFFFFFFF
    check(path)
    assert content(path) == found


# -- zeroing and trimming -------------------------------------------------------------------------------------------


def test_subclusters_are_zeroed_by_their_bits(tmp_path: Path) -> None:
    path = _create(tmp_path, backed=True)
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"x" * 8 * SUB)
        place = next(iter(disk.root.resolve(0, 1, Intent.WRITE))).offset
        disk.zero(2 * SUB, 2 * SUB, Flag.MAY_UNMAP)
        disk.zero(20 * SUB, SUB)
        disk.zero(6 * SUB + 10, SUB)  # parts of two, which are written
        assert disk.read(0, CLUSTER) == (
            b"x" * 2 * SUB + bytes(2 * SUB) + b"x" * (2 * SUB + 10) + bytes(SUB) + b"x" * (SUB - 10)
            + b"\1" * 12 * SUB + bytes(SUB) + b"\1" * 11 * SUB
        )  # fmt: skip
        found = disk.read(0, MIB)
    assert _entry(path) == (COPIED | place, _bits(0, 1, 4, 5, 6, 7) | _bits(2, 3, 20) << 32)
    check(path)
    assert content(path) == found


def test_a_zeroed_subcluster_is_filled_where_it_was(tmp_path: Path) -> None:
    path = _create(tmp_path)
    with open_stack(_opened(path, allocation_ahead=0)) as disk:
        disk.write(0, b"x" * 8 * SUB)
        place = next(iter(disk.root.resolve(0, 1, Intent.WRITE))).offset
        disk.zero(2 * SUB, SUB)
        disk.write(2 * SUB + 1, b"y")
        assert disk.read(0, 8 * SUB) == b"x" * 2 * SUB + b"\0y" + bytes(SUB - 2) + b"x" * 5 * SUB
        (extent,) = list(disk.root.resolve(0, 8 * SUB, Intent.READ))[:1]
        assert (extent.offset, extent.length) == (place, 8 * SUB)
    assert _entry(path) == (COPIED | place, 0xFF)
    check(path)


@pytest.mark.parametrize("unmap", [False, True])
def test_whole_clusters_are_freed_if_that_is_allowed(unmap: bool, tmp_path: Path) -> None:
    path = _create(tmp_path, backed=True)
    with open_stack(_opened(path)) as disk:
        disk.write(3 * SUB, b"x" * 8 * SUB)
        disk.zero(20 * SUB, SUB)
        place = next(iter(disk.root.resolve(3 * SUB, 1, Intent.WRITE))).offset - 3 * SUB
        disk.zero(0, CLUSTER, Flag.MAY_UNMAP if unmap else Flag.NONE)
        assert disk.read(0, CLUSTER) == bytes(CLUSTER)
    assert _entry(path) == (0 if unmap else COPIED | place, 0xFFFFFFFF << 32)
    check(path)
    assert content(path) == bytes(CLUSTER) + b"\1" * (MIB - CLUSTER)


def test_trimming_frees_whole_clusters_and_gives_back_the_storage_of_parts(tmp_path: Path) -> None:
    path = _create(tmp_path)
    file, layer = open_recorded(path.read_bytes())
    with open_stack(layer) as disk:
        disk.write(0, b"x" * 3 * CLUSTER)
        disk.trim(CLUSTER - 2 * SUB, CLUSTER + 3 * SUB)
        discards = [operation for operation in file.log if operation.name == "discard"]
        assert [operation.length for operation in discards] == [2 * SUB, SUB], "where they are"
        disk.flush()
        assert [operation.length for operation in file.log if operation.name == "discard"] == [2 * SUB, SUB, CLUSTER]
        assert disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
        assert disk.read(2 * CLUSTER + SUB, SUB) == b"x" * SUB
    assert not own_check(file.data).errors and not own_check(file.data).leaks


def test_fast_zeroing_of_subclusters(tmp_path: Path) -> None:
    path = _create(tmp_path, backed=True)
    with open_stack(_opened(path)) as disk:
        disk.zero(5 * SUB, 3 * SUB, Flag.NO_FALLBACK)
        assert disk.read(4 * SUB, 5 * SUB) == b"\1" * SUB + bytes(3 * SUB) + b"\1" * SUB
        with pytest.raises(RequestError):
            disk.zero(10 * SUB + 1, 1, Flag.NO_FALLBACK)


def test_the_last_cluster_of_the_disk_is_whole_as_far_as_it_goes(tmp_path: Path) -> None:
    size = MIB + 3 * SUB + 512
    path = _create(tmp_path, size, backed=True)
    with open_stack(_opened(path)) as disk:
        disk.write(size - 600, b"x" * 600)
        assert disk.read(MIB, 3 * SUB + 512) == b"\1" * (3 * SUB - 88) + b"x" * 600
        disk.zero(MIB, 3 * SUB + 512, Flag.MAY_UNMAP)
        assert disk.read(MIB, 3 * SUB + 512) == bytes(3 * SUB + 512)
    check(path)
    assert _entry(path, 16) == (0, 0xFFFFFFFF << 32)


# -- extents --------------------------------------------------------------------------------------------------------


def test_intents_by_subcluster(tmp_path: Path) -> None:
    path = _create(tmp_path, backed=True)
    qemu_io(path, f"write -P 3 {4 * SUB} {4 * SUB}", f"write -z {6 * SUB} {SUB}")
    layer = _opened(path)
    with open_stack(layer):

        def kinds(offset: int, length: int, intent: Intent) -> list[tuple[int, object, bool]]:
            runs: list[tuple[int, object, bool]] = []
            for extent in layer.resolve(offset, length, intent):
                runs.append((min(extent.length, length), extent.target, extent.writable))
                length -= extent.length
                if length <= 0:
                    break
            return runs

        file, backing = layer.file, layer.backing
        assert kinds(0, 9 * SUB, Intent.READ) == [
            (4 * SUB, backing, False), (2 * SUB, file, True), (SUB, ZERO, False), (SUB, file, True),
            (SUB, backing, False),
        ]  # fmt: skip
        assert kinds(0, 9 * SUB, Intent.WRITE) == [
            (4 * SUB, CODE, False), (2 * SUB, file, True), (SUB, CODE, False), (SUB, file, True), (SUB, CODE, False),
        ]  # fmt: skip
        # Zeroing: parts of subclusters in place, whole ones by their bits.
        assert kinds(4 * SUB + 1, 2 * SUB - 1, Intent.ZERO) == [(SUB - 1, file, True), (SUB, CODE, False)]


def test_status_by_subcluster(tmp_path: Path) -> None:
    path = _create(tmp_path)
    qemu_io(path, f"write -P 3 {4 * SUB} {4 * SUB}", f"write -z {6 * SUB} {SUB}")
    with open_stack(_opened(path), read_only=True) as disk:
        assert disk.status(0, 9 * SUB) == [(4 * SUB, 3), (2 * SUB, 0), (SUB, 3), (SUB, 0), (SUB, 3)]
        assert disk.status(0, 9 * SUB, "qemu:allocation-depth") == [(4 * SUB, 0), (4 * SUB, 1), (SUB, 0)]


def test_clusters_alike_are_one_run_however_many(tmp_path: Path) -> None:
    path = _create(tmp_path, 8 * MIB)
    qemu_io(path, "write -P 1 0 4M", "write -z 4M 2M")
    layer = _opened(path)
    with open_stack(layer, read_only=True):
        runs: list[Run] = list(layer.reader.mapping.runs(0, 8 * MIB, ahead=False))
    assert [(run.kind, run.end - run.start) for run in runs] == [
        (Kind.NORMAL, 4 * MIB), (Kind.ZERO, 2 * MIB), (Kind.UNALLOCATED, 2 * MIB),
    ]  # fmt: skip


# -- what no image contains -----------------------------------------------------------------------------------------


BAD = {
    "both allocated and zero": (None, _bits(3, 35), "no subcluster both allocated and zero"),
    "allocated nowhere": (0, _bits(3), "no allocated subcluster without a host cluster"),
    "compressed, with a bitmap": (1 << 62 | 0x50000, 1, "no subcluster bitmap on a compressed cluster"),
    "zero flag of ordinary entries": (COPIED | 0x50000 | 1, 0, "reserved bits clear"),
}


@pytest.mark.parametrize(("entry", "bitmap", "words"), BAD.values(), ids=BAD)
def test_bad_entries(entry: int | None, bitmap: int, words: str, tmp_path: Path) -> None:
    path = _create(tmp_path)
    qemu_io(path, "write -P 1 0 128k")
    data = bytearray(path.read_bytes())
    image = Image(data)
    table = image.numbers(image.l1_offset, 1)[0] & 0x00FFFFFFFFFFFE00
    struct.pack_into(">QQ", data, table, _entry(path)[0] if entry is None else entry, bitmap)
    path.write_bytes(data)
    with open_stack(_opened(path)) as disk:
        for request in (
            lambda: disk.read(0, 1),
            lambda: disk.write(0, b"x"),
            lambda: disk.zero(0, SUB),
            lambda: disk.trim(0, CLUSTER),
        ):
            with pytest.raises(RequestError, match=f"L2 table 0, entry 0 .*{words}"):
                request()
        assert disk.read(CLUSTER, 1) == b"\1", "what lies beside it is served"
    data[79] |= 2  # corrupt
    assert path.read_bytes() == data


# -- crashes --------------------------------------------------------------------------------------------------------


def test_zero_bits_survive_the_copy_of_a_shared_table(tmp_path: Path) -> None:
    """The last one is where entries have COPIED."""
    path = _create(tmp_path, backed=True)
    qemu_io(path, "write -P 3 0 2k", "write -z 62k 2k", "write -z 64k 64k")
    run("qemu-img", "snapshot", "-c", "s", path)
    with open_stack(_opened(path)) as disk:
        disk.write(MIB // 2, b"x")
        disk.flush()
        assert read(path.read_bytes(), b"\1" * MIB)[62 * KIB : 128 * KIB] == bytes(66 * KIB)
    check(path)


@pytest.mark.parametrize("cluster", [16 * KIB, 64 * KIB])
def test_every_pattern_of_a_cluster_reads_as_qemu_reads_it(cluster: int, tmp_path: Path) -> None:
    """QEMU writes, zeroes and discards pieces at random."""
    pick, sub = random.Random(cluster), cluster // 32
    path = _create(tmp_path, backed=True, cluster_size=cluster)
    commands = []
    for _ in range(120):
        start = pick.randrange(MIB // sub) * sub
        length = min(pick.choice((1, 2, 5, 40)) * sub, MIB - start)
        commands.append(f"{pick.choice(('write -P 7', 'write -z', 'write -z -u', 'discard'))} {start} {length}")
    qemu_io(path, *commands)
    with open_stack(_opened(path), read_only=True) as disk:
        assert disk.read(0, MIB) == content(path)
