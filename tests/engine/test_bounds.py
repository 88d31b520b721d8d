"""What one client can make the engine do at once is bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from layers.file import File
from nbdserver.extent import Extent, Intent
from nbdserver.layer import Layer
from nbdserver.limits import PAYLOAD_MAX
from nbdserver.testing import NbdServers
from tests.interop.wire import Wire

CACHE = 5


@dataclasses.dataclass(eq=False)
class Asked(Layer):
    """Its child, and how much was asked for at once."""

    file: Layer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lengths: list[int] = []

    @property
    def size(self) -> int:
        return self.file.size

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        self.lengths.append(length)
        return (Extent(length, self.file, offset),)


def test_a_long_cache_request_is_resolved_piece_by_piece(nbd_server: NbdServers, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(4 * PAYLOAD_MAX)
    asked = Asked(file=File(path=str(path)))
    client = Wire(nbd_server(asked))
    client.go()
    client.request(CACHE, 0, 4 * PAYLOAD_MAX)
    assert client.reply() == (0, 0)
    assert len(asked.lengths) == 4
    assert max(asked.lengths) == PAYLOAD_MAX
