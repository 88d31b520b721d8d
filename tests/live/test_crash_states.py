"""What kill -9 cannot show: a machine that stops in the middle of a snapshot, a commit or a stream.

As `tests.faults.test_crash_states`, with all images of the chain: by the name that the disk is known by, everything is
there that a client had been told is durable; and every image of that chain is consistent.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserver.image import creation
from tests.faults.replay import Replay, load
from tests.faults.test_crash_states import WEATHER, Acknowledged
from tests.live.kit import Live
from tests.live.test_kill import whole_chain
from tests.live.test_storm import Changes
from tests.oracle.model import Model
from tests.oracle.storm import Storm
from tests.serving import BACKENDS, FULL, SEED, amount, check, content, create, qemu_io

MIB = 1 << 20
SIZE = 4 * MIB
STATES = amount(16, 1500)
OPERATIONS = amount(500, 5000)
#: As many changes as there are to be meanwhile: on a fast machine the operations may be over sooner.
CHANGES_MIN = 4


class Overlays:
    """The overlays that have been made: what was in them then, and where the recording was."""

    def __init__(self, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._record, self._make = record, creation.make_overlay
        self.made: list[tuple[int, Path, bytes]] = []
        monkeypatch.setattr(creation, "make_overlay", self._make_one)

    def _make_one(self, path: str, *arguments: object) -> None:
        self._make(path, *arguments)  # type: ignore[arg-type]
        self.made.append((self._record.stat().st_size, Path(path), Path(path).read_bytes()))


@pytest.mark.parametrize("backend", BACKENDS if FULL else BACKENDS[-1:])
def test_crash_states(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    base = create(live.directory / "base.qcow2", SIZE)
    qemu_io(base, "write -q -P 5 0 700k", "write -q -P 6 2M 300k")
    path = create(live.directory / "disk.qcow2", SIZE, backing=base, cluster_size=4096)
    initial = {file: file.read_bytes() for file in (path, base)}
    model = Model(SIZE, initial=content(path), crashes=True)
    record = live.directory / "record" / "record.bin"
    overlays, told = Overlays(record, monkeypatch), Acknowledged(model, record)
    live.serve(path, engine=f'record = "{record.parent}"')
    with Storm(live.uri(), model, seed=SEED, weather=WEATHER, acknowledged=told) as storm:
        changes = Changes(live, SEED, kinds=("overlay", "commit", "between", "stream"))
        storm.run(operations=OPERATIONS)
        while sum(changes.done.values()) < CHANGES_MIN:
            storm.run(operations=OPERATIONS // 10)
        storm.drain()
        changes.stop()
    live.stop()

    operations = load(record)
    initial |= {file: data for _, file, data in overlays.made}
    assert {operation.file for operation in operations} <= {str(file) for file in initial}
    replays = {file: Replay(operations, str(file), data) for file, data in initial.items()}
    positions = sorted({position for replay in replays.values() for position in replay.positions()})
    pick = random.Random(SEED)
    for number in range(STATES):
        position = positions[number * len(positions) // STATES]
        name = path
        for made, file, _ in overlays.made:
            name = file if made <= position else name
        for file, replay in replays.items():
            file.write_bytes(replay.prefix(position) if number % 3 == 0 else replay.reordered(position, pick))
        try:
            for image in whole_chain(name):
                check(image, leaks_allowed=True)
            model.check_crashed(content(name), told.tick(position))
        except AssertionError as error:
            raise AssertionError(f"state {number}, a crash at {position} of the recording: {error}") from error
