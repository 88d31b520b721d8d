"""The server's life: what it does before it starts, and what becomes of what it has when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from layers.file import File
from nbdserver.errors import ConfigError, ImageError
from nbdserver.server import Server


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
