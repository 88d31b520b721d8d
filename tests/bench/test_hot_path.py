"""A warm qcow2 chain costs what a raw file costs: no call into Python, and nine tenths of the rate at least.

Both are exports of one server; runs alternate between them, so that whatever else the machine does hits both. Rates
vary from machine to machine and mean nothing here: only their ratio is looked at.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from layers.file import File
from layers.raw import Raw
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from nbdserver.uri import parse
from tests.serving import SEED, amount, create, run

pytestmark = pytest.mark.alone

MIB = 1 << 20
SIZE = amount(256, 1024) * MIB
#: Seconds of one run, and pairs of runs: at first, and at most if the machine is too unsteady for so few.
RUN_S = amount(1, 3)
PAIRS, PAIRS_MAX = 5, 15
RATIO_MIN = 0.9


@dataclass(frozen=True)
class Pair:
    """The chain and the raw file with the same content, exported by one server."""

    server: Server
    chain: str
    raw: str

    def calls(self) -> dict[str, int]:
        """How often the chain has needed Python since the server began, and what for."""
        counters = self.server.stats()["exports"]["chain"]
        return {name: count for name, count in counters.items() if name == "faults" or name.endswith("_calls")}


@pytest.fixture
def pair(nbd_server: NbdServers, tmp_path: Path, backend: str) -> Pair:
    top = _chain(tmp_path)
    raw = tmp_path / "same.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-S", "0", top, raw)
    server, uri = nbd_server.start(top, format="qcow2", name="chain", backend=backend)
    server.export("raw", Raw(file=File(path=str(raw))))
    return Pair(server, uri, str(parse(uri).with_export("raw")))


def _chain(directory: Path) -> Path:
    """Three images; all of the base is data, and each overlay covers a part of what is below in many pieces."""
    path = create(directory / "0.qcow2", SIZE)
    run("qemu-io", "-f", "qcow2", *_commands([(offset, 16 * MIB) for offset in range(0, SIZE, 16 * MIB)]), path)
    pick = random.Random(SEED)
    for level in (1, 2):
        path = create(directory / f"{level}.qcow2", SIZE, backing=path)
        pieces = [(pick.randrange(SIZE // MIB - 1) * MIB, pick.randrange(1, 16) << 16) for _ in range(SIZE // MIB // 3)]
        run("qemu-io", "-f", "qcow2", *_commands(pieces), path)
    return path


def _commands(pieces: list[tuple[int, int]]) -> list[str]:
    return [word for at, length in pieces for word in ("-c", f"write -q -P {1 + at // MIB % 255} {at} {length}")]


def _rate(uri: str, pattern: str, directory: Path) -> float:
    """Operations a second of fio's 4k requests at random offsets."""
    done = subprocess.run(
        [
            *("fio", "--name=run", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", "--bs=4k", "--iodepth=16"),
            *(f"--runtime={RUN_S}", "--time_based", f"--size={SIZE}", "--norandommap", "--output-format=json"),
        ],
        cwd=directory,
        capture_output=True,
        check=True,
    )
    # A line of fio's own comes first.
    job = json.loads(done.stdout[done.stdout.index(b"{") :])["jobs"][0]
    assert job["error"] == 0
    return float(job["read" if pattern == "randread" else "write"]["iops"])


def _ratio(pair: Pair, pattern: str, directory: Path) -> float:
    """The median of what the chain does over what the raw file does, pair by pair."""
    ratios: list[float] = []
    while len(ratios) < PAIRS or (len(ratios) < PAIRS_MAX and statistics.median(ratios) < RATIO_MIN):
        # Whoever comes second may pay for what the first one left: take turns.
        order = (pair.chain, pair.raw) if len(ratios) % 2 else (pair.raw, pair.chain)
        rates = {uri: _rate(uri, pattern, directory) for uri in order}
        ratios.append(rates[pair.chain] / rates[pair.raw])
    last = ", ".join(f"{rate:.0f}" for rate in rates.values())
    print(f"{pattern}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; last: {last} a second")
    return statistics.median(ratios)


def test_warm_reads(pair: Pair, tmp_path: Path) -> None:
    run("nbdcopy", pair.chain, "null:")
    run("nbdcopy", pair.raw, "null:")
    before = pair.calls()
    ratio = _ratio(pair, "randread", tmp_path)
    assert pair.calls() == before
    assert ratio >= RATIO_MIN


def test_writes_to_allocated_clusters(pair: Pair, tmp_path: Path) -> None:
    # A whole pass of writes allocates everything in the top image; a second one finds all of it allocated. Writes at
    # random, as they are measured, would leave out a cluster now and then.
    data = tmp_path / "same.raw"
    copy = shutil.copy(data, tmp_path / "content")
    for _ in range(2):
        for uri in (pair.chain, pair.raw):
            run("nbdcopy", "--allocated", "--sparse=0", copy, uri)
    before = pair.calls()
    ratio = _ratio(pair, "randwrite", tmp_path)
    assert pair.calls() == before
    assert ratio >= RATIO_MIN
