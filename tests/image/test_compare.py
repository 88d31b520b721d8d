"""``image compare`` finds what ``qemu-img compare`` finds, and ends as it ends."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.image.kit import KIB, MIB, Sample, image, image_json, qemu_img
from tests.serving import create, qemu_io


def test_as_qemu_compares(zoo: dict[str, Sample]) -> None:
    for (one, first), (other, second) in itertools.combinations(zoo.items(), 2):
        formats = ("-f", first.format, "-F", second.format, first.path, second.path)
        expected = qemu_img("compare", *formats)
        result = image("compare", *formats, status=expected.status)
        assert result.stdout == expected.out, f"{one} and {other}"


def test_an_image_is_itself(zoo: dict[str, Sample]) -> None:
    for sample in zoo.values():
        assert image("compare", "-s", sample.path, sample.path).stdout == "Images are identical.\n"


@pytest.mark.parametrize("at", [0, 511, 512, 65535, 65536, MIB + 4097, 3 * MIB - 1])
def test_the_first_difference_to_the_sector(at: int, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    data = bytearray(3 * MIB)
    one.write_bytes(data)
    data[at] = 1
    other.write_bytes(data)
    result = image("compare", "-f", "raw", "-F", "raw", one, other, status=1)
    assert result.stdout == f"Content mismatch at offset {at // 512 * 512}!\n"
    assert image_json("compare", one, other, status=1) == {
        "identical": False, "virtual-sizes": [3 * MIB, 3 * MIB], "mismatch": "content", "offset": at // 512 * 512,
    }  # fmt: skip


def test_a_longer_image_may_be_the_same_if_there_are_zeroes_behind(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_bytes(b"x" * MIB)
    long.write_bytes(b"x" * MIB + bytes(MIB))
    assert image("compare", short, long).stdout == "Warning: Image size mismatch!\nImages are identical.\n"
    assert image("compare", "-s", short, long, status=1).stdout == "Strict mode: Image size mismatch!\n"
    long.write_bytes(b"x" * MIB + bytes(1000) + b"y")
    words = f"Warning: Image size mismatch!\nContent mismatch at offset {MIB + 512}!\n"
    assert image("compare", long, short, status=1).stdout == qemu_img("compare", long, short).out == words
    assert image("compare", "-q", long, short, status=1).stdout == ""


def test_strict_is_about_allocation(tmp_path: Path) -> None:
    one, other = create(tmp_path / "one", MIB), create(tmp_path / "other", MIB)
    qemu_io(one, "write -P 1 0 64k", "write -P 0 128k 64k")
    qemu_io(other, "write -P 1 0 64k")
    assert image("compare", one, other).stdout == "Images are identical.\n"
    expected = qemu_img("compare", "-s", one, other)
    assert image("compare", "-s", one, other, status=1).stdout == expected.out
    assert image_json("compare", "-s", one, other, status=1)["mismatch"] == "status"


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_io(path, "write -P 1 0 1M")
    assert "cannot be opened" in image("compare", path, tmp_path / "none", status=2).stderr
    assert image("compare", path, status=2).stderr
    broken = bytearray(path.read_bytes())
    l1 = int.from_bytes(broken[40:48], "big")
    l2 = int.from_bytes(broken[l1 : l1 + 8], "big") & ((1 << 56) - 1)
    broken[l2 + 7] |= 2  # a reserved bit of the first entry
    path.write_bytes(broken)
    assert "allocation cannot be read" in image("compare", path, path, status=3).stderr


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_io(path, "write -c -P 1 0 64k")
    data = bytearray(path.read_bytes())
    data[5 * 64 * KIB : 5 * 64 * KIB + 8] = b"\xff" * 8  # where the compressed data is
    path.write_bytes(data)
    other = tmp_path / "other"
    other.write_bytes(b"\1" * 64 * KIB + bytes(960 * KIB))
    assert image("compare", path, other, status=4).stderr
