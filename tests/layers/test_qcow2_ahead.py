"""Allocating more than is written: what it may do, and where it must not."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.raw import Raw
from nbdserver.errors import RequestError
from nbdserver.extent import ZERO, Intent
from nbdserver.layer import Layer
from nbdserver.limits import KIB, MIB
from nbdserver.reference import Reference, open_stack
from tests.serving import SEED, create, run

CLUSTER = 64 * KIB


def allocated(disk: Reference, offset: int, length: int) -> int:
    """How much of a range has a place, from its start on."""
    extent = next(iter(disk.root.resolve(offset, length, Intent.READ)))
    return 0 if extent.target is ZERO else min(extent.length, length)


def test_a_write_allocates_around_itself_and_leaves_holes(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "64M")
    with open_stack(Qcow2(File(str(path)))) as disk:
        disk.write(5 * MIB, b"x")
        assert allocated(disk, 4 * MIB, 8 * MIB) == 4 * MIB
        assert allocated(disk, 3 * MIB, MIB) == 0
        assert disk.read(4 * MIB, 4 * MIB) == bytes(MIB) + b"x" + bytes(3 * MIB - 1)
    run("qemu-img", "check", path)
    assert path.stat().st_blocks * 512 < MIB


def test_writes_in_a_row_allocate_more_and_more(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "256M")
    with open_stack(Qcow2(File(str(path)))) as disk:
        for offset in range(0, 13 * MIB, MIB):
            disk.write(offset, b"x")
        assert allocated(disk, 12 * MIB, 64 * MIB) == 16 * MIB
        disk.write(100 * MIB, b"x")
        assert allocated(disk, 100 * MIB, 64 * MIB) == 4 * MIB
    run("qemu-img", "check", path)


@pytest.mark.parametrize("size", ["1M", "100k", "64M"])
def test_not_past_the_end_of_the_disk(tmp_path: Path, size: str) -> None:
    path = create(tmp_path / "disk.qcow2", size)
    with open_stack(Qcow2(File(str(path)))) as disk:
        disk.write(disk.size - 1, b"x")
        assert disk.read(disk.size - 1, 1) == b"x"
    run("qemu-img", "check", path)


def test_nothing_ahead_if_that_is_wished(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "64M")
    with open_stack(Qcow2(File(str(path)), allocation_ahead=0)) as disk:
        disk.write(5 * MIB, b"x")
        assert allocated(disk, 5 * MIB, 8 * MIB) == CLUSTER


@pytest.mark.parametrize("opened_with_it", [True, False])
def test_never_before_a_backing_file(tmp_path: Path, opened_with_it: bool) -> None:
    """Also where it is not used now, or is shorter: it shows where nothing is allocated."""
    base = create(tmp_path / "base.qcow2", "2M")
    path = create(tmp_path / "disk.qcow2", "64M", backing=base)
    backing: Layer | bool | None = None if opened_with_it else False
    with open_stack(Qcow2(File(str(path)), backing)) as disk:  # type: ignore[arg-type]
        disk.write(5 * MIB, b"x")
        assert allocated(disk, 5 * MIB, 8 * MIB) == CLUSTER


def test_never_in_clusters_that_have_been_used(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "64M")
    with open_stack(Qcow2(File(str(path)), pass_discard_request=False)) as disk:
        disk.write(0, b"secret" * MIB)
        disk.trim(0, 8 * MIB)
        disk.flush()
        disk.write(32 * MIB, b"x")
        assert disk.read(32 * MIB, 8 * MIB) == b"x" + bytes(8 * MIB - 1)
        disk.write(48 * MIB + 5, b"x")
        assert disk.read(48 * MIB, 8 * MIB) == bytes(5) + b"x" + bytes(8 * MIB - 6)
    run("qemu-img", "check", path)


def test_a_file_that_was_longer_than_its_image_shows_nothing_of_it(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "64M")
    with path.open("ab") as file:
        file.write(b"secret" * 2 * MIB)
    with open_stack(Qcow2(File(str(path)))) as disk:
        disk.write(MIB, b"x")
        assert disk.read(0, 64 * MIB) == bytes(MIB) + b"x" + bytes(63 * MIB - 1)


def test_where_there_is_no_room_ahead_there_may_be_for_what_is_written(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "64M")
    with path.open("r+b") as file:
        file.truncate(3 * MIB)
    with open_stack(Qcow2(Raw(File(str(path)), size=3 * MIB))) as disk:
        disk.write(0, b"x" * MIB)
        with pytest.raises(RequestError) as caught:
            disk.write(16 * MIB, b"x" * 4 * MIB)
        assert caught.value.errno == errno.ENOSPC
        assert disk.read(0, 2 * MIB) == b"x" * MIB + bytes(MIB)
    run("qemu-img", "check", path)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_random_writes_equal_a_model(tmp_path: Path, cluster_size: int) -> None:
    path = create(tmp_path / "disk.qcow2", 32 * MIB, cluster_size=cluster_size)
    pick, model = random.Random(SEED), bytearray(32 * MIB)
    for _ in range(3):
        with open_stack(Qcow2(File(str(path)), allocation_ahead=256 * KIB, pass_discard_request=False)) as disk:
            for _ in range(60):
                offset = pick.randrange(32 * MIB - 200 * KIB)
                length = pick.choice((1, 511, 4096, 70_000, 200_000))
                if pick.random() < 0.3:
                    disk.trim(offset, length)
                    first, stop = -(-offset // cluster_size), (offset + length) // cluster_size
                    if first < stop:
                        model[first * cluster_size : stop * cluster_size] = bytes((stop - first) * cluster_size)

                else:
                    piece = pick.randbytes(length)
                    disk.write(offset, piece)
                    model[offset : offset + length] = piece
            assert disk.read(0, 32 * MIB) == model
        run("qemu-img", "check", path)
