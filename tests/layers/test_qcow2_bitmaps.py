"""Persistent bitmaps: QEMU's read and kept true, ours read by QEMU, changed on demand, and refused where they lie."""

from __future__ import annotations

import contextlib
import errno
import random
import re
import shutil
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.qcow2.bitmap_directory import read_directory, read_table
from layers.qcow2.limits import BITMAPS_COUNT_MAX
from nbdserver.errors import ImageError, RequestError
from nbdserver.format import Bitmap, HasBitmaps
from nbdserver.layer import DIRTY_BITMAP
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag
from tests.layers import bitmap_kit
from tests.layers.bitmap_kit import AUTO, EXTRA_COMPATIBLE, IN_USE, granules, joined, qemu_dirty, qemu_flags, stored
from tests.layers.qcow2_check import check as own_check
from tests.layers.qcow2_kit import Operation, RecordedFile, apply, open_recorded
from tests.serving import SEED, amount, check, create, qemu_io, run

KIB = 1024
MIB = 1024 * KIB


def bitmap(path: Path, *arguments: str) -> None:
    run("qemu-img", "bitmap", "-f", "qcow2", *arguments[:-1], path, arguments[-1])


@contextlib.contextmanager
def opened(path: Path, *, read_only: bool = False) -> Iterator[tuple[Reference, Qcow2]]:
    layer = Qcow2(File(str(path)))
    with open_stack(layer, read_only=read_only) as disk:
        yield disk, layer


def dirty(disk: Reference, name: str) -> list[tuple[int, int]]:
    """The dirty (offset, length) runs of a bitmap."""
    at, found = 0, []
    for length, flags in disk.status(0, disk.size, DIRTY_BITMAP + name):
        if flags:
            found.append((at, length))
        at += length
    return found


def qemu_sees(path: Path, name: str) -> list[tuple[int, int]]:
    """`qemu_dirty` of an image that is open here."""
    return qemu_dirty(Path(shutil.copy(path, path.with_name(path.name + ".copy"))), name)


def failing(number: int) -> contextlib.AbstractContextManager[object]:
    return pytest.raises(RequestError, check=lambda error: error.errno == number)


def changed(path: Path, name: str, **fields: int) -> None:
    """Change fields of a bitmap's directory entry."""
    data = bytearray(path.read_bytes())
    found = bitmap_kit.directory(data)
    assert found is not None
    at = data.index(name.encode(), found[2]) - 24
    layout = {"table_offset": (">Q", 0), "table_count": (">I", 8), "flags": (">I", 12), "type": (">B", 16)}
    layout |= {"granularity_bits": (">B", 17), "name_size": (">H", 18), "extra_size": (">I", 20)}
    for field, value in fields.items():
        struct.pack_into(layout[field][0], data, at + layout[field][1], value)
    path.write_bytes(data)


# -- what QEMU made ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [512, 4096, 65536, MIB, 1 << 31])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_what_qemu_recorded_is_read(tmp_path: Path, granularity: int, cluster_size: int) -> None:
    size = 24 * MIB - 512
    path = create(tmp_path / "image", size, cluster_size=cluster_size)
    bitmap(path, "--add", "-g", str(granularity), "b0")
    written = [(0, 512), (5 * MIB, 300 * KIB), (size - 512, 512)]
    qemu_io(path, *(f"write {offset} {length}" for offset, length in written))
    expected = joined(granules(granularity, *written), granularity, size)
    with opened(path, read_only=True) as (disk, layer):
        assert layer.bitmaps() == [Bitmap("b0", granularity, True, False, None)]
        assert dirty(disk, "b0") == expected == qemu_dirty(path, "b0")
        assert layer.bitmaps()[0].count == sum(length for _, length in expected)


def test_a_read_only_open_shows_them_as_they_are_and_changes_nothing(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "on")
    bitmap(path, "--add", "--disable", "off")
    before = path.read_bytes()
    with opened(path, read_only=True) as (_, layer):
        assert isinstance(layer, HasBitmaps)
        assert [(found.name, found.auto, found.in_use) for found in layer.bitmaps()] == [
            ("on", True, False),
            ("off", False, False),
        ]
        for change in (layer.remove_bitmap, layer.enable_bitmap, layer.disable_bitmap, layer.clear_bitmap):
            with failing(errno.EROFS):
                change("on")
        with failing(errno.EROFS):
            layer.add_bitmap("new")
    assert path.read_bytes() == before


# -- recording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [512, 65536])
def test_what_is_written_zeroed_and_trimmed_is_recorded_and_qemu_reads_it(tmp_path: Path, granularity: int) -> None:
    size = 8 * MIB
    path = create(tmp_path / "image", size)
    bitmap(path, "--add", "-g", str(granularity), "b0")
    with opened(path) as (disk, layer):
        disk.write(100 * KIB, b"x" * 3000)
        disk.write(101 * KIB, b"y" * 10)  # in place
        disk.zero(2 * MIB, 4096, Flag.MAY_UNMAP)
        disk.zero(3 * MIB + 5, 1000)
        disk.trim(5 * MIB, 128 * KIB)
        disk.read(0, size)
        changed = [(100 * KIB, 3000), (2 * MIB, 4096), (3 * MIB + 5, 1000), (5 * MIB, 128 * KIB)]
        expected = joined(granules(granularity, *changed), granularity, size)
        assert dirty(disk, "b0") == expected
        assert qemu_flags(path) == {"b0": (granularity, {"auto", "in-use"})}
    assert qemu_flags(path) == {"b0": (granularity, {"auto"})}
    assert qemu_dirty(path, "b0") == expected
    check(path)
    qemu_io(path, "write 7M 512")
    with opened(path, read_only=True) as (disk, _):
        assert dirty(disk, "b0") == joined(granules(granularity, *changed, (7 * MIB, 512)), granularity, size)
    assert layer.dirty_log is not None


def test_a_disabled_bitmap_records_nothing_and_stays_valid_all_the_time(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "--disable", "off")
    with opened(path) as (disk, layer):
        assert layer.dirty_log is None
        disk.write(0, b"x" * 512)
        assert qemu_flags(path) == {"off": (65536, set())}
    assert qemu_dirty(path, "off") == []


def test_it_is_in_use_durably_before_the_first_write_and_until_it_is_stored(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    file, layer = open_recorded(path.read_bytes())
    with open_stack(layer) as disk:
        opened_at = len(file.log)
        assert file.log[-1].name == "sync"
        assert stored(file.data)["b0"].flags == IN_USE | AUTO
        disk.write(0, b"x" * 512)
    state, seen = bytearray(path.read_bytes()), set()
    for position, operation in enumerate(file.log):
        apply(state, operation)
        found = stored(state)["b0"]
        if position >= opened_at:
            seen.add(found.flags)
            assert found.flags & IN_USE or found.dirty == {0}
    assert seen == {IN_USE | AUTO, AUTO}


def test_what_was_not_stored_is_inconsistent_and_can_only_be_removed(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    with opened(path) as (disk, _):
        disk.write(0, b"x" * 512)
        killed = path.read_bytes()
    path.write_bytes(killed)
    assert qemu_flags(path) == {"b0": (65536, {"auto", "in-use"})}
    with opened(path) as (disk, layer):
        assert layer.bitmaps() == [Bitmap("b0", 65536, True, True, None)]
        assert layer.dirty_log is None
        disk.write(0, b"y" * 512)
        for change in (layer.enable_bitmap, layer.disable_bitmap, layer.clear_bitmap):
            with failing(errno.EINVAL):
                change("b0")
        with failing(errno.EINVAL):
            dirty(disk, "b0")
        layer.add_bitmap("b1")
        with failing(errno.EINVAL):
            layer.merge_bitmap("b1", layer, "b0")
        with failing(errno.EINVAL), layer.use_bitmap("b0"):
            pass
    assert qemu_flags(path) == {"b0": (65536, {"auto", "in-use"}), "b1": (65536, {"auto"})}
    with opened(path) as (_, layer):
        layer.remove_bitmap("b0")
    assert qemu_flags(path) == {"b1": (65536, {"auto"})}
    run("qemu-img", "check", "-q", path)
    check(path)


def test_nothing_is_stored_again_that_has_not_changed(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    qemu_io(path, "write 0 512")
    before = stored(path.read_bytes())["b0"]
    with opened(path):
        pass
    after = stored(path.read_bytes())["b0"]
    assert after == before
    check(path)


# -- changing ----------------------------------------------------------------------------------------------------------


def test_bitmaps_are_added_as_qemu_adds_them(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=16384)
    with opened(path) as (disk, layer):
        layer.add_bitmap("by default")
        layer.add_bitmap("fine", granularity=512)
        layer.add_bitmap("off", granularity=1 << 31, enabled=False)
        disk.write(5000, b"x")
        assert dirty(disk, "fine") == [(4608, 512)] and dirty(disk, "by default") == [(0, 16384)]
        assert dirty(disk, "off") == []
    wanted = {"by default": (16384, {"auto"}), "fine": (512, {"auto"}), "off": (1 << 31, set())}
    assert qemu_flags(path) == wanted
    assert qemu_dirty(path, "fine") == [(4608, 512)]
    bitmap(path, "--remove", "fine")
    check(path)
    with opened(path) as (_, layer):
        layer.remove_bitmap("by default")
        layer.remove_bitmap("off")
        assert not layer.bitmaps()
    assert qemu_flags(path) == {} and not bitmap_kit.extensions(path.read_bytes()).get(bitmap_kit.EXTENSION)
    check(path)


def test_enabling_and_disabling(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    with opened(path) as (disk, layer):
        layer.add_bitmap("b0", enabled=False)
        disk.write(0, b"x")
        layer.enable_bitmap("b0")
        assert qemu_flags(path) == {"b0": (65536, {"auto", "in-use"})}
        disk.write(128 * KIB, b"x")
        disk.write(128 * KIB, b"y")  # at a place that was known as writable
        layer.disable_bitmap("b0")
        assert qemu_flags(path) == {"b0": (65536, set())} and qemu_sees(path, "b0") == [(128 * KIB, 64 * KIB)]
        disk.write(256 * KIB, b"x")
        assert dirty(disk, "b0") == [(128 * KIB, 64 * KIB)]
        layer.disable_bitmap("b0")
        layer.enable_bitmap("b0")
        layer.enable_bitmap("b0")
    assert qemu_flags(path) == {"b0": (65536, {"auto"})} and qemu_dirty(path, "b0") == [(128 * KIB, 64 * KIB)]
    check(path)


def test_clearing(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    with opened(path) as (disk, layer):
        layer.add_bitmap("on")
        layer.add_bitmap("off")
        disk.write(0, b"x")
        layer.disable_bitmap("off")
        layer.clear_bitmap("on")
        layer.clear_bitmap("off")
        assert dirty(disk, "on") == dirty(disk, "off") == []
        assert stored(path.read_bytes())["off"].dirty == set()
        disk.write(64 * KIB, b"x")
    assert qemu_dirty(path, "on") == [(64 * KIB, 64 * KIB)] and qemu_dirty(path, "off") == []
    check(path)


def test_merging_within_an_image_and_from_another(tmp_path: Path) -> None:
    path, other = (create(tmp_path / name, MIB) for name in ("image", "other"))
    bitmap(other, "--add", "-g", "512", "source")
    qemu_io(other, "write 700k 1k")
    with opened(path) as (disk, layer), opened(other, read_only=True) as (_, source):
        layer.add_bitmap("all")
        layer.add_bitmap("off", granularity=4096, enabled=False)
        disk.write(0, b"x")
        layer.merge_bitmap("off", layer, "all")
        assert qemu_sees(path, "off") == [(0, 65536)]
        layer.merge_bitmap("all", source, "source")
        layer.merge_bitmap("off", source, "source")
        layer.merge_bitmap("all", layer, "all")
        assert dirty(disk, "all") == [(0, 65536), (640 * KIB, 65536)]
    assert qemu_dirty(path, "all") == [(0, 65536), (640 * KIB, 65536)]
    assert qemu_dirty(path, "off") == [(0, 65536), (700 * KIB, 4096)]
    check(path)


def test_what_cannot_be_done_is_refused_by_its_errno(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    larger = create(tmp_path / "larger", 2 * MIB)
    bitmap(larger, "--add", "b0")
    with opened(path) as (_, layer), opened(larger, read_only=True) as (_, other):
        layer.add_bitmap("b0")
        with failing(errno.EEXIST):
            layer.add_bitmap("b0")
        for name in ("", "x" * 1024, "a\0b"):
            with failing(errno.EINVAL):
                layer.add_bitmap(name)
        for granularity in (0, 256, 3000, 1 << 32):
            with failing(errno.EINVAL):
                layer.add_bitmap("b1", granularity=granularity)
        for change in (layer.remove_bitmap, layer.enable_bitmap, layer.disable_bitmap, layer.clear_bitmap):
            with failing(errno.ENOENT):
                change("nothing")
        with failing(errno.ENOENT):
            layer.merge_bitmap("b0", layer, "nothing")
        with failing(errno.EINVAL):
            layer.merge_bitmap("b0", other, "b0")
        with failing(errno.EINVAL):
            layer.merge_bitmap("b0", layer.file, "b0")
        with layer.use_bitmap("b0"):
            for change in (layer.remove_bitmap, layer.enable_bitmap, layer.disable_bitmap, layer.clear_bitmap):
                with failing(errno.EBUSY):
                    change("b0")
        layer.add_bitmap("x" * 1023)
        assert [found.name for found in layer.bitmaps()] == ["b0", "x" * 1023]
    check(path)
    with opened(create(tmp_path / "old", MIB, compat="0.10")) as (_, layer), failing(errno.ENOTSUP):
        layer.add_bitmap("b0")
    huge = create(tmp_path / "huge", 4 << 40)
    with opened(huge) as (_, layer):
        with failing(errno.EINVAL):
            layer.add_bitmap("b0", granularity=512)
        layer.add_bitmap("b0", granularity=1024)
    assert qemu_flags(huge) == {"b0": (1024, {"auto"})}


def test_names_are_bytes(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    name = b"na\xffme".decode(errors="surrogateescape")
    with opened(path) as (_, layer):
        layer.add_bitmap(name)
        layer.add_bitmap("schön")
    with opened(path) as (_, layer):
        assert [found.name for found in layer.bitmaps()] == [name, "schön"]
    assert "schön" in qemu_flags(path)


def test_applying_a_snapshot_counts_as_writing_everything(tmp_path: Path) -> None:
    """QEMU does not apply one where there are bitmaps."""
    path = create(tmp_path / "image", MIB)
    run("qemu-img", "snapshot", "-c", "small", path)
    run("qemu-img", "resize", "-q", path, "3M")
    with opened(path) as (disk, layer):
        layer.create_snapshot("large")
        for name, enabled in (("on", True), ("off", False)):
            layer.add_bitmap(name, enabled=enabled)
        layer.enable_bitmap("off")
        disk.write(2 * MIB, b"x")
        layer.disable_bitmap("off")
        layer.apply_snapshot("small")
        assert disk.size == MIB and dirty(disk, "on") == [(0, MIB)] and dirty(disk, "off") == []
        assert stored(path.read_bytes())["off"].flags == 0
        layer.clear_bitmap("on")
        layer.apply_snapshot("large")
        assert dirty(disk, "on") == [(0, 3 * MIB)] and dirty(disk, "off") == []
    assert qemu_dirty(path, "on") == [(0, 3 * MIB)] and qemu_dirty(path, "off") == []
    check(path)


def test_emptying_counts_as_writing_everything(tmp_path: Path) -> None:
    base = create(tmp_path / "base", MIB)
    path = create(tmp_path / "image", MIB, backing=base)
    with opened(path) as (disk, layer):
        disk.write(0, b"x")
        layer.add_bitmap("b0")
        layer.make_empty()
        assert dirty(disk, "b0") == [(0, MIB)]
    assert qemu_dirty(path, "b0") == [(0, MIB)]
    check(path)


@pytest.mark.parametrize("sizes", [(3 * MIB, 20 * MIB, MIB - 512), (MIB + 512, 64 * KIB, 40 * MIB)])
def test_bitmaps_follow_the_size_of_the_disk(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    path = create(tmp_path / "image", 4 * MIB, cluster_size=512)
    model: dict[str, set[int]] = {"on": set(), "off": set()}
    with opened(path) as (disk, layer):
        layer.add_bitmap("on", granularity=512)
        layer.add_bitmap("off", granularity=512)
        for size in sizes:
            for marked in model.values():
                marked |= granules(512, (disk.size - 700, 700), (30 * KIB, 1))
            disk.write(disk.size - 700, b"x" * 700)
            disk.write(30 * KIB, b"x")
            layer.disable_bitmap("off")
            layer.resize(size)
            for marked in model.values():
                marked &= set(range(-(-size // 512)))
            assert stored(path.read_bytes())["off"].dirty == model["off"]
            assert stored(path.read_bytes())["on"].flags == AUTO | IN_USE
            for name, marked in model.items():
                assert dirty(disk, name) == joined(marked, 512, size)
            layer.enable_bitmap("off")
    for name, marked in model.items():
        assert qemu_dirty(path, name) == joined(marked, 512, sizes[-1])
    check(path)


def test_a_disk_is_not_resized_to_what_its_bitmaps_cannot_be_of(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 4 * MIB, cluster_size=MIB)
    with opened(path) as (disk, layer):
        layer.add_bitmap("b0", granularity=512)
        for size in (0, 3 << 40):
            with failing(errno.EINVAL):
                layer.resize(size)
        assert disk.size == 4 * MIB
        layer.remove_bitmap("b0")
        layer.resize(3 << 40)
        layer.resize(0)
        with failing(errno.EINVAL):
            layer.add_bitmap("b0")
    path = with_extra(tmp_path, compatible=False, auto=False)
    with opened(path) as (disk, layer), failing(errno.ENOTSUP):
        layer.resize(2 * MIB)


def test_an_inconsistent_bitmap_does_not_keep_a_disk_from_being_resized(tmp_path: Path) -> None:
    """Its table may be of any size, as long as it is in use. QEMU refuses."""
    path = create(tmp_path / "image", MIB, cluster_size=512)
    bitmap(path, "--add", "-g", "512", "b0")
    changed(path, "b0", flags=AUTO | IN_USE)
    with opened(path) as (_, layer):
        layer.resize(30 * MIB)
    assert qemu_flags(path) == {"b0": (512, {"auto", "in-use"})}
    check(path)
    bitmap(path, "--remove", "b0")
    check(path)


@pytest.mark.parametrize(
    "options", [{"extended_l2": "on"}, {"data_file": "data"}, {"data_file": "data", "data_file_raw": "on"}]
)
def test_with_subclusters_and_data_files(tmp_path: Path, options: dict[str, str]) -> None:
    options = {key: str(tmp_path / value) if key == "data_file" else value for key, value in options.items()}
    path = create(tmp_path / "image", 4 * MIB, **options)
    bitmap(path, "--add", "-g", "4k", "b0")
    with opened(path) as (disk, layer):
        disk.write(100 * KIB, b"x" * 5000)
        disk.zero(MIB, 70 * KIB)
        disk.trim(2 * MIB, 64 * KIB)
        layer.add_bitmap("b1", granularity=65536)
        disk.write(100 * KIB, b"y")
    marked = granules(4096, (100 * KIB, 5000), (MIB, 70 * KIB), (2 * MIB, 64 * KIB))
    assert qemu_dirty(path, "b0") == joined(marked, 4096, 4 * MIB)
    assert qemu_dirty(path, "b1") == [(64 * KIB, 64 * KIB)]
    check(path)


# -- turns with QEMU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_in_turns_with_qemu_against_a_model(tmp_path: Path, cluster_size: int) -> None:
    pick, size = random.Random(f"{SEED} {cluster_size}"), 3 * MIB + 512
    path = create(tmp_path / "image", size, cluster_size=cluster_size)
    model: dict[str, tuple[int, bool, set[int]]] = {}
    for _ in range(amount(10, 60)):
        if pick.random() < 0.5:
            with opened(path) as (disk, layer):
                for _ in range(pick.randrange(1, 8)):
                    _step(pick, model, layer, disk, size)
        else:
            offset = pick.randrange(size // 512) * 512
            length = min(pick.randrange(1, 200) * 512, size - offset)
            qemu_io(path, f"{pick.choice(('write', 'write -z', 'discard'))} {offset} {length}")
            _record(model, offset, length)
        found = stored(path.read_bytes())
        assert {name: (b.granularity, b.flags, b.dirty) for name, b in found.items()} == {
            name: (granularity, AUTO * auto, marked) for name, (granularity, auto, marked) in model.items()
        }
        report = own_check(path.read_bytes())
        assert not report.errors and not report.leaks
    check(path)
    for name, (granularity, _, marked) in model.items():
        assert qemu_dirty(path, name) == joined(marked, granularity, size)


def _record(model: dict[str, tuple[int, bool, set[int]]], offset: int, length: int) -> None:
    for granularity, auto, marked in model.values():
        if auto:
            marked |= granules(granularity, (offset, length))


def _step(
    pick: random.Random, model: dict[str, tuple[int, bool, set[int]]], layer: Qcow2, disk: Reference, size: int
) -> None:
    choice, name = pick.random(), pick.choice(list(model) or [""])
    if choice < 0.5:
        offset = pick.randrange(size)
        length = min(pick.randrange(1, 300_000), size - offset)
        pick.choice((lambda: disk.write(offset, bytes(length)), lambda: disk.zero(offset, length)))()
        _record(model, offset, length)
    elif choice < 0.65 and len(model) < 6:
        name, granularity = f"bitmap {pick.random()}", 1 << pick.randrange(9, 20)
        enabled = pick.random() < 0.6
        layer.add_bitmap(name, granularity=granularity, enabled=enabled)
        model[name] = (granularity, enabled, set())
    elif name:
        granularity, _, marked = model[name]
        what = pick.choice(("remove", "enable", "disable", "clear", "merge"))
        if what == "remove":
            layer.remove_bitmap(name)
            del model[name]
        elif what in ("enable", "disable"):
            (layer.enable_bitmap if what == "enable" else layer.disable_bitmap)(name)
            model[name] = (granularity, what == "enable", marked)
        elif what == "clear":
            layer.clear_bitmap(name)
            marked.clear()
        else:
            other = pick.choice(list(model))
            layer.merge_bitmap(name, layer, other)
            marked |= granules(granularity, *joined(model[other][2], model[other][0], size))


# -- large -------------------------------------------------------------------------------------------------------------


def test_a_bitmap_of_64_tib(tmp_path: Path) -> None:
    size = 64 << 40
    path = create(tmp_path / "image", size, cluster_size=MIB * 2)
    bitmap(path, "--add", "-g", str(1 << 20), "qemu's")
    with opened(path) as (disk, layer):
        layer.add_bitmap("ours", granularity=65536)
        layer.add_bitmap("full", granularity=65536)
        layer.bitmap_list.bits("full").mark(0, size)
        disk.write(63 << 40, b"x")
    with opened(path, read_only=True) as (disk, layer):
        assert dirty(disk, "ours") == [(63 << 40, 65536)]
        assert dirty(disk, "qemu's") == [(63 << 40, 1 << 20)] == qemu_dirty(path, "qemu's")
        assert dirty(disk, "full") == [(0, size)]
        assert stored_table(layer, "full") == {1}
    assert path.stat().st_blocks * 512 < 32 * MIB
    check(path)


def stored_table(layer: Qcow2, name: str) -> set[int]:
    """The different entries of a bitmap's table."""
    entry = next(entry for entry in read_directory(layer.reader.storage, layer.header).entries if entry.name == name)
    return set(read_table(layer.reader.storage, entry))


def test_many_bitmaps(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=512)
    count = amount(60, 400)
    with opened(path) as (disk, layer):
        for number in range(count):
            layer.add_bitmap(f"number {number}", granularity=4096, enabled=number % 2 == 0)
        disk.write(0, b"x")
    flags = qemu_flags(path)
    assert len(flags) == count and flags["number 0"] == (4096, {"auto"}) and flags["number 1"] == (4096, set())
    assert qemu_dirty(path, "number 58") == [(0, 4096)]
    check(path)


# -- what others left --------------------------------------------------------------------------------------------------


def test_without_the_autoclear_bit_they_are_worthless(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    data = bytearray(path.read_bytes())
    data[95] &= 0xFE
    path.write_bytes(data)
    with opened(path, read_only=True) as (_, layer):
        assert not layer.bitmaps()
    assert path.read_bytes() == data
    with opened(path) as (_, layer):
        assert not layer.bitmaps() and layer.dirty_log is None
        assert bitmap_kit.EXTENSION not in bitmap_kit.extensions(path.read_bytes())
        layer.add_bitmap("b0")
    assert qemu_flags(path) == {"b0": (65536, {"auto"})}
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    check(path)


def test_unknown_autoclear_bits_go_and_the_bitmaps_stay(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    data = bytearray(path.read_bytes())
    data[90] |= 0x40
    path.write_bytes(data)
    with opened(path) as (disk, _):
        disk.write(0, b"x")
    assert path.read_bytes()[88:96] == (1).to_bytes(8, "big")
    assert qemu_dirty(path, "b0") == [(0, 65536)]


def with_extra(tmp_path: Path, *, compatible: bool, auto: bool) -> Path:
    """An image whose bitmap "name" has extra data, which QEMU does not write."""
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "name" + "x" * 12)
    changed(path, "name", flags=AUTO * auto | EXTRA_COMPATIBLE * compatible, extra_size=12, name_size=4)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"name" + b"x" * 12, b"EXTRA-DATA-!name"))
    return path


def test_compatible_extra_data_is_kept_and_the_bitmap_used(tmp_path: Path) -> None:
    path = with_extra(tmp_path, compatible=True, auto=True)
    with opened(path) as (disk, layer):
        disk.write(0, b"x")
        layer.add_bitmap("other")
    found = stored(path.read_bytes())["name"]
    assert found.extra == b"EXTRA-DATA-!" and found.flags == AUTO | EXTRA_COMPATIBLE and found.dirty == {0}


def test_a_bitmap_with_other_extra_data_is_left_alone(tmp_path: Path) -> None:
    path = with_extra(tmp_path, compatible=False, auto=False)
    before = stored(path.read_bytes())["name"]
    with opened(path) as (disk, layer):
        disk.write(0, b"x")
        with failing(errno.ENOTSUP), layer.use_bitmap("name"):
            pass
        with failing(errno.ENOTSUP):
            layer.enable_bitmap("name")
        layer.add_bitmap("other")
    assert stored(path.read_bytes())["name"] == before


def test_a_bitmap_that_should_record_and_may_not_be_used_forbids_writing(tmp_path: Path) -> None:
    path = with_extra(tmp_path, compatible=False, auto=True)
    before = path.read_bytes()
    with pytest.raises(ImageError, match="'name' must record what is written, but has extra data"), opened(path):
        pass
    assert path.read_bytes() == before
    with opened(path, read_only=True) as (_, layer):
        assert [found.name for found in layer.bitmaps()] == ["name"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"table_offset": 512}, "its table"),
        ({"table_offset": 1 << 40}, "its table"),
        ({"table_count": 0}, "entries of its table.*found 0"),
        ({"table_count": 2}, "entries of its table.*found 2, wanted 1"),
        ({"table_count": 1 << 31}, "entries of its table"),
        ({"flags": AUTO | 8}, "flags.*found 0xa"),
        ({"type": 2}, "type.*found 2"),
        ({"granularity_bits": 8}, "granularity_bits.*found 8, wanted 9 to 31"),
        ({"granularity_bits": 64}, "granularity_bits.*found 64"),
        ({"name_size": 0}, "name_size.*found 0"),
        ({"name_size": 1 << 14}, "bitmap directory, entry 0.*found a length of"),
        ({"extra_size": (1 << 32) - 1}, "bitmap directory, entry 0.*found a length of"),
    ],
)
def test_broken_entries_are_refused(tmp_path: Path, fields: dict[str, int], message: str) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "the bitmap")
    changed(path, "the bitmap", **fields)
    _refused(path, message)


def _refused(path: Path, message: str) -> None:
    """Neither opened for writing, nor its bitmaps shown; but its disk can be read."""
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(ImageError) as refusal, opened(path, read_only=read_only) as (disk, layer):
            assert disk.read(0, 512) == bytes(512)
            layer.bitmaps()
        assert re.search(message, str(refusal.value)) and str(path) in str(refusal.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("at", "format", "value", "message"),
    [
        (0, ">I", 0, "number of bitmaps: found 0"),
        (0, ">I", BITMAPS_COUNT_MAX + 1, "number of bitmaps.*found 65536"),
        (0, ">I", 2, "size of the directory"),
        (4, ">I", 7, "reserved field: found 7"),
        (8, ">Q", 1 << 40, "size of the directory"),
        (8, ">Q", 48, "bytes behind its last entry"),
        (16, ">Q", 1000, "directory: found 0x3e8"),
        (16, ">Q", 1 << 50, "directory: found"),
    ],
)
def test_a_broken_extension_is_refused(tmp_path: Path, at: int, format: str, value: int, message: str) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    data = bytearray(path.read_bytes())
    struct.pack_into(format, data, bitmap_kit.extensions(data)[bitmap_kit.EXTENSION][0] + at, value)
    path.write_bytes(data + bytes(65536))
    _refused(path, message)


def test_two_bitmaps_of_one_name_are_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "bitmap0")
    bitmap(path, "--add", "bitmap1")
    path.write_bytes(path.read_bytes().replace(b"bitmap1", b"bitmap0"))
    _refused(path, "two bitmaps are called 'bitmap0'")


@pytest.mark.parametrize("value", [1 << 63, 512, 65536 | 1, 1 << 50, 2])
def test_a_broken_table_is_refused_for_writing(tmp_path: Path, value: int) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, stored(data)["b0"].table_offset, value)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="bitmap 'b0': its table, entry 0"), opened(path):
        pass
    with opened(path, read_only=True) as (disk, _), failing(errno.EIO):
        dirty(disk, "b0")


def test_a_bitmap_on_other_metadata_is_refused_for_writing(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, stored(data)["b0"].table_offset, 65536)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="bitmap 'b0': its data"), opened(path):
        pass


def test_a_broken_table_of_an_inconsistent_bitmap_does_not_matter(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, stored(data)["b0"].table_offset, 1 << 63)
    path.write_bytes(data)
    changed(path, "b0", flags=AUTO | IN_USE)
    with opened(path) as (_, layer):
        layer.remove_bitmap("b0")
    check(path, leaks_allowed=True)


# -- when the file fails -----------------------------------------------------------------------------------------------


def test_a_change_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """The file is full, or its writes fail, at every place where they can."""
    path = create(tmp_path / "image", MIB, cluster_size=512)
    bitmap(path, "--add", "-g", "512", "on")
    bitmap(path, "--add", "-g", "512", "--disable", "off")
    for nth in range(0, 60):
        file, layer = open_recorded(path.read_bytes())
        has_failed = False
        with contextlib.suppress(OSError), open_stack(layer) as disk:
            for sector in range(0, 2000, 3):
                disk.write(sector * 512, b"x" * 512)
            disk.flush()
            fails_at(file, nth)
            try:
                layer.disable_bitmap("on")
                layer.merge_bitmap("off", layer, "on")
                layer.add_bitmap("new")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                has_failed = True
            file.before = lambda operation: None
            if has_failed:
                layer.add_bitmap("afterwards")
        report, found = own_check(file.data), stored(file.data)
        assert not report.errors
        for name, bitmap_ in found.items():
            recorded = set(range(0, 2000, 3))
            wanted = {"on": (recorded,), "off": (set(), recorded)}.get(name, (set(),))
            assert bitmap_.flags & IN_USE or bitmap_.dirty in wanted, (nth, name)
        if not has_failed:
            assert len(found) == 3 and not report.leaks
            return
    pytest.fail("it never succeeds")


def fails_at(file: RecordedFile, nth: int) -> None:
    """Have the ``nth`` change of the file from now on fail for want of space."""
    left = [nth]

    def before(operation: Operation) -> None:
        if operation.name in ("write", "resize"):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, "full")

    file.before = before


def test_bitmaps_that_cannot_be_stored_at_closing_are_inconsistent_and_it_is_said(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=512)
    bitmap(path, "--add", "b0")
    file, layer = open_recorded(path.read_bytes())
    with pytest.raises(OSError, match="its bitmaps could not be stored"), open_stack(layer) as disk:
        disk.write(0, b"x" * 512)
        disk.flush()
        fails_at(file, 0)
    assert stored(file.data)["b0"].flags == AUTO | IN_USE
    report = own_check(file.data)
    assert not report.errors and not report.leaks
    with open_stack(open_recorded(bytes(file.data))[1]) as disk:
        assert disk.read(0, 512) == b"x" * 512


# -- hostile images ----------------------------------------------------------------------------------------------------


def test_mutated_bitmaps_are_refused_or_make_no_trouble(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=512)
    for name in ("on", "off", "third"):
        bitmap(path, "--add", "-g", "512", name)
    qemu_io(path, "write 0 300k", "write 700k 1k")
    bitmap(path, "--disable", "off")
    data = path.read_bytes()
    pick, outcomes = random.Random(SEED), Counter[str]()
    places = [*_bitmap_bytes(data)]
    for number in range(amount(300, 10_000)):
        mutant = bytearray(data)
        for _ in range(pick.choice((1, 1, 1, 2, 8))):
            mutant[pick.choice(places)] = pick.choice((0, 1, 0x7F, 0x80, 0xFF, pick.randrange(256)))
        try:
            outcomes[_use(mutant, pick)] += 1
        except (ImageError, OSError, RequestError):
            outcomes["refused"] += 1
        except AssertionError as error:
            raise AssertionError(f"mutant {number}") from error
    assert outcomes["refused"] and outcomes["used"]


def _bitmap_bytes(data: bytes) -> Iterator[int]:
    """Where the extension, the directory and the tables are, and the autoclear bits."""
    at, content = bitmap_kit.extensions(data)[bitmap_kit.EXTENSION]
    yield from range(at - 8, at + len(content))
    yield from range(88, 96)
    for what, offset, length in bitmap_kit.references(data):
        if "data" not in what:
            yield from range(offset, offset + min(length, 200))


def _is_corrupt(mutant: bytearray) -> bool:
    """Whether something is in use for two purposes."""
    try:
        return any("references 2" in error for error in own_check(mutant).errors)
    except (AssertionError, struct.error):
        return True  # not even readable


def _use(mutant: bytearray, pick: random.Random) -> str:
    """Do with an image what can be done with its bitmaps."""
    began = time.monotonic()
    try:
        with open_stack(open_recorded(bytes(mutant))[1], read_only=True) as disk:
            layer = disk.root
            assert isinstance(layer, Qcow2)
            for found in layer.bitmaps():
                with contextlib.suppress(RequestError):
                    dirty(disk, found.name)
        with open_stack(open_recorded(bytes(mutant))[1]) as disk:
            layer = disk.root
            assert isinstance(layer, Qcow2)
            before = disk.read(0, disk.size)
            disk.write(pick.randrange(1000) * 512, b"x" * 512)
            for found in layer.bitmaps():
                change = pick.choice((layer.remove_bitmap, layer.enable_bitmap, layer.disable_bitmap))
                with contextlib.suppress(RequestError):
                    change(found.name)
            disk.flush()
            after = disk.read(0, disk.size)
        # Where a bitmap claims what a disk's data is in, whose it is nobody can tell.
        differences = sum(one != other for one, other in zip(before, after, strict=True))
        assert differences <= 512 or _is_corrupt(mutant)
        return "used"
    finally:
        assert time.monotonic() - began < 5
