"""``image check`` finds, counts, mends and ends as ``qemu-img check`` does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.image.kit import MIB, Sample, image, image_json, qemu_img
from tests.serving import check, content, create, qemu_io

#: Clusters of 64 KiB: header, refcount table, refcount block, L1 table, L2 table, and then the data.
BLOCK, DATA, UNUSED = 2 * 65536, 5, 40


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = create(tmp_path / "disk", 4 * MIB)
    qemu_io(path, "write -P 1 0 1M")
    os.truncate(path, (UNUSED + 1) * 65536)
    return path


def _count(path: Path, cluster: int, refcount: int) -> None:
    """Have the image say that a cluster is referred to so often."""
    with path.open("r+b") as file:
        file.seek(BLOCK + 2 * cluster)
        file.write(refcount.to_bytes(2, "big"))


def test_sound_images(zoo: dict[str, Sample]) -> None:
    for name, sample in zoo.items():
        expected = qemu_img("check", "-f", sample.format, "--output=json", sample.path)
        result = image("check", "-f", sample.format, "--json", sample.path, status=expected.status)
        if sample.format == "raw":
            assert expected.status == 63 and "cannot be checked" in result.stderr
        else:
            assert json.loads(result.stdout) == json.loads(expected.out), name
            assert image("check", sample.path).stdout == qemu_img("check", sample.path).out, name


@pytest.mark.parametrize(("cluster", "refcount", "status"), [(UNUSED, 1, 3), (DATA, 0, 2), (DATA + 3, 2, 2)])
def test_broken_images(cluster: int, refcount: int, status: int, disk: Path) -> None:
    _count(disk, cluster, refcount)
    expected = qemu_img("check", "--output=json", disk)
    assert expected.status == status
    assert image_json("check", disk, status=status) == json.loads(expected.out)
    result = image("check", disk, status=status)
    assert result.stdout == qemu_img("check", disk).out and result.stderr
    assert image("check", "-q", disk, status=status).stdout == ""


@pytest.mark.parametrize(
    ("repair", "cluster", "refcount", "status"),
    [("leaks", UNUSED, 1, 0), ("all", UNUSED, 1, 0), ("all", DATA, 0, 0), ("all", DATA + 3, 2, 0)],
)
def test_repairs(repair: str, cluster: int, refcount: int, status: int, disk: Path) -> None:
    _count(disk, cluster, refcount)
    twin = disk.with_name("twin")
    twin.write_bytes(disk.read_bytes())
    expected = qemu_img("check", "-r", repair, twin)
    result = image("check", "--repair", repair, disk, status=status)
    assert expected.status == status
    end = "Image end offset"  # where repairs put things is a matter of taste
    assert result.stdout.partition(end)[0] == expected.out.partition(end)[0]
    check(disk)
    assert content(disk) == content(twin)


def test_what_was_mended_is_told(disk: Path) -> None:
    _count(disk, UNUSED, 1)
    assert image_json("check", "-r", "leaks", disk)["leaks-fixed"] == 1
    assert "leaks-fixed" not in image_json("check", "-r", "leaks", disk)


def test_what_is_refused(disk: Path) -> None:
    assert "not both" in image("check", "-r", "all", "-U", disk, status=1).stderr
    assert "cannot be opened" in image("check", disk.with_name("none"), status=1).stderr
    disk.write_bytes(disk.read_bytes()[:100])
    assert image("check", "-f", "qcow2", disk, status=1).stderr.startswith(f"nbdserver: {disk}: ")
