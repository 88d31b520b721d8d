"""Resizing a disk that is being served: what has waited is judged by the size that it meets."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from layers.file import File
from layers.memory import Memory
from layers.raw import Raw
from nbdserver.errors import ConfigError, RequestError
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from nbdserver.uri import parse
from tests.coherence.pages import LITTLE, Background
from tests.interop.wire import READ, WRITE, Wire

PAGE = 4096
SIZE = 16 * PAGE


@pytest.fixture
def server(nbd_server: NbdServers, disk: Path, backend: str) -> Server:
    with disk.open("r+b") as file:
        file.truncate(SIZE)
    return nbd_server.start(Raw(file=File(path=str(disk))), name="disk", backend=backend)[0]


def connect(server: Server) -> Wire:
    client = Wire(str(parse(server.listening[0]).with_export("disk")))
    client.go()
    return client


def test_a_request_parked_over_a_shrink_is_judged_again(server: Server, disk: Path) -> None:
    client, other = connect(server), connect(server)
    with server.exports["disk"].drained():
        client.request(WRITE, SIZE - PAGE, PAGE, cookie=1, data=b"x" * PAGE)
        client.request(WRITE, 0, PAGE, cookie=3, data=b"y" * PAGE)
        other.request(READ, SIZE - PAGE, PAGE, cookie=2)
        threading.Event().wait(LITTLE)  # they are parked
        server.resize("disk", SIZE - PAGE)
    assert client.reply() == (1, errno.ENOSPC)
    assert client.reply() == (3, 0)
    assert other.reply() == (2, errno.EINVAL)
    assert disk.stat().st_size == SIZE - PAGE, "a write past the end has brought it back"


def test_a_write_whose_payload_comes_after_a_shrink_is_judged_again(server: Server, disk: Path) -> None:
    client = connect(server)
    client.request(WRITE, SIZE - PAGE, PAGE, cookie=1, data=b"x" * 100)
    threading.Event().wait(LITTLE)  # taken, not whole
    server.resize("disk", SIZE - PAGE)
    client.send(b"x" * (PAGE - 100))
    assert client.reply() == (1, errno.ENOSPC)
    assert disk.stat().st_size == SIZE - PAGE


def test_what_a_disk_has_grown_by_can_be_used_at_once(server: Server) -> None:
    client = connect(server)
    client.request(READ, SIZE, PAGE)
    assert client.reply()[1] == errno.EINVAL
    server.resize("disk", 2 * SIZE)
    client.request(WRITE, 2 * SIZE - PAGE, PAGE, data=b"n" * PAGE)
    assert client.reply()[1] == 0
    client.request(READ, 2 * SIZE - 2 * PAGE, 2 * PAGE)
    assert client.reply()[1] == 0
    assert client.receive(2 * PAGE) == bytes(PAGE) + b"n" * PAGE


def test_what_was_cut_off_reads_as_zeroes_when_it_comes_back(server: Server) -> None:
    client = connect(server)
    client.request(WRITE, 0, SIZE, data=b"o" * SIZE)
    assert client.reply()[1] == 0
    server.resize("disk", PAGE)
    server.resize("disk", SIZE)
    client.request(READ, 0, SIZE)
    assert client.reply()[1] == 0
    assert client.receive(SIZE) == b"o" * PAGE + bytes(SIZE - PAGE)


def test_a_resize_waits_for_requests_that_run(server: Server) -> None:
    with server.exports["disk"].running():
        resize = Background(server.resize, "disk", PAGE)
        assert not resize.is_done()
    resize.finish()
    assert server.exports["disk"].info.size == PAGE


def test_layers_that_cannot_be_resized_stay_what_they_are(nbd_server: NbdServers, disk: Path) -> None:
    server, _ = nbd_server.start(Raw(file=File(path=str(disk)), size=PAGE), name="disk")
    with pytest.raises(RequestError, match="cannot be resized"):
        server.resize("disk", SIZE)
    assert server.exports["disk"].info.size == server.exports["disk"].engine_export.size == PAGE


def test_what_others_stand_on_is_not_resized_under_them(nbd_server: NbdServers) -> None:
    below = Memory(SIZE)
    server, _ = nbd_server.start(below, name="below")
    server.export("same", below)
    server.resize("same", 2 * SIZE)
    assert server.exports["below"].info.size == 2 * SIZE
    server.export("above", Raw(file=below))
    with pytest.raises(ConfigError, match="export 'below' stands on layers that export 'above' uses too"):
        server.resize("below", SIZE)


def test_who_reads_only_is_not_resized(nbd_server: NbdServers, disk: Path) -> None:
    server, _ = nbd_server.start(File(path=str(disk)), name="disk", read_only=True)
    with pytest.raises(ConfigError, match="export 'disk' is read-only"):
        server.resize("disk", SIZE)
