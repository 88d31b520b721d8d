"""Making room: clusters allocated as the zeroes that they are, so that whoever writes needs no code to."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.extent import CODE, Intent
from nbdserver.limits import KIB, MIB
from nbdserver.reference import open_stack
from tests.layers.qcow2_kit import Thread
from tests.serving import create, run

CLUSTER = 64 * KIB


def test_what_has_room_reads_as_before_and_may_be_written(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 64 * MIB)
    layer = Qcow2(File(str(path)))
    with open_stack(layer) as disk:
        assert layer.make_room(5 * MIB + 1, 1) == (4 * MIB, 4 * MIB)
        assert next(iter(layer.resolve(4 * MIB, 4 * MIB, Intent.WRITE))).writable
        assert disk.read(4 * MIB, 4 * MIB) == bytes(4 * MIB)
        assert layer.make_room(5 * MIB + 1, 1) is None
    run("qemu-img", "check", path)


def test_it_ends_where_something_is(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 64 * MIB)
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 1 5M {CLUSTER}", path)
    layer = Qcow2(File(str(path)))
    with open_stack(layer) as disk:
        disk.zero(5 * MIB, CLUSTER)  # which keeps its place, but not to be written without code
        assert layer.make_room(4 * MIB, 1) == (4 * MIB, MIB)
        assert layer.make_room(7 * MIB, 1) == (5 * MIB + CLUSTER, 4 * MIB - CLUSTER)
        assert layer.make_room(5 * MIB, 1) is None
        assert next(iter(layer.resolve(5 * MIB, CLUSTER, Intent.WRITE))).target is CODE
    run("qemu-img", "check", path)


def test_not_where_a_request_is_in_several_tables(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 64 * MIB, cluster_size=4096)  # a table maps 2 MiB
    layer = Qcow2(File(str(path)))
    with open_stack(layer):
        assert layer.make_room(2 * MIB - 4096, 8192) is None
        assert layer.make_room(2 * MIB - 4096, 4096) == (0, 2 * MIB)
    run("qemu-img", "check", path)


@pytest.mark.parametrize("busy", [5 * MIB, 6 * MIB])
def test_it_waits_for_who_holds_these_clusters_and_for_nobody_else(tmp_path: Path, busy: int) -> None:
    path = create(tmp_path / "disk.qcow2", 64 * MIB)
    layer = Qcow2(File(str(path)))
    with open_stack(layer):
        held = layer._clusters.exclusive(busy, CLUSTER)
        held.__enter__()
        made: list[tuple[int, int] | None] = []
        thread = Thread(lambda: made.append(layer.make_room(5 * MIB, 512)))
        assert thread.waits() == (busy == 5 * MIB)
        held.__exit__(None, None, None)
        thread.done()
        assert made == [None], "there is none yet; the write itself makes it"
    run("qemu-img", "check", path)


def test_two_who_want_the_same_room_have_it_made_once(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 64 * MIB)
    layer = Qcow2(File(str(path)))
    with open_stack(layer):
        seen: list[tuple[int, int]] = []
        inside, go = threading.Event(), threading.Event()

        def changed(offset: int, length: int) -> None:
            seen.append((offset, length))
            inside.set()
            assert go.wait(10)

        layer.writer._changed = changed
        made: list[tuple[int, int] | None] = []
        first = Thread(lambda: made.append(layer.make_room(5 * MIB, 512)))
        assert inside.wait(10)
        second = Thread(lambda: made.append(layer.make_room(6 * MIB, 512)))
        assert second.waits()
        go.set()
        first.done()
        second.done()
        assert made == [(4 * MIB, 4 * MIB), (6 * MIB, CLUSTER)]
        assert seen == [(4 * MIB, 4 * MIB)]
    run("qemu-img", "check", path)


def test_more_at_once_the_more_there_is(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "8G")
    layer = Qcow2(File(str(path)))
    with open_stack(layer):
        lengths = []
        for offset in range(0, 8 << 30, 32 * MIB):  # never one after the other
            room = layer.make_room(offset + 17 * MIB, 512)
            assert room is not None and room[0] <= offset + 17 * MIB < room[0] + room[1]
            lengths.append(room[1])
    assert lengths[0] == 4 * MIB and max(lengths) == 16 * MIB
    for index, length in enumerate(lengths):
        assert length <= max(4 * MIB, sum(lengths[:index]) // 64)
    run("qemu-img", "check", path)


def test_a_file_grows_in_large_steps_and_is_as_long_as_it_must_be_in_the_end(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 256 * MIB)
    with open_stack(Qcow2(File(str(path)), allocation_ahead=0)) as disk:
        sizes = set()
        for offset in range(0, 40 * MIB, CLUSTER):
            disk.write(offset, b"x")
            sizes.add(path.stat().st_size)
        assert len(sizes) < 5
    assert path.stat().st_size < 41 * MIB
    run("qemu-img", "check", path)


@pytest.mark.parametrize("raw", [False, True])
def test_zeroes_of_a_backing_file_are_not_copied(tmp_path: Path, raw: bool) -> None:
    base = tmp_path / "base"
    if raw:
        with base.open("wb") as file:
            file.truncate(2 * MIB)
            file.seek(MIB)
            file.write(b"d" * CLUSTER)
    else:
        create(base, 2 * MIB)
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 100 1M {CLUSTER}", base)
    image = create(tmp_path / "disk.qcow2", 2 * MIB, backing=base, backing_format="raw" if raw else "qcow2")
    with open_stack(Qcow2(File(str(image)))) as disk:
        disk.write(512 * KIB, bytes(CLUSTER))  # which makes an L2 table
        before = image.stat().st_blocks
        disk.write(512 * KIB + CLUSTER + 8192, b"x" * 4096)
        assert (image.stat().st_blocks - before) * 512 <= 8192
        disk.write(MIB + 8192, b"y" * 4096)
        disk.write(MIB - 4096 + CLUSTER, b"z" * 8192)  # and where it is both
        wanted = bytearray(2 * MIB)
        wanted[MIB : MIB + CLUSTER] = b"d" * CLUSTER
        for offset, data in (
            (512 * KIB + CLUSTER + 8192, b"x" * 4096),
            (MIB + 8192, b"y" * 4096),
            (MIB - 4096 + CLUSTER, b"z" * 8192),
        ):
            wanted[offset : offset + len(data)] = data
        assert disk.read(0, 2 * MIB) == wanted
    run("qemu-img", "check", image)
