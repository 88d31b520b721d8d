"""``image resize``: larger, smaller, and what is new is zeroes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.image.kit import MIB, image, image_json, qemu_img
from tests.serving import check, content, create, qemu_io


@pytest.fixture(params=["qcow2", "raw"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """An image of 4 MiB, full of ones."""
    path = tmp_path / "disk"
    if request.param == "raw":
        path.write_bytes(b"\1" * 4 * MIB)
    else:
        create(path, 4 * MIB)
        qemu_io(path, "write -P 1 0 4M")
    return path, request.param


@pytest.mark.parametrize(("size", "mib"), [("6M", 6), ("+2M", 6), ("-1M", 3), ("+0", 4), ("1.5M", 1.5)])
def test_sizes(size: str, mib: float, disk: tuple[Path, str]) -> None:
    path, format = disk
    wanted = int(mib * MIB)
    shrink = ["--shrink"] if wanted < 4 * MIB else []
    assert image("resize", "-f", format, *shrink, path, size).stdout == "Image resized.\n"
    found = content(path, format=format)
    assert found == (b"\1" * 4 * MIB).ljust(wanted, b"\0")[:wanted]
    if format == "qcow2":
        check(path)
    assert image_json("resize", "-f", format, path, "+1M") == {"filename": str(path), "virtual-size": wanted + MIB}
    assert image("resize", "-q", "-f", format, path, "+1M").stdout == ""


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_preallocation(preallocation: str, disk: tuple[Path, str]) -> None:
    path, format = disk
    words = ("resize", "-f", format, "--preallocation", preallocation, path, "8M")
    if (format, preallocation) == ("raw", "metadata"):
        assert "falloc" in image(*words, status=1).stderr
        return
    image(*words)
    assert content(path, format=format) == b"\1" * 4 * MIB + bytes(4 * MIB)
    assert preallocation == "metadata" or path.stat().st_blocks * 512 >= 8 * MIB
    twin = path.with_name("twin")
    twin.write_bytes(b"\1" * 4 * MIB) if format == "raw" else create(twin, 4 * MIB)
    if format == "qcow2":
        qemu_io(twin, "write -P 1 0 4M")
        check(path)
    assert qemu_img("resize", "-f", format, "--preallocation", preallocation, twin, "8M").status == 0
    allocated = [
        sum(entry["length"] for entry in json.loads(qemu_img("map", "--output=json", each).out) if entry["present"])
        for each in (path, twin)
    ]
    assert allocated[0] == allocated[1]


def test_a_backing_file_that_is_longer_stays_hidden(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"x" * 8 * MIB)
    path = create(tmp_path / "disk", 2 * MIB, backing=base, backing_format="raw")
    image("resize", path, "6M")
    assert content(path) == b"x" * 2 * MIB + bytes(4 * MIB)
    check(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["disk", "1M"], "--shrink"),
        (["disk", "-1M"], "--shrink"),
        (["--shrink", "disk", "-4M"], "must be positive"),
        (["--shrink", "disk", "-1G"], "must be positive"),
        (["disk", "0"], "must be positive"),
        (["disk", "many"], "'many' is not a number of bytes"),
        (["disk", "++1M"], "is not a number of bytes"),
        (["disk"], "Missing argument"),
        (["--preallocation", "full", "disk", "4M"], "grows by"),
        (["none", "1M"], "cannot be opened"),
    ],
)
def test_what_is_refused(
    words: list[str], message: str, disk: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, format = disk
    monkeypatch.chdir(path.parent)
    before = path.read_bytes()
    assert message in image("resize", "-f", format, *words, status=1).stderr
    assert path.read_bytes()[: len(before)] == before


def test_a_raw_image_that_was_only_guessed_at_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    assert "was probed as raw" in image("resize", path, "2M").stderr
    assert path.stat().st_size == 2 * MIB
