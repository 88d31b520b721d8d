"""What a machine that stops leaves of all that can happen to an image at once: by the engine's recorder.

As in `test_crash_states`, but with snapshots made, applied, deleted and shown, other sizes, and bitmaps added, changed
and stored, in between. What is left halfway of a point in time, a repair of leaks mends without loss, ours and
qemu-img's: COPIED flags, besides leaks.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.files import FileOpener, Files
from nbdserver.format import Repair
from nbdserver.graph import Graph
from nbdserver.reference import open_stack
from nbdserver.testing import NbdServers
from tests.faults.replay import Replay, load
from tests.faults.test_crash_states import Acknowledged
from tests.layers.bitmap_history import BitmapHistory, Said, found_in, said, said_when_closed
from tests.layers.bitmap_kit import IN_USE
from tests.layers.qcow2_check import check, read, snapshots
from tests.layers.qcow2_kit import RecordedFile
from tests.oracle.model import Kind, Model
from tests.oracle.points import Points
from tests.oracle.storm import Storm, Weather
from tests.serving import BACKENDS, SEED, amount, content, create, qemu_io, run
from tests.serving import check as qemu_check

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB
#: States of all disks and backends together, and points in time that are passed on each.
STATES, POINTS = amount(240, 12_000), amount(18, 80)

#: Bitmaps that there are at once.
BITMAPS_MAX = 4

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


class Everything(Points):
    """Points in time, and changes of bitmaps among them."""

    #: What the file may say of the bitmaps, by the clock of the points.
    bitmaps: BitmapHistory

    def one(self) -> None:
        began = self._clock()
        if self.pick.random() < 0.35:
            with self.server.drained(self.live):
                self._change_bitmaps()
        else:
            super().one()
        self.bitmaps.changed(began, self._clock(), said(self.live))

    def _change_bitmaps(self) -> None:
        live, pick, names = self.live, self.pick, [bitmap.name for bitmap in self.live.bitmaps()]
        changes: list[Callable[[str], None]] = [
            live.remove_bitmap, live.enable_bitmap, live.disable_bitmap, live.disable_bitmap, live.clear_bitmap,
            lambda name: live.merge_bitmap(name, live, pick.choice(names)),
        ]  # fmt: skip
        if names and (len(names) >= BITMAPS_MAX or pick.random() < 0.6):
            pick.choice(changes)(pick.choice(names))
        else:
            granularity = pick.choice((512, 4096, 65536))
            live.add_bitmap(f"b{pick.getrandbits(32)}", granularity=granularity, enabled=pick.random() < 0.7)


@pytest.mark.parametrize("name", DISKS)
def test_crash_states(memory: Path, backend: str, name: str) -> None:
    below = memory / "base.raw"
    below.write_bytes(random.Random(SEED).randbytes(700 * KIB) + bytes(60 * KIB))
    path = create(memory / "disk.qcow2", SIZE, backing=below, backing_format="raw", **DISKS[name])
    qemu_io(path, "write -c -P 7 512k 64k")
    initial = path.read_bytes()
    model, pick = Model(SIZE, initial=content(path), crashes=True), random.Random(f"{SEED} {name}")
    record = memory / "record" / "record.bin"
    told, bitmaps = Acknowledged(model, record), BitmapHistory()
    with contextlib.ExitStack() as ending:
        live = Qcow2(File(str(path)))
        server, address = NbdServers(memory, ending).start(live, backend=backend, record=record.parent)
        storm = ending.enter_context(Storm(address, model, seed=SEED, weather=WEATHER, acknowledged=told))
        points = Everything(server, live, storm, model, pick, clock=lambda: record.stat().st_size)
        points.bitmaps = bitmaps
        for _ in range(POINTS):
            storm.run(operations=pick.randint(5, 40))
            points.one()
        storm.drain()
        closing, says = record.stat().st_size, said_when_closed(live)
    bitmaps.changed(closing, record.stat().st_size, says)

    replay = Replay(load(record), str(path), initial)
    positions = replay.positions()
    assert replay.is_all(path.read_bytes()), "the recording is not all that happened"
    assert found_in(path.read_bytes()) == bitmaps.last
    count = STATES // (len(DISKS) * len(BACKENDS))
    for number in range(count):
        position = positions[number * len(positions) // count]
        state = replay.prefix(position) if number % 2 else replay.reordered(position, pick)
        try:
            _check(state, below.read_bytes(), position, points, model)
            disk = read(state, below.read_bytes())
            model.check_crashed(disk[:SIZE], told.tick(position))
            repaired = _repaired(state, below, disk)
            if number % 20 < 2:  # a prefix, and what was reordered
                assert not check(repaired).errors
                _qemu_agrees(state, path)
        except AssertionError as error:
            raise AssertionError(f"state {number}, a crash at {position} of the recording: {error}") from error


def _check(state: bytearray, below: bytes, crash: int, points: Everything, model: Model) -> None:
    report, found = check(state), snapshots(state, below)
    is_within = any(began < crash < ended for began, ended in points.windows)
    wrong = [error for error in report.errors if not (is_within and error in report.flags)]
    assert not wrong, wrong[:3]
    for name, made in points.made.items():
        assert name in found or not made.must_be(crash), f"{name} is missing"
        assert name not in found or made.may_be(crash), f"{name} is there"
        if name in found and found[name] != made.content:
            _check_ties(name, found[name], made.content, model)
    says, allowed = found_in(state), points.bitmaps.allowed(crash)
    # While the disk becomes another, disabled bitmaps are in use, too.
    assert any(_is_said(says, each, or_in_use=is_within) for each in allowed), f"bitmaps: {says}, allowed: {allowed}"


def _is_said(found: Said, wanted: Said, *, or_in_use: bool) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name] == wanted[name] or (or_in_use and bool(found[name][0] & IN_USE)) for name in found
    )


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


def _repaired(state: bytearray, below: Path, disk: bytes) -> bytes:
    """Once its leaks are repaired it is clean, is what it was, and can be written; what it is then."""
    file = RecordedFile(bytearray(state))
    left = Qcow2.check(file, repair=Repair.LEAKS, opener=FileOpener(Graph(), Files()))
    assert not (left.corruptions or left.leaks or left.check_errors), left.messages[:3]
    with open_stack(Qcow2(file, backing=File(str(below)))) as opened:
        assert opened.read(0, opened.size) == disk
        opened.write(0, b"again" * 100)
        assert opened.read(500, opened.size - 500) == disk[500:]
    return bytes(file.data)
