"""The group of commands: what is imported when, and how things end."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest

from nbdserver.image.cli import COMMANDS
from tests.image.kit import image
from tests.serving import create


def test_every_command_has_its_help() -> None:
    listed = image("--help").stdout
    for name in COMMANDS:
        command = importlib.import_module(f"nbdserver.image.{name}").command
        assert f"  {name} " in listed
        words = image(name, "-h").stdout
        assert words.startswith(f"Usage: main image {name} ")
        missing = [param.name for param in command.params if isinstance(param, click.Option) and not param.help]
        assert not missing, f"{name}: {missing} have no help"


def test_no_command_is_imported_that_is_not_called() -> None:
    code = "import sys, nbdserver.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {f"nbdserver.image.{name}" for name in COMMANDS} & set(done.stdout.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_ends_as_qemu_img_ends(name: str) -> None:
    """With 1: 2 says of ``check`` that the image is corrupt. Of ``compare`` 1 says that images differ."""
    result = image(name, "--what", status=2 if name == "compare" else 1)
    assert "No such option" in result.stderr and result.stdout == ""


def test_there_is_no_such_command() -> None:
    assert "No such command 'amend'" in image("amend", status=1).stderr


def test_one_line_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert image("info", path, status=1).stderr == (
        f"nbdserver: {path}: cannot be opened for reading: No such file or directory\n"
    )


def test_a_file_outside_is_opened_only_if_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base = create(tmp_path / "b/base", 1 << 20)
    path = create(tmp_path / "a/disk", 1 << 20, backing=base)
    assert f"--root {tmp_path}/b" in image("map", path, status=1).stderr
    image("map", "--root", tmp_path / "b", path)


def test_what_somebody_writes_is_looked_at_only_with_force_share(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", 1 << 20)
    # It says "qemu-io> " when it has the image open.
    command = ["qemu-io", "-f", "qcow2", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdin is not None
        writer.stdout.read(8)
        for name in ("info", "map"):
            assert '"write" lock' in image(name, path, status=1).stderr
            image(name, "-U", path)
        assert "lock" in image("compare", path, path, status=2).stderr
        image("compare", "--force-share", path, path)
        assert "lock" in image("create", path, "1M", status=1).stderr
        writer.stdin.close()
    image("map", path)
