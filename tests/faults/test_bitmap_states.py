"""The machine stops while the engine records in bitmaps: what is valid afterwards marks everything that has changed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.faults.replay import Replay, load
from tests.layers import qcow2_check
from tests.layers.bitmap_kit import AUTO, IN_USE, granules, qemu_dirty, stored
from tests.oracle.model import Kind, Model
from tests.oracle.storm import Storm, Weather
from tests.serving import BACKENDS, SEED, amount, check, create, qemu_io, run

MIB = 1 << 20
SIZE = 2 * MIB
SECTOR = 512

#: States of all images and backends together.
STATES = amount(120, 4_000)

WEATHER = Weather(
    weights={Kind.READ: 2, Kind.WRITE: 40, Kind.ZERO: 8, Kind.TRIM: 8, Kind.FLUSH: 4},
    length_max=20 << 10,
    connections=2,
    depth=6,
    hot=0.3,
)
OPERATIONS = 200

CLUSTERS = (512, 65536)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_no_crash_of_a_server_leaves_a_bitmap_that_is_valid_and_wrong(
    nbd_server: NbdServers, memory: Path, backend: str, cluster: int
) -> None:
    path = create(memory / "disk.qcow2", SIZE, cluster_size=cluster)
    qemu_io(path, "write -P 5 0 900k")
    for name, granularity in (("fine", "512"), ("coarse", "64k"), ("off", "4k")):
        run("qemu-img", "bitmap", "--add", "-g", granularity, path, name)
    qemu_io(path, "write -P 6 100k 10k")
    run("qemu-img", "bitmap", "--disable", path, "off")
    initial = path.read_bytes()
    before, known = stored(initial), qcow2_check.read(initial)
    arguments = ("--format", "qcow2", "--backend", backend, "--record", memory / "record")
    model = Model(SIZE, initial=known)
    with (
        nbd_server.process(path, *arguments) as server,
        Storm(server.uri(), model, seed=SEED, weather=WEATHER) as storm,
    ):
        storm.run(operations=OPERATIONS)
        storm.drain()
        storm.verify()

    replay = Replay(load(memory / "record" / "record.bin"), str(path), initial)
    positions = replay.positions()
    assert replay.is_all(path.read_bytes()), "the recording is not all that happened"
    after = stored(path.read_bytes())
    assert {name: bitmap.flags for name, bitmap in after.items()} == {"fine": AUTO, "coarse": AUTO, "off": 0}
    assert set(qemu_dirty(path, "fine")) and after["off"] == before["off"]
    check(path)

    pick = random.Random(SEED)
    count = STATES // (len(CLUSTERS) * len(BACKENDS))
    valid = 0
    for number in range(count):
        # Half of them all over the recording, half where the bitmaps are stored; every second one is a prefix.
        near = positions if number % 4 < 2 else positions[-60:]
        position = near[number * len(near) // count]
        state = replay.prefix(position) if number % 2 else replay.reordered(position, pick)
        assert not qcow2_check.check(state).errors, (number, position)
        content, found = qcow2_check.read(state), stored(state)
        assert found["off"] == before["off"], (number, position)
        changed = [at for at in range(0, SIZE, SECTOR) if content[at : at + SECTOR] != known[at : at + SECTOR]]
        for name in ("fine", "coarse"):
            if not found[name].flags & IN_USE:
                valid += 1
                marked = before[name].dirty | granules(found[name].granularity, *((at, SECTOR) for at in changed))
                assert marked <= found[name].dirty, (number, position, name)
    assert valid
