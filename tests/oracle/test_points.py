"""Points in time at random moments of a storm: snapshots made, applied, deleted, shown beside the disk; other sizes."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.testing import NbdServers
from tests.oracle.model import Model
from tests.oracle.points import Points
from tests.oracle.storm import Storm, Weather
from tests.serving import SEED, amount, check, content, create, qemu_io, run

MIB = 1 << 20
SIZE = 4 * MIB
#: Points in time that are passed over each disk, a tenth of a second apart.
POINTS = amount(8, 600)

DISKS = {
    "64k": {},
    "4k": {"cluster_size": 4096},
    "512": {"cluster_size": 512},
}


@pytest.mark.parametrize("name", DISKS)
def test_points_in_time(nbd_server: NbdServers, tmp_path: Path, backend: str, name: str) -> None:
    base = create(tmp_path / "base.qcow2", SIZE - MIB // 2)
    qemu_io(base, "write -P 5 0 700k", "write -P 6 2M 300k")
    path = create(tmp_path / "disk.qcow2", SIZE, backing=base, **DISKS[name])
    qemu_io(path, "write -c -P 7 1M 64k")
    live, model, pick = Qcow2(File(str(path))), Model(SIZE, initial=content(path)), random.Random(SEED)
    with contextlib.ExitStack() as ending:
        servers = NbdServers(tmp_path, ending)
        server, address = servers.start(live, backend=backend)
        storm = ending.enter_context(Storm(address, model, seed=SEED, weather=Weather(length_max=32 << 10)))
        points = Points(server, live, storm, model, pick)
        for _ in range(POINTS):
            storm.run(seconds=pick.uniform(0, 0.2))
            points.one()
        final = storm.verify()
    check(path)
    assert content(path)[:SIZE] == final
    for snapshot, before in points.snapshots.items():
        run("qemu-img", "snapshot", "-a", snapshot, path)
        assert content(path) == before, snapshot
