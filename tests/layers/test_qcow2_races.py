"""Races, decided: threads are stopped at the point where it would go wrong, and the others tried."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.qcow2.order import Cut
from nbdserver.extent import Extent, Intent, Special
from nbdserver.graph import Graph, flatten
from nbdserver.layer import Layer
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag, Request, Vector
from tests.layers.qcow2_check import check, read
from tests.layers.qcow2_kit import VARIANTS, Operation, RecordedFile, Thread, open_recorded
from tests.serving import check as qemu_check
from tests.serving import create, data_beside, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 16 * KIB
SIZE = 65 * MIB
#: What has data at first: so many bytes, of ones.
USED = 16 * CLUSTER
#: Of images that have some.
SUBCLUSTER = CLUSTER // 32
FREE = 1 * MIB  # a place on the disk with nothing in it
FAR, FARTHER = 40 * MIB, SIZE - CLUSTER  # others, which other L2 tables map
COMPRESSED = 512 * KIB  # and where there is a compressed cluster of twos, in images that can have some


class Stop:
    """Stops the first operation on the files that ``when`` picks, before it is done, until it is let go."""

    def __init__(self, files: Files, when: Callable[[Operation], bool]) -> None:
        self._when = when
        self.reached, self._go = threading.Event(), threading.Event()
        for file in files.all:
            file.before = self._before

    def _before(self, operation: Operation) -> None:
        if self._when(operation) and not self.reached.is_set():
            self.reached.set()
            assert self._go.wait(10), "never let go"

    def wait(self) -> None:
        assert self.reached.wait(10), "never reached"

    def let_go(self) -> None:
        self._go.set()


@dataclasses.dataclass
class Files:
    """The files of an image."""

    image: RecordedFile
    data: RecordedFile | None = None

    @property
    def all(self) -> list[RecordedFile]:
        return [self.image] if self.data is None else [self.image, self.data]

    @property
    def log(self) -> list[Operation]:
        return self.image.log

    def content(self) -> bytes:
        """The disk, as a crash of the process alone would leave it."""
        return read(self.image.data, data_file=None if self.data is None else self.data.data)

    def size(self) -> int:
        return len(self.image.data)

    def errors(self) -> list[str]:
        return check(self.image.data).errors


class Image(NamedTuple):
    """The bytes of an image file, and of its external data file."""

    file: bytes
    data: bytes | None = None

    @classmethod
    def at(cls, path: Path) -> Image:
        beside = data_beside(path)
        return cls(path.read_bytes(), beside.read_bytes() if beside.exists() else None)


def _create(path: Path, variant: str, cluster: int = CLUSTER) -> Path:
    options: dict[str, Any] = {**VARIANTS[variant], "cluster_size": cluster}
    create(path, SIZE, **options)
    qemu_io(path, f"write -P 1 0 {USED}")
    if "data_file" not in options:
        qemu_io(path, f"write -c -P 2 {COMPRESSED} {max(cluster, CLUSTER)}")
    return path


@pytest.fixture(params=["plain", "subclusters"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    """All that there can be, in the image alone."""
    return Image.at(_create(tmp_path / "image", request.param))


@pytest.fixture(params=["plain", "subclusters", "data file", "data file, subclusters"])
def any_image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    """Every kind of image in which writes allocate."""
    return Image.at(_create(tmp_path / "image", request.param))


class Sized(NamedTuple):
    """An image, and its clusters' size."""

    image: Image
    cluster: int


#: Small clusters, of which many are under one request, and which are less than a page; and every kind.
SIZED = {"512": 512, "4K": 4 * KIB, "64K": 64 * KIB, "subclusters": CLUSTER}


def _sized(directory: Path, name: str) -> Sized:
    cluster, variant = SIZED.get(name, CLUSTER), name if name in VARIANTS else "plain"
    return Sized(Image.at(_create(directory / "image", variant, cluster)), cluster)


@pytest.fixture(params=[*SIZED, "data file", "data file, subclusters"])
def sized(request: pytest.FixtureRequest, tmp_path: Path) -> Sized:
    """Every kind of image in which writes allocate."""
    return _sized(tmp_path, request.param)


@pytest.fixture(params=SIZED)
def sized_whole(request: pytest.FixtureRequest, tmp_path: Path) -> Sized:
    """Those that can have snapshots."""
    return _sized(tmp_path, request.param)


@pytest.fixture
def subclusters(tmp_path: Path) -> Image:
    return Image.at(_create(tmp_path / "image", "subclusters"))


@pytest.fixture
def data_file(tmp_path: Path) -> Image:
    return Image.at(_create(tmp_path / "image", "data file"))


@contextmanager
def _opened(image: Image, *, checked: bool = True) -> Iterator[tuple[Files, Reference, Qcow2]]:
    file, layer = open_recorded(image.file, image.data, allocation_ahead=0)  # each write allocates by itself
    data = layer.data_file
    assert data is None or isinstance(data, RecordedFile)
    files = Files(file, data)
    try:
        with open_stack(layer) as disk:
            yield files, disk, layer
            for each in files.all:
                each.before = lambda operation: None
    finally:
        report = check(file.data)
        assert not checked or (not report.errors and not report.leaks)


def _writes(text: bytes) -> Callable[[Operation], bool]:
    return lambda operation: operation.name == "write" and text in operation.data


def _syncs(operation: Operation) -> bool:
    return operation.name == "sync"


def test_trim_waits_for_an_allocating_write_of_the_same_cluster(sized: Sized) -> None:
    image, cluster = sized
    with _opened(image) as (files, disk, _):
        stop = Stop(files, _writes(b"new"))
        write = Thread(lambda: disk.write(FREE, b"new" + bytes(cluster - 3)))
        stop.wait()
        trim = Thread(lambda: disk.root.trim(Request.trim(FREE, cluster)))  # as if the mapping had been known
        assert trim.waits()
        disk.trim(FREE + cluster, cluster)  # what is beside it does not
        stop.let_go()
        write.done()
        trim.done()
        assert disk.read(FREE, cluster) == bytes(cluster)


def test_an_allocating_write_waits_for_a_trim_of_the_same_cluster(sized: Sized) -> None:
    """The other way round: the write finds the cluster gone, and takes another, not the one that is being freed."""
    image, cluster = sized
    with _opened(image) as (_, disk, layer):
        reached, go = threading.Event(), threading.Event()
        changed = layer.changed

        def pause(offset: int, length: int) -> None:
            changed(offset, length)
            reached.set()
            assert go.wait(10), "never let go"

        layer.writer._changed = pause
        trim = Thread(lambda: disk.trim(0, cluster))
        assert reached.wait(10)
        layer.writer._changed = changed
        write = Thread(lambda: disk.root.write(Request.write(0, Vector.of(bytearray(b"new" + bytes(cluster - 3))))))
        assert write.waits()
        go.set()
        trim.done()
        write.done()
        assert disk.read(0, cluster) == b"new" + bytes(cluster - 3)
        assert disk.read(cluster, cluster) == b"\1" * cluster


def test_writes_to_halves_of_a_new_cluster_are_both_there(sized: Sized) -> None:
    """The second resolves again after it has waited, and finds the cluster that the first has allocated."""
    image, cluster = sized
    half = cluster // 2
    with _opened(image) as (files, disk, _):
        stop = Stop(files, _writes(b"one"))
        one = Thread(lambda: disk.write(FREE, b"one" + bytes(half - 3)))
        stop.wait()
        two = Thread(lambda: disk.write(FREE + half, b"two" + bytes(half - 3)))
        assert two.waits()
        stop.let_go()
        one.done()
        two.done()
        assert disk.read(FREE, cluster) == b"one" + bytes(half - 3) + b"two" + bytes(half - 3)
        (run,) = {run.place for run, _, _ in disk.root.reader.spans(FREE, cluster)}  # type: ignore[attr-defined]
        assert run is not None, "one cluster"


def test_copying_a_shared_cluster_against_a_write_to_its_other_half(tmp_path: Path, sized_whole: Sized) -> None:
    image, cluster = sized_whole
    path = tmp_path / "shared"
    path.write_bytes(image.file)
    run("qemu-img", "snapshot", "-c", "s", path)
    with _opened(Image.at(path)) as (files, disk, _):
        stop = Stop(files, _writes(b"one"))
        one = Thread(lambda: disk.write(0, b"one"))
        stop.wait()
        two = Thread(lambda: disk.write(cluster - 3, b"two"))
        over = Thread(lambda: disk.write(1, b"ver"))  # and one that overlaps the first: it comes second
        assert two.waits() and over.waits()
        stop.let_go()
        for thread in (one, two, over):
            thread.done()
        assert disk.read(0, cluster) == b"over" + b"\1" * (cluster - 7) + b"two"
    path.write_bytes(files.image.data)
    run("qemu-img", "snapshot", "-a", "s", path)
    assert read(path.read_bytes())[:USED] == b"\1" * USED


def test_other_clusters_are_not_held_up(any_image: Image) -> None:
    with _opened(any_image) as (files, disk, _):
        stop = Stop(files, _writes(b"slow"))
        slow = Thread(lambda: disk.write(FREE, b"slow"))
        stop.wait()
        disk.write(FREE + CLUSTER, b"quick")
        disk.zero(FREE + 2 * CLUSTER, CLUSTER)
        disk.trim(0, CLUSTER)
        assert disk.read(COMPRESSED, 3) == (b"\2\2\2" if any_image.data is None else bytes(3))
        disk.flush()
        assert disk.read(FREE, 4) == bytes(4)
        stop.let_go()
        slow.done()
        assert disk.read(FREE, 4) == b"slow"


def test_a_reader_of_compressed_data_keeps_it_from_being_freed(image: Image) -> None:
    with _opened(image) as (files, disk, layer):
        place = layer.reader.geometry.compressed(next(layer.reader.spans(COMPRESSED, 1))[0].entry)[0]
        stop = Stop(files, lambda operation: operation.name == "read" and operation.offset == place)
        found: list[bytes] = []
        reader = Thread(lambda: found.append(disk.read(COMPRESSED, 4)))
        stop.wait()
        write = Thread(lambda: disk.write(COMPRESSED, b"new"))
        assert write.waits()
        stop.let_go()
        reader.done()
        write.done()
        assert found == [b"\2\2\2\2"] and disk.read(COMPRESSED, 4) == b"new\2"


# -- subclusters of one cluster -------------------------------------------------------------------------------------


def test_a_stored_subcluster_is_written_while_another_is_allocated(subclusters: Image) -> None:
    with _opened(subclusters) as (files, disk, _):
        disk.write(FREE, b"a" * SUBCLUSTER)
        stop = Stop(files, _writes(b"slow"))
        slow = Thread(lambda: disk.write(FREE + 3 * SUBCLUSTER, b"slow"))
        stop.wait()
        disk.write(FREE + 5, b"quick")
        stop.let_go()
        slow.done()
        assert disk.read(FREE, 10) == b"aaaaaquick" and disk.read(FREE + 3 * SUBCLUSTER, 5) == b"slow\0"


@pytest.mark.parametrize("kept", [False, True])
def test_subclusters_of_one_cluster_are_allocated_one_after_the_other(kept: bool, subclusters: Image) -> None:
    """Each changes the bitmap that the other has left."""
    with _opened(subclusters) as (files, disk, _):
        if kept:
            disk.write(FREE + 31 * SUBCLUSTER, b"there already")
        stop = Stop(files, _writes(b"one"))
        one = Thread(lambda: disk.write(FREE, b"one"))
        stop.wait()
        two = Thread(lambda: disk.write(FREE + 7 * SUBCLUSTER, b"two"))
        three = Thread(lambda: disk.zero(FREE + 9 * SUBCLUSTER, SUBCLUSTER))
        assert two.waits()
        stop.let_go()
        for thread in (one, two, three):
            thread.done()
        assert disk.read(FREE, 4) == b"one\0" and disk.read(FREE + 7 * SUBCLUSTER, 4) == b"two\0"
        assert disk.read(FREE + 31 * SUBCLUSTER, 5) == (b"there" if kept else bytes(5))


# -- flushes --------------------------------------------------------------------------------------------------------


def test_a_flush_covers_what_was_written_before_it_began_though_another_runs(any_image: Image) -> None:
    with _opened(any_image) as (files, disk, _):
        disk.write(FREE, b"first")
        stop = Stop(files, _syncs)
        one = Thread(disk.flush)
        stop.wait()  # its cut is taken
        disk.write(FREE + CLUSTER, b"second")
        two = Thread(disk.flush)
        assert two.waits()
        stop.let_go()
        one.done()
        two.done()
        assert files.content()[FREE + CLUSTER :][:6] == b"second"


def test_flushes_that_wait_share_one(any_image: Image) -> None:
    with _opened(any_image) as (files, disk, _):
        stop = Stop(files, _syncs)
        running = Thread(disk.flush)
        stop.wait()
        waiting = [Thread(disk.flush) for _ in range(5)]
        assert all(thread.waits() for thread in waiting)
        before = len(files.log)
        stop.let_go()
        for thread in (running, *waiting):
            thread.done()
        assert [operation.name for operation in files.log[before:]] == ["sync", "sync"]


def test_all_who_share_a_flush_learn_that_it_failed(any_image: Image) -> None:
    with pytest.raises(OSError), _opened(any_image, checked=False) as (files, disk, _):
        stop = Stop(files, _syncs)
        running = Thread(disk.flush)
        stop.wait()
        waiting = [Thread(disk.flush) for _ in range(3)]
        assert all(thread.waits() for thread in waiting)

        def fail(operation: Operation) -> None:
            if _syncs(operation):
                raise OSError(5, "lost")

        for file in files.all:
            file.before = fail
        stop.let_go()
        running.done()
        for thread in waiting:
            with pytest.raises(Exception, match="lost"):
                thread.done()


@pytest.mark.parametrize("step", ["prepare", "first sync", "link", "last sync"])
def test_a_flush_links_nothing_that_came_after_its_cut(step: str, any_image: Image) -> None:
    """A write allocates, in the same L2 table, while a flush is between its steps; then the machine crashes."""
    with _opened(any_image) as (files, disk, _):
        disk.write(FREE, b"first")
        disk.write(FAR, b"first")
        # A data file is synced first.
        count = {"prepare": 0, "first sync": 0}.get(step, len(files.all))
        syncs = 0

        def when(operation: Operation) -> bool:
            nonlocal syncs
            here = syncs == count and (_syncs(operation) if "sync" in step else operation.name == "write")
            here = here and threading.current_thread() is flush
            syncs += _syncs(operation)
            return here

        flush_may = threading.Event()

        def flush_later() -> None:
            flush_may.wait(10)
            disk.flush()

        flush = Thread(flush_later)
        stop = Stop(files, when)
        flush_may.set()
        stop.wait()
        disk.write(FREE + CLUSTER, b"later")
        disk.write(FARTHER, b"later")  # a new L2 table
        disk.trim(0, 2 * CLUSTER)
        assert not files.errors()
        stop.let_go()
        flush.done()
        assert not files.errors()
        now = files.content()
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


def test_a_cut_is_taken_at_one_instant(any_image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """No write gets in between the refcounts that a flush takes and the links that need them."""
    with _opened(any_image) as (files, disk, layer):
        disk.write(FREE, b"first")
        refcounts, order = layer.writer.refcounts, layer.writer._order
        writes: list[Thread] = []
        take = refcounts.cut

        def cut(cut: Cut, *, lag: bool) -> None:
            take(cut, lag=lag)
            monkeypatch.undo()
            writes.append(Thread(lambda: disk.write(FREE + CLUSTER, b"later")))
            assert writes[0].waits()

        monkeypatch.setattr(refcounts, "cut", cut)
        order._lock = Generous(order._lock, writes)  # type: ignore[assignment]
        disk.flush()
        writes[0].done()
        assert not files.errors()


def test_an_unlinked_cluster_is_not_reused_before_that_is_durable(image: Image) -> None:
    other = b"other---" * (CLUSTER // 8)
    with _opened(image) as (files, disk, _):
        disk.trim(0, USED)
        for number in range(16):
            disk.write(FREE + number * CLUSTER, other)
        assert files.content()[:USED] == b"\1" * USED  # the file, as a crash would leave it
        disk.flush()
        size = files.size()
        for number in range(16, 32):
            disk.write(FREE + number * CLUSTER, other)
        assert files.size() == size, "reused after the flush"


# -- the users of a place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "subclusters", "data file"])
def test_a_freed_place_is_not_reused_while_somebody_reads_it(variant: str, tmp_path: Path) -> None:
    """A reader has resolved, announced its use, and is slow: the flush that sets the cluster free waits for it."""
    path = _create(tmp_path / "used", variant)
    layer = Qcow2(File(str(path)))
    with open_stack(layer) as disk:
        extent = next(iter(layer.resolve(0, CLUSTER, Intent.READ)))
        assert isinstance(extent.target, Layer)
        place = next(iter(flatten(extent.target, extent.offset, CLUSTER, Intent.READ)))
        assert not isinstance(place.target, Special)
        file = Path(place.target.name)
        with place.target.use(place.offset, CLUSTER):
            changes = layer.changes
            disk.trim(0, USED)
            assert layer.changes > changes, "who has not announced yet resolves again"
            flush = Thread(disk.flush)
            assert flush.waits()
            disk.write(FREE, b"other---" * (CLUSTER // 8))
            assert file.read_bytes()[place.offset : place.offset + CLUSTER] == b"\1" * CLUSTER
        flush.done()
        disk.flush()
    qemu_check(path)


@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB])
def test_a_discarded_cluster_is_not_reused_under_a_write_in_flight(cluster: int, tmp_path: Path) -> None:
    """The write has been looked up, in place, and is slow; what it was to overwrite is discarded meanwhile. It may
    land in no other guest cluster."""
    path = create(tmp_path / "used", 8 * MIB, cluster_size=cluster)
    qemu_io(path, f"write -P 1 0 {16 * cluster}")
    layer = Qcow2(File(str(path)), allocation_ahead=0)
    other = 2 * MIB
    with open_stack(layer) as disk:
        place = next(iter(flatten(layer, 3 * cluster, cluster, Intent.WRITE)))
        assert not isinstance(place.target, Special) and place.writable
        with place.target.use(place.offset, cluster):
            disk.trim(0, 16 * cluster)
            flush = Thread(disk.flush)
            assert flush.waits()
            for number in range(24):
                disk.write(other + number * cluster, b"o" * cluster)
            place.target.write(place.offset, Vector.of(bytearray(b"w" * cluster)))
        flush.done()
        assert disk.read(other, 24 * cluster) == b"o" * 24 * cluster
        disk.flush()
        size = path.stat().st_size
        for number in range(24, 36):
            disk.write(other + number * cluster, b"p" * cluster)
        assert path.stat().st_size == size, "reused once it is safe"
        assert disk.read(0, 16 * cluster) == bytes(16 * cluster)
        assert disk.read(other, 36 * cluster) == b"o" * 24 * cluster + b"p" * 12 * cluster
    qemu_check(path)


# -- giving back the storage of a data file -------------------------------------------------------------------------


def test_no_flush_waits_for_a_request_to_give_back_storage(data_file: Image) -> None:
    """What is near a request that is under way is given back by a later flush."""
    with _opened(data_file) as (files, disk, _):
        disk.trim(0, 3 * CLUSTER)
        stop = Stop(files, _writes(b"slow"))
        slow = Thread(lambda: disk.write(CLUSTER, b"slow"))
        stop.wait()
        disk.flush()
        assert "discard" not in [operation.name for operation in files.log]
        stop.let_go()
        slow.done()
        disk.flush()
        discards = [(each.offset, each.length, each.file) for each in files.log if each.name == "discard"]
        assert discards == [(0, CLUSTER, 1), (2 * CLUSTER, CLUSTER, 1)]


def test_storage_is_not_given_back_while_an_older_entry_in_the_file_names_it(data_file: Image) -> None:
    """A range was left over by one flush; it has been used again, which the next one links, and let go of meanwhile."""
    with _opened(data_file) as (files, disk, _):
        disk.trim(0, 2 * CLUSTER)
        stop = Stop(files, _writes(b"slow"))
        slow = Thread(lambda: disk.write(CLUSTER, b"slow"))
        stop.wait()
        disk.flush()
        stop.let_go()
        slow.done()
        disk.write(0, b"b" * CLUSTER)
        stop = Stop(files, _syncs)
        flush = Thread(disk.flush)
        stop.wait()  # its cut is taken
        disk.zero(0, CLUSTER, Flag.MAY_UNMAP)
        stop.let_go()
        flush.done()
        assert files.content()[:CLUSTER] == b"b" * CLUSTER, "the files, as a crash would leave them"
        disk.flush()
        assert files.content()[:CLUSTER] == bytes(CLUSTER)
        assert "discard" in [operation.name for operation in files.log]


def test_a_place_that_is_in_use_again_is_not_given_back(data_file: Image) -> None:
    with _opened(data_file) as (files, disk, _):
        disk.trim(0, CLUSTER)
        stop = Stop(files, _syncs)
        flush = Thread(disk.flush)
        stop.wait()
        disk.write(0, b"b" * CLUSTER)
        stop.let_go()
        flush.done()
        assert disk.read(0, CLUSTER) == b"b" * CLUSTER
        assert "discard" not in [operation.name for operation in files.log]


# -- what is announced ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("variant", "unit"), [("plain", CLUSTER), ("subclusters", SUBCLUSTER)])
def test_every_change_is_announced_before_the_request_returns(variant: str, unit: int, tmp_path: Path) -> None:
    file, layer = open_recorded(_create(tmp_path / "image", variant).read_bytes(), allocation_ahead=0)
    watched = Watched(layer)
    with open_stack(watched, graph=Graph()) as disk:
        changes: list[tuple[Callable[[], None], tuple[int, int] | None]] = [
            (lambda: disk.write(FREE + 5, b"x"), (FREE, unit)),
            (lambda: disk.write(FREE + 5, b"y"), None),
            (lambda: disk.write(COMPRESSED, b"x"), (COMPRESSED, CLUSTER)),
            (lambda: disk.zero(FREE, CLUSTER), (FREE, CLUSTER)),
            (lambda: disk.zero(FREE, 100), None),
            (lambda: disk.write(FREE, b"x"), (FREE, unit)),
            (lambda: disk.zero(FREE, CLUSTER, Flag.MAY_UNMAP), (FREE, CLUSTER)),
            (lambda: disk.trim(0, 2 * CLUSTER), (0, 2 * CLUSTER)),
            (lambda: disk.write(16 * MIB - CLUSTER, bytes(3 * CLUSTER)), (16 * MIB - CLUSTER, 3 * CLUSTER)),
            (disk.flush, None),
        ]
        for request, range_ in changes:
            watched.seen.clear()
            request()
            covered = [offset for start, length in watched.seen for offset in range(start, start + length, SUBCLUSTER)]
            wanted = [] if range_ is None else list(range(range_[0], range_[0] + range_[1], SUBCLUSTER))
            assert covered == wanted
    assert not check(file.data).errors
