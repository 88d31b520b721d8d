"""The layer ``copy-before-write``, in plain Python: what is copied when, what guest and snapshot see, what fails."""

from __future__ import annotations

import dataclasses
import errno
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from layers.copy_before_write import COPY_MAX, CopyBeforeWrite
from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.raw import Raw
from layers.snapshot_access import SnapshotAccess
from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import CODE, Extent, Intent, Meter, Transform
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Graph, execute
from nbdserver.layer import STATE_HOLE, STATE_ZERO, Layer
from nbdserver.reference import open_stack
from nbdserver.request import Flag, Operation, Request, Vector
from tests.coherence.pages import Background
from tests.layers.snapshot_kit import CLUSTER, SIZE, Coded, opened, pattern
from tests.registered import Spy, registered
from tests.serving import SEED, create, run


@pytest.fixture
def disk(tmp_path: Path) -> File:
    """A disk of SIZE bytes, the last cluster but one a hole."""
    path = tmp_path / "live.raw"
    with path.open("wb") as file:
        file.write(pattern(4 * CLUSTER))
        file.seek(5 * CLUSTER)
        file.write(pattern(SIZE - 5 * CLUSTER))
    return File(str(path))


BEFORE = pattern(4 * CLUSTER) + bytes(CLUSTER) + pattern(SIZE - 5 * CLUSTER)


# -- what both see ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, CLUSTER), (1, 1), (CLUSTER - 1, 2), (100, 3 * CLUSTER), (4 * CLUSTER + 5, 10), (SIZE - 1, 1), (0, SIZE)],
)
@pytest.mark.parametrize("operation", ["write", "zero", "trim"])
def test_the_guest_sees_its_changes_and_the_snapshot_does_not(
    disk: File, operation: str, offset: int, length: int
) -> None:
    with opened(disk) as ends:
        if operation == "write":
            ends.live.write(offset, b"n" * length)
        else:
            getattr(ends.live, operation)(offset, length)
        changed = b"n" * length if operation == "write" else bytes(length)
        assert ends.live.read(0, SIZE) == BEFORE[:offset] + changed + BEFORE[offset + length :]
        assert ends.snap.read(0, SIZE) == BEFORE


@pytest.mark.parametrize("target", ["memory", "raw", "qcow2", "qcow2-2M"])
@pytest.mark.parametrize("file", ["raw", "qcow2", "qcow2-512"])
@pytest.mark.parametrize("cluster", [0, 4 * CLUSTER])
def test_random_changes(tmp_path: Path, disk: File, target: str, file: str, cluster: int) -> None:
    live: Layer = disk
    if file != "raw":
        options: dict[str, Any] = {"cluster_size": 512} if file == "qcow2-512" else {}
        base = tmp_path / "base.qcow2"
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", disk.path, base)
        live = Qcow2(File(str(create(tmp_path / "live.qcow2", SIZE, backing=base, **options))))
    pick = random.Random(SEED)
    with opened(live, _target(tmp_path, target), min_cluster_size=cluster) as ends:
        size = ends.live.size  # qcow2 counts in sectors
        now = bytearray(ends.live.read(0, size))
        before = bytes(now)
        for _ in range(60):
            offset = pick.randrange(size)
            length = min(int(3 * CLUSTER ** pick.random()), size - offset)
            data = pick.randbytes(length)
            match pick.choice(("write", "write", "zero", "read")):
                case "write":
                    ends.live.write(offset, data)
                    now[offset : offset + length] = data
                case "zero":
                    ends.live.zero(offset, length, pick.choice((Flag.NONE, Flag.MAY_UNMAP)))
                    now[offset : offset + length] = bytes(length)
                case _:
                    assert ends.snap.read(offset, length) == before[offset : offset + length]
        assert ends.live.read(0, size) == now
        assert ends.snap.read(0, size) == before


def _target(directory: Path, kind: str) -> Layer:
    """Where old data goes; what is there already is somebody else's."""
    if kind == "memory":
        return Memory(SIZE + 1000)
    if kind == "raw":
        path = directory / "target.raw"
        path.write_bytes(b"g" * (SIZE + 777))
        return Raw(File(str(path)))
    options: dict[str, Any] = {"cluster_size": "2M"} if kind == "qcow2-2M" else {}
    return Qcow2(File(str(create(directory / "target.qcow2", SIZE + 512, **options))))


def test_two_points_in_time(disk: File) -> None:
    first = CopyBeforeWrite(disk, Memory(SIZE))
    second = CopyBeforeWrite(first, Memory(SIZE))
    graph, files = Graph(), Files()
    with open_stack(SnapshotAccess(first), graph=graph, files=files) as oldest:
        with open_stack(first, graph=graph, files=files) as live:
            live.write(5, b"1st")
        with (
            open_stack(second, graph=graph, files=files) as later,
            open_stack(SnapshotAccess(second), graph=graph, files=files) as older,
            open_stack(SnapshotAccess(second), graph=graph, files=files) as twin,
        ):
            later.write(7, b"2nd")
            later.zero(CLUSTER, CLUSTER)
            assert oldest.read(0, SIZE) == BEFORE
            assert older.read(0, SIZE) == twin.read(0, SIZE) == BEFORE[:5] + b"1st" + BEFORE[8:]
            assert later.read(0, 12) == BEFORE[:5] + b"1s2nd" + BEFORE[10:12]


def test_the_snapshot_is_read_only(disk: File) -> None:
    with opened(disk) as ends:
        assert ends.snap.root.read_only
        for request in (Request.write(0, Vector.of(1)), Request.zero(0, 1), Request.trim(0, 1)):
            with pytest.raises(RequestError) as caught:
                ends.snap.execute(request)
            assert caught.value.errno == errno.EPERM
        ends.snap.flush()


def test_a_disk_that_nobody_may_write_needs_no_target(tmp_path: Path, disk: File) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(SIZE))
    with open_stack(SnapshotAccess(CopyBeforeWrite(disk, File(str(target)))), read_only=True) as snap:
        assert snap.read(0, SIZE) == BEFORE


def test_status_of_the_snapshot_is_what_it_was(disk: File) -> None:
    hole = STATE_HOLE | STATE_ZERO
    was = [(4 * CLUSTER, 0), (CLUSTER, hole), (SIZE - 5 * CLUSTER, 0)]
    with opened(disk) as ends:
        assert ends.snap.status(0, SIZE) == was
        ends.live.write(4 * CLUSTER, b"data where there was none")
        ends.live.zero(0, 2 * CLUSTER, Flag.MAY_UNMAP)
        ends.live.trim(3 * CLUSTER, CLUSTER)
        assert ends.snap.status(0, SIZE) == was
        assert ends.snap.status(4 * CLUSTER - 1, 2) == [(1, 0), (1, hole)]
        assert ends.live.status(0, 2 * CLUSTER) == [(2 * CLUSTER, hole)]


# -- what is copied, and when ----------------------------------------------------------------------------------------


def test_a_cluster_is_copied_once_and_whole(disk: File) -> None:
    target = Spy(Memory(SIZE))
    with opened(disk, target) as ends:
        for _ in range(2):
            ends.live.write(CLUSTER + 1, b"x")
            ends.live.write(SIZE - 1, b"x")
    assert [(seen.offset, seen.length) for seen in target.seen] == [
        (CLUSTER, CLUSTER),
        (5 * CLUSTER, SIZE - 5 * CLUSTER),
    ]


def test_neighbours_are_copied_in_one_piece_but_for_those_that_are(disk: File) -> None:
    target = Spy(Memory(SIZE))
    with opened(disk, target) as ends:
        ends.live.write(CLUSTER, b"x")
        ends.live.trim(1, 4 * CLUSTER - 2)
    assert [(seen.offset // CLUSTER, seen.length // CLUSTER) for seen in target.seen] == [(1, 1), (0, 1), (2, 2)]


def test_much_is_copied_in_pieces_of_bounded_size() -> None:
    target = Spy(Memory(5 * COPY_MAX))
    with opened(Coded(Memory(5 * COPY_MAX)), target) as ends:
        ends.live.trim(7, 4 * COPY_MAX)
        assert {seen.length for seen in target.seen} == {COPY_MAX, CLUSTER}


def test_zeroes_are_not_copied_but_made(disk: File) -> None:
    target = Spy(Memory(SIZE))
    with opened(disk, target) as ends:
        ends.live.write(4 * CLUSTER, b"x")
        assert ends.snap.read(4 * CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert [seen.operation for seen in target.seen] == [Operation.ZERO, Operation.READ]
    assert Flag.MAY_UNMAP in target.seen[0].flags


def test_what_changes_nothing_copies_nothing(disk: File) -> None:
    target = Spy(Memory(SIZE))
    with opened(disk, target) as ends:
        ends.live.write(100, BEFORE[100:200], Flag.WRITE_UNCHANGED)
    assert not target.seen


def test_clusters_are_at_least_as_large_as_wished(disk: File) -> None:
    target = Spy(Memory(SIZE))
    with opened(disk, target, min_cluster_size=2 * CLUSTER) as ends:
        ends.live.write(3 * CLUSTER, b"x")
    assert [(seen.offset, seen.length) for seen in target.seen] == [(2 * CLUSTER, 2 * CLUSTER)]


def test_writing_in_place_is_for_copied_clusters_alone(disk: File) -> None:
    with opened(disk) as ends:
        assert [extent.writable for extent in ends.layer.resolve(0, SIZE, Intent.READ)] == [False]
        assert [extent.target for extent in ends.layer.resolve(0, SIZE, Intent.WRITE)] == [CODE]
        assert [extent.target for extent in ends.layer.resolve(0, SIZE, Intent.ZERO)] == [CODE]
        ends.live.write(CLUSTER, b"x")
        for intent in Intent:
            found = [
                (extent.length, extent.target is ends.layer.file, extent.offset, extent.writable)
                for extent in ends.layer.resolve(CLUSTER + 1, CLUSTER, intent)
            ][:1]
            assert found == [(CLUSTER - 1, True, CLUSTER + 1, True)]


def test_flushing_makes_the_disk_durable_and_the_target_not() -> None:
    file, target = Coded(Memory(SIZE)), Coded(Memory(SIZE))
    with opened(file, target) as ends:
        ends.live.write(0, b"x", Flag.FUA)
        ends.live.flush()
        ends.snap.flush()
    assert (file.flushes, target.flushes) == (2, 0)


# -- what fails ------------------------------------------------------------------------------------------------------


def test_break_guest_write_fails_the_write_and_keeps_the_snapshot(disk: File) -> None:
    target = Coded(Memory(SIZE))
    with opened(disk, target) as ends:
        target.failure = RequestError(errno.ENOSPC, "full")
        for request in (Request.write(10, Vector.of(1)), Request.zero(0, CLUSTER)):
            with pytest.raises(RequestError) as caught:
                ends.live.execute(request)
            assert caught.value.errno == errno.ENOSPC
        assert ends.live.read(0, SIZE) == ends.snap.read(0, SIZE) == BEFORE
        target.failure = None
        ends.live.write(10, b"x")
        assert ends.live.read(10, 1) == b"x"
        assert ends.snap.read(0, SIZE) == BEFORE


def test_break_snapshot_lets_the_write_pass_and_fails_the_snapshot(disk: File) -> None:
    target = Coded(Memory(SIZE))
    with opened(disk, target, on_cbw_error="break-snapshot") as ends:
        ends.live.write(0, b"x")
        target.failure = OSError(errno.ENOSPC, "full")
        ends.live.write(CLUSTER, b"x")
        target.failure = None
        ends.live.write(2 * CLUSTER, b"x")
        assert ends.live.read(2 * CLUSTER, 1) == ends.live.read(CLUSTER, 1) == b"x"
        for ask in (
            lambda: ends.snap.read(0, 1),
            lambda: ends.snap.read(5 * CLUSTER, 1),
            lambda: ends.snap.status(0, 1),
        ):
            with pytest.raises(RequestError, match=r"the snapshot is lost.*full") as caught:
                ask()
            assert caught.value.errno == errno.EPERM  # what EACCES is on the wire


def test_a_read_by_code_that_loses_its_snapshot_fails(disk: File) -> None:
    target = Coded(Memory(SIZE))
    slow = Coded(disk)
    with opened(slow, target, on_cbw_error="break-snapshot", cbw_timeout=1) as ends:
        slow.reading.close()
        reading = Background(ends.snap.read, 0, 10)
        slow.reading.wait_reached()
        ends.live.write(0, b"x")  # to copy, the reader would have to let go of the cluster
        slow.reading.open()
        with pytest.raises(RequestError, match="the snapshot is lost"):
            reading.finish()


def test_copying_that_takes_too_long_fails_and_ends_later(disk: File) -> None:
    target = Coded(Memory(SIZE))
    with opened(disk, target, cbw_timeout=1) as ends:
        ends.live.write(0, b"x")
        target.writing.close()
        with pytest.raises(RequestError, match="took longer than 1 s"):
            ends.live.write(CLUSTER, b"x")
        target.writing.wait_reached()
        target.writing.open()
        ends.live.write(CLUSTER, b"y")
        assert ends.live.read(CLUSTER, 1) == b"y"
        assert ends.snap.read(0, SIZE) == BEFORE


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"target": Memory(SIZE - 1)}, f"target: has {SIZE - 1} bytes, fewer than the disk's {SIZE}"),
        ({"target": SnapshotAccess(CopyBeforeWrite(Memory(SIZE), Memory(SIZE)))}, "target: is read-only, but"),
        (
            {"min_cluster_size": 96 << 10},
            "min-cluster-size: found 98304, allowed is a power of two of at most 33554432",
        ),
        ({"min_cluster_size": 64 << 20}, "min-cluster-size: found 67108864, allowed is a power of two"),
        ({"cbw_timeout": -1}, "cbw-timeout: found -1, allowed are 0 to 4294967295 seconds"),
    ],
)
def test_refused(disk: File, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught, opened(disk, keys.pop("target", None), **keys):
        pass
    assert str(caught.value).startswith(said)


# -- races -----------------------------------------------------------------------------------------------------------


def test_a_write_waits_for_the_first_copy_of_its_cluster_and_copies_no_second_time(disk: File) -> None:
    spy = Spy(Memory(SIZE))
    target = Coded(spy)
    with opened(disk, target) as ends:
        target.writing.close()
        one = Background(ends.live.write, 10, b"one")
        target.writing.wait_reached()
        two = Background(ends.live.write, 11, b"two")
        zero = Background(ends.live.zero, CLUSTER - 5, 10)
        assert not two.is_done()
        assert not zero.is_done()
        target.writing.open()
        for change in (one, two, zero):
            change.finish()
        assert ends.live.read(9, 6) in [BEFORE[9:10] + both + BEFORE[14:15] for both in (b"otwo", b"oneo")]
        assert ends.live.read(CLUSTER - 5, 10) == bytes(10)
        assert ends.snap.read(0, SIZE) == BEFORE
        assert [seen.offset for seen in spy.seen if seen.operation is Operation.WRITE] == [0, CLUSTER]


def test_other_clusters_are_not_held_up(disk: File) -> None:
    target = Coded(Memory(SIZE), gated=range(CLUSTER))
    with opened(disk, target) as ends:
        target.writing.close()
        slow = Background(ends.live.write, 0, b"slow")
        target.writing.wait_reached()
        ends.live.write(CLUSTER, b"quick")
        assert ends.live.read(0, CLUSTER + 5) == BEFORE[:CLUSTER] + b"quick"
        assert ends.snap.read(0, SIZE) == BEFORE
        target.writing.open()
        slow.finish()


@pytest.mark.parametrize("operation", ["write", "zero", "trim"])
def test_a_snapshot_read_by_code_is_waited_for(disk: File, operation: str) -> None:
    """What is CODE below uses no place that could be waited for: the cluster is held instead."""
    slow = Coded(disk)
    with opened(slow) as ends:
        slow.reading.close()
        data = bytearray(CLUSTER)
        reading = Background(execute, ends.snap.root, Request.read(0, Vector.of(data)))
        slow.reading.wait_reached()
        change = Background(ends.live.execute, _change(operation, 5))
        assert not change.is_done(), "the old data is being read"
        slow.reading.open()
        reading.finish()
        change.finish()
        assert data == BEFORE[:CLUSTER]
        assert ends.snap.read(0, SIZE) == BEFORE
        assert ends.live.read(5, 3) == (b"new" if operation == "write" else bytes(3))


@pytest.mark.parametrize("operation", ["write", "zero", "trim"])
def test_a_snapshot_read_of_a_place_is_waited_for(disk: File, operation: str) -> None:
    with opened(disk) as ends:
        with disk.open_file.use(CLUSTER + 5, 1):  # somebody has found it there, and reads
            changes = [Background(ends.live.execute, _change(operation, CLUSTER + at)) for at in (0, 5000, -1)]
            assert not any(change.is_done() for change in changes)
            assert disk.open_file.status(0, 1)
            assert ends.snap.read(0, SIZE) == ends.live.read(0, SIZE) == BEFORE
            assert not any(extent.writable for extent in ends.layer.resolve(0, SIZE, Intent.READ))
        for change in changes:
            change.finish()
        assert ends.snap.read(0, SIZE) == BEFORE


def test_a_cluster_that_was_copied_in_vain_is_waited_for_when_it_is_written(disk: File) -> None:
    target = Coded(Memory(SIZE), gated=range(2 * CLUSTER, 3 * CLUSTER))
    with opened(disk, target) as ends:
        ends.live.write(CLUSTER, b"x")
        target.failure = OSError(errno.EIO, "broken")
        with pytest.raises(OSError, match="broken"):
            # As if resolved before the write: cluster 0 is copied, 1 is passed over, 2 fails.
            ends.layer.zero(Request.zero(0, 3 * CLUSTER))
        with disk.open_file.use(0, 1):
            write = Background(ends.live.write, 0, b"x")
            assert not write.is_done()
        write.finish()
        assert ends.snap.read(0, SIZE) == BEFORE


def test_a_status_is_not_mixed_with_a_change(disk: File) -> None:
    """Or a client would skip, as holes, what the guest has only now zeroed."""
    slow = Coded(disk)
    with opened(slow) as ends:
        slow.asking.close()
        found: list[tuple[int, int]] = []
        asking = Background(lambda: found.extend(ends.snap.status(0, CLUSTER)))
        slow.asking.wait_reached()
        zero = Background(ends.live.zero, 0, CLUSTER, Flag.MAY_UNMAP)
        assert not zero.is_done(), "somebody is being told what is there"
        slow.asking.open()
        asking.finish()
        zero.finish()
        assert found == [(CLUSTER, 0)]


def _change(operation: str, offset: int) -> Request:
    if operation == "write":
        return Request.write(offset, Vector.of(b"new"))
    return getattr(Request, operation)(offset, 3)  # type: ignore[no-any-return]


# -- what lies between the disk and its file -------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Through(Layer):
    """The bytes of ``file``, by way of ``effect``."""

    file: Layer
    effect: Transform | Meter

    @property
    def size(self) -> int:
        return self.file.size

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        return (Extent(self.size - offset, self.file, offset, True, self.effect),)


class Free:
    def charge(self, length: int, write: bool) -> None:
        """Whatever it is."""


def test_a_transform_below_is_the_snapshots_too_where_positions_are_the_same(disk: File) -> None:
    cipher = Transform("aes-xts-plain64", bytes(64))
    with opened(Through(disk, cipher)) as ends:
        [extent] = ends.snap.root.resolve(CLUSTER, 512, Intent.READ)
        assert extent == Extent(SIZE - CLUSTER, disk.open_file, CLUSTER, False, cipher)
    with opened(Raw(Through(disk, cipher), offset=CLUSTER)) as ends:
        [extent] = ends.snap.root.resolve(0, 512, Intent.READ)
        assert extent.target is CODE


def test_a_meter_below_is_charged_by_code(disk: File) -> None:
    with opened(Through(disk, Free())) as ends:
        assert [extent.target for extent in ends.snap.root.resolve(0, 512, Intent.READ)] == [CODE]
        assert ends.snap.read(0, SIZE) == BEFORE


# -- the registered-buffer flag --------------------------------------------------------------------------------------


def test_the_flag_is_kept_at_every_hop(disk: File) -> None:
    file, target = Spy(disk), Spy(Memory(SIZE))
    layer = CopyBeforeWrite(file, target)
    view = SnapshotAccess(layer)
    graph = Graph()
    opener = FileOpener(graph, Files(), allocate=registered)
    graph.open(layer, opener)
    graph.open(view, opener)
    try:
        execute(layer, Request.write(100, registered(b"new")))
        copied, written = file.seen
        assert (copied.operation, copied.is_registered) == (Operation.READ, True), "into a bounce buffer from the pool"
        assert (written.operation, written.is_registered) == (Operation.WRITE, True), "the guest's own"
        assert [seen.is_registered for seen in target.seen] == [True]
        execute(view, Request.read(0, registered(2 * CLUSTER)))
        assert file.seen[-1].is_registered, "untouched, read from the file"
        assert target.seen[-1].is_registered, "copied, read from the target"
        execute(layer, Request.write(200, Vector.of(b"new")))
        execute(view, Request.read(0, Vector.of(2 * CLUSTER)))
        assert not file.seen[-2].is_registered, "memory of another kind stays what it is"
        assert not file.seen[-1].is_registered
        assert not target.seen[-1].is_registered
    finally:
        graph.close(view)
        graph.close(layer)


def test_memory_that_is_not_registered_is_seen_to_be_lost(disk: File) -> None:
    target = Spy(Memory(SIZE))
    with opened(disk, target) as ends:  # the reference's opener has no pool
        execute(ends.layer, Request.write(0, registered(b"new")))
        assert [seen.is_registered for seen in target.seen] == [False]
