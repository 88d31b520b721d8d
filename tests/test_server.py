"""The server's life: what it does before it starts, and what becomes of what it has when it does not."""

from __future__ import annotations

import contextlib
import gc
import struct
import threading
import time
import weakref
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.errors import ConfigError, ImageError
from nbdserver.offers import Removal
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.coherence.pages import LITTLE, SOON, Pages
from tests.interop.wire import OPT_GO, READ, REP_ERR_UNKNOWN, Wire
from tests.serving import amount, create, eventually


def test_an_export_can_be_refused_before_the_server_starts(disk: Path, tmp_path: Path) -> None:
    server = Server()
    server.export("disk", File(path=str(disk)))
    with pytest.raises(ImageError):
        server.export("missing", File(path=str(tmp_path / "missing")))
    server.stop()


def test_a_server_that_never_started_lets_its_files_go(disk: Path) -> None:
    for _ in range(2):
        server = Server()
        server.export("disk", File(path=str(disk)))
        server.stop()


def test_a_server_that_cannot_listen_lets_its_files_go(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "socket").write_text("no socket")
    for _ in range(2):
        server = Server(listen=[f"nbd+unix:///?socket={tmp_path / 'socket'}"])
        server.export("disk", File(path=str(disk)))
        with pytest.raises(ConfigError, match="cannot listen"):
            server.start()
        server.stop()


def test_two_exports_of_one_name_are_refused(disk: Path) -> None:
    server = Server()
    server.export("disk", File(path=str(disk)), read_only=True)
    with pytest.raises(ConfigError, match="there is an export 'disk' already"):
        server.export("disk", File(path=str(disk)), read_only=True)
    server.stop()


def test_only_one_export_is_the_default(disk: Path) -> None:
    server = Server()
    server.export("a", File(path=str(disk)), read_only=True, default=True)
    with pytest.raises(ConfigError, match="cannot be the default"):
        server.export("b", File(path=str(disk)), read_only=True, default=True)
    server.stop()


def test_a_server_that_has_stopped_keeps_no_memory(tmp_path: Path) -> None:
    """Its buffer pool is large, and Python's collector does not know that."""
    base = create(tmp_path / "base.qcow2", 1 << 20)
    layer = Qcow2(file=File(path=str(create(tmp_path / "top.qcow2", 1 << 20, backing=base))))
    gc.collect()
    gc.disable()
    try:
        with Server(listen=[f"nbd+unix:///?socket={tmp_path / 's'}"]) as server:
            server.export("", layer)
            client = Wire(server.listening[0])
            client.go()
            client.request(READ, 0, 512)
            assert client.reply() == (0, 0)
            engine, server = weakref.ref(server._engine), weakref.ref(server)  # type: ignore[assignment]
    finally:
        gc.enable()
    assert server() is None  # type: ignore[operator]
    assert engine() is None
    assert layer.type


# -- exports and clients that go ---------------------------------------------------------------------------------------


def served(nbd_server: NbdServers, disk: Path) -> tuple[Server, str]:
    return nbd_server.start(File(path=str(disk)), name="disk")


def connect(uri: str) -> Wire:
    client = Wire(uri)
    client.go()
    client.request(READ, 0, 512)
    assert client.reply() == (0, 0)
    client.receive(512)
    return client


def is_refused(uri: str) -> bool:
    client = Wire(uri)
    client.greet()
    client.option(OPT_GO, struct.pack(">I4sH", 4, b"disk", 0))
    return client.option_reply()[0] == REP_ERR_UNKNOWN


def test_an_export_without_clients_is_removed_and_its_file_let_go(nbd_server: NbdServers, disk: Path) -> None:
    server, uri = served(nbd_server, disk)
    for mode in Removal:
        assert server.remove("disk", mode)
        assert is_refused(uri)
        server.export("disk", File(path=str(disk)))
        connect(uri).close()
        eventually(lambda: not server.exports["disk"].clients)


def test_an_export_with_clients_is_not_removed_safely(nbd_server: NbdServers, disk: Path) -> None:
    server, uri = served(nbd_server, disk)
    client = connect(uri)
    with pytest.raises(ConfigError, match="export 'disk' has 1 client"):
        server.remove("disk")
    client.request(READ, 0, 512)
    assert client.reply() == (0, 0)
    connect(uri)


def test_a_hard_removal_disconnects_clients(nbd_server: NbdServers, disk: Path) -> None:
    server, uri = served(nbd_server, disk)
    clients = [connect(uri) for _ in range(3)]
    assert server.remove("disk", Removal.HARD)
    for client in clients:
        assert client.rest() == b""
    server.export("disk", File(path=str(disk)))


def test_a_drained_export_ends_after_its_last_client(nbd_server: NbdServers, disk: Path) -> None:
    server, uri = served(nbd_server, disk)
    first, second = connect(uri), connect(uri)
    export = server.exports["disk"]
    assert not server.remove("disk", Removal.DRAIN)
    assert is_refused(uri)
    first.close()
    second.request(READ, 0, 512)
    assert second.reply() == (0, 0)
    assert not export.ended.wait(LITTLE)
    second.close()
    assert export.ended.wait(SOON)
    server.export("disk", File(path=str(disk)))


def test_an_export_that_is_leaving_is_told_to_end(nbd_server: NbdServers, disk: Path) -> None:
    server, uri = served(nbd_server, disk)
    client = connect(uri)
    assert not server.remove("disk", Removal.DRAIN)
    with pytest.raises(ConfigError, match="there is no export 'disk'"):
        server.remove("disk", Removal.SAFE)
    assert server.remove("disk", Removal.HARD)
    assert client.rest() == b""
    with pytest.raises(ConfigError, match="there is no export 'disk'"):
        server.remove("disk", Removal.HARD)


def test_a_removal_waits_for_the_requests_of_clients_that_have_gone(nbd_server: NbdServers, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    pages = Pages(file=File(path=str(tmp_path / "disk")), pages=1)
    pages.code.add(0)
    server, uri = nbd_server.start(pages, name="disk")
    pages.reading.close()
    client = Wire(uri)
    client.go()
    client.request(READ, 0, 512)
    pages.reading.wait_reached()
    assert not server.remove("disk", Removal.HARD, timeout=LITTLE), "its layers are in use"
    assert pages.file.size == 4096
    pages.reading.open()
    eventually(lambda: not server._by_id)


def test_one_client_is_disconnected_and_others_stay(nbd_server: NbdServers, disk: Path) -> None:
    server, uri = served(nbd_server, disk)
    first, second = connect(uri), connect(uri)
    one, other = server.clients
    assert (one.describe()["requests"], one.describe()["bytes_read"], one.describe()["export"]) == (1, 512, "disk")
    server.disconnect(one.id)
    assert first.rest() == b""
    second.request(READ, 0, 512)
    assert second.reply() == (0, 0)
    eventually(lambda: server.clients == [other])
    with pytest.raises(ConfigError, match=f"there is no client {one.id}"):
        server.disconnect(one.id)


def test_a_client_in_its_handshake_is_listed_and_can_be_disconnected(nbd_server: NbdServers, disk: Path) -> None:
    server, uri = served(nbd_server, disk)
    client = Wire(uri)
    eventually(lambda: bool(server.clients))
    assert server.clients[0].describe()["export"] is None
    server.disconnect(server.clients[0].id)
    client.rest()
    eventually(lambda: not server.clients)


def test_exports_that_leave_are_closed_when_the_server_stops(disk: Path, tmp_path: Path) -> None:
    with Server(listen=[f"nbd+unix:///?socket={tmp_path / 's'}"]) as server:
        server.export("disk", File(path=str(disk)))
        client = Wire(f"nbd+unix:///disk?socket={tmp_path / 's'}")
        client.go()
        assert not server.remove("disk", Removal.DRAIN)
    again = Server()
    again.export("disk", File(path=str(disk)))
    again.stop()


def test_a_storm_of_clients_over_exports_that_come_and_go(nbd_server: NbdServers, disk: Path) -> None:
    """Whoever gets in gets answers or is disconnected; nothing hangs, and every image is closed properly."""
    server, uri = served(nbd_server, disk)
    over = threading.Event()
    answered = []

    def clients() -> None:
        count = 0
        while not over.is_set():
            with contextlib.suppress(OSError, EOFError, AssertionError):
                client = Wire(uri)
                client.go()
                for _ in range(10):
                    client.request(READ, 0, 512)
                    assert client.reply() == (0, 0)
                    client.receive(512)
                    count += 1
                client.close()
        answered.append(count)

    threads = [threading.Thread(target=clients) for _ in range(4)]
    for thread in threads:
        thread.start()
    for mode in [Removal.HARD, Removal.DRAIN] * amount(15, 200):
        time.sleep(0.01)
        export = server.exports["disk"]
        server.remove("disk", mode)
        assert export.ended.wait(SOON)
        server.export("disk", File(path=str(disk)))
    over.set()
    for thread in threads:
        thread.join(SOON)
    assert len(answered) == 4
    assert sum(answered) > 100
