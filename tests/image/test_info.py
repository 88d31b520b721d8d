"""``image info`` is ``qemu-img info``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.image.kit import Sample, image, qemu_img
from tests.serving import create, data_beside


def test_every_image_is_described_as_qemu_describes_it(zoo: dict[str, Sample]) -> None:
    for name, sample in zoo.items():
        arguments = ("info", "-f", sample.format, sample.path)
        assert image(*arguments).stdout == qemu_img(*arguments).out, name
        expected = json.loads(qemu_img(*arguments, "--output=json").out)
        assert json.loads(image(*arguments, "--output=json").stdout) == expected, name


def test_an_external_data_file_is_not_looked_at(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "1M", data_file="beside")
    data_beside(path).unlink()
    assert image("info", path).stdout == qemu_img("info", path).out
