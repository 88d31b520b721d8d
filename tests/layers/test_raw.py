"""The layer ``raw``."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.file import File
from layers.memory import Memory
from layers.raw import Raw
from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import Extent, Intent
from nbdserver.files import FileOpener, Files
from nbdserver.format import Creates
from nbdserver.graph import Graph
from nbdserver.limits import DISK_MAX
from nbdserver.reference import open_stack
from tests.conftest import Run


def test_raw_is_the_file_as_it_is(disk: Path) -> None:
    with open_stack(Raw(File(str(disk)))) as export:
        assert export.size == 1 << 20
        assert export.read(0, 1 << 20) == disk.read_bytes()


def test_a_window_of_the_file() -> None:
    graph = Graph()
    with open_stack(Memory(100), graph=graph) as below:
        below.write(0, bytes(range(100)))
        with open_stack(Raw(below.root, offset=10, size=20), graph=graph) as export:
            assert export.size == 20
            assert export.read(0, 20) == bytes(range(10, 30))
            export.write(19, b"\xff")
            with pytest.raises(RequestError):
                export.read(19, 2)
        assert below.read(28, 3) == bytes([28, 0xFF, 30])


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 99), st.integers(1, 100))
def test_resolve_shifts_and_translate_shifts_back(offset: int, size: int, at: int, length: int) -> None:
    size = min(size, 100 - offset)
    layer = Raw(Memory(100), offset=offset, size=size)
    with open_stack(layer):
        if at < size:
            length = min(length, size - at)
            (extent,) = layer.resolve(at, length, Intent.READ)
            assert extent == Extent(size - at, layer.file, offset + at, True)
            assert list(layer.translate(layer.file, extent.offset, length)) == [(at, length)]
        seen = [child - offset for child in range(at, at + length) if 0 <= child - offset < size]
        told = list(layer.translate(layer.file, at, length))
        assert [start + i for start, count in told for i in range(count)] == seen


@pytest.mark.parametrize("offset", [101, -1])
def test_the_offset_lies_in_the_file(offset: int) -> None:
    refused = pytest.raises(ConfigError, match=r"offset: found .*, but the file has 100 bytes")
    with refused, open_stack(Raw(Memory(100), offset=offset)):
        pass


@pytest.mark.parametrize("size", [91, -1])
def test_the_window_ends_in_the_file(size: int) -> None:
    refused = pytest.raises(ConfigError, match=r"size: found .*, but 90 bytes follow the offset 10")
    with refused, open_stack(Raw(Memory(100), offset=10, size=size)):
        pass


def test_a_window_of_nothing() -> None:
    with open_stack(Raw(Memory(100), offset=100)) as export:
        assert export.size == 0
        assert export.read(0, 0) == b""


def test_a_raw_disk_grows_and_shrinks_with_its_file() -> None:
    memory = Memory(100)
    layer = Raw(memory, offset=10)
    with open_stack(layer) as export:
        layer.resize(200)
        assert (export.size, memory.size) == (200, 210)
        layer.resize(5)
        assert (export.size, memory.size) == (5, 15)


def test_a_window_cannot_be_resized() -> None:
    layer = Raw(Memory(100), size=50)
    with open_stack(layer), pytest.raises(RequestError) as caught:
        layer.resize(60)
    assert caught.value.errno == errno.ENOTSUP


def test_a_disk_too_large_for_its_offset() -> None:
    layer = Raw(Memory(100), offset=10)
    with open_stack(layer), pytest.raises(RequestError) as caught:
        layer.resize(DISK_MAX)
    assert caught.value.errno == errno.EINVAL


def test_a_window_is_what_qemu_reads_through_it(run: Run, disk: Path, tmp_path: Path) -> None:
    with disk.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(range(256)) * 64)
    image = {"driver": "raw", "offset": 4608, "size": 8192, "file": {"driver": "file", "filename": str(disk)}}
    run("qemu-img", "convert", "-O", "raw", f"json:{json.dumps(image)}", tmp_path / "out")
    with open_stack(Raw(File(str(disk)), offset=4608, size=8192), read_only=True) as export:
        assert export.read(0, 8192) == (tmp_path / "out").read_bytes()


@pytest.mark.parametrize(("mode", "share"), [("off", 0), ("falloc", 1), ("full", 1)])
def test_a_new_disk_takes_up_what_is_asked_for(tmp_path: Path, mode: str, share: int) -> None:
    path = tmp_path / "image"
    path.touch()
    file = File(str(path))
    with open_stack(file):
        Raw.create(file, (1 << 20) + 1, Raw.CreateOptions(preallocation=mode), opener=FileOpener(Graph(), Files()))
    assert path.read_bytes() == bytes((1 << 20) + 512)
    assert share <= path.stat().st_blocks * 512 / (1 << 20) < share + 0.1


def test_measured_as_qemu_does(run: Run) -> None:
    for size in (0, 1, 512, 1000, 1 << 40):
        theirs = json.loads(run("qemu-img", "measure", "--output=json", "-O", "raw", "--size", size).stdout)
        ours = Raw.measure(size, Raw.CreateOptions(), ())
        assert (ours.required, ours.fully_allocated) == (theirs["required"], theirs["fully-allocated"])


@pytest.mark.parametrize("size", [-512, 1 << 63])
def test_a_disk_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"size: found {size}"):
        Raw.create(Memory(512), size, Raw.CreateOptions(), opener=FileOpener(Graph(), Files()))


def test_raw_disks_can_be_made() -> None:
    assert isinstance(Raw, Creates)
