"""``image map`` is ``qemu-img map``."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserver.image.parameters import parse_size
from tests.image.kit import MIB, Sample, image, qemu_img
from tests.serving import create, qemu_io


def test_every_image_is_mapped_as_qemu_maps_it(zoo: dict[str, Sample]) -> None:
    for name, sample in zoo.items():
        expected = qemu_img("map", "-f", sample.format, "--output=json", sample.path)
        found = image("map", "-f", sample.format, "--json", sample.path).stdout
        # qemu-img tells of an entry of length 0 where there is none.
        assert found == ("[]\n" if name == "raw, empty" else expected.out), name


def test_in_words(zoo: dict[str, Sample]) -> None:
    for name in ("raw", "raw, empty", "chain", "short backing", "full"):
        sample = zoo[name]
        expected = qemu_img("map", "-f", sample.format, sample.path)
        result = image("map", "-f", sample.format, sample.path, status=expected.status)
        assert result.stdout.splitlines() == expected.out.splitlines(), name


def test_compressed_data_cannot_be_shown_in_words(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_io(path, "write -c -P 1 0 64k")
    assert qemu_img("map", path).status == 1
    assert "compressed" in image("map", path, status=1).stderr


@pytest.mark.parametrize(("start", "length"), [("1M", "64k"), ("0", "1"), ("3145728", "100M"), ("5M", "0")])
def test_a_part_of_it(start: str, length: str, zoo: dict[str, Sample]) -> None:
    for name in ("raw", "qcow2", "chain"):
        path = zoo[name].path
        wanted = ("--output=json", "--start-offset", start, "--max-length", length)
        if parse_size(length):
            assert image("map", path, *wanted).stdout == qemu_img("map", path, *wanted).out, name
        else:
            assert image("map", path, *wanted).stdout == "[]\n"
