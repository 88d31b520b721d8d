"""What is told of an image, and its backing file's name: as QEMU tells and reads it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.errors import RequestError
from nbdserver.format import Describes, HasBacking
from nbdserver.reference import open_stack
from tests.serving import check, content, create, qemu_io, run, run_json

MIB = 1 << 20


def opened(path: Path, **keys: Any) -> Qcow2:
    return Qcow2(File(str(path)), **keys)


IMAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "version 2": {"compat": "0.10"},
    "lazy": {"lazy_refcounts": "on"},
    "zstd": {"compression_type": "zstd"},
    "refcounts": {"refcount_bits": 1},
    "subclusters": {"extended_l2": "on"},
    "data file": {"data_file": True},
    "raw data file": {"data_file": True, "data_file_raw": "on"},
}


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_what_qemu_tells(options: dict[str, Any], tmp_path: Path) -> None:
    options = {key: tmp_path / "data" if key == "data_file" else value for key, value in options.items()}
    path = create(tmp_path / "image", MIB, **options)
    theirs = run_json("qemu-img", "info", "--output=json", path)
    for read_only in (True, False):
        layer = opened(path)
        with open_stack(layer, read_only=read_only):
            assert isinstance(layer, Describes)
            assert layer.info() == theirs["format-specific"]


def test_bitmaps_are_told(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    run("qemu-img", "bitmap", "--add", path, "one")
    run("qemu-img", "bitmap", "--add", "-g", "4096", path, "two")
    run("qemu-img", "bitmap", "--disable", path, "two")
    layer = opened(path)
    with open_stack(layer, read_only=True):
        assert layer.info() == run_json("qemu-img", "info", "--output=json", path)["format-specific"]


def test_the_corrupt_bit_is_told(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    with path.open("r+b") as file:
        file.seek(72)
        file.write(bytes(7) + b"\2")
    layer = opened(path)
    with open_stack(layer, read_only=True):
        assert layer.info()["data"]["corrupt"] is True


# -- the backing file --------------------------------------------------------------------------------------------------


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """Two images of different formats."""
    one = create(tmp_path / "one.qcow2", MIB)
    qemu_io(one, "write -P 1 0 64k")
    two = tmp_path / "two.raw"
    two.write_bytes(b"\2" * MIB)
    return one, two


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_another_backing_file(cluster_size: int, compat: str, bases: tuple[Path, Path], tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, backing=bases[0], cluster_size=cluster_size, compat=compat)
    for name, format, first in (("two.raw", "raw", 2), (None, None, 0), ("one.qcow2", "qcow2", 1)):
        layer = opened(path)
        with open_stack(layer) as disk:
            assert isinstance(layer, HasBacking)
            disk.write(MIB // 2, b"x" * 512)
            layer.set_backing(name, format)
            assert (layer.backing_name, layer.backing_format) == (name, format)
            disk.write(MIB // 2 + 512, b"y" * 512)
        report = run_json("qemu-img", "info", "--output=json", path)
        assert (report.get("backing-filename"), report.get("backing-filename-format")) == (name, format)
        check(path)
        assert content(path)[:512] == bytes([first]) * 512
        assert content(path)[MIB // 2 : MIB // 2 + 1024] == b"x" * 512 + b"y" * 512
        with open_stack(opened(path), read_only=True) as disk:
            assert disk.read(0, disk.size) == content(path)


def test_a_name_that_is_too_long(bases: tuple[Path, Path], tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=512)
    layer = opened(path)
    with open_stack(layer):
        for length, number in ((1024, errno.EINVAL), (1000, errno.ENOSPC)):
            with pytest.raises(RequestError) as caught:
                layer.set_backing("x" * length, "raw")
            assert caught.value.errno == number
        assert layer.backing_name is None
    check(path)


def test_what_is_open_for_reading_names_what_it_did(bases: tuple[Path, Path], tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, backing=bases[0])
    layer = opened(path)
    with open_stack(layer, read_only=True):
        with pytest.raises(RequestError) as caught:
            layer.set_backing(None, None)
        assert caught.value.errno == errno.EROFS and layer.backing_name == "one.qcow2"


def test_a_raw_data_file_has_no_backing_file(bases: tuple[Path, Path], tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, data_file=tmp_path / "data", data_file_raw="on")
    layer = opened(path)
    with open_stack(layer), pytest.raises(RequestError) as caught:
        layer.set_backing("one.qcow2", "qcow2")
    assert caught.value.errno == errno.EINVAL
