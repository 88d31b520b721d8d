"""Races, decided: threads are stopped at the point where it would go wrong, and the others tried."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.qcow2.order import Cut
from nbdserver.extent import Extent, Intent
from nbdserver.graph import Graph
from nbdserver.layer import Layer
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag, Request
from tests.layers.qcow2_check import check, read
from tests.layers.qcow2_kit import Operation, RecordedFile, Thread, open_recorded
from tests.serving import check as qemu_check
from tests.serving import create, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 4096


class Stop:
    """Stops the first operation on the file that ``when`` picks, before it is done, until it is let go."""

    def __init__(self, file: RecordedFile, when: Callable[[Operation], bool]) -> None:
        self._file, self._when = file, when
        self.reached, self._go = threading.Event(), threading.Event()
        file.before = self._before

    def _before(self, operation: Operation) -> None:
        if self._when(operation) and not self.reached.is_set():
            self.reached.set()
            assert self._go.wait(10), "never let go"

    def wait(self) -> None:
        assert self.reached.wait(10), "never reached"

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    path = create(tmp_path / "image", 4 * MIB, cluster_size=CLUSTER)
    qemu_io(path, "write -P 1 0 64k", "write -c -P 2 64k 4k")
    return path.read_bytes()


@contextmanager
def _opened(image: bytes) -> Iterator[tuple[RecordedFile, Reference, Qcow2]]:
    file, layer = open_recorded(image)
    with open_stack(layer) as disk:
        yield file, disk, layer
        file.before = lambda operation: None
    report = check(file.data)
    assert not report.errors and not report.leaks


def _writes(text: bytes) -> Callable[[Operation], bool]:
    return lambda operation: operation.name == "write" and text in operation.data


def _syncs(operation: Operation) -> bool:
    return operation.name == "sync"


FREE = 1 * MIB  # a place on the disk with nothing in it


def test_trim_waits_for_an_allocating_write_of_the_same_cluster(image: bytes) -> None:
    with _opened(image) as (file, disk, _):
        stop = Stop(file, _writes(b"new"))
        write = Thread(lambda: disk.write(FREE, b"new" + bytes(CLUSTER - 3)))
        stop.wait()
        trim = Thread(lambda: disk.root.trim(Request.trim(FREE, CLUSTER)))  # as if the mapping had been known
        assert trim.waits()
        stop.let_go()
        write.done()
        trim.done()
        assert disk.read(FREE, CLUSTER) == bytes(CLUSTER)


def test_writes_to_halves_of_a_new_cluster_are_both_there(image: bytes) -> None:
    """The second resolves again after it has waited, and finds the cluster that the first has allocated."""
    with _opened(image) as (file, disk, _):
        stop = Stop(file, _writes(b"one"))
        one = Thread(lambda: disk.write(FREE, b"one" + bytes(2045)))
        stop.wait()
        two = Thread(lambda: disk.write(FREE + 2048, b"two" + bytes(2045)))
        assert two.waits()
        stop.let_go()
        one.done()
        two.done()
        assert disk.read(FREE, CLUSTER) == b"one" + bytes(2045) + b"two" + bytes(2045)


def test_copying_a_shared_cluster_against_a_write_to_its_other_half(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "shared"
    path.write_bytes(image)
    run("qemu-img", "snapshot", "-c", "s", path)
    with _opened(path.read_bytes()) as (file, disk, _):
        stop = Stop(file, _writes(b"one"))
        one = Thread(lambda: disk.write(0, b"one"))
        stop.wait()
        two = Thread(lambda: disk.write(CLUSTER - 3, b"two"))
        assert two.waits()
        stop.let_go()
        one.done()
        two.done()
        assert disk.read(0, CLUSTER) == b"one" + b"\1" * (CLUSTER - 6) + b"two"
    path.write_bytes(file.data)
    run("qemu-img", "snapshot", "-a", "s", path)
    assert read(path.read_bytes())[: 64 * KIB] == b"\1" * 64 * KIB


def test_other_clusters_are_not_held_up(image: bytes) -> None:
    with _opened(image) as (file, disk, _):
        stop = Stop(file, _writes(b"slow"))
        slow = Thread(lambda: disk.write(FREE, b"slow"))
        stop.wait()
        disk.write(FREE + CLUSTER, b"quick")
        disk.zero(FREE + 2 * CLUSTER, CLUSTER)
        disk.trim(0, CLUSTER)
        assert disk.read(64 * KIB, 3) == b"\2\2\2"
        disk.flush()
        assert disk.read(FREE, 4) == bytes(4)
        stop.let_go()
        slow.done()
        assert disk.read(FREE, 4) == b"slow"


def test_a_reader_of_compressed_data_keeps_it_from_being_freed(image: bytes) -> None:
    with _opened(image) as (file, disk, layer):
        place = layer.reader.geometry.compressed(next(layer.reader.spans(64 * KIB, 1))[0].entry)[0]
        stop = Stop(file, lambda operation: operation.name == "read" and operation.offset == place)
        found: list[bytes] = []
        reader = Thread(lambda: found.append(disk.read(64 * KIB, 4)))
        stop.wait()
        write = Thread(lambda: disk.write(64 * KIB, b"new"))
        assert write.waits()
        stop.let_go()
        reader.done()
        write.done()
        assert found == [b"\2\2\2\2"] and disk.read(64 * KIB, 4) == b"new\2"


# -- flushes --------------------------------------------------------------------------------------------------------


def test_a_flush_covers_what_was_written_before_it_began_though_another_runs(image: bytes) -> None:
    with _opened(image) as (file, disk, _):
        disk.write(FREE, b"first")
        stop = Stop(file, _syncs)
        one = Thread(disk.flush)
        stop.wait()  # its cut is taken
        disk.write(FREE + CLUSTER, b"second")
        two = Thread(disk.flush)
        assert two.waits()
        stop.let_go()
        one.done()
        two.done()
        assert read(file.data)[FREE + CLUSTER :][:6] == b"second"


def test_flushes_that_wait_share_one(image: bytes) -> None:
    with _opened(image) as (file, disk, _):
        stop = Stop(file, _syncs)
        running = Thread(disk.flush)
        stop.wait()
        waiting = [Thread(disk.flush) for _ in range(5)]
        assert all(thread.waits() for thread in waiting)
        before = len(file.log)
        stop.let_go()
        for thread in (running, *waiting):
            thread.done()
        assert [operation.name for operation in file.log[before:]] == ["sync", "sync"]


def test_all_who_share_a_flush_learn_that_it_failed(image: bytes) -> None:
    file, layer = open_recorded(image)
    with pytest.raises(OSError), open_stack(layer) as disk:
        stop = Stop(file, _syncs)
        running = Thread(disk.flush)
        stop.wait()
        waiting = [Thread(disk.flush) for _ in range(3)]
        assert all(thread.waits() for thread in waiting)

        def fail(operation: Operation) -> None:
            if _syncs(operation):
                raise OSError(5, "lost")

        file.before = fail
        stop.let_go()
        running.done()
        for thread in waiting:
            with pytest.raises(Exception, match="lost"):
                thread.done()


@pytest.mark.parametrize("step", ["prepare", "first sync", "link", "second sync"])
def test_a_flush_links_nothing_that_came_after_its_cut(step: str, image: bytes) -> None:
    """A write allocates, in the same L2 table, while a flush is between its steps; then the machine crashes."""
    with _opened(image) as (file, disk, _):
        disk.write(FREE, b"first")
        count = {"prepare": 0, "first sync": 0, "link": 1, "second sync": 1}[step]
        syncs = 0

        def when(operation: Operation) -> bool:
            nonlocal syncs
            here = syncs == count and (_syncs(operation) if "sync" in step else operation.name == "write")
            syncs += _syncs(operation)
            return here and threading.current_thread() is flush

        flush_may = threading.Event()

        def flush_later() -> None:
            flush_may.wait(10)
            disk.flush()

        flush = Thread(flush_later)
        stop = Stop(file, when)
        flush_may.set()
        stop.wait()
        disk.write(FREE + CLUSTER, b"later")
        disk.write(FREE + 3 * MIB - CLUSTER, b"later")  # a new L2 table
        disk.trim(0, 32 * KIB)
        assert not check(file.data).errors
        stop.let_go()
        flush.done()
        assert not check(file.data).errors
        now = read(file.data)
        assert now[FREE : FREE + 5] == b"first" and now[FREE + CLUSTER :][:5] == bytes(5) and now[0] == 1


class Generous:
    """A lock that, whenever it is let go, waits until those who wanted it have had it."""

    def __init__(self, lock: threading.Lock, wanting: list[Thread]) -> None:
        self._lock, self._wanting = lock, wanting

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        for thread in self._wanting:
            thread.join(1)


def test_a_cut_is_taken_at_one_instant(image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """No write gets in between the refcounts that a flush takes and the links that need them."""
    with _opened(image) as (file, disk, layer):
        disk.write(FREE, b"first")
        refcounts, order = layer.writer.refcounts, layer.writer._order
        writes: list[Thread] = []
        take = refcounts.cut

        def cut(cut: Cut) -> None:
            take(cut)
            monkeypatch.undo()
            writes.append(Thread(lambda: disk.write(FREE + CLUSTER, b"later")))
            assert writes[0].waits()

        monkeypatch.setattr(refcounts, "cut", cut)
        order._lock = Generous(order._lock, writes)  # type: ignore[assignment]
        disk.flush()
        writes[0].done()
        assert not check(file.data).errors


def test_an_unlinked_cluster_is_not_reused_before_that_is_durable(image: bytes) -> None:
    with _opened(image) as (file, disk, _):
        disk.trim(0, 64 * KIB)
        for number in range(16):
            disk.write(FREE + number * CLUSTER, b"other" * 800)
        assert read(file.data)[: 64 * KIB] == b"\1" * 64 * KIB  # the file, as a crash would leave it
        disk.flush()
        size = len(file.data)
        for number in range(16, 32):
            disk.write(FREE + number * CLUSTER, b"other" * 800)
        assert len(file.data) == size, "reused after the flush"


# -- the users of a place -------------------------------------------------------------------------------------------


def test_a_freed_place_is_not_reused_while_somebody_reads_it(tmp_path: Path, image: bytes) -> None:
    """A reader has resolved, announced its use, and is slow: the flush that sets the cluster free waits for it."""
    path = tmp_path / "used"
    path.write_bytes(image)
    layer = Qcow2(File(str(path)))
    with open_stack(layer) as disk:
        extent = next(iter(layer.resolve(0, CLUSTER, Intent.READ)))
        leaf = layer.file.resolve(extent.offset, CLUSTER, Intent.READ)
        place = next(iter(leaf))
        assert not isinstance(place.target, Layer)
        with place.target.use(place.offset, CLUSTER):  # type: ignore[union-attr]
            changes = layer.changes
            disk.trim(0, 64 * KIB)
            assert layer.changes > changes, "who has not announced yet resolves again"
            flush = Thread(disk.flush)
            assert flush.waits()
            disk.write(FREE, b"other" * 800)
            assert path.read_bytes()[place.offset : place.offset + CLUSTER] == b"\1" * CLUSTER
        flush.done()
        disk.flush()
    qemu_check(path)


@dataclasses.dataclass(eq=False)
class Watched(Layer):
    """Sees how its child's mapping changes, and what it says just then."""

    file: Layer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return self.file.size

    def resolve(self, offset: int, length: int, intent: Intent) -> tuple[Extent, ...]:
        return (Extent(self.size - offset, self.file, offset, True),)

    def translate(self, child: Layer, offset: int, length: int) -> tuple[tuple[int, int], ...]:
        self.seen.append((offset, length))
        return ((offset, length),)


def test_every_change_is_announced_before_the_request_returns(image: bytes) -> None:
    file, layer = open_recorded(image)
    watched = Watched(layer)
    with open_stack(watched, graph=Graph()) as disk:
        changes: list[tuple[Callable[[], None], tuple[int, int] | None]] = [
            (lambda: disk.write(FREE + 5, b"x"), (FREE, CLUSTER)),
            (lambda: disk.write(FREE + 5, b"y"), None),
            (lambda: disk.write(64 * KIB, b"x"), (64 * KIB, CLUSTER)),
            (lambda: disk.zero(FREE, CLUSTER), (FREE, CLUSTER)),
            (lambda: disk.zero(FREE, 100), None),
            (lambda: disk.write(FREE, b"x"), (FREE, CLUSTER)),
            (lambda: disk.zero(FREE, CLUSTER, Flag.MAY_UNMAP), (FREE, CLUSTER)),
            (lambda: disk.trim(0, 2 * CLUSTER), (0, 2 * CLUSTER)),
            (lambda: disk.write(2 * MIB - CLUSTER, bytes(3 * CLUSTER)), (2 * MIB - CLUSTER, 3 * CLUSTER)),
            (disk.flush, None),
        ]
        for request, range_ in changes:
            watched.seen.clear()
            request()
            covered = [offset for start, length in watched.seen for offset in range(start, start + length, CLUSTER)]
            wanted = [] if range_ is None else list(range(range_[0], range_[0] + range_[1], CLUSTER))
            assert covered == wanted
    assert not check(file.data).errors
