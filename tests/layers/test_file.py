"""The layer ``file``."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.file import File
from nbdserver.errors import ImageError, RequestError
from nbdserver.extent import Extent, Intent
from nbdserver.files import Files
from nbdserver.graph import Graph
from nbdserver.reference import open_stack
from nbdserver.request import Flag
from tests.conftest import Run


def test_every_byte_lives_in_the_file_where_it_lives_in_the_layer(disk: Path) -> None:
    layer = File(str(disk))
    with open_stack(layer):
        for intent in Intent:
            assert list(layer.resolve(100, 5, intent)) == [Extent((1 << 20) - 100, layer.open_file, 100, True)]


def test_a_file_open_for_reading_is_not_writable(disk: Path) -> None:
    layer = File(str(disk))
    with open_stack(layer, read_only=True):
        assert layer.read_only
        assert [extent.writable for extent in layer.resolve(0, 1, Intent.WRITE)] == [False]


def test_bytes_go_to_the_file(disk: Path) -> None:
    with open_stack(File(str(disk))) as export:
        export.write(10, b"hello")
        export.zero(12, 1)
    assert disk.read_bytes()[9:16] == b"dhe\0lod"
    assert disk.stat().st_size == 1 << 20


def test_trim_and_zero_with_may_unmap_make_holes(disk: Path) -> None:
    with open_stack(File(str(disk))) as export:
        export.trim(0, 1 << 18)
        export.zero(1 << 18, 1 << 17, Flag.MAY_UNMAP)
        assert export.status(0, 1 << 20) == [(3 << 17, 3), (1 << 17, 0), (1 << 19, 3)]
        export.zero(0, 1 << 19)
        assert export.read(0, 1 << 20) == bytes(1 << 20)


def test_resize(disk: Path) -> None:
    layer = File(str(disk))
    with open_stack(layer) as export:
        layer.resize(2 << 20)
        assert export.read((2 << 20) - 1, 1) == b"\0"
        assert layer.changes == 0
        layer.resize(100)
        assert layer.changes == 1
        assert export.size == 100
    assert disk.stat().st_size == 100


def test_a_shrinking_file_says_what_is_gone(disk: Path) -> None:
    graph, layer = Graph(), File(str(disk))
    gone: list[tuple[int, int]] = []
    with open_stack(layer, graph=graph):
        graph.subscribe(layer, lambda offset, length: gone.append((offset, length)))
        layer.resize(100)
    assert gone == [(100, (1 << 20) - 100)]


def test_a_file_system_that_is_full_is_an_error_of_the_request(disk: Path) -> None:
    layer = File(str(disk))
    with open_stack(layer), pytest.raises(RequestError) as caught:
        layer.resize(1 << 62)
    assert caught.value.errno == errno.EFBIG


def test_a_file_that_cannot_be_opened_is_an_error_of_the_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing: cannot be opened"), open_stack(File(str(tmp_path / "missing"))):
        pass


def test_exports_share_a_file_that_they_read(disk: Path) -> None:
    files = Files()
    first, second = File(str(disk)), File(str(disk))
    with open_stack(first, read_only=True, files=files):
        with open_stack(second, read_only=True, files=files):
            assert first.open_file is second.open_file
        assert first.open_file.size == 1 << 20


@pytest.fixture
def device(run: Run, disk: Path) -> Iterator[str]:
    """A loop device over ``disk``."""
    done = run("losetup", "--find", "--show", disk, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    name = done.stdout.strip()
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


def test_a_block_device(device: str) -> None:
    layer = File(device)
    with open_stack(layer) as export:
        assert export.size == 1 << 20
        export.write(4095, b"hello")
        export.zero(4096, 1)
        assert export.read(4094, 7) == b"dh\0llod"
        export.zero(8192, 8192, Flag.MAY_UNMAP)
        export.trim(16384, 5000)
        assert export.read(8191, 8194) == b"d" + bytes(8192) + export.read(16383 + 1, 1)
        assert export.status(0, 1 << 20) == [(1 << 20, 0)]
        export.flush()
        with pytest.raises(RequestError) as caught:
            layer.resize(1 << 21)
        assert caught.value.errno == errno.ENOTSUP
        with pytest.raises(RequestError) as caught:
            export.zero(0, 4096, Flag.NO_FALLBACK)
        assert caught.value.errno == errno.ENOTSUP


def test_a_block_device_has_one_identity(device: str, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(device)
    files = Files()
    with (
        open_stack(File(device), files=files),
        pytest.raises(ImageError, match="somebody writes it, but has it open already"),
    ):
        files.open(str(alias), read_only=True)
