"""``image rebase``: another backing file, the same disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.image.kit import KIB, MIB, image, image_json, qemu_img
from tests.serving import check, content, create, qemu_io, run


def _backing(path: Path, size: int, *writes: str) -> Path:
    create(path, size)
    qemu_io(path, *writes)
    return path


def _info(path: Path) -> tuple[str | None, str | None]:
    info = json.loads(qemu_img("info", "--output=json", path).out)
    return info.get("backing-filename"), info.get("backing-filename-format")


#: What the old backing file holds and what the new one does, with their sizes; of images of 6 MiB.
CASES = {
    "the same": ((6, "write -P 1 0 3M"), (6, "write -P 1 0 3M")),
    "different": ((6, "write -P 1 0 3M"), (6, "write -P 1 0 1M", "write -P 2 2M 3M")),
    "new one is shorter": ((6, "write -P 1 0 6M"), (2, "write -P 1 0 1M")),
    "old one is shorter": ((2, "write -P 1 0 2M"), (6, "write -P 3 0 6M")),
    "old one is empty": ((6,), (6, "write -P 3 0 6M")),
    "new one is longer": ((6, "write -P 1 0 3M"), (9, "write -P 1 0 3M", "write -P 4 5M 4M")),
}


@pytest.mark.parametrize("case", ["different", "old one is shorter"])
def test_what_is_copied_is_compressed(case: str, tmp_path: Path) -> None:
    for name, (mib, *writes) in zip(("old", "new"), CASES[case], strict=True):
        _backing(tmp_path / name, mib * MIB, *writes)
    path = create(tmp_path / "disk", 6 * MIB + 512, backing=tmp_path / "old")
    qemu_io(path, "write -P 9 100k 200k")
    before = content(path)
    image("rebase", "-c", "-b", "new", "-F", "qcow2", path)
    check(path)
    assert content(path) == before
    found = image_json("check", path)
    assert found["compressed-clusters"] == found["allocated-clusters"] - 4 > 10


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_as_qemu_rebases(case: str, compat: str, tmp_path: Path) -> None:
    for name, (mib, *writes) in zip(("old", "new"), CASES[case], strict=True):
        _backing(tmp_path / name, mib * MIB, *writes)
    old = tmp_path / "old"
    sizes = []
    for who in ("ours", "theirs"):
        path = create(tmp_path / who, 6 * MIB, backing=old, compat=compat, cluster_size=4096)
        qemu_io(path, "write -P 9 100k 200k", "write -P 8 3M 5k")
        before = content(path)
        command = ("rebase", "-b", "new", "-F", "qcow2", path)
        if who == "ours":
            assert image(*command).stdout == ""
        else:
            assert qemu_img(*command).status == 0
        check(path)
        assert content(path) == before and _info(path) == ("new", "qcow2")
        sizes.append(path.stat().st_size)
    # qemu-img writes zeroes as data.
    assert sizes[0] <= sizes[1] * 1.1 + 64 * KIB, case
    old.unlink()
    assert content(tmp_path / "ours") == before


def test_onto_an_image_further_down(tmp_path: Path) -> None:
    base = _backing(tmp_path / "base", 6 * MIB, "write -P 1 0 6M")
    middle = create(tmp_path / "middle", 4 * MIB, backing=base)
    qemu_io(middle, "write -P 2 1M 100k", "write -z 2M 64k")
    top = create(tmp_path / "top", 6 * MIB, backing=middle)
    qemu_io(top, "write -P 3 3M 64k")
    before = content(top)
    image("rebase", "-b", base, "-F", "qcow2", top)
    middle.unlink()
    assert content(top) == before and _info(top) == (str(base), "qcow2")
    check(top)
    held = sum(entry["length"] for entry in image_json("map", top) if entry["depth"] == 0)
    # What the middle one held, the end that it hid, and what the topmost one had.
    assert held == 128 * KIB + 64 * KIB + 2 * MIB + 64 * KIB


def test_onto_nothing(tmp_path: Path) -> None:
    old = _backing(tmp_path / "old", 6 * MIB, "write -P 1 0 100k", "write -P 0 1M 1M", "write -P 2 3M 64k")
    path = create(tmp_path / "disk", 6 * MIB, backing=old)
    qemu_io(path, "write -P 3 2M 1k")
    before = content(path)
    image("rebase", "-b", "", path)
    old.unlink()
    assert content(path) == before and _info(path) == (None, None)
    check(path)
    assert path.stat().st_size < 1 * MIB, "zeroes are not written"


def test_unsafe_changes_the_name_alone(tmp_path: Path) -> None:
    old = _backing(tmp_path / "old", MIB, "write -P 1 0 100k")
    path = create(tmp_path / "disk", MIB, backing=old)
    moved = old.rename(tmp_path / "moved")
    assert image_json("rebase", "-u", "-b", "moved", "-F", "qcow2", path) == {
        "filename": str(path), "backing-filename": "moved", "backing-filename-format": "qcow2",
    }  # fmt: skip
    assert _info(path) == ("moved", "qcow2")
    assert content(path) == content(moved)
    image("rebase", "-u", "-b", "nowhere", "-F", "raw", path)
    assert _info(path) == ("nowhere", "raw")
    image("rebase", "-u", path)
    assert _info(path) == (None, None)
    assert content(path) == bytes(MIB)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    old = _backing(tmp_path / "old", MIB, "write -P 1 0 100k")
    path = create(tmp_path / "disk", MIB, backing=old, cluster_size=512)
    result = image("rebase", "-u", "-b", "x" * 600, "-F", "qcow2", path, status=1)
    assert "cannot be told of its backing file" in result.stderr
    assert _info(path) == ("old", "qcow2") and content(path) == content(old)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["disk"], "-b"),
        (["-b", "new", "disk"], "-F"),
        (["-b", "none", "-F", "raw", "disk"], "none: cannot be opened"),
        (["-b", "disk", "-F", "qcow2", "disk"], "disk"),
        (["-b", "over", "-F", "qcow2", "disk"], "disk"),
        (["-b", "new", "-F", "qcow2", "-f", "raw", "disk"], "cannot have a backing file"),
        (["-u", "-b", "new", "-F", "qcow2", "-f", "raw", "disk"], "cannot have a backing file"),
        (["-b", "new", "-F", "qcow3", "disk"], "no layer 'qcow3'"),
    ],
)
def test_what_is_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _backing(tmp_path / "new", MIB)
    disk = create(tmp_path / "disk", MIB, backing=_backing(tmp_path / "old", MIB, "write -P 1 0 100k"))
    create(tmp_path / "over", MIB, backing=disk)
    before = hashlib.sha1(disk.read_bytes()).digest()
    assert message in image("rebase", *words, status=1).stderr
    assert hashlib.sha1(disk.read_bytes()).digest() == before


def test_internal_snapshots_are_warned_of(tmp_path: Path) -> None:
    old, new = _backing(tmp_path / "old", MIB), _backing(tmp_path / "new", MIB)
    path = create(tmp_path / "disk", MIB, backing=old)
    run("qemu-img", "snapshot", "-c", "before", path)
    assert "disk has internal snapshots" in image("rebase", "-b", new, "-F", "qcow2", path).stderr
