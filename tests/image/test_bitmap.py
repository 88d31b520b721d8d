"""``image bitmap``: the bitmaps of QEMU's images and of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.image.kit import MIB, image, image_json, qemu_img
from tests.serving import check, create, qemu_io, run


def _bitmaps(path: Path) -> list[dict[str, Any]]:
    data = json.loads(qemu_img("info", "--output=json", path).out)["format-specific"]["data"]
    found: list[dict[str, Any]] = data.get("bitmaps", [])
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image with the bitmaps "one", which has recorded a write, and "two", which is disabled."""
    path = create(tmp_path / "disk", 4 * MIB)
    run("qemu-img", "bitmap", "--add", path, "one")
    run("qemu-img", "bitmap", "--add", "--disable", path, "two")
    qemu_io(path, "write 1M 100k")
    return path


def _dirty(path: Path, name: str) -> list[tuple[int, int]]:
    """The dirty ranges of a bitmap, as QEMU exports them."""
    server = ("qemu-nbd", "-r", "-f", "qcow2", "-B", name, path)
    listed = run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", "--json", "--", "[", *server, "]")
    return [(entry["offset"], entry["length"]) for entry in json.loads(listed) if entry["type"] & 1]


def test_added_enabled_and_removed(disk: Path) -> None:
    told = image_json("bitmap", "--add", "-g", "128k", disk, "three")
    assert told == _bitmaps(disk)
    assert told[2] == {"name": "three", "granularity": 131072, "flags": ["auto"]}
    assert image("bitmap", "--disable", disk, "three").stdout == ""
    image("bitmap", "--enable", disk, "two")
    assert [entry["flags"] for entry in _bitmaps(disk)] == [["auto"], ["auto"], []]
    image("bitmap", "--remove", disk, "one")
    assert [entry["name"] for entry in _bitmaps(disk)] == ["two", "three"]
    image("bitmap", "--remove-all", disk)
    assert _bitmaps(disk) == []
    check(disk)


def test_cleared_and_merged(disk: Path) -> None:
    marked = [(MIB, 128 * 1024)]
    assert _dirty(disk, "one") == marked
    image("bitmap", "--merge", "one", disk, "two")
    assert _dirty(disk, "two") == marked
    image("bitmap", "--clear", disk, "one")
    assert _dirty(disk, "one") == []
    other = create(disk.with_name("other"), 4 * MIB)
    image("bitmap", "--add", "--disable", "--merge", "two", "-b", disk, "-F", "qcow2", other, "copy")
    assert _dirty(other, "copy") == marked
    check(disk)
    check(other)


def test_things_are_done_in_the_order_given(disk: Path) -> None:
    image("bitmap", "--remove", "--add", "--disable", disk, "one")
    assert _bitmaps(disk)[-1]["flags"] == [] and _dirty(disk, "one") == []
    assert "could not add" in image("bitmap", "--add", "--remove", disk, "two", status=1).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["disk", "one"], "nothing to do"),
        (["--add", "disk"], "name the BITMAP"),
        (["--add", "disk", "one"], "could not add bitmap 'one'"),
        (["--remove", "disk", "none"], "could not remove bitmap 'none'"),
        (["--merge", "none", "disk", "one"], "could not merge bitmap 'one'"),
        (["--add", "-g", "1000", "disk", "new"], "could not add bitmap 'new'"),
        (["--clear", "-g", "64k", "disk", "one"], "--granularity is for --add"),
        (["--clear", "-b", "disk", "disk", "one"], "--source-file is for --merge"),
        (["--merge", "one", "-F", "raw", "disk", "two"], "--source-format is for --source-file"),
        (["--remove-all", "disk", "one"], "takes no BITMAP"),
        (["--add", "-f", "raw", "disk", "one"], "cannot have bitmaps"),
        (["--add", "none", "one"], "cannot be opened"),
    ],
)
def test_what_is_refused(words: list[str], message: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk.parent)
    before = _bitmaps(disk)
    assert message in image("bitmap", *words, status=1).stderr
    assert _bitmaps(disk) == before


def test_bitmaps_are_converted(disk: Path) -> None:
    target = disk.with_name("target")
    image("convert", "--bitmaps", "-O", "qcow2", disk, target)
    assert _bitmaps(target) == _bitmaps(disk)
    assert _dirty(target, "one") == _dirty(disk, "one")
    check(target)
