"""How often Python is called for so many requests: what speed rests on, and the same on any machine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.limits import GIB, KIB, MIB
from nbdserver.testing import NbdServers
from tests.interop.wire import READ, WRITE, Wire
from tests.serving import SEED, create


class Counted:
    """An export, a client, and how often Python has been called since."""

    def __init__(self, nbd_server: NbdServers, path: Path) -> None:
        self.server, uri = nbd_server.start(Qcow2(File(str(path))))
        self.client = Wire(uri)
        self.client.go()

    def calls(self) -> int:
        counters = self.server.stats()["exports"][""]
        return sum(count for name, count in counters.items() if name.endswith("_calls"))

    def write(self, offset: int, data: bytes) -> None:
        self.client.request(WRITE, offset, len(data), data=data)
        assert self.client.reply()[1] == 0

    def read(self, offset: int, length: int) -> bytes:
        self.client.request(READ, offset, length)
        assert self.client.reply()[1] == 0
        return self.client.receive(length)


@pytest.fixture
def disk(nbd_server: NbdServers, tmp_path: Path) -> Counted:
    return Counted(nbd_server, create(tmp_path / "disk.qcow2", 4 * GIB))


def test_first_writes_in_a_row(disk: Counted) -> None:
    for offset in range(0, 256 * MIB, 256 * KIB):
        disk.write(offset, b"x" * 4096)
    assert disk.calls() <= 256 // 16 + 4


def test_first_writes_here_and_there(disk: Counted) -> None:
    pick = random.Random(SEED)
    for _ in range(2000):
        disk.write(pick.randrange(4 * GIB // 4096) * 4096, b"x" * 512)
    assert disk.calls() <= 600  # 4 GiB, 4 to 16 MiB at once


def test_reading_what_was_written_in_a_row(nbd_server: NbdServers, tmp_path: Path) -> None:
    disk = Counted(nbd_server, create(tmp_path / "disk.qcow2", 4 * GIB, preallocation="metadata"))
    for offset in range(0, 4 * GIB, MIB):
        disk.read(offset, 512)
    assert disk.calls() <= 4 * GIB // (512 * MIB) + 8, "one for each L2 table"
    counters = disk.server.stats()["exports"][""]
    assert counters["cache_bytes"] < 64 * KIB
