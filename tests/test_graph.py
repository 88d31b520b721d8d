"""The graph: flattening, running requests, opening and closing, and telling of changes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import threading
from collections.abc import Iterator

import pytest

from layers.memory import Memory
from layers.raw import Raw
from nbdserver.dirty import Log
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import CODE, ZERO, Extent, ExtentLawError, Intent
from nbdserver.files import FileOpener, Files, PlainFile
from nbdserver.graph import Child, Graph, Leaf, execute, flatten
from nbdserver.layer import BASE_ALLOCATION, Layer, Opener
from nbdserver.limits import DEPTH_MAX
from nbdserver.permissions import READER
from nbdserver.ranges import Uses
from nbdserver.reference import open_stack
from nbdserver.request import Flag, Request, Vector


@dataclasses.dataclass(eq=False)
class Table(Layer):
    """A layer that answers ``resolve`` from a list, and notes what is done to it."""

    extents: list[Extent]
    below: list[Layer] = dataclasses.field(default_factory=list)
    writable: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._calls: list[tuple[str, int, int]] = []
        self._length = sum(extent.length for extent in self.extents)

    @property
    def calls(self) -> list[tuple[str, int, int]]:
        return self._calls

    @property
    def size(self) -> int:
        return self._length

    @property
    def read_only(self) -> bool:
        return not self.writable

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        start = 0
        for extent in list(self.extents):
            end = start + extent.length
            if end > offset:
                into = max(offset - start, 0)
                yield extent.cut(into, extent.length - into)
            start = end

    def read(self, request: Request) -> None:
        self._calls.append(("read", request.offset, request.length))
        request.vector.fill(b"c" * request.length)

    def write(self, request: Request) -> None:
        self._calls.append(("write", request.offset, request.length))

    def flush(self) -> None:
        self._calls.append(("flush", 0, 0))


@pytest.fixture
def file() -> Iterator[PlainFile]:
    """1000 bytes in memory, open."""
    memory = Files().memory(1000, "memory")
    assert isinstance(memory, PlainFile)
    yield memory
    memory.close()


def leaves(layer: Layer, offset: int, length: int, intent: Intent = Intent.READ) -> list[Leaf]:
    return list(flatten(layer, offset, length, intent))


def read(layer: Layer, offset: int, length: int) -> bytes:
    vector = Vector.of(length)
    execute(layer, Request.read(offset, vector))
    return vector.tobytes()


# -- flatten -------------------------------------------------------------------------------------------------------


def test_a_place_of_a_child_is_followed_to_its_file(file: PlainFile) -> None:
    bottom = Table([Extent(100, ZERO), Extent(100, file, 500, True)])
    top = Table([Extent(50, bottom, 75, True), Extent(30, ZERO)])
    assert leaves(top, 0, 80) == [
        Leaf(25, ZERO, 0, False, None),
        Leaf(25, file, 500, True, None),
        Leaf(30, ZERO, 0, False, None),
    ]


def test_a_walk_may_begin_anywhere(file: PlainFile) -> None:
    bottom = Table([Extent(100, file, 500, True)])
    top = Table([Extent(50, ZERO), Extent(50, bottom, 10, True)])
    assert leaves(top, 60, 5) == [Leaf(40, file, 520, True, None)]


def test_a_child_is_not_followed_past_what_its_parent_said(file: PlainFile) -> None:
    bottom = Table([Extent(1000, file, 0, True)])
    top = Table([Extent(10, bottom, 5, True), Extent(10, CODE)])
    assert leaves(top, 0, 20) == [Leaf(10, file, 5, True, None), Leaf(10, CODE, 10, False, top)]


@pytest.mark.parametrize("ways", [(True, True), (True, False), (False, True), (False, False)])
def test_a_place_is_writable_if_all_on_the_way_say_so(file: PlainFile, ways: tuple[bool, bool]) -> None:
    bottom = Table([Extent(10, file, 0, ways[1])])
    top = Table([Extent(10, bottom, 0, ways[0])])
    assert [leaf.writable for leaf in leaves(top, 0, 10)] == [all(ways)]


def test_code_below_names_the_layer_to_call_and_its_own_offset() -> None:
    bottom = Table([Extent(10, ZERO), Extent(90, CODE)])
    top = Table([Extent(7, CODE), Extent(50, bottom, 20, True)])
    assert leaves(top, 0, 57) == [Leaf(7, CODE, 0, False, top), Leaf(50, CODE, 20, False, bottom)]


def test_nothing_is_nowhere() -> None:
    assert leaves(Table([]), 0, 0) == []


def test_depth_takes_no_stack(file: PlainFile) -> None:
    depths = []

    class Bottom(Table):
        def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
            depths.append(len(inspect.stack()))
            return super().resolve(offset, length, intent)

    for count in 1, 900:
        layer: Layer = Bottom([Extent(10, file, 0, True)])
        for _ in range(count):
            layer = Table([Extent(10, layer, 0, True)])
        assert leaves(layer, 0, 10) == [Leaf(10, file, 0, True, None)]
    assert depths[0] == depths[1]


def test_a_chain_of_900_layers_opens_serves_and_closes() -> None:
    stack: Layer = Memory(1000)
    for _ in range(900):
        stack = Raw(stack, offset=1)
    with open_stack(stack) as export:
        export.write(5, b"deep")
        assert export.size == 100
        assert export.read(4, 6) == b"\0deep\0"
        assert export.status(0, 100) == [(100, 0)]
        export.flush()


def test_a_walk_that_does_not_end_is_an_error() -> None:
    layer = Table([Extent(10, ZERO)])
    layer.extents[0] = Extent(10, layer)
    with pytest.raises(ImageError, match=f"deeper than {DEPTH_MAX}"):
        leaves(layer, 0, 10)


def test_an_unlawful_layer_is_named() -> None:
    bottom = Table([Extent(10, ZERO)])
    bottom._length = 20
    with pytest.raises(ExtentLawError, match="answered up to 0xa, asked up to 0x14"):
        leaves(Table([Extent(20, bottom)]), 0, 20)


# -- execute -------------------------------------------------------------------------------------------------------


def test_a_request_goes_to_every_place_of_its_range(file: PlainFile) -> None:
    layer = Table([Extent(4, file, 100, True), Extent(4, ZERO), Extent(4, CODE), Extent(4, file, 0, True)])
    file.write(98, Vector.of(b"..abcd.."))
    file.write(0, Vector.of(b"efgh"))
    assert read(layer, 0, 16) == b"abcd\0\0\0\0ccccefgh"
    assert read(layer, 2, 12) == b"cd\0\0\0\0ccccef"
    assert layer.calls == [("read", 8, 4), ("read", 8, 4)]


def test_code_is_called_for_its_part_only() -> None:
    bottom = Table([Extent(100, CODE)])
    top = Table([Extent(10, CODE), Extent(10, bottom, 50, True)])
    execute(top, Request.write(5, Vector.of(10)))
    assert (top.calls, bottom.calls) == ([("write", 5, 5)], [("write", 50, 5)])


def test_async_layers_are_awaited() -> None:
    class Slow(Table):
        async def read(self, request: Request) -> None:  # type: ignore[override]
            request.vector.fill(b"s" * request.length)

    assert read(Slow([Extent(4, CODE)]), 0, 4) == b"ssss"


def test_fua_is_a_write_and_a_flush() -> None:
    layer = Table([Extent(10, CODE)])
    execute(layer, Request.write(0, Vector.of(4), Flag.FUA))
    assert layer.calls == [("write", 0, 4), ("flush", 0, 0)]


def test_zeroing_passes_the_flags_on(file: PlainFile) -> None:
    asked = []

    class Noting(PlainFile):
        def zero(self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool) -> None:
            asked.append((offset, length, may_unmap, no_fallback))

    layer = Table([Extent(10, Noting(file._fd, "", False), 5, True)])
    for flags in Flag.NONE, Flag.MAY_UNMAP, Flag.NO_FALLBACK:
        execute(layer, Request.zero(1, 2, flags))
    assert asked == [(6, 2, False, False), (6, 2, True, False), (6, 2, False, True)]


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        (Request.read(9, Vector.of(2)), errno.EINVAL),
        (Request.trim(9, 2), errno.EINVAL),
        (Request.zero(9, 2), errno.ENOSPC),
        (Request.write(9, Vector.of(2)), errno.ENOSPC),
        (Request.read(1 << 63, Vector.of(1)), errno.EINVAL),
    ],
)
def test_requests_past_the_end_fail(request_: Request, number: int) -> None:
    layer = Table([Extent(10, CODE)])
    with pytest.raises(RequestError) as caught:
        execute(layer, request_)
    assert caught.value.errno == number
    assert layer.calls == []


@pytest.mark.parametrize("request_", [Request.write(0, Vector.of(2)), Request.zero(0, 2), Request.trim(0, 2)])
def test_changing_what_is_read_only_fails(request_: Request) -> None:
    with pytest.raises(RequestError) as caught:
        execute(Table([Extent(10, CODE)], writable=False), request_)
    assert caught.value.errno == errno.EPERM


class Interrupted(PlainFile):
    """Memory at whose first use something happens between looking the place up and becoming its user."""

    def __init__(self, file: PlainFile) -> None:
        super().__init__(file._fd, "", False)
        self.interruption: list[object] = []

    def use(self, offset: int, length: int) -> contextlib.AbstractContextManager[object]:
        if self.interruption:
            action = self.interruption.pop()
            assert callable(action)
            action()
        return super().use(offset, length)


@pytest.mark.parametrize("through_a_parent", [False, True])
def test_a_mapping_that_changes_before_its_use_is_resolved_again(file: PlainFile, through_a_parent: bool) -> None:
    memory = Interrupted(file)
    memory.write(0, Vector.of(b"old....new."))
    layer = Table([Extent(4, memory, 0, True)])
    root: Layer = Table([Extent(4, layer, 0, True)], [layer]) if through_a_parent else layer
    graph = Graph()
    graph.open(root, FileOpener(graph, Files()))

    def move() -> None:
        layer.extents[0] = Extent(4, memory, 7, True)
        layer.changed(0, 4)
        memory.wait_unused(0, 4)  # as nobody uses the old place, it may be overwritten now
        memory.write(0, Vector.of(b"evil"))

    memory.interruption.append(move)
    assert read(root, 0, 4) == b"new."

    def move_on() -> None:
        layer.extents[0] = Extent(4, memory, 100, True)
        layer.changed(0, 4)

    memory.interruption.append(move_on)
    execute(root, Request.write(0, Vector.of(b"data")))
    assert read(root, 0, 4) == b"data"
    vector = Vector.of(11)
    memory.read(0, vector)
    assert vector.tobytes() == b"evil...new."


def test_who_frees_a_place_waits_for_those_who_use_it(file: PlainFile) -> None:
    """The other order: the use is announced first, so the one who changes the mapping has to wait."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(PlainFile):
        def read(self, offset: int, vector: Vector) -> None:
            entered.set()
            assert go_on.wait(10)
            super().read(offset, vector)

    memory = Slow(file._fd, "", False)
    memory.write(0, Vector.of(b"good"))
    layer = Table([Extent(4, memory, 0, True)])
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read(layer, 0, 4)))
    reader.start()
    assert entered.wait(10)

    def overwrite() -> None:
        layer.changed(0, 4)
        memory.wait_unused(0, 4)
        memory.write(0, Vector.of(b"evil"))

    changer = threading.Thread(target=overwrite)
    changer.start()
    changer.join(0.1)
    assert changer.is_alive()
    go_on.set()
    reader.join(10)
    changer.join(10)
    assert got == [b"good"]


class Coded(Layer):
    """Memory that only its code reads and writes, which calls ``before`` first."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = bytearray(data)
        self.before = lambda: None

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, request: Request) -> None:
        self.before()
        request.vector.fill(self._data[request.offset : request.end])

    def write(self, request: Request) -> None:
        self._data[request.offset : request.end] = request.vector.tobytes()


def test_who_frees_a_place_waits_for_code_that_was_called_for_it() -> None:
    """What a mapping leads to may be another layer's code: it is a user of its range until it returns."""
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(10)

    below = Coded(b"good")
    below.before = hold
    root = Table([Extent(4, below, 0, True)], [below])
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read(root, 0, 4)))
    reader.start()
    assert entered.wait(10)

    def overwrite() -> None:
        root.changed(0, 4)
        below.wait_unused(0, 4)
        below.write(Request.write(0, Vector.of(b"evil")))

    changer = threading.Thread(target=overwrite)
    changer.start()
    changer.join(0.1)
    assert changer.is_alive()
    go_on.set()
    reader.join(10)
    changer.join(10)
    assert got == [b"good"]


def test_a_mapping_to_code_that_changes_before_its_use_is_resolved_again() -> None:
    below = Coded(b"old....new.")
    root = Table([Extent(4, below, 0, True)], [below])
    interruptions = [None]

    class Interrupting(Uses):
        def use(self, offset: int, length: int) -> contextlib.AbstractContextManager[None]:
            if interruptions:
                interruptions.pop()
                root.extents[0] = Extent(4, below, 7, True)
                root.changed(0, 4)
                below.wait_unused(0, 4)
                below.write(Request.write(0, Vector.of(b"evil")))
            return super().use(offset, length)

    below.code_uses = Interrupting()
    assert read(root, 0, 4) == b"new."
    interruptions.append(None)
    execute(root, Request.write(0, Vector.of(b"data")))
    assert below._data == b"evil...data"


def test_a_zero_that_changes_is_resolved_again(file: PlainFile) -> None:
    class Late(Table):
        """Says ZERO, and is written to before that is believed."""

        def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
            answer = list(super().resolve(offset, length, intent))
            if self.extents[0].target is ZERO:
                self.extents[0] = Extent(4, file, 0, True)
                file.write(0, Vector.of(b"data"))
                self.changed(0, 4)
            yield from answer

    assert read(Late([Extent(4, ZERO)]), 0, 4) == b"data"


# -- opening and closing -------------------------------------------------------------------------------------------

LOG: list[str] = []


@dataclasses.dataclass(eq=False)
class Noted(Layer):
    """A layer that notes when it is opened and closed, and may fail at either."""

    name: str
    below: list[Layer] = dataclasses.field(default_factory=list)
    fails: str = ""

    @property
    def size(self) -> int:
        return 0

    def open(self, opener: Opener) -> None:
        LOG.append(f"open {self.name}")
        if self.fails == "open":
            raise ConfigError("no")

    def close(self) -> None:
        LOG.append(f"close {self.name}")
        if self.fails == "close":
            raise ConfigError("no")


@pytest.fixture
def opened() -> tuple[Graph, Opener]:
    LOG.clear()
    graph = Graph()
    return graph, FileOpener(graph, Files())


def test_children_open_before_their_parents_and_close_after(opened: tuple[Graph, Opener]) -> None:
    graph, opener = opened
    root = Noted("root", [Noted("left", [Noted("leaf")]), Noted("right")])
    graph.open(root, opener)
    assert LOG == ["open leaf", "open left", "open right", "open root"]
    LOG.clear()
    graph.close(root)
    assert LOG[0] == "close root"
    assert LOG.index("close left") < LOG.index("close leaf")
    assert sorted(LOG) == ["close leaf", "close left", "close right", "close root"]


def test_roles_become_edges(opened: tuple[Graph, Opener]) -> None:
    graph, opener = opened
    leaf = Noted("leaf")
    root = Noted("root", [leaf])
    graph.open(root, opener)
    (role, edge), *rest = root.children()
    assert role == "below.0" and not rest
    assert isinstance(edge, Child) and edge.layer is leaf


@pytest.mark.parametrize("culprit", ["leaf", "left", "right", "root"])
def test_a_failed_open_closes_all_that_was_opened(opened: tuple[Graph, Opener], culprit: str) -> None:
    graph, opener = opened

    def noted(name: str, *below: Layer) -> Noted:
        return Noted(name, list(below), "open" if name == culprit else "")

    root = noted("root", noted("left", noted("leaf")), noted("right"))
    with pytest.raises(ConfigError):
        graph.open(root, opener)
    opens = {entry.split()[1] for entry in LOG if entry.startswith("open")}
    closes = [entry.split()[1] for entry in LOG if entry.startswith("close")]
    assert culprit in opens
    assert opens <= set(closes) and len(closes) == len(set(closes))
    assert not graph._uses and not any(graph._edges.values())


def test_a_failed_close_closes_what_is_below_all_the_same(opened: tuple[Graph, Opener]) -> None:
    graph, opener = opened
    root = Noted("root", [Noted("left", fails="close"), Noted("right")], fails="close")
    graph.open(root, opener)
    LOG.clear()
    with pytest.raises(ConfigError):
        graph.close(root)
    assert sorted(LOG) == ["close left", "close right", "close root"]


def test_a_shared_child_is_opened_once_and_closed_last(opened: tuple[Graph, Opener]) -> None:
    graph, opener = opened
    base = Noted("base")
    first, second = Noted("first", [base]), Noted("second", [base])
    graph.open(first, opener)
    graph.open(second, opener)
    graph.open(second, opener)
    graph.close(first)
    graph.close(second)
    assert "close base" not in LOG and "close second" not in LOG
    graph.close(second)
    assert LOG == ["open base", "open first", "open second", "close first", "close second", "close base"]
    graph.close(second)
    assert LOG[-1] == "close base"


def test_only_what_is_open_can_be_shared(opened: tuple[Graph, Opener]) -> None:
    graph, opener = opened
    layer = Noted("layer")
    parent = Noted("parent")
    assert not graph.share(layer, user="file", grant=READER, parent=parent)
    graph.open(layer, opener)
    assert graph.share(layer, user="file", grant=READER, parent=parent)
    graph.close(layer)
    assert "close layer" not in LOG
    graph.close(layer)
    assert not graph.share(layer, user="file", grant=READER, parent=parent)


# -- changes -------------------------------------------------------------------------------------------------------


def test_a_change_is_told_to_all_above_where_they_see_it() -> None:
    graph = Graph()
    memory = Memory(1000)
    low, high = Raw(memory, offset=100, size=200), Raw(memory, offset=250)
    top = Raw(low, offset=50)
    opener = FileOpener(graph, Files())
    told: list[tuple[str, int, int]] = []
    for name, root in ("low", low), ("high", high), ("top", top):
        graph.open(root, opener)
        graph.subscribe(root, lambda offset, length, name=name: told.append((name, offset, length)))  # type: ignore[misc]
    memory.changed(120, 150)
    assert sorted(told) == [("high", 0, 20), ("low", 20, 150), ("top", 0, 120)]
    assert (memory.changes, low.changes, high.changes, top.changes) == (1, 1, 1, 1)
    told.clear()
    memory.changed(0, 100)
    assert told == []
    low.changed(150, 10)
    assert sorted(told) == [("low", 150, 10), ("top", 100, 10)]


def test_a_layer_that_cannot_translate_says_everything() -> None:
    graph = Graph()
    bottom = Memory(100)
    top = Table([Extent(500, CODE)], [bottom])
    graph.open(top, FileOpener(graph, Files()))
    told: list[tuple[int, int]] = []
    stop = graph.subscribe(top, lambda offset, length: told.append((offset, length)))
    bottom.changed(3, 4)
    stop()
    bottom.changed(3, 4)
    assert told == [(0, 500)]


def test_a_layer_that_is_closed_is_told_no_more() -> None:
    graph = Graph()
    bottom = Memory(100)
    top = Raw(bottom)
    opener = FileOpener(graph, Files())
    graph.open(bottom, opener)
    graph.open(top, opener)
    graph.close(top)
    bottom.changed(0, 10)
    assert (bottom.changes, top.changes) == (1, 0)


# -- inherited answers ---------------------------------------------------------------------------------------------


# -- dirty logs ------------------------------------------------------------------------------------------------------


class NotingLog(Log):
    """A log that notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[int, int]] = []

    def mark(self, offset: int, length: int) -> None:
        self.marks.append((offset, length))


def logged(layer: Layer) -> list[tuple[int, int]]:
    """Give the layer a log; what is marked there."""
    log = layer.dirty_log = NotingLog()
    return log.marks


def test_a_leaf_tells_where_it_lies_in_each_layer_with_a_log(file: PlainFile) -> None:
    bottom = Table([Extent(100, file, 1000, True)])
    middle = Table([Extent(10, ZERO), Extent(50, bottom, 20, True)])
    top = Table([Extent(30, middle, 15, True), Extent(7, CODE)])
    logged(bottom), logged(top)
    leaves = list(flatten(top, 3, 34, Intent.READ))
    assert [leaf.logs for leaf in leaves] == [((top.dirty_log, 3), (bottom.dirty_log, 28)), ((top.dirty_log, 30),)]
    assert [leaf.logs for leaf in flatten(middle, 0, 20, Intent.READ)] == [(), ((bottom.dirty_log, 20),)]


def test_all_that_changes_a_layer_is_marked_and_reading_is_not(file: PlainFile) -> None:
    bottom = Table([Extent(100, file, 1000, True), Extent(100, CODE)])
    top = Table([Extent(150, bottom, 50, True)])
    above, below = logged(top), logged(bottom)
    execute(top, Request.read(0, Vector.of(150)))
    assert not above and not below
    execute(top, Request.write(40, Vector.of(20)))
    assert above == [(40, 10), (50, 10)] and below == [(90, 10), (100, 10)]
    for request in (Request.zero(0, 5), Request.trim(1, 5)):
        execute(bottom, request)
    assert below[2:] == [(0, 5), (1, 5)] and len(above) == 2


def test_what_leaves_the_content_as_it_is_is_not_marked(file: PlainFile) -> None:
    layer = Table([Extent(100, file, 1000, True)])
    marks = logged(layer)
    execute(layer, Request.write(0, Vector.of(10), Flag.WRITE_UNCHANGED))
    assert not marks


def test_what_failed_is_marked_all_the_same(file: PlainFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "the storage fails")

    layer = Table([Extent(100, file, 0, True), Extent(100, CODE)])
    marks = logged(layer)
    monkeypatch.setattr(layer, "write", fail)
    with pytest.raises(OSError):
        execute(layer, Request.write(90, Vector.of(20)))
    assert marks == [(90, 10), (100, 10)]
    monkeypatch.setattr(file, "write", fail)
    with pytest.raises(OSError):
        execute(layer, Request.write(0, Vector.of(20)))
    assert marks[2:] == [(0, 20)]


def test_what_only_a_layers_code_can_do_is_marked(file: PlainFile, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Table([Extent(100, file, 0, True)])
    monkeypatch.setattr(Table, "supported_write_flags", Flag.WRITE_COMPRESSED)
    marks = logged(layer)
    execute(layer, Request.write(30, Vector.of(20), Flag.WRITE_COMPRESSED))
    assert layer.calls == [("write", 30, 20)] and marks == [(30, 20)]


def test_status_follows_resolve(file: PlainFile) -> None:
    file.write(0, Vector.of(b"d" * 1000))
    bottom = Table([Extent(10, file, 0, True), Extent(10, ZERO)])
    top = Table([Extent(5, CODE), Extent(15, bottom, 5, True), Extent(5, ZERO)])
    assert list(top.status(BASE_ALLOCATION, 0, 25)) == [(5, 0), (5, 0), (10, 3), (5, 3)]
    assert list(top.status(BASE_ALLOCATION, 3, 10)) == [(2, 0), (5, 0), (3, 3)]


def test_zeroes_are_written_out_where_a_layer_has_no_better_way() -> None:
    written: list[tuple[int, bytes]] = []

    class Data(Table):
        def write(self, request: Request) -> None:
            written.append((request.offset, request.vector.tobytes()))

    layer = Data([Extent(3 << 20, CODE)])
    execute(layer, Request.zero(5, (1 << 20) + 3))
    assert written == [(5, bytes(1 << 20)), (5 + (1 << 20), bytes(3))]
    with pytest.raises(RequestError) as caught:
        execute(layer, Request.zero(5, 3, Flag.NO_FALLBACK))
    assert caught.value.errno == errno.ENOTSUP


def test_waiting_for_users_goes_down_to_the_file(file: PlainFile) -> None:
    waited: list[tuple[int, int]] = []

    class Noting(PlainFile):
        def wait_unused(self, offset: int, length: int) -> None:
            waited.append((offset, length))

    bottom = Table([Extent(100, Noting(file._fd, "", False), 500, True)])
    Table([Extent(10, ZERO), Extent(50, bottom, 20, True)]).wait_unused(5, 25)
    assert waited == [(520, 20)]
