"""The engine's files at the edges of the engine's life."""

from __future__ import annotations

from pathlib import Path

import pytest

from layers.file import File
from nbdserver.errors import NbdserverError
from nbdserver.server import Server
from tests.coherence.pages import PAGE, Background, Pages


class Broken(Pages):
    """An image that turns out to be broken once its file is open."""

    def open(self, opener: object) -> None:
        raise NbdserverError("this image is broken")


def test_an_image_that_is_refused_before_the_server_starts_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(PAGE))
    server = Server()

    def refused() -> None:
        with pytest.raises(NbdserverError, match="broken"):
            server.export("", Broken(file=File(path=str(path)), pages=1))

    Background(refused).finish()
    server.stop()
