"""Marks: dirty while refcounts lag behind, corrupt when metadata turns out to be wrong."""

from __future__ import annotations

import errno
import logging
import random
import struct
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.errors import ImageError, RequestError
from nbdserver.reference import Reference, open_stack
from tests.layers import qcow2_check
from tests.layers.qcow2_broken import PLACE, Anatomy
from tests.layers.qcow2_kit import Drive, crash_states, open_recorded
from tests.serving import SEED, amount, check, content, create, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 4096
DIRTY, CORRUPT = 1, 2


def marks(data: bytes | bytearray) -> int:
    return int(struct.unpack_from(">Q", data, 72)[0])


@pytest.fixture
def lazy(tmp_path: Path) -> Path:
    """An image that asks for lazy refcounts."""
    path = create(tmp_path / "image", MIB, cluster_size=CLUSTER, lazy_refcounts="on")
    qemu_io(path, "write -P 1 0 64k")
    return path


def block_place(data: bytes | bytearray) -> int:
    anatomy = Anatomy(data)
    return anatomy.word(anatomy.kinds["refcount table"][0])


# -- dirty -------------------------------------------------------------------------------------------------------------


def test_refcounts_lag_behind_a_mark(lazy: Path) -> None:
    file, layer = open_recorded(lazy.read_bytes())
    before, block = file.data[:], block_place(file.data)
    with open_stack(layer) as disk:
        disk.write(0, b"x")
        disk.flush()
        assert marks(file.data) == 0 and not layer.dirty_flag, "nothing was allocated"
        disk.write(MIB // 2, b"x" * CLUSTER)
        assert marks(file.data) == 0, "nothing is in the file yet"
        file.log.clear()
        disk.flush()
        assert layer.dirty_flag
        assert [(operation.name, operation.offset) for operation in file.log[:2]] == [("write", 72), ("sync", 0)]
        assert file.data[block : block + CLUSTER] == before[block : block + CLUSTER]
        disk.write(MIB // 2 + CLUSTER, b"x" * CLUSTER)
        file.log.clear()
        disk.flush()
        assert all(operation.offset != 72 for operation in file.log), "marked once"
    assert marks(file.data) == 0
    assert file.data[block : block + CLUSTER] != before[block : block + CLUSTER]
    report = qcow2_check.check(file.data)
    assert not report.errors and not report.leaks


def test_the_mark_goes_last(lazy: Path) -> None:
    file, layer = open_recorded(lazy.read_bytes())
    with open_stack(layer) as disk:
        disk.write(MIB // 2, b"x" * CLUSTER)
        disk.flush()
    (cleared,) = (at for at, operation in enumerate(file.log) if operation.offset == 72 and not operation.data[7])
    assert [operation.name for operation in file.log[cleared - 2 :]] == ["sync", "resize", "write", "sync"]


def test_laziness_is_a_choice(lazy: Path, tmp_path: Path) -> None:
    eager = create(tmp_path / "eager", MIB, cluster_size=CLUSTER)
    old = create(tmp_path / "old", MIB, cluster_size=CLUSTER, compat="0.10")
    for path, choice, is_marked in (
        (lazy, None, True), (lazy, False, False), (eager, None, False), (eager, True, True), (old, True, False),
    ):  # fmt: skip
        file, layer = open_recorded(path.read_bytes(), lazy_refcounts=choice)
        with open_stack(layer) as disk:
            disk.write(MIB // 2, b"x" * CLUSTER)
            disk.flush()
            assert marks(file.data) == int(is_marked) or path is old, (path, choice)
        assert not qcow2_check.check(file.data).errors


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("cluster", [512, CLUSTER])
def test_a_crash_of_a_lazy_image_is_mended_when_it_is_opened(cluster: int, snapshot: bool, tmp_path: Path) -> None:
    pick = random.Random(f"{SEED} {cluster} {snapshot}")
    path = create(tmp_path / "image", 128 * KIB, cluster_size=cluster, lazy_refcounts="on")
    qemu_io(path, "write -P 1 0 40k", "write -P 2 64k 33k")
    if snapshot:
        run("qemu-img", "snapshot", "-c", "s", path)
    initial = path.read_bytes()
    file, layer = open_recorded(initial)
    with open_stack(layer) as disk:
        drive = Drive(file, disk, qcow2_check.read(initial), pick, cluster)
        for _ in range(60):
            drive.step()
    assert marks(file.data) == 0 and not qcow2_check.check(file.data).errors
    dirty = 0
    for position, state in crash_states(initial, file.log, pick, amount(60, 1000)):
        if not marks(state):
            assert not qcow2_check.check(state).errors
        dirty += marks(state) == DIRTY
        wrong = drive.history.wrong(position, qcow2_check.read(state))
        assert not wrong, (position, wrong)
        again, layer = open_recorded(state)
        with open_stack(layer) as disk:
            disk.write(0, disk.read(0, 512))
            assert not drive.history.wrong(position, disk.read(0, disk.size))
        report = qcow2_check.check(again.data)
        assert not report.errors, (position, report.errors[:5])
        assert marks(again.data) == 0
    assert dirty


def test_snapshots_of_a_lazy_image_survive_a_crash(tmp_path: Path) -> None:
    pick = random.Random(f"{SEED} snapshots")
    initial = create(tmp_path / "image", 64 * KIB, cluster_size=1024, lazy_refcounts="on").read_bytes()
    file, layer = open_recorded(initial)
    contents: dict[str, bytes] = {}
    with open_stack(layer) as disk:
        drive = Drive(file, disk, bytes(64 * KIB), pick, 1024)
        for turn in range(60):
            drive.step(longest=4)
            if turn % 10 == 5:
                contents[f"s{turn}"] = bytes(drive.model)
                began = file.mark("snapshot begins")
                layer.create_snapshot(f"s{turn}")
                drive.history.flushed(began, file.mark("snapshot ended"))
            if turn % 20 == 17:
                layer.delete_snapshot(f"s{turn - 12}")
    assert marks(file.data) == 0 and not qcow2_check.check(file.data).errors
    dirty, seen = 0, set()
    for position, state in crash_states(initial, file.log, pick, amount(60, 1000)):
        dirty += marks(state) == DIRTY
        again, layer = open_recorded(state)
        with open_stack(layer) as disk:
            disk.write(0, disk.read(0, 512))
            assert not drive.history.wrong(position, disk.read(0, disk.size)), position
            names = [snapshot.name for snapshot in layer.snapshots()]
        assert not qcow2_check.check(again.data).errors, position
        for name in names:
            with open_stack(open_recorded(again.data, snapshot=name)[1], read_only=True) as shown:
                assert shown.read(0, shown.size) == contents[name], (position, name)
            seen.add(name)
    assert dirty and len(seen) >= 3


def test_qemu_mends_what_a_crash_of_ours_left(lazy: Path) -> None:
    file, layer = open_recorded(lazy.read_bytes())
    with open_stack(layer) as disk:
        disk.write(MIB // 2, b"x" * CLUSTER)
        disk.flush()
        crashed = file.data[:]
    lazy.write_bytes(crashed)
    qemu_io(lazy, "write -P 3 700k 4k")
    check(lazy)
    assert content(lazy)[MIB // 2 : MIB // 2 + CLUSTER] == b"x" * CLUSTER


def test_we_mend_what_a_crash_of_qemu_left(lazy: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 512k 64k", "-c", "flush", "-c", "abort", lazy, status=-6)
    assert marks(lazy.read_bytes()) == DIRTY
    before = lazy.read_bytes()
    with open_stack(Qcow2(File(str(lazy))), read_only=True) as disk:
        assert disk.read(MIB // 2, 64 * KIB) == b"\5" * 64 * KIB
        assert isinstance(disk.root, Qcow2) and disk.root.dirty_flag
    assert lazy.read_bytes() == before
    with caplog.at_level(logging.WARNING), open_stack(Qcow2(File(str(lazy)))) as disk:
        assert disk.read(MIB // 2, 64 * KIB) == b"\5" * 64 * KIB
        assert isinstance(disk.root, Qcow2) and not disk.root.dirty_flag
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{lazy}: was not closed properly; its refcounts are counted anew", f"{lazy}: is repaired"
    ]  # fmt: skip
    check(lazy)


def test_a_dirty_image_that_cannot_be_mended_is_not_written(lazy: Path) -> None:
    data = bytearray(lazy.read_bytes())
    struct.pack_into(">Q", data, 72, DIRTY)
    entry = Anatomy(data).kinds["L2"][0]
    struct.pack_into(">Q", data, entry, Anatomy(data).word(entry) | 1 << 60)
    lazy.write_bytes(data)
    words = r"was not closed properly, and cannot be repaired: L2 table .*reserved bits"
    with pytest.raises(ImageError, match=words), open_stack(Qcow2(File(str(lazy)))):
        pass
    assert marks(lazy.read_bytes()) == DIRTY
    with open_stack(Qcow2(File(str(lazy))), read_only=True) as disk:
        assert disk.read(CLUSTER, 1) == b"\1"


def test_a_mark_that_cannot_be_made_durable_fails_the_flush(lazy: Path) -> None:
    file, layer = open_recorded(lazy.read_bytes())

    def fail(operation: object) -> None:
        if getattr(operation, "name", "") == "sync":
            raise OSError(errno.EIO, "sync")

    with pytest.raises(OSError), open_stack(layer) as disk:
        disk.write(MIB // 2, b"x" * CLUSTER)
        file.before = fail
        with pytest.raises(RequestError):
            disk.flush()
        file.before = lambda operation: None
        with pytest.raises(RequestError):
            disk.flush()
        file.before = fail


# -- corrupt -----------------------------------------------------------------------------------------------------------


def test_an_image_that_turns_out_to_be_corrupt_is_condemned_once(lazy: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(lazy.read_bytes())
    entry = Anatomy(data).kinds["L2"][0]
    place = Anatomy(data).kinds["L1"][0] & PLACE
    struct.pack_into(">Q", data, entry, 1 << 63 | place)
    file, layer = open_recorded(data)
    with caplog.at_level(logging.ERROR), open_stack(layer) as disk:
        disk.write(8 * CLUSTER, b"in place")
        for _ in range(2):
            with pytest.raises(RequestError, match="does not hold metadata") as caught:
                disk.write(0, b"x" * CLUSTER)
            assert caught.value.errno == errno.EIO
        size = len(file.data)
        for request in (
            lambda: disk.write(8 * CLUSTER, b"in place"),
            lambda: disk.write(MIB // 2, b"new"),
            lambda: disk.zero(8 * CLUSTER, CLUSTER),
            lambda: disk.trim(8 * CLUSTER, CLUSTER),
            disk.flush,
        ):
            with pytest.raises(RequestError, match=r"corrupt and takes no more writes.*L2 table 0, entry 0") as caught:
                request()
            assert caught.value.errno == errno.EIO
        assert disk.read(8 * CLUSTER, 8) == b"in place"
    (record,) = caplog.records
    assert "L2 table 0, entry 0" in record.getMessage() and "marked as corrupt" in record.getMessage()
    assert marks(file.data) == CORRUPT and len(file.data) == size
    with pytest.raises(ImageError, match="marked as corrupt"), open_stack(open_recorded(file.data)[1]):
        pass


def test_what_is_wrong_below_condemns_nobody_above(tmp_path: Path) -> None:
    base = create(tmp_path / "base", MIB, cluster_size=CLUSTER)
    qemu_io(base, "write -P 1 0 64k")
    data = bytearray(base.read_bytes())
    struct.pack_into(">Q", data, Anatomy(data).kinds["L2"][0], 1 << 63 | 0x5200)
    base.write_bytes(data)
    path = create(tmp_path / "image", MIB, backing=base, cluster_size=CLUSTER)
    with open_stack(Qcow2(File(str(path)))) as disk:
        for request in (lambda: disk.read(0, 1), lambda: disk.write(0, b"x")):
            with pytest.raises(RequestError, match="base: L2 table"):
                request()
        disk.write(CLUSTER, b"x")
        disk.flush()
    assert marks(path.read_bytes()) == 0 and base.read_bytes() == data


def test_a_mark_that_cannot_be_written_is_told(lazy: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(lazy.read_bytes())
    struct.pack_into(">Q", data, Anatomy(data).kinds["L2"][0], 1 << 63 | 0x5200)
    file, layer = open_recorded(data)

    def fail(operation: object) -> None:
        if getattr(operation, "name", "") == "write":
            raise OSError(errno.EIO, "write")

    with caplog.at_level(logging.ERROR), open_stack(layer) as disk:
        file.before = fail
        with pytest.raises(RequestError, match="aligned"):
            disk.read(0, 1)
        with pytest.raises(RequestError, match="takes no more writes"):
            disk.flush()
    assert [("marked" in r.getMessage(), "cannot be marked" in r.getMessage()) for r in caplog.records] == [
        (True, False), (True, True)
    ]  # fmt: skip


def test_a_condemned_image_of_version_2_has_no_mark(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=CLUSTER, compat="0.10")
    qemu_io(path, "write -P 1 0 64k")
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, Anatomy(data).kinds["L2"][0], 1 << 63 | 0x5200)
    file, layer = open_recorded(data)
    with open_stack(layer) as disk:
        _is_condemned(disk)
    assert file.data[: len(data)] == data


def _is_condemned(disk: Reference) -> None:
    with pytest.raises(RequestError, match="aligned"):
        disk.read(0, 1)
    with pytest.raises(RequestError, match="takes no more writes"):
        disk.write(8 * CLUSTER, b"x")
