"""What a machine that stops leaves of points in time, passed while clients write: by the engine's recorder.

As in `test_crash_states`, but with snapshots made, applied, deleted and shown, and other sizes, in between. What such a
point leaves halfway, qemu-img mends without loss: COPIED flags, besides leaks.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.testing import NbdServers
from tests.faults.replay import Replay, load
from tests.faults.test_crash_states import Acknowledged, memory
from tests.layers.qcow2_check import check, read, snapshots
from tests.oracle.model import Kind, Model
from tests.oracle.points import Points
from tests.oracle.storm import Storm, Weather
from tests.serving import BACKENDS, SEED, amount, content, create, qemu_io, run
from tests.serving import check as qemu_check

__all__ = ["memory"]

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB
#: States of all disks and backends together, and points in time that are passed on each.
STATES, POINTS = amount(240, 12_000), amount(14, 60)

DISKS = {
    "4k": {"cluster_size": 4096},
    "512": {"cluster_size": 512},
    "64k": {},
}

WEATHER = Weather(
    weights={Kind.READ: 2, Kind.WRITE: 40, Kind.ZERO: 12, Kind.TRIM: 12, Kind.FLUSH: 5},
    length_max=24 << 10,
    connections=2,
    depth=6,
    hot=0.3,
)


@pytest.mark.parametrize("name", DISKS)
def test_crash_states(memory: Path, backend: str, name: str) -> None:
    below = memory / "base.raw"
    below.write_bytes(random.Random(SEED).randbytes(700 * KIB) + bytes(60 * KIB))
    path = create(memory / "disk.qcow2", SIZE, backing=below, backing_format="raw", **DISKS[name])
    qemu_io(path, "write -c -P 7 512k 64k")
    initial = path.read_bytes()
    model, pick = Model(SIZE, initial=content(path), crashes=True), random.Random(f"{SEED} {name}")
    record = memory / "record" / "record.bin"
    told = Acknowledged(model, record)
    with contextlib.ExitStack() as ending:
        live = Qcow2(File(str(path)))
        server, address = NbdServers(memory, ending).start(live, backend=backend, record=record.parent)
        storm = ending.enter_context(Storm(address, model, seed=SEED, weather=WEATHER, acknowledged=told))
        points = Points(server, live, storm, model, pick, clock=lambda: record.stat().st_size)
        for _ in range(POINTS):
            storm.run(operations=pick.randint(5, 40))
            points.one()
        storm.drain()

    replay = Replay(load(record), str(path), initial)
    positions = replay.positions()
    assert bytes(replay.prefix(positions[-1])) == path.read_bytes(), "the recording is not all that happened"
    count = STATES // (len(DISKS) * len(BACKENDS))
    for number in range(count):
        position = positions[number * len(positions) // count]
        state = replay.prefix(position) if number % 2 else replay.reordered(position, pick)
        try:
            _check(state, below.read_bytes(), position, points, model)
            model.check_crashed(read(state, below.read_bytes())[:SIZE], told.tick(position))
            if number % 20 < 2:
                _qemu_agrees(state, path)
        except AssertionError as error:
            raise AssertionError(f"state {number}, a crash at {position} of the recording: {error}") from error


def _check(state: bytearray, below: bytes, crash: int, points: Points, model: Model) -> None:
    report, found = check(state), snapshots(state, below)
    is_within = any(began < crash < ended for began, ended in points.windows)
    wrong = [error for error in report.errors if not (is_within and error in report.flags)]
    assert not wrong, wrong[:3]
    for name, made in points.made.items():
        assert name in found or not made.must_be(crash), f"{name} is missing"
        assert name not in found or made.may_be(crash), f"{name} is there"
        if name in found and found[name] != made.content:
            _check_ties(name, found[name], made.content, model)


def _check_ties(name: str, found: bytes, wanted: bytes, model: Model) -> None:
    """A snapshot differs from what the disk was only where two clients wrote at once, and the recording cannot say who
    came last."""
    assert len(found) == len(wanted) and found[SIZE:] == wanted[SIZE:], f"{name} is not what the disk was"
    for grain, (start, end) in enumerate(itertools.pairwise(model.edges)):
        one, other = found[start:end], wanted[start:end]
        assert one == other or model.is_tie(grain, one, other), f"{name} is not what the disk was at {start:#x}"


def _qemu_agrees(state: bytearray, path: Path) -> None:
    path.write_bytes(state)
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    qemu_check(path)
