"""``image commit``: what an overlay holds goes down; killed at any moment, it shows what it did."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.image.kit import MIB, image, image_json, qemu_img
from tests.serving import check, content, create, qemu_io, run

#: (topmost, middle, base) sizes and formats, and what of each is written.
WRITES = {
    "base": ("write -P 1 0 2M", "write -P 2 3M 100k", "write -P 3 5M 64k"),
    "middle": ("write -P 4 512k 1M", "write -z 1792k 128k", "write -P 5 4M 10k", "write -c -P 6 4608k 64k"),
    "top": ("write -P 7 1M 200k", "write -z 3M 64k", "write -P 8 5M 3k", "write -c -P 9 5184k 64k", "write -P 9 2M 1k"),
}


def _chain(
    directory: Path, sizes: tuple[int, int, int] = (6 * MIB,) * 3, format: str = "qcow2", **options: object
) -> Path:
    """The topmost of three images."""
    base = directory / "base"
    run("qemu-img", "create", "-q", "-f", format, base, str(sizes[2]))
    run("qemu-io", "-f", format, *(word for write in WRITES["base"] for word in ("-c", write)), base)
    middle = create(directory / "middle", sizes[1], backing=base, backing_format=format, **options)
    qemu_io(middle, *WRITES["middle"])
    top = create(directory / "top", sizes[0], backing=middle, **options)
    qemu_io(top, *WRITES["top"])
    return top


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("base", [None, "base"])
@pytest.mark.parametrize(
    "sizes",
    [(6 * MIB,) * 3, (8 * MIB, 6 * MIB, 6 * MIB), (6 * MIB, 8 * MIB, 8 * MIB), (8 * MIB, 5 * MIB + 512, 7 * MIB)],
)
def test_as_qemu_commits(sizes: tuple[int, int, int], base: str | None, format: str, tmp_path: Path) -> None:
    shown = []
    for who in ("ours", "theirs"):
        directory = tmp_path / who
        directory.mkdir()
        top = _chain(directory, sizes, format)
        before = content(top)
        words = ("-b", directory / base) if base else ()
        if who == "ours":
            assert image("commit", *words, top).stdout == "Image committed.\n"
        else:
            assert qemu_img("commit", *words, top).status == 0
        check(top)
        target = directory / (base or "middle")
        committed = content(target, format=format if base else "qcow2")
        assert committed[: len(before)] == before, "the base shows what the overlay did"
        assert content(top) == before
        shown.append((hashlib.sha1(committed).digest(), len(committed)))
    assert shown[0] == shown[1]


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_the_overlay_is_emptied_unless_it_is_dropped(compat: str, tmp_path: Path) -> None:
    top = _chain(tmp_path, compat=compat)
    before = content(top)
    told = image_json("commit", "-d", top)
    assert told == {"filename": str(top), "base": str(tmp_path / "middle"), "emptied": False}
    assert {entry["depth"] for entry in image_json("map", top)} == {0, 1, 2}
    assert image("commit", "-q", top).stdout == ""
    assert {entry["depth"] for entry in image_json("map", top)} == {1, 2}
    check(top)
    check(tmp_path / "middle")
    assert content(top) == before


def test_a_base_that_has_a_longer_backing_file_does_not_show_it(tmp_path: Path) -> None:
    """What the overlay shows of its backing file's end is zeroes, and stays so when that file grows."""
    lowest = tmp_path / "lowest"
    lowest.write_bytes(b"x" * 8 * MIB)
    base = create(tmp_path / "base", 2 * MIB, backing=lowest, backing_format="raw")
    top = create(tmp_path / "top", 6 * MIB, backing=base)
    qemu_io(top, "write -P 1 4M 64k")
    before = content(top)
    assert before[2 * MIB : 4 * MIB] == bytes(2 * MIB)
    image("commit", top)
    assert content(base) == content(top) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base"], "does not have a backing file"),
        (["-b", "other", "top"], "has no image 'other' in its chain"),
        (["-b", "base", "-f", "raw", "top"], "does not have a backing file"),
        (["none"], "cannot be opened"),
    ],
)
def test_what_is_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _chain(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = image("commit", *words, status=1) if "raw" not in words else None
    assert result is None or message in result.stderr
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_backing_file_of_unknown_format_is_not_written(tmp_path: Path) -> None:
    top = _chain(tmp_path)
    run("qemu-img", "rebase", "-u", "-b", "middle", "-F", "qcow2", top)
    data = bytearray(top.read_bytes())
    at = data.index((0xE2792ACA).to_bytes(4, "big"))
    data[at : at + 4] = b"none"  # another header extension, that nobody knows
    top.write_bytes(data)
    assert "image rebase -u -b middle -F FMT" in image("commit", top, status=1).stderr


def test_internal_snapshots_are_warned_of(tmp_path: Path) -> None:
    top = _chain(tmp_path)
    run("qemu-img", "snapshot", "-c", "before", top)
    assert "top has internal snapshots" in image("commit", top).stderr


def test_nobody_else_may_use_them(tmp_path: Path) -> None:
    top = _chain(tmp_path)
    with subprocess.Popen(["qemu-io", "-r", "-f", "qcow2", tmp_path / "middle"], stdin=-1, stdout=-1) as reader:
        assert reader.stdout is not None and reader.stdin is not None
        reader.stdout.read(8)
        assert "middle: cannot be opened for writing" in image("commit", top, status=1).stderr
        reader.stdin.close()
