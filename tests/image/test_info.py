"""``image info`` says what ``qemu-img info`` says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.image.kit import KIB, MIB, Sample, image, image_json, qemu_img
from tests.serving import create, data_beside, qemu_io, run


def test_every_image_is_described_as_qemu_describes_it(zoo: dict[str, Sample]) -> None:
    for name, sample in zoo.items():
        words = ("-f", sample.format, sample.path)
        expected = json.loads(qemu_img("info", "--output=json", *words).out)
        if sample.format == "raw":
            expected.pop("format-specific", None)  # the file's, which is empty
        assert image_json("info", *words) == expected, name
        assert image("info", *words).stdout == qemu_img("info", *words).out, name


def test_backing_chains(zoo: dict[str, Sample]) -> None:
    for name in ("chain", "old overlay", "raw"):
        path = zoo[name].path
        assert image("info", "--backing-chain", path).stdout == qemu_img("info", "--backing-chain", path).out
        expected = json.loads(qemu_img("info", "--backing-chain", "--output=json", path).out)
        for info in expected:
            if info["format"] == "raw":
                info.pop("format-specific", None)
        assert image_json("info", "--backing-chain", path) == expected


def test_snapshots_and_bitmaps(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", MIB)
    run("qemu-img", "snapshot", "-c", "first", path)
    run("qemu-img", "bitmap", "--add", path, "one")
    run("qemu-img", "bitmap", "--add", "-g", "128k", "--disable", path, "two")
    assert image("info", path).stdout == qemu_img("info", path).out
    assert image_json("info", path) == json.loads(qemu_img("info", "--output=json", path).out)


def test_an_image_that_was_not_closed_properly(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", MIB, lazy_refcounts="on")
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")  # the dirty bit
    assert "cleanly shut down: no\n" in qemu_img("info", path).out
    assert image("info", path).stdout == qemu_img("info", path).out


def test_the_backing_file_need_not_be_there(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", MIB, backing=create(tmp_path / "base", MIB))
    (tmp_path / "base").unlink()
    assert image("info", path).stdout == qemu_img("info", path).out
    assert "base" in image("info", "--backing-chain", path, status=1).stderr


@pytest.mark.parametrize("name", ["nbd://localhost/x", "json:{}", "file:base", "../base", "/somewhere/else"])
def test_names_of_backing_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = create(tmp_path / "disk", MIB)
    run("qemu-img", "rebase", "-u", "-b", name, "-F", "raw", path)
    info = image_json("info", "disk")
    assert info["backing-filename"] == name and info["backing-filename-format"] == "raw"
    assert image("info", "--backing-chain", "disk", status=1).stderr


def test_loops_end(tmp_path: Path) -> None:
    one, other = create(tmp_path / "one", MIB), create(tmp_path / "other", MIB)
    run("qemu-img", "rebase", "-u", "-b", "other", "-F", "qcow2", one)
    run("qemu-img", "rebase", "-u", "-b", "one", "-F", "qcow2", other)
    assert "closes a loop" in image("info", "--backing-chain", one, status=1).stderr


def test_paths_are_told_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    create(tmp_path / "deep/disk", MIB, backing=create(tmp_path / "deep/base", MIB))
    for directory in (tmp_path, tmp_path / "deep"):
        monkeypatch.chdir(directory)
        name = os.path.relpath(tmp_path / "deep/disk")
        assert image("info", name).stdout == qemu_img("info", name).out


def test_sparse_and_large(tmp_path: Path) -> None:
    for size in ("1000T", "999G", "1023k", "1536"):
        path = tmp_path / "disk"
        image("create", "-f", "qcow2", "-o", "cluster_size=2M", path, size)
        assert image("info", path).stdout == qemu_img("info", path).out
    qemu_io(create(path, 100 * MIB), f"write 0 {1000 * KIB}")
    assert image("info", path).stdout == qemu_img("info", path).out


def test_an_external_data_file_is_not_looked_at(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "1M", data_file="beside")
    data_beside(path).unlink()
    assert image("info", path).stdout == qemu_img("info", path).out
