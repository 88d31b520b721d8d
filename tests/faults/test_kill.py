"""kill -9 at random instants of a storm: what was flushed is there, and the image is consistent."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import nbd
import pytest

from nbdserver.testing import NbdServers
from tests.oracle.model import Kind, Model
from tests.oracle.storm import Storm, Weather
from tests.serving import SEED, amount, check, content, create, qemu_io

MIB = 1 << 20
SIZE = 24 * MIB
KILLS = amount(10, 50)

#: More flushes than usual: they are what is tested.
WEATHER = Weather(
    weights={Kind.READ: 10, Kind.WRITE: 40, Kind.ZERO: 10, Kind.TRIM: 8, Kind.STATUS: 2, Kind.FLUSH: 4}, fua=0.1
)


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_kill(nbd_server: NbdServers, tmp_path: Path, backend: str, cluster_size: int) -> None:
    """Again and again on the same image: each life begins with what the last one left, leaked clusters included."""
    base = create(tmp_path / "base.qcow2", SIZE)
    qemu_io(base, "write -P 5 0 3M", "write -P 6 10M 1M")
    path = create(tmp_path / "disk.qcow2", SIZE, backing=base, cluster_size=cluster_size)
    model = Model(SIZE, initial=content(path), crashes=True)
    server = nbd_server.process(path, "--format", "qcow2", "--backend", backend)
    pick = random.Random(SEED)
    for life in range(KILLS):
        with Storm(server.uri(), model, seed=SEED * 1000 + life, weather=WEATHER) as storm:
            timer = threading.Timer(pick.uniform(0.05, 0.8), server.kill)
            storm.run_until_killed(timer)
        check(path, leaks_allowed=True)
        server.start()
        model.recover(_whole(server.uri()))


def _whole(uri: str) -> bytes:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = b"".join(bytes(handle.pread(MIB, offset)) for offset in range(0, SIZE, MIB))
    handle.shutdown()
    return data
