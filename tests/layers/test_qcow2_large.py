"""Large images: opening one reads its tables once, reading all over one takes the memory that the caches may take."""

from __future__ import annotations

import dataclasses
import random
import re
import time
from pathlib import Path

import nbd
import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.layer import Layer
from nbdserver.reference import open_stack
from nbdserver.request import Request
from nbdserver.testing import NbdServers, ServerProcess
from tests.layers.qcow2_large import CLUSTER, make_large
from tests.serving import SEED, amount, check

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@dataclasses.dataclass(eq=False)
class Counting(Layer):
    """Counts what is read."""

    file: Layer
    reads: int = 0
    bytes_read: int = 0

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, request: Request) -> None:
        self.reads += 1
        self.bytes_read += request.length
        self.file.read(request)

    def write(self, request: Request) -> None:
        self.file.write(request)


def test_they_are_sound(tmp_path: Path) -> None:
    for number, data in enumerate((False, True)):
        check(make_large(tmp_path / str(number), 3 * GIB, data=data))


@pytest.mark.parametrize("read_only", [True, False])
def test_opening_reads_what_it_needs(tmp_path: Path, read_only: bool) -> None:
    path = make_large(tmp_path / "image", 64 * TIB)
    counting = Counting(File(str(path)))
    began = time.process_time()
    with open_stack(Qcow2(counting), read_only=read_only):
        assert counting.reads < 10 and counting.bytes_read < MIB + 4 * CLUSTER, "the L1 table has 1 MiB"
        assert time.process_time() - began < 1, "as much as it took before it was done for all L2 tables at once"


def test_tables_are_kept_as_far_as_the_cache_reaches(tmp_path: Path) -> None:
    layer = Qcow2(File(str(make_large(tmp_path / "image", 64 * TIB))), l2_cache_size=MIB)
    pick = random.Random(SEED)
    with open_stack(layer, read_only=True) as disk:
        for _ in range(100):
            disk.read(pick.randrange(64 * TIB // CLUSTER) * CLUSTER, 512)
        assert len(layer.reader.mapping._cache._clean) == MIB // CLUSTER


@pytest.mark.alone
def test_random_reads_take_what_the_caches_may_take(nbd_server: NbdServers, tmp_path: Path) -> None:
    """The whole disk is allocated, in as many pieces as there can be."""
    size = amount(64 * GIB, TIB)
    make_large(tmp_path / "image", size, data=True)
    grown = {}
    for cache in (MIB, 16 * MIB):
        layers = f'[{{ type = "qcow2", l2_cache_size = {cache} }}, {{ type = "file", path = "image" }}]'
        config = tmp_path / f"{cache}.toml"
        config.write_text(f'[engine]\npool = "32M"\n[exports.disk]\nread_only = true\nlayers = {layers}\n')
        server = nbd_server.process(config)
        before = _memory(server)
        _read_all_over(server.uri("disk"), size, amount(2_000, 200_000))
        grown[cache] = _memory(server) - before
        server.terminate()
    print({cache: f"{bytes_ / MIB:.0f} MiB" for cache, bytes_ in grown.items()})
    for cache, bytes_ in grown.items():
        assert bytes_ < cache + EXTENTS_MAX + SLACK, grown


#: What the engine's cache of places may take for an export, extents and packed tables; and what else grows in a process
#: that begins to work.
EXTENTS_MAX, SLACK = 120 * MIB, 32 * MIB


def _memory(server: ServerProcess) -> int:
    """What it has of its own, bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * KIB


def _read_all_over(uri: str, size: int, count: int) -> None:
    """Random reads, 16 at a time."""
    pick, handle = random.Random(SEED), nbd.NBD()
    handle.connect_uri(uri)
    buffers = [nbd.Buffer(4096) for _ in range(16)]
    for _ in range(count // len(buffers)):
        cookies = {handle.aio_pread(buffer, pick.randrange(size // 4096) * 4096) for buffer in buffers}
        while cookies:
            handle.poll(-1)
            cookies -= {cookie for cookie in cookies if handle.aio_command_completed(cookie)}
    handle.shutdown()
