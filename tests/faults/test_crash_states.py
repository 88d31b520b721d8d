"""What kill -9 cannot show: a machine that stops. Writes may then be lost, or reach the disk in another order.

A storm runs with the engine's recorder on; from the recording, states are made that a crash could have left
(`tests.faults.replay`): after every event, and with what no sync had made durable yet chosen at random. Each must be
consistent after ``qemu-img check -r leaks``, open here, and hold everything that a client had been told is durable.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdserver.limits import POOL_MIN
from nbdserver.testing import NbdServers
from tests.faults.replay import Replay, load
from tests.oracle.model import Kind, Model, Operation
from tests.oracle.storm import Storm, Weather
from tests.serving import BACKENDS, SEED, amount, content, create, data_beside, qemu_io

MIB = 1 << 20
#: States of all disks and backends together.
STATES = amount(300, 2_000)

DISKS: dict[str, dict[str, Any]] = {
    "4k": {"cluster_size": 4096},
    "64k": {"cluster_size": 65536},
    "512": {"cluster_size": 512},
    "v2": {"cluster_size": 4096, "compat": "0.10"},
    "subclusters": {"cluster_size": 16384, "extended_l2": "on"},
    "data file": {"cluster_size": 4096, "data_file": "beside"},
    "data file, subclusters": {"cluster_size": 16384, "data_file": "beside", "extended_l2": "on"},
    "compressed": {"cluster_size": 8192},
}
SIZE = 4 * MIB

#: Long enough to allocate most of the disk, flushing as it goes.
WEATHER = Weather(
    weights={Kind.READ: 2, Kind.WRITE: 40, Kind.ZERO: 12, Kind.TRIM: 12, Kind.FLUSH: 5},
    length_max=48 << 10,
    connections=2,
    depth=6,
    hot=0.3,
)
OPERATIONS = 600


class Acknowledged:
    """What a client had been told when: ticks of the model against positions in the recording."""

    def __init__(self, model: Model, record: Path) -> None:
        self._model, self._record = model, record
        self._positions: list[int] = []
        self._ticks: list[int] = []

    def __call__(self, _operation: Operation) -> None:
        # The engine records an event before anybody is told of it.
        self._positions.append(self._record.stat().st_size)
        self._ticks.append(self._model.now)

    def tick(self, position: int) -> int:
        """The last tick that a client had certainly seen before that position was recorded."""
        index = bisect.bisect_right(self._positions, position)
        return self._ticks[index - 1] if index else 0


@pytest.mark.parametrize("name", DISKS)
def test_crash_states(nbd_server: NbdServers, memory: Path, backend: str, name: str) -> None:
    base = create(memory / "base.qcow2", SIZE - MIB // 2)
    qemu_io(base, "write -P 5 0 700k", "write -P 6 2M 300k")
    path = create(memory / "disk.qcow2", SIZE, backing=base, **DISKS[name])
    initial = {file: file.read_bytes() for file in (path, data_beside(path)) if file.exists()}
    model = Model(SIZE, initial=content(path), crashes=True)
    told = Acknowledged(model, memory / "record" / "record.bin")
    served = (_compressed(path),) if name == "compressed" else (path, "--format", "qcow2")
    with (
        nbd_server.process(*served, "--backend", backend, "--record", memory / "record") as server,
        Storm(server.uri(), model, seed=SEED, weather=WEATHER, acknowledged=told) as storm,
    ):
        storm.run(operations=OPERATIONS)
        storm.drain()

    operations = load(memory / "record" / "record.bin")
    replays = {file: Replay(operations, str(file), data) for file, data in initial.items()}
    positions = sorted({position for replay in replays.values() for position in replay.positions()})
    for file, replay in replays.items():
        assert replay.is_all(file.read_bytes()), "the recording is not all that happened"

    pick = random.Random(SEED)
    count = STATES // (len(DISKS) * len(BACKENDS))
    # Every second state is a prefix; they are spread over the recording evenly.
    for number in range(count):
        position = positions[number * len(positions) // count]
        for file, replay in replays.items():
            file.write_bytes(replay.prefix(position) if number % 2 else replay.reordered(position, pick))
        try:
            _repair_leaks(path)
            model.check_crashed(_read_all(path, backend), told.tick(position))
        except AssertionError as error:
            raise AssertionError(f"state {number}, a crash at {position} of the recording: {error}") from error


def _compressed(path: Path) -> Path:
    """A configuration that has all compressed that is written into the image."""
    configuration = path.parent / "exports.toml"
    layers = f'[{{type = "compress"}}, {{type = "qcow2"}}, {{type = "file", path = "{path}"}}]'
    configuration.write_text(f'[exports.""]\nlayers = {layers}\n')
    return configuration


def _repair_leaks(path: Path) -> None:
    """After this the image is clean, or the test has failed: anything but leaks is an error."""
    command = ["qemu-img", "check", "-q", "-r", "leaks", "--output=json", str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    report = json.loads(done.stdout or b"{}")
    wrong = {key: report[key] for key in ("corruptions", "check-errors", "leaks") if report.get(key)}
    assert done.returncode == 0 and not wrong, (done.returncode, wrong, done.stdout, done.stderr)


def _read_all(path: Path, backend: str) -> bytes:
    """The disk, as a server that lives for this long reads it."""
    with contextlib.ExitStack() as stack:
        server = NbdServers(path.parent, stack)
        uri = server(path, format="qcow2", backend=backend, workers=1, fault_threads=1, pool=POOL_MIN)
        handle = nbd.NBD()
        handle.connect_uri(uri)
        data = b"".join(bytes(handle.pread(MIB, offset)) for offset in range(0, SIZE, MIB))
        handle.shutdown()
    return data
