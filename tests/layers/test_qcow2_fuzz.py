"""Broken images: whatever is done to one, there is an answer, and it takes no more than it may.

Sound images of every kind (`qcow2_seeds`) are broken at random (`qcow2_mutate`), and then checked, read, mapped,
repaired and written (`qcow2_fuzz`), by processes of which time and memory are measured: one that hangs, or dies, is
found, and says where.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers import qcow2_fuzz
from tests.layers.qcow2_fuzz import HANG_S, Tally
from tests.layers.qcow2_seeds import make_seeds
from tests.serving import FULL, SEED, amount, memory

__all__ = ["memory"]

ROOT = Path(__file__).parents[2]

#: Cases, and the processes that share them.
CASES, PROCESSES = amount(240, 100_000), 2

#: All of this comes of them, or the images are too much alike.
OUTCOMES = [f"{what}: {outcome}" for what in ("check", "read", "repair", "write") for outcome in ("done", "refused")]


@pytest.mark.timeout(4 * 3600 if FULL else 120)
def test_broken_images_have_an_answer_in_bounded_time_and_memory(memory: Path) -> None:
    (memory / "images").mkdir()
    seeds = memory / "seeds"
    seeds.write_bytes(pickle.dumps(make_seeds(memory / "images")))
    folders = [memory / str(number) for number in range(PROCESSES)]
    workers = [_start(folder, seeds, number) for number, folder in enumerate(folders)]
    try:
        for worker, folder in zip(workers, folders, strict=True):
            said = (folder / "said").read_text()[-5000:] if worker.wait() else ""
            assert worker.returncode == 0, f"a case ended its process, or hung for {HANG_S} s:\n{said}"
    finally:
        for worker in workers:
            worker.kill()
    total = Tally()
    for folder in folders:
        total.add(Tally.load(folder / "result"))
    print(f"{total.cases} cases\nslowest {total.slowest}\nlargest {total.largest}\n{sorted(total.outcomes.items())}")
    assert not total.failures, f"{len(total.failures)} with seed {SEED}; the first: {total.failures[0]}"
    assert total.cases == CASES
    assert [what for what in OUTCOMES if not total.outcomes[what]] == []


def _start(folder: Path, seeds: Path, number: int) -> subprocess.Popen[bytes]:
    """Every so-many-th case, in a directory of its own."""
    folder.mkdir()
    words = ["-m", qcow2_fuzz.__name__, seeds, folder / "result", number, CASES, PROCESSES]
    with (folder / "said").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=said
        )
