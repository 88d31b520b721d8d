"""Room made before a write (`Layer.make_room`), so that the engine can write: what is cached of it, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver import server as serving
from nbdserver.extent import Intent
from nbdserver.graph import Leaf
from nbdserver.layer import Layer
from nbdserver.limits import KIB, MIB
from nbdserver.reference import Reference
from nbdserver.testing import NbdServers
from tests.interop.wire import READ, WRITE, Wire
from tests.serving import create, run

CLUSTER = 64 * KIB


class Stage:
    """A server, a disk, and a client."""

    def __init__(self, nbd_server: NbdServers, path: Path) -> None:
        self.path, self.disk = path, Qcow2(File(str(path)))
        self.server, uri = nbd_server.start(self.disk)
        self.client = Wire(uri)
        self.client.go()

    def read(self, offset: int, length: int) -> bytes:
        self.client.request(READ, offset, length)
        assert self.client.reply()[1] == 0
        return self.client.receive(length)

    def write(self, offset: int, data: bytes) -> None:
        self.client.request(WRITE, offset, len(data), data=data)
        assert self.client.reply()[1] == 0

    def calls(self) -> int:
        counters = self.server.stats()["exports"][""]
        return sum(count for name, count in counters.items() if name.endswith("_calls"))


@pytest.fixture
def stage(nbd_server: NbdServers, tmp_path: Path) -> Iterator[Stage]:
    path = create(tmp_path / "disk.qcow2", 64 * MIB)
    stage = Stage(nbd_server, path)
    yield stage
    stage.client.close()
    stage.server.stop()
    run("qemu-img", "check", path)


def test_zeroes_that_are_cached_are_dropped(stage: Stage) -> None:
    assert stage.read(0, 8 * MIB) == bytes(8 * MIB)
    stage.write(5 * MIB, b"x" * 512)
    assert stage.read(5 * MIB, 1024) == b"x" * 512 + bytes(512)
    assert stage.read(4 * MIB, MIB) == bytes(MIB)


def test_all_the_room_is_entered_at_once(stage: Stage) -> None:
    stage.write(5 * MIB, b"x" * 512)
    calls = stage.calls()
    for offset in range(4 * MIB, 8 * MIB, CLUSTER):
        stage.write(offset, b"y" * 512)
    assert stage.calls() == calls
    assert stage.read(5 * MIB, 1024) == b"y" * 512 + bytes(512)


def test_room_that_is_lost_again_before_it_is_entered_is_not_written_to(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its being resolved and its being entered the cluster is freed, and somebody else takes it."""
    lost = False

    def flatten(layer: Layer, offset: int, length: int, intent: Intent, **how: Any) -> Iterator[Leaf]:
        nonlocal lost
        leaves = list(original(layer, offset, length, intent, **how))
        if intent is Intent.WRITE and leaves[0].writable and not lost:
            lost = True
            disk = Reference(stage.disk)
            disk.trim(4 * MIB, 4 * MIB)
            disk.flush()  # only then is it free
            disk.write(32 * MIB, b"z" * 4 * MIB)
        return iter(leaves)

    original = serving.flatten
    monkeypatch.setattr(serving, "flatten", flatten)
    stage.write(5 * MIB, b"x" * 512)
    assert lost
    assert stage.read(32 * MIB, 4 * MIB) == b"z" * 4 * MIB
    assert stage.read(4 * MIB, 4 * MIB) == bytes(MIB) + b"x" * 512 + bytes(3 * MIB - 512)


def test_no_room_is_made_where_a_backing_file_shows(nbd_server: NbdServers, tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 8M", base)
    stage = Stage(nbd_server, create(tmp_path / "disk.qcow2", 64 * MIB, backing=base))
    stage.write(5 * MIB + 4096, b"x" * 4096)
    assert stage.read(5 * MIB, CLUSTER) == b"\7" * 4096 + b"x" * 4096 + b"\7" * (CLUSTER - 8192)
    assert stage.disk.make_room(6 * MIB, 4096) is None
