"""The server's life: what it does before it starts, and what becomes of what it has when it does not."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.errors import ConfigError, ImageError
from nbdserver.server import Server
from tests.interop.wire import READ, Wire
from tests.serving import create


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
