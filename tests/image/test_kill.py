"""``kill -9`` at random moments of a commit and of a rebase: the overlay shows what it did; it can be done again."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.image.kit import MIB, image
from tests.serving import SEED, amount, check, content, create, qemu_io

SIZE = 24 * MIB


@pytest.mark.parametrize("command", [["commit"], ["rebase", "-b", "other", "-F", "raw"], ["rebase", "-b", ""]])
def test_killed_at_any_moment(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    pick = random.Random(f"{SEED} {command}")
    (tmp_path / "other").write_bytes(pick.randbytes(SIZE // 2) + bytes(SIZE // 4))
    base, top = tmp_path / "base", tmp_path / "top"
    for _ in range(amount(6, 60)):
        base.write_bytes(pick.randbytes(SIZE))
        create(top, SIZE, backing=base, backing_format="raw", cluster_size=4096)
        qemu_io(top, *(f"write -P {number} {pick.randrange(5900) * 4}k 300k" for number in range(1, 30)))
        before = hashlib.sha1(content(top)).digest()
        _kill(command, pick.randint(0, 100), pick.random() * 0.02)
        check(top, leaks_allowed=True)
        assert hashlib.sha1(content(top)).digest() == before
        image(*command, "top")
        assert hashlib.sha1(content(top)).digest() == before, "done again"
        check(top, leaks_allowed=True)
        if command[0] == "rebase":
            base.unlink()
            assert hashlib.sha1(content(top)).digest() == before, "the old backing file is not needed any more"


def _kill(command: list[str], percent: int, seconds: float) -> None:
    """Begin a command, and kill it some time after it has said that it has come that far."""
    words = [sys.executable, "-m", "nbdserver", "image", *command, "-p", "top"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b""
        while more := os.read(process.stderr.fileno(), 4096):
            said += more
            if max(map(int, re.findall(rb"\((\d+)\.00/100%\)", said)), default=0) >= percent:
                break
        time.sleep(seconds)
        process.kill()
