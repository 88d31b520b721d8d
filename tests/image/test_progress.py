"""Progress goes to stderr: a bar on a terminal, percentages where it was asked for, else nothing."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserver.image.progress import progress
from tests.image.kit import MIB


def test_percentages_where_they_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("copying", wanted=True, quiet=False) as tell:
        for done in (1, 2, 2, 150, 200):
            tell(done, 200)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.split("\r") == [f"    ({percent}.00/100%)" for percent in (0, 1, 75, 100)] + ["\n"]


@pytest.mark.parametrize(("wanted", "quiet"), [(False, False), (True, True)])
def test_nothing_otherwise(wanted: bool, quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("copying", wanted=wanted, quiet=quiet) as tell:
        tell(1, 2)
    assert capsys.readouterr() == ("", "")


def test_nothing_is_complete_that_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError), progress("copying", wanted=True, quiet=False) as tell:
        tell(1, 2)
        raise OSError
    assert "100.00" not in capsys.readouterr().err


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * MIB)
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "nbdserver", "image", "convert", "source", "target"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=30
    )
    os.close(theirs)
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert "converting" in said and "100%" in said and done.stdout == b""
