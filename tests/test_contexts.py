"""Which meta contexts an export can offer, and what keeps a bitmap that it does."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.raw import Raw
from layers.throttle import Throttle
from nbdserver import contexts
from nbdserver.contexts import Contexts
from nbdserver.errors import ConfigError, RequestError
from nbdserver.layer import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, Layer
from nbdserver.reference import Reference, open_stack
from tests.serving import create, run

MIB = 1 << 20


def image(path: Path, *bitmaps: str, size: int = MIB, backing: Path | None = None) -> Path:
    """A new image with bitmaps: the name of one that is disabled begins with "off"."""
    create(path, size, backing=backing)
    for name in bitmaps:
        run("qemu-img", "bitmap", "--add", *(["--disable"] if name.startswith("off") else []), path, name)
    return path


@contextlib.contextmanager
def offered(
    root: Layer, *bitmaps: str, read_only: bool = False, opened_read_only: bool | None = None
) -> Iterator[tuple[Reference, Contexts]]:
    with open_stack(root, read_only=read_only if opened_read_only is None else opened_read_only) as disk:
        found = Contexts(disk.root, bitmaps, read_only=read_only)
        try:
            yield disk, found
        finally:
            found.close()


def dirty(disk: Reference, name: str) -> list[tuple[int, int]]:
    runs, at = [], 0
    for length, flags in disk.status(0, disk.size, DIRTY_BITMAP + name):
        if flags:
            runs.append((at, length))
        at += length
    return runs


def test_only_allocation_is_offered_unless_more_is_asked_for() -> None:
    with open_stack(Memory(MIB)) as disk:
        assert Contexts(disk.root, read_only=False).names == (BASE_ALLOCATION,)
        asked = Contexts(disk.root, allocation_depth=True, read_only=False)
        assert asked.names == (BASE_ALLOCATION, ALLOCATION_DEPTH)
        assert Contexts(disk.root, True, read_only=False).names == (BASE_ALLOCATION,)


def test_filters_show_the_bitmaps_below_them_where_they_see_them(tmp_path: Path) -> None:
    path = image(tmp_path / "image", "b0")
    root = Throttle(Raw(Qcow2(File(str(path))), offset=256 << 10), bps_total=1 << 30)
    with offered(root, "b0") as (disk, found):
        assert found.names == (BASE_ALLOCATION, DIRTY_BITMAP + "b0")
        disk.write(64 << 10, b"x")
        assert dirty(disk, "b0") == [(64 << 10, 64 << 10)], "at the filter's offsets"
        found.check(disk.root, DIRTY_BITMAP + "b0")
    with open_stack(Qcow2(File(str(path)))) as disk:
        assert dirty(disk, "b0") == [(320 << 10, 64 << 10)], "at the image's"


def test_images_show_those_of_their_backing_files_but_for_their_own_of_that_name(tmp_path: Path) -> None:
    base = image(tmp_path / "base", "deep", "both", size=2 * MIB)
    run("qemu-io", "-c", "write 1M 512", base)
    top = image(tmp_path / "top", "both", size=3 * MIB, backing=base)
    with offered(Qcow2(File(str(top))), "deep", "both") as (disk, _):
        disk.write(0, b"x")
        assert dirty(disk, "deep") == [(MIB, 64 << 10)]
        assert dirty(disk, "both") == [(0, 64 << 10)]
        assert Contexts(disk.root, True, read_only=False).names[1:] == (DIRTY_BITMAP + "both", DIRTY_BITMAP + "deep")


def test_what_there_is_not_is_refused_with_what_there_is(tmp_path: Path) -> None:
    path = image(tmp_path / "image", "b0", "off")
    expected = pytest.raises(ConfigError, match=r"bitmaps: there is no bitmap 'b1'; there are: 'b0', 'off'")
    with expected, offered(Qcow2(File(str(path))), "b1"):
        pass
    with pytest.raises(ConfigError, match=r"there is no bitmap 'b1'; there are: none"), offered(Memory(MIB), "b1"):
        pass


def test_an_inconsistent_one_is_not_offered(tmp_path: Path) -> None:
    path = image(tmp_path / "image", "b0")
    with open_stack(Qcow2(File(str(path)))):
        killed = path.read_bytes()
    path.write_bytes(killed)
    with pytest.raises(ConfigError, match="bitmap 'b0' is inconsistent"), offered(Qcow2(File(str(path))), "b0"):
        pass
    with open_stack(Qcow2(File(str(path)))) as disk:
        assert Contexts(disk.root, True, read_only=False).names == (BASE_ALLOCATION,)


@pytest.mark.parametrize("name", ["b0", "off"])
def test_one_that_records_is_not_offered_read_only_while_others_write(tmp_path: Path, name: str) -> None:
    """QEMU: "Enabled bitmap incompatible with readonly export"."""
    path = str(image(tmp_path / "image", name))
    with offered(Qcow2(File(path)), name, read_only=False):
        pass
    with offered(Qcow2(File(path)), name, read_only=True, opened_read_only=True):
        pass  # nobody writes
    expected = pytest.raises(ConfigError, match="bitmap 'b0' records what is written") if name == "b0" else None
    with (
        expected or contextlib.nullcontext(),
        offered(Qcow2(File(path)), name, read_only=True, opened_read_only=False),
    ):
        pass


def test_what_is_offered_stays(tmp_path: Path) -> None:
    layer = Qcow2(File(str(image(tmp_path / "image", "b0"))))
    with open_stack(layer) as disk:
        first, second = (Contexts(disk.root, ["b0", "b0"], read_only=False) for _ in range(2))
        assert first.names == (BASE_ALLOCATION, DIRTY_BITMAP + "b0")
        for found in (first, second):
            with pytest.raises(RequestError, check=lambda error: error.errno == errno.EBUSY):
                layer.remove_bitmap("b0")
            found.close()
        layer.remove_bitmap("b0")


def test_what_can_no_longer_be_told_is_an_error_and_not_clean(tmp_path: Path) -> None:
    layer = Qcow2(File(str(image(tmp_path / "image", "b0"))))
    context = DIRTY_BITMAP + "b0"
    with offered(layer, "b0") as (disk, found), open_stack(Memory(MIB)) as other:
        found.check(disk.root, BASE_ALLOCATION)
        found.check(other.root, BASE_ALLOCATION)
        with pytest.raises(RequestError, match="no longer what the export shows"):
            found.check(other.root, context)
        top = Qcow2(File(str(image(tmp_path / "top", "b0", backing=tmp_path / "image"))), backing=False)
        with open_stack(top):
            top.backing = layer
            with pytest.raises(RequestError, match="no longer what the export shows"):
                found.check(top, context)
            top.remove_bitmap("b0")
            found.check(top, context)
            top.backing = False


def test_there_is_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "BITMAPS_OFFERED_MAX", 2)
    names: Sequence[str] = ("b0", "b1", "b2")
    path = image(tmp_path / "image", *names)
    with pytest.raises(ConfigError, match="at most 2 bitmaps"), offered(Qcow2(File(str(path))), *names):
        pass
