"""Layers put in above others, and taken out again, while clients are connected."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from layers.detect_zeroes import DetectZeroes
from layers.file import File
from layers.memory import Memory
from layers.raw import Raw
from layers.throttle import Throttle
from nbdserver.errors import ConfigError
from nbdserver.graph import Child, Graph, walk
from nbdserver.layer import Layer
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from nbdserver.uri import parse
from tests.coherence.pages import LITTLE, PAGE, Background, Pages
from tests.interop.wire import READ, WRITE, Wire

PAGES = 16
SIZE = PAGES * PAGE


def image(path: Path, letter: bytes) -> File:
    path.write_bytes(letter * SIZE)
    return File(path=str(path))


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    return Pages(file=image(tmp_path / "disk.raw", b"d"), pages=PAGES)


@pytest.fixture
def server(nbd_server: NbdServers, pages: Pages, backend: str) -> Server:
    return nbd_server.start(pages, name="disk", backend=backend)[0]


def connect(server: Server, name: str = "disk") -> Wire:
    client = Wire(str(parse(server.listening[0]).with_export(name)))
    client.go()
    return client


def read(client: Wire, page: int = 0) -> bytes:
    client.request(READ, page * PAGE, PAGE)
    assert client.reply() == (0, 0)
    data = client.receive(PAGE)
    assert len(set(data)) == 1
    return data[:1]


def write(client: Wire, page: int, letter: bytes) -> None:
    client.request(WRITE, page * PAGE, PAGE, data=letter * PAGE)
    assert client.reply() == (0, 0)


def roles(layer: Layer) -> list[tuple[str, str]]:
    return [(path, below.type) for path, below in walk(layer)]


def users(server: Server, layer: Layer) -> int:
    return len(server._graph._uses.get(layer, ()))


# -- roots ---------------------------------------------------------------------------------------------------------


def test_what_was_cached_of_the_old_root_is_dropped(server: Server, tmp_path: Path) -> None:
    client = connect(server)
    write(client, 0, b"o")
    assert [read(client, page) for page in range(3)] == [b"o", b"d", b"d"]
    export = server.exports["disk"]
    with server.opened_layers(image(tmp_path / "other", b"n")) as other, export.drained():
        export.replace_root(other)
    assert [read(client, page) for page in range(3)] == [b"n"] * 3
    write(client, 1, b"w")
    assert (tmp_path / "other").read_bytes()[PAGE : PAGE + 1] == b"w"
    assert (tmp_path / "disk.raw").read_bytes()[PAGE : PAGE + 1] == b"d"


def test_the_old_root_is_closed_when_nobody_else_uses_it(server: Server, pages: Pages) -> None:
    export = server.exports["disk"]
    with server.opened_layers(Memory(SIZE)) as other, export.drained():
        export.replace_root(other)
    assert not server.is_open(pages)
    assert users(server, other) == 1


def test_a_filter_is_put_in_and_taken_out_and_changes_below_it_are_heard(server: Server, pages: Pages) -> None:
    client = connect(server)
    export = server.exports["disk"]
    assert read(client, 3) == b"d"
    for _ in range(3):
        with server.drained(pages), server.opened_layers(DetectZeroes(file=pages)) as layer:
            export.replace_root(layer)
        assert (users(server, pages), users(server, layer)) == (1, 1)
        write(client, 5, b"f")
        assert read(client, 3) in (b"d", b"f")
        pages.table[3] = 5
        pages.changed(3 * PAGE, PAGE)
        assert read(client, 3) == b"f"
        with server.drained(pages):
            export.replace_root(pages)
        assert not server.is_open(layer)
        assert users(server, pages) == 1
        assert read(client, 3) == b"f"
        pages.table[3] = 4
        pages.changed(3 * PAGE, PAGE)
        assert read(client, 3) == b"d"
        write(client, 5, b"d")


def test_changes_of_what_is_no_longer_there_are_not_heard(server: Server, pages: Pages) -> None:
    export = server.exports["disk"]
    server.export("same", pages)
    with server.opened_layers(Memory(SIZE)) as other, export.drained():
        export.replace_root(other)
    before = export.engine_export.sequence
    pages.changed(0, PAGE)
    assert export.engine_export.sequence == before


def test_requests_that_run_end_first_and_those_that_come_meet_the_new_root(
    server: Server, pages: Pages, tmp_path: Path
) -> None:
    client, other_client = connect(server), connect(server)
    export = server.exports["disk"]
    pages.code.add(0)
    pages.reading.close()
    client.request(READ, 0, PAGE)
    pages.reading.wait_reached()

    def replace() -> None:
        with server.opened_layers(image(tmp_path / "other", b"n")) as other, export.drained():
            export.replace_root(other)

    replacing = Background(replace)
    assert not replacing.is_done()
    other_client.request(READ, PAGE, PAGE)  # it waits
    pages.reading.open()
    replacing.finish()
    assert client.reply() == (0, 0)
    assert client.receive(PAGE) == b"d" * PAGE
    assert other_client.reply() == (0, 0)
    assert other_client.receive(PAGE) == b"n" * PAGE


def test_a_new_root_of_another_size_is_a_resize(server: Server) -> None:
    client = connect(server)
    export = server.exports["disk"]
    with server.opened_layers(Memory(SIZE // 2)) as other, export.drained():
        export.replace_root(other)
    client.request(READ, SIZE // 2, PAGE)
    assert client.reply()[1] == errno.EINVAL
    assert export.info.size == SIZE // 2


def test_a_disk_that_is_written_does_not_become_read_only(server: Server, pages: Pages, tmp_path: Path) -> None:
    export = server.exports["disk"]
    with (
        server.opened_layers(image(tmp_path / "other", b"n"), read_only=True) as other,
        export.drained(),
        pytest.raises(ConfigError, match="export 'disk' is writable, but file is not"),
    ):
        export.replace_root(other)
    assert export.root is pages
    assert read(connect(server)) == b"d"
    assert not server.is_open(other)


def test_a_root_that_writes_through_has_every_write_durable(server: Server, tmp_path: Path) -> None:
    client = connect(server)
    export = server.exports["disk"]
    (tmp_path / "other").write_bytes(bytes(SIZE))
    with server.opened_layers(File(path=str(tmp_path / "other"), cache="writethrough")) as other, export.drained():
        export.replace_root(other)
    write(client, 0, b"w")
    assert export.counters()["files"][str(tmp_path / "other")]["syncs"] == 1


# -- anywhere ------------------------------------------------------------------------------------------------------


def test_a_layer_in_the_middle_is_replaced_for_all_who_stand_on_it(
    nbd_server: NbdServers, pages: Pages, tmp_path: Path
) -> None:
    server, _ = nbd_server.start(Raw(file=pages, offset=PAGE), name="above")
    server.export("same", pages)
    above, same = connect(server, "above"), connect(server, "same")
    write(same, 1, b"1")
    assert (read(above, 0), read(same, 1)) == (b"1", b"1")
    with server.opened_layers(image(tmp_path / "other", b"n")) as other:
        server.replace(pages, other)
    assert (read(above, 0), read(same, 1)) == (b"n", b"n")
    assert not server.is_open(pages)
    assert users(server, other) == 2
    write(above, 0, b"w")
    assert read(same, 1) == b"w"


def test_a_layer_is_put_in_above_a_node_for_all_who_stand_on_it_and_taken_out(
    nbd_server: NbdServers, pages: Pages
) -> None:
    server, _ = nbd_server.start(Raw(file=pages), name="above")
    server.export("same", pages)
    above, same = connect(server, "above"), connect(server, "same")
    assert read(above, 3) == read(same, 3) == b"d"
    with server.opened_layers(Throttle(file=pages, iops_total=100000)) as layer:
        server.replace(pages, layer)
    assert roles(server.exports["above"].root) == [
        ("/", "raw"),
        ("/file", "throttle"),
        ("/file/file", "pages"),
        ("/file/file/file", "file"),
    ]
    assert server.exports["same"].root is layer
    assert (users(server, pages), users(server, layer)) == (1, 2)
    write(same, 5, b"f")
    pages.table[3] = 5
    pages.changed(3 * PAGE, PAGE)
    assert read(above, 3) == read(same, 3) == b"f"
    server.replace(layer, pages)
    assert (users(server, pages), server.is_open(layer)) == (2, False)
    pages.table[3] = 3
    pages.changed(3 * PAGE, PAGE)
    assert read(above, 3) == read(same, 3) == b"d"


def test_other_exports_go_on_meanwhile(nbd_server: NbdServers, pages: Pages, tmp_path: Path) -> None:
    server, _ = nbd_server.start(pages, name="disk")
    server.export("other", image(tmp_path / "other", b"n"))
    other = connect(server, "other")
    with server.drained(pages):
        assert read(other) == b"n"
        waiting = connect(server)
        waiting.request(READ, 0, PAGE)
        waiting.socket.settimeout(LITTLE)
        with pytest.raises(TimeoutError):
            waiting.reply()


def test_the_graph_alone_keeps_count() -> None:
    """`Graph.replace` with no server: edges, users, changes."""
    graph = Graph()
    base, top = Memory(SIZE), Raw(file=Memory(SIZE))
    from nbdserver.files import FileOpener, Files

    opener = FileOpener(graph, Files())
    graph.open(top, opener)
    graph.open(base, opener)
    assert isinstance(top.file, Child)
    old = top.file.layer
    changes = top.changes
    graph.replace(old, base)
    assert top.file.layer is base
    assert top.changes == changes + 1
    assert not graph.is_open(old)
    graph.close(base)
    assert graph.is_open(base), "top stands on it"
    graph.close(top)
    assert not graph.is_open(base)
