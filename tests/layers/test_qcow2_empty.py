"""Emptying an image: everything shows the backing file then, and a crash shows the one or the other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserver.format import Empties, MapEntry, Maps
from nbdserver.reference import open_stack
from tests.layers.qcow2_check import check, read
from tests.layers.qcow2_kit import SECTOR, crash_states, open_recorded
from tests.serving import SEED, amount, create, qemu_io, run

KIB = 1024
SIZE = 128 * KIB
CLUSTER = 1024


def _image(directory: Path, below: bytes, *, snapshot: bool, **options: object) -> bytes:
    """An overlay with data, zeroes, holes and, with ``compat`` 1.1 or not, compressed clusters."""
    backing = directory / "backing.raw"
    backing.write_bytes(below)
    path = create(
        directory / "image", SIZE, backing=backing, backing_format="raw", cluster_size=CLUSTER, **options
    )  # fmt: skip
    qemu_io(path, "write -P 1 0 20k", "write -z 24k 5k", "write -P 2 64k 33k")
    for cluster in range(100, 110):
        qemu_io(path, f"write -c -P 3 {cluster}k 1k")
    if snapshot:
        run("qemu-img", "snapshot", "-c", "before", path)
        qemu_io(path, "write -P 4 70k 3k")
    return path.read_bytes()


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_an_emptied_image_shows_its_backing_file(compat: str, snapshot: bool, at_once: bool, tmp_path: Path) -> None:
    pick = random.Random(SEED)
    below = pick.randbytes(SIZE - 3 * SECTOR)
    initial = _image(tmp_path, below, snapshot=snapshot, compat=compat)
    before, after = read(initial, below), below + bytes(3 * SECTOR)
    file, layer = open_recorded(initial, backing=False)
    with open_stack(layer):
        assert isinstance(layer, Empties) and isinstance(layer, Maps)
        if at_once:
            give_back = layer.empty_at_once()
            assert read(file.data, below) == after, "it is in the file"
            give_back()
        else:
            layer.make_empty()
        assert {entry._replace(length=0) for entry in layer.map(0, SIZE)} == {MapEntry(0)}
        layer.flush()
        assert read(file.data, below) == after
    assert not check(file.data).errors and not check(file.data).leaks
    discarded = sum(operation.length for operation in file.log if operation.name == "discard")
    assert discarded >= (3 if snapshot else 50) * KIB

    for position, state in crash_states(initial, file.log, pick, amount(60, 2000)):
        assert not check(state).errors, position
        shown = read(state, below)
        assert not at_once or shown in (before, after), position
        for at in range(0, SIZE, CLUSTER):
            there = shown[at : at + CLUSTER]
            assert there in (before[at : at + CLUSTER], after[at : at + CLUSTER]), (position, at)


def test_what_is_given_up_at_once_and_not_given_back_is_lost_and_no_more(tmp_path: Path) -> None:
    below = random.Random(SEED).randbytes(SIZE)
    file, layer = open_recorded(_image(tmp_path, below, snapshot=False), backing=False)
    with open_stack(layer) as disk:
        assert isinstance(layer, Empties)
        layer.empty_at_once()
        disk.write(0, b"new")
    assert not check(file.data).errors and check(file.data).leaks
    assert read(file.data, below) == b"new" + bytes(KIB - 3) + below[KIB:]


def test_an_emptied_image_can_be_written(tmp_path: Path) -> None:
    below = random.Random(SEED).randbytes(SIZE)
    file, layer = open_recorded(_image(tmp_path, below, snapshot=False), backing=False)
    with open_stack(layer) as disk:
        layer.make_empty()
        disk.write(3 * KIB, b"new")
    assert not check(file.data).errors and not check(file.data).leaks
    assert read(file.data, below) == below[: 3 * KIB] + b"new" + bytes(KIB - 3) + below[4 * KIB :]
