"""Fixtures that many tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from nbdserver.files import Files
from nbdserver.request import debug

#: What runs a tool: ``run("qemu-img", "info", path)``; a tool that is missing skips the test.
Run = Callable[..., "subprocess.CompletedProcess[str]"]

# At every hop the flag is held against the addresses: here, and in the servers that tests start.
debug.flags = debug.permissions = True
os.environ["NBDSERVER_DEBUG_FLAGS"] = "1"

# A time limit for each example would only measure how busy the machine is.
hypothesis.settings.register_profile("nbdserver", deadline=None)
hypothesis.settings.load_profile("nbdserver")


@pytest.fixture
def run() -> Run:
    def run(tool: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
        command = [tool, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done

    return run


@pytest.fixture
def files() -> Files:
    return Files()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw image of 1 MiB, its first half 'd', the other a hole."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(b"d" * (1 << 19))
        file.truncate(1 << 20)
    return path
