"""``image create``: QEMU's options, images that QEMU takes for its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbdserver.image.parameters import parse_size
from nbdserver.locks import lock_image
from nbdserver.permissions import READER, as_file
from tests.image.kit import KIB, MIB, image, image_json, qemu_img
from tests.serving import create, run, run_json


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1000", 1000), ("4096b", 4096), ("1k", KIB), ("1.5M", 3 * MIB // 2), ("2G", 2 << 30), ("1T", 1 << 40),
     ("0x10000", 65536), ("7E", 7 << 60)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1X", "-1", "1.5", "8E", "1" * 100, "1e3", "0x1k", "1 M"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


OPTIONS = [
    "", "cluster_size=4k", "compat=0.10", "refcount_bits=1,cluster_size=512", "lazy_refcounts=on", "preallocation=full",
    "preallocation=metadata,cluster_size=2M", "compression_type=zstd",
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_an_image_is_as_qemu_makes_it(options: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    words = ("-f", "qcow2", *(["-o", options] if options else []))
    assert image("create", *words, ours, "24M").stdout.startswith(f"Formatting '{ours}', fmt=qcow2 ")
    run("qemu-img", "create", "-q", *words, theirs, "24M")
    infos = [run_json("qemu-img", "info", "--output=json", path) for path in (ours, theirs)]
    for key in ("virtual-size", "cluster-size", "format-specific"):
        assert infos[0][key] == infos[1][key]
    run("qemu-img", "check", ours)
    run("qemu-img", "compare", ours, theirs)


def test_a_raw_image(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    assert image("create", path, "1M").stdout == f"Formatting '{path}', fmt=raw size=1048576\n"
    assert path.stat().st_size == MIB and path.stat().st_blocks == 0
    assert image("create", "-q", "-o", "preallocation=full", path, "1M").stdout == ""
    assert path.stat().st_blocks * 512 >= MIB


@pytest.mark.parametrize("raw", ["off", "on"])
def test_an_external_data_file_is_made_too(raw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path("source")
    source.write_bytes(b"x" * MIB + bytes(MIB))
    options = f"data_file=data,data_file_raw={raw}"
    image("create", "-f", "qcow2", "-o", options, "disk", "3M")
    run("qemu-img", "check", "disk")
    assert Path("data").stat().st_size == 3 * MIB
    image("convert", "-O", "qcow2", "-o", options, source, "disk")
    run("qemu-img", "compare", "-F", "raw", "disk", source)
    assert Path("data").stat().st_size == 2 * MIB
    assert raw == "off" or Path("data").read_bytes() == source.read_bytes()
    assert (
        "has it open already"
        in image("convert", "-O", "qcow2", "-o", "data_file=source", source, "other", status=1).stderr
    )


def test_an_overlay_has_the_size_of_its_backing_file(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 5 * MIB)
    over = tmp_path / "deep"
    over.mkdir()
    words = image("create", "-f", "qcow2", "-b", "../base", "-F", "qcow2", over / "disk").stdout
    assert f"size={5 * MIB} backing_file=../base backing_fmt=qcow2" in words
    info = json.loads(qemu_img("info", "--output=json", over / "disk").out)
    assert info["virtual-size"] == 5 * MIB
    assert (info["backing-filename"], info["backing-filename-format"]) == ("../base", "qcow2")
    image("create", "-f", "qcow2", "-o", f"backing_file={base},backing_fmt=qcow2", over / "disk", "7M")
    assert json.loads(qemu_img("info", "--output=json", over / "disk").out)["virtual-size"] == 7 * MIB


def test_a_backing_file_is_looked_at_unless_told_not_to(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    assert "none" in image("create", "-f", "qcow2", "-b", "none", "-F", "qcow2", path, "1M", status=1).stderr
    assert not path.exists()
    image("create", "-u", "-f", "qcow2", "-b", "none", "-F", "qcow2", path, "1M")
    assert "needs a size" in image("create", "-u", "-f", "qcow2", "-b", "x", "-F", "raw", path, status=1).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-f", "qcow2", "-o", "cluster_siz=4k"], "did you mean cluster_size"),
        (["-f", "qcow2", "-o", "cluster_size=3000"], "3000"),
        (["-f", "qcow2", "-o", "lazy_refcounts=maybe"], "on or off"),
        (["-f", "qcow2", "-o", "refcount_bits=many"], "an integer"),
        (["-f", "qcow2", "-o", "compat=3"], "0.10 or 1.1"),
        (["-f", "qcow2", "-o", "backing_fmt"], "a value is missing"),
        (["-f", "qcow2", "-b", "base"], "-F"),
        (["-b", "base", "-F", "raw"], "no such option"),
        (["-f", "luks"], "cannot be made"),
        (["-f", "qcow3"], "there is no layer 'qcow3'"),
        (["-f", "file"], "no image format"),
    ],
)
def test_what_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    (tmp_path / "base").touch()
    result = image("create", *words, path, "1M", status=1)
    assert message in result.stderr
    assert not path.exists() and result.stdout == ""


def test_a_file_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"precious")
    with path.open("r+b") as file:
        lock_image(file.fileno(), str(path), as_file(READER, read_only=True))
        assert "another process" in image("create", path, "1M", status=1).stderr
    assert path.read_bytes() == b"precious"
    image("create", path, "1M")
    assert path.read_bytes() == bytes(MIB)


def test_an_image_is_not_its_own_backing_file(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", MIB)
    before = path.read_bytes()
    assert image("create", "-f", "qcow2", "-b", "disk", "-F", "qcow2", path, status=1).stderr
    assert path.read_bytes() == before


def test_help_for_options(tmp_path: Path) -> None:
    lines = image("create", "-f", "qcow2", "-o", "help").stdout.splitlines()
    assert lines[0] == "Supported qcow2 options:"
    theirs = {line.split("=")[0].strip() for line in qemu_img("create", "-f", "qcow2", "-o", "help").out.splitlines()}
    ours = {line.split("=")[0].strip() for line in lines[1:]}
    assert ours <= theirs
    assert {"cluster_size", "compat", "backing_file", "backing_fmt", "preallocation", "size"} <= ours


def test_measure_as_qemu_measures(tmp_path: Path) -> None:
    source = create(tmp_path / "disk", 40 * MIB)
    run("qemu-io", "-f", "qcow2", "-c", "write 1M 3M", "-c", "write -z 8M 1M", source)
    bitmaps = create(tmp_path / "bitmaps", 100 << 30)
    run("qemu-img", "bitmap", "--add", "-g", "512", bitmaps, "a long name, and more of it")
    run("qemu-img", "bitmap", "--add", "--disable", bitmaps, "another")
    for words in (
        ["--size", "1G", "-O", "qcow2"],
        ["--size", "3T", "-O", "qcow2", "-o", "cluster_size=4k"],
        ["--size", "10M"],
        ["-O", "qcow2", source],
        ["-O", "qcow2", "-o", "compat=0.10", source],
        ["-O", "qcow2", bitmaps],
        ["-O", "qcow2", "-o", "cluster_size=4k", bitmaps],
        ["-O", "raw", "-f", "qcow2", source],
        ["-O", "qcow2", "-o", "cluster_size=512,refcount_bits=64", source],
    ):
        assert image_json("measure", *words) == json.loads(qemu_img("measure", "--output=json", *words).out)
        assert image("measure", *words).stdout == qemu_img("measure", *words).out


def test_what_measure_refuses(tmp_path: Path) -> None:
    assert image("measure", status=1).stderr
    assert image("measure", "--size", "1M", tmp_path / "x", status=1).stderr
    assert image("measure", "--size", "1M", "-l", "x", status=1).stderr
