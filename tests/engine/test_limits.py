"""What a file takes at once: transfers are cut, by the engine as by the layers; devices are zeroed in whole blocks."""

from __future__ import annotations

import random
from pathlib import Path

import nbd
import pytest

from layers.file import File
from layers.raw import Raw
from nbdserver import _engine
from nbdserver.extent import FileMode
from nbdserver.layer import Opener
from nbdserver.reference import open_stack
from nbdserver.testing import NbdServers
from tests.engine.test_direct import engine_file, loop_device
from tests.serving import SEED, amount, backend
from tests.test_blocks import drive

__all__ = ["backend"]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB


class Narrow(File):
    """A file that takes 64 KiB at once."""

    def open(self, opener: Opener) -> None:
        mode = FileMode(self.cache, self.aio, max_transfer=64 * KIB)
        self._file = opener.file(self.path, read_only=opener.read_only, mode=mode)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(SEED).randbytes(SIZE))
    return path


def transfers(file: _engine.File) -> tuple[int, int]:
    counters = file.counters()
    assert counters["fixed"] + counters["plain"] == counters["reads"] + counters["writes"]
    return counters["reads"], counters["writes"]


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_no_transfer_is_longer(nbd_server: NbdServers, disk: Path, backend: str, cache: str) -> None:
    """On every way: the first read faults, the second does not; FUA and the write into a mapping are the layers'."""
    server, uri = nbd_server.start(Raw(Narrow(str(disk), cache)), backend=backend)  # type: ignore[arg-type]
    file = engine_file(server)
    assert file.limits.max_transfer == 64 * KIB
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = random.Random(SEED).randbytes(MIB)
    for _ in range(2):
        before = transfers(file)
        assert bytes(handle.pread(MIB + 1, 0)) == disk.read_bytes()[: MIB + 1]
        assert transfers(file)[0] - before[0] in range(17, 20)  # what is not in the page cache is met once more
    for flags in (0, nbd.CMD_FLAG_FUA):
        before = transfers(file)
        handle.pwrite(data, 64 * KIB, flags)
        assert transfers(file)[1] - before[1] == 16
        assert bytes(handle.pread(MIB, 64 * KIB)) == data
    if cache == "none" and backend == "io_uring":
        assert file.counters()["plain"] == 0
    handle.shutdown()


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_any_request(nbd_server: NbdServers, disk: Path, backend: str, cache: str) -> None:
    uri = nbd_server(Narrow(str(disk), cache), backend=backend)  # type: ignore[arg-type]
    drive(uri, SIZE, random.Random(SEED), amount(150, 3000), 600_000)


def test_the_reference_is_held_to_it_too(disk: Path) -> None:
    lengths = []
    with open_stack(layer := Narrow(str(disk))) as export:
        file = layer.open_file
        plain_read = file.read
        file.read = lambda offset, vector: (lengths.append(vector.length), plain_read(offset, vector))  # type: ignore
        assert export.read(100, 150_000) == disk.read_bytes()[100:150_100]
    assert lengths == [64 * KIB, 64 * KIB, 150_000 - 128 * KIB]


def test_on_a_device_what_is_no_whole_block_is_cut_off(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    """The kernel refuses to zero or to discard a range altogether if its ends are not aligned."""
    with loop_device(disk) as device:
        server, uri = nbd_server.start(File(device), backend=backend)
        limits = engine_file(server).limits
        assert limits.pwrite_zeroes_alignment == 4096
        assert limits.pdiscard_alignment % 4096 == 0
        handle = nbd.NBD()
        handle.connect_uri(uri)
        before = disk.stat().st_blocks
        handle.trim(MIB - 200, 100)
        handle.flush()
        assert disk.stat().st_blocks <= before - (MIB - 2 * limits.pdiscard_alignment) // 512
        handle.zero(MIB - 200, MIB + 100)
        handle.flush()
        data = random.Random(SEED).randbytes(SIZE)
        after = data[MIB : MIB + 100] + bytes(MIB - 200) + data[2 * MIB - 100 : 2 * MIB + 100]
        assert bytes(handle.pread(MIB + 100, MIB)) == after
        assert disk.stat().st_blocks <= before - (2 * MIB - 4 * limits.pdiscard_alignment) // 512
        handle.shutdown()
        server.stop()
