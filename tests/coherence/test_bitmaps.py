"""Rules 4 and 7 for the bitmaps of a disk that is being served: no write is answered before it is marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.raw import Raw
from nbdserver.extent import Intent
from nbdserver.layer import DIRTY_BITMAP
from nbdserver.server import Export, Server
from nbdserver.testing import NbdServers
from tests.coherence.pages import LITTLE, SOON, Background, stopped_at
from tests.interop.wire import TRIM, WRITE, WRITE_ZEROES, Wire
from tests.layers.bitmap_kit import AUTO, IN_USE, stored
from tests.serving import BACKENDS, create

KIB, MIB = 1 << 10, 1 << 20


class Stage:
    """A qcow2 image that is served, with a client; the first 64 KiB are allocated, and known to the engine."""

    def __init__(self, nbd_server: NbdServers, path: Path, backend: str) -> None:
        self.path = create(path, MIB)
        self.layer = Qcow2(File(str(self.path)))
        self.server, uri = nbd_server.start(self.layer, backend=backend)
        self.client = Wire(uri)
        self.client.go()
        self._counted = 0
        for _ in range(3):
            self.write(0)
        assert self.hits() > 0, "the last one was the engine's alone"

    def request(self, command: int, offset: int, length: int = 512) -> None:
        self.client.request(command, offset, length, data=b"x" * length if command == WRITE else b"")

    def write(self, offset: int) -> None:
        self.request(WRITE, offset)
        assert self.client.reply()[1] == 0

    def hits(self) -> int:
        """Requests that the engine has answered alone since this was last asked."""
        counted = int(self.export.engine_export.counters()["hits"])
        before, self._counted = self._counted, counted
        return counted - before

    @property
    def export(self) -> Export:
        return self.server.exports[""]

    def add(self, name: str) -> None:
        with self.server.drained(self.layer):
            self.layer.add_bitmap(name, granularity=4096)

    def dirty(self, name: str) -> list[tuple[int, int]]:
        at, found = 0, []
        for length, flags in self.layer.status(DIRTY_BITMAP + name, 0, MIB):
            if flags:
                found.append((at, length))
            at += length
        return found


@pytest.fixture
def stage(nbd_server: NbdServers, tmp_path: Path, backend: str) -> Stage:
    return Stage(nbd_server, tmp_path / "image", backend)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_bitmap_records_what_is_written_where_the_engine_knew_the_place_before(stage: Stage) -> None:
    stage.add("b0")
    assert stage.dirty("b0") == []
    stage.write(8 * KIB)
    assert stage.dirty("b0") == [(8 * KIB, 4096)]
    stage.hits()
    stage.write(16 * KIB)
    assert stage.hits() == 1, "recording costs no Python"
    assert stage.dirty("b0") == [(8 * KIB, 4096), (16 * KIB, 4096)]
    with stage.server.drained(stage.layer):
        stage.layer.disable_bitmap("b0")
    stage.write(24 * KIB)
    assert stage.dirty("b0") == [(8 * KIB, 4096), (16 * KIB, 4096)]


@pytest.mark.parametrize(("command", "offset"), [(WRITE, 0), (WRITE, 512 * KIB), (WRITE_ZEROES, 0), (TRIM, 0)])
def test_no_write_is_answered_before_it_is_marked(stage: Stage, command: int, offset: int) -> None:
    """In place, by allocating, by zeroing and by trimming."""
    stage.add("b0")
    stage.write(32 * KIB)
    length = 512 if command == WRITE else 64 * KIB
    with stopped_at("log.mark") as stop:
        stage.request(command, offset, length)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        stage.client.socket.settimeout(LITTLE)
        with pytest.raises(TimeoutError):
            stage.client.reply()
        assert offset not in [at for at, _ in stage.dirty("b0")]
        stage.client.socket.settimeout(SOON)
    assert stage.client.reply()[1] == 0
    assert offset in [at for at, _ in stage.dirty("b0")]


def test_a_bitmap_is_not_switched_while_a_write_is_under_way(stage: Stage) -> None:
    stage.add("b0")
    stage.write(0)
    with stage.server.drained(stage.layer):
        stage.layer.clear_bitmap("b0")
    with stopped_at("log.mark") as stop:
        stage.request(WRITE, 0)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        switching = Background(lambda: _disable(stage.server, stage.layer))
        assert not switching.is_done(), "the write is on the disk and not in the bitmap"
    switching.finish()
    assert stage.client.reply()[1] == 0
    found = stored(stage.path.read_bytes())["b0"]
    assert found.flags == 0 and found.dirty == {0}


def _disable(server: Server, layer: Qcow2) -> None:
    with server.drained(layer):
        layer.disable_bitmap("b0")


def test_it_is_in_use_in_the_file_before_anything_is_written(nbd_server: NbdServers, tmp_path: Path) -> None:
    stage = Stage(nbd_server, tmp_path / "image", BACKENDS[0])
    stage.add("b0")
    assert stored(stage.path.read_bytes())["b0"].flags == AUTO | IN_USE
    stage.server.stop()
    assert stored(stage.path.read_bytes())["b0"].flags == AUTO


def test_a_write_through_two_layers_that_record_is_marked_in_both(nbd_server: NbdServers, tmp_path: Path) -> None:
    """An image within an image. The engine marks in one log; such writes go through Python."""
    outer = create(tmp_path / "outer", 4 * MIB)
    inner = Qcow2(Raw(Qcow2(File(str(outer))), offset=MIB), backing=False)
    create(tmp_path / "inner", MIB)
    data = (tmp_path / "inner").read_bytes()
    server, uri = nbd_server.start(Qcow2(File(str(outer))))
    client = Wire(uri)
    client.go()
    client.request(WRITE, MIB, len(data), data=data)
    assert client.reply()[1] == 0
    server.stop()
    server, uri = nbd_server.start(inner)
    with server.drained(inner):
        below = inner.file.layer.file.layer  # type: ignore[attr-defined]
        inner.add_bitmap("above", granularity=4096)
        below.add_bitmap("below", granularity=4096)
    client = Wire(uri)
    client.go()
    for _ in range(3):
        client.request(WRITE, 100 * KIB, 512, data=b"z" * 512)
        assert client.reply()[1] == 0
    above = list(inner.status(DIRTY_BITMAP + "above", 0, MIB))
    assert above == [(100 * KIB, 0), (4096, 1), (MIB - 104 * KIB, 0)]
    marked = sum(length for length, flags in below.status(DIRTY_BITMAP + "below", 0, 4 * MIB) if flags)
    place = next(iter(inner.resolve(100 * KIB, 512, Intent.WRITE))).offset + MIB
    assert marked and next(iter(below.status(DIRTY_BITMAP + "below", place, 512)))[1] == 1
