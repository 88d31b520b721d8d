"""``image snapshot``: QEMU sees the snapshots that we make, and we see QEMU's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.image.kit import MIB, image, image_json, qemu_img
from tests.serving import check, content, create, qemu_io, run


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image with two snapshots, each of other data."""
    path = create(tmp_path / "disk", 4 * MIB)
    qemu_io(path, "write -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "first", path)
    qemu_io(path, "write -P 2 512k 1M")
    run("qemu-img", "snapshot", "-c", "a name with spaces, and ünïcode", path)
    qemu_io(path, "write -P 3 2M 1M")
    return path


def test_the_list_is_qemus(disk: Path) -> None:
    expected = qemu_img("snapshot", "-l", disk).out
    assert image("snapshot", disk).stdout == image("snapshot", "-l", disk).stdout == expected
    told = json.loads(qemu_img("info", "--output=json", disk).out)["snapshots"]
    assert image_json("snapshot", disk) == image_json("info", disk)["snapshots"] == told
    assert image("snapshot", create(disk.with_name("none"), MIB)).stdout == ""


def test_made_applied_and_deleted(disk: Path) -> None:
    before = content(disk)
    image("snapshot", "-c", "third", disk)
    assert [entry["name"] for entry in image_json("snapshot", disk)][-1] == "third"
    check(disk)
    image("snapshot", "-a", "first", disk)
    assert content(disk) == b"\1" * MIB + bytes(3 * MIB)
    check(disk)
    image("snapshot", "--apply", "third", disk)
    assert content(disk) == before
    image("snapshot", "-d", "2", disk)
    assert image_json("snapshot", "-d", "first", disk)[0]["name"] == "third"
    assert re.search("third", qemu_img("snapshot", "-l", disk).out)
    image("snapshot", "--delete", "third", disk)
    assert qemu_img("snapshot", "-l", disk).out == ""
    assert content(disk) == before
    check(disk)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-a", "fourth", "disk"], "could not apply snapshot 'fourth'"),
        (["-d", "fourth", "disk"], "could not delete snapshot 'fourth'"),
        (["-c", "a", "-d", "b", "disk"], "one at a time"),
        (["-l", "-c", "a", "disk"], "one at a time"),
        (["-f", "raw", "disk"], "cannot have internal snapshots"),
        (["none"], "cannot be opened"),
    ],
)
def test_what_is_refused(words: list[str], message: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk.parent)
    assert message in image("snapshot", *words, status=1).stderr


@pytest.mark.parametrize("name", ["1", "first", "snapshot.id=1", "snapshot.name=first"])
def test_a_snapshot_is_converted(name: str, disk: Path) -> None:
    target = disk.with_name("target")
    image("convert", "-l", name, disk, target)
    assert target.read_bytes() == b"\1" * MIB + bytes(3 * MIB)
    words = ("measure", "-l", name, "-O", "qcow2", disk)
    assert image_json(*words) == json.loads(qemu_img(*words, "--output=json").out)


def test_a_snapshot_that_is_not_there_is_not_converted(disk: Path) -> None:
    assert "fourth" in image("convert", "-l", "fourth", disk, disk.with_name("target"), status=1).stderr
