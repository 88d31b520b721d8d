"""Internal snapshots: made, applied, deleted, against QEMU and a model."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.qcow2.snapshot_table import Entry, encode_table, read_table
from layers.qcow2.storage import Storage
from nbdserver.dirty import Bitmap, Log
from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import CODE, Intent
from nbdserver.files import PlainFile
from nbdserver.format import HasSnapshots
from nbdserver.graph import flatten
from nbdserver.reference import Reference, open_stack
from tests.layers.qcow2_check import Image, read, snapshots
from tests.layers.qcow2_check import check as own_check
from tests.layers.qcow2_kit import Fails, Thread, open_recorded
from tests.serving import SEED, amount, check, content, create, qemu_io, run, run_json

KIB, MIB = 1 << 10, 1 << 20

MATRIX: list[tuple[int, int, dict[str, Any]]] = [
    (512, 1 * MIB + 512, {}),
    (512, 1 * MIB, {"refcount_bits": 64}),
    (4096, 4 * MIB, {"refcount_bits": 2}),
    (4096, 4 * MIB + 1024, {"refcount_bits": 4}),
    (4096, 4 * MIB, {"compat": "0.10"}),
    (16384, 4 * MIB + 1024, {"extended_l2": "on"}),
    (65536, 16 * MIB, {"refcount_bits": 8, "preallocation": "metadata"}),
    (2 * MIB, 24 * MIB + 512, {"refcount_bits": 32}),
    (16 * KIB, 2 * MIB + 512, {"extended_l2": "on"}),
]
MATRIX_IDS = [f"{cluster} {' '.join(map(str, options.values()))}" for cluster, _, options in MATRIX]


def _opened(path: Path, **options: Any) -> Qcow2:
    return Qcow2(File(str(path)), **options)


def _snapshot_content(path: Path, name: str) -> bytes:
    """A snapshot, as QEMU reads it."""
    raw = path.with_name("snapshot.raw")
    run("qemu-img", "convert", "-U", "-f", "qcow2", "-l", f"snapshot.name={name}", "-O", "raw", path, raw)
    return raw.read_bytes()


def _listed(path: Path) -> list[dict[str, Any]]:
    """QEMU's list of the snapshots."""
    info = run_json("qemu-img", "info", "-U", "--output=json", path)
    return list(info.get("snapshots", []))


def test_it_has_the_protocol() -> None:
    assert isinstance(Qcow2(File("none")), HasSnapshots)


@pytest.mark.parametrize(("cluster", "size", "options"), MATRIX, ids=MATRIX_IDS)
def test_random_snapshots(cluster: int, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Made, applied and deleted at random among writes; QEMU finds the image clean and every snapshot in it."""
    path = create(tmp_path / "image", size, cluster_size=cluster, **options)
    pick = random.Random(f"{SEED} {cluster} {options}")
    most = min(2 ** options.get("refcount_bits", 16) - 3, 6)
    snapshots: dict[str, bytes] = {}
    for turn in range(3):
        layer = _opened(path)
        with open_stack(layer) as disk:
            model = bytearray(disk.read(0, size))
            for step in range(amount(30, 300)):
                choice = pick.random()
                if choice < 0.15 and len(snapshots) < most:
                    name = f"s{turn}.{step}"
                    assert layer.create_snapshot(name).disk_size == size
                    snapshots[name] = bytes(model)
                elif choice < 0.25 and snapshots:
                    name = pick.choice(list(snapshots))
                    layer.apply_snapshot(name)
                    model[:] = snapshots[name]
                elif choice < 0.35 and snapshots:
                    name = pick.choice(list(snapshots))
                    layer.delete_snapshot(name)
                    del snapshots[name]
                else:
                    offset = pick.randrange(size)
                    length = min(pick.randint(1, 3 * cluster + 5000), size - offset)
                    if choice < 0.75:
                        data = pick.randbytes(length)
                        disk.write(offset, data)
                        model[offset : offset + length] = data
                    elif choice < 0.85:
                        disk.zero(offset, length)
                        model[offset : offset + length] = bytes(length)
                    else:
                        assert disk.read(offset, length) == model[offset : offset + length]
            assert disk.read(0, size) == model
            assert [snapshot.name for snapshot in layer.snapshots()] == list(snapshots)
        check(path)
        assert content(path) == model
        assert [each["name"] for each in _listed(path)] == list(snapshots)
        for name, before in snapshots.items():
            assert _snapshot_content(path, name) == before, name


# -- the snapshot table ----------------------------------------------------------------------------------------------


def _rewrite_table(path: Path, change: Callable[[int, Entry], Entry]) -> None:
    """Change entries of the snapshot table where it is; it may grow within its cluster."""
    data = bytearray(path.read_bytes())
    image = Image(data)
    entries, _ = read_table(Storage(open_recorded(data)[0], image.cluster), image.snapshots_offset, image.snapshots)
    table = encode_table(change(number, entry) for number, entry in enumerate(entries))
    assert len(table) <= image.cluster
    data[image.snapshots_offset : image.snapshots_offset + len(table)] = table
    path.write_bytes(data)


def _entries(path: Path) -> list[Entry]:
    data = path.read_bytes()
    image = Image(data)
    return read_table(Storage(open_recorded(data)[0], image.cluster), image.snapshots_offset, image.snapshots)[0]


def test_the_list_says_what_qemu_says(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 3 * MIB)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-img", "snapshot", "-c", "zwei \u00fcber", path)
    with open_stack(_opened(path), read_only=True) as disk:
        assert isinstance(disk.root, Qcow2)
        found = disk.root.snapshots()
    for ours, theirs in zip(found, _listed(path), strict=True):
        assert (ours.id, ours.name, ours.vm_state_size) == (theirs["id"], theirs["name"], theirs["vm-state-size"])
        assert ours.date_ns == theirs["date-sec"] * 10**9 + theirs["date-nsec"]
        assert ours.vm_clock_ns == theirs["vm-clock-sec"] * 10**9 + theirs["vm-clock-nsec"]
        assert ours.disk_size == 3 * MIB
        assert ours.icount == theirs.get("icount")


@pytest.mark.parametrize("length", [0, 8, 16, 24, 40])
def test_extra_data_of_any_length(length: int, tmp_path: Path) -> None:
    """What is there is understood and kept; what must be there is completed; what is unknown stays as it is."""
    path = create(tmp_path / "image", MIB, compat="1.1" if length >= 16 else "0.10")
    qemu_io(path, "write -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "old", path)
    extra = struct.pack(">QQQ", 5 << 32, MIB, 77) + b"what nobody knows"[:16]
    _rewrite_table(path, lambda _, entry: dataclasses.replace(entry, extra=extra[:length], vm_state_size=123))
    layer = _opened(path)
    with open_stack(layer, read_only=True):
        (old,) = layer.snapshots()
        assert old.vm_state_size == (5 << 32 if length >= 8 else 123)
        assert old.disk_size == (MIB if length >= 16 else None)
        assert old.icount == (77 if length >= 24 else None)
    layer = _opened(path)
    with open_stack(layer) as disk:
        disk.write(0, b"new")
        layer.create_snapshot("new")
    entry, _ = _entries(path)
    assert entry.extra[:length] == extra[:length] and len(entry.extra) == max(length, 24)
    assert (entry.info.disk_size, entry.info.icount) == (MIB, 77 if length >= 24 else None)
    check(path)
    assert _snapshot_content(path, "old") == b"\1" * MIB
    assert _listed(path)[0].get("icount") == (77 if length >= 24 else None)
    assert _listed(path)[0]["vm-state-size"] == old.vm_state_size


def test_the_id_is_a_new_one_and_found_before_a_name(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    layer = _opened(path)
    with open_stack(layer) as disk:
        disk.write(0, b"1")
        assert layer.create_snapshot("2").id == "1"
        disk.write(0, b"2")
        assert layer.create_snapshot("1").id == "2"
        layer.apply_snapshot("1")
        assert disk.read(0, 1) == b"1"
        layer.delete_snapshot("1")
        assert layer.create_snapshot("third").id == "3"
        layer.apply_snapshot("1")  # no longer an ID
        assert disk.read(0, 1) == b"2"
    _rewrite_table(path, lambda number, entry: dataclasses.replace(entry, id=["", "41 and more"][number]))
    layer = _opened(path)
    with open_stack(layer):
        assert layer.create_snapshot("fourth").id == "42"
    check(path)


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b"])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    layer = _opened(create(tmp_path / "image", MIB))
    with open_stack(layer), pytest.raises(RequestError, match="1 to 255 bytes") as caught:
        layer.create_snapshot(name)
    assert caught.value.errno == errno.EINVAL


def test_what_is_not_there_or_there_already(tmp_path: Path) -> None:
    layer = _opened(create(tmp_path / "image", MIB))
    with open_stack(layer):
        layer.create_snapshot("here")
        for call in (layer.apply_snapshot, layer.delete_snapshot):
            with pytest.raises(RequestError, match="no snapshot 'there'") as caught:
                call("there")
            assert caught.value.errno == errno.ENOENT
        with pytest.raises(RequestError, match="'here' already") as caught:
            layer.create_snapshot("here")
        assert caught.value.errno == errno.EEXIST


def test_an_image_open_read_only(tmp_path: Path) -> None:
    layer = _opened(create(tmp_path / "image", MIB))
    with open_stack(layer, read_only=True), pytest.raises(RequestError, match="read-only") as caught:
        layer.create_snapshot("x")
    assert caught.value.errno == errno.EROFS


def test_an_external_data_file(tmp_path: Path) -> None:
    """As in QEMU: what a snapshot would have to keep is overwritten where it is."""
    path = create(tmp_path / "image", MIB, data_file=tmp_path / "data")
    layer = _opened(path)
    with open_stack(layer):
        assert not layer.snapshots()
        for call in (layer.create_snapshot, layer.apply_snapshot, layer.delete_snapshot):
            with pytest.raises(RequestError, match="external data file") as caught:
                call("x")
            assert caught.value.errno == errno.ENOTSUP
    layer = _opened(path, snapshot="x")
    with pytest.raises(ConfigError, match="external data file"), open_stack(layer, read_only=True):
        pass


def test_no_more_than_qemu_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "image", MIB)
    layer = _opened(path)
    with open_stack(layer):
        layer.create_snapshot("one")
        monkeypatch.setattr("layers.qcow2.snapshots.SNAPSHOTS_COUNT_MAX", 1)
        with pytest.raises(RequestError, match="the most there can be"):
            layer.create_snapshot("two")
        monkeypatch.undo()
        monkeypatch.setattr("layers.qcow2.snapshots.SNAPSHOT_TABLE_MAX", 100)
        with pytest.raises(RequestError, match="longer than 100 bytes"):
            layer.create_snapshot("two")
    check(path)
    assert len(_listed(path)) == 1


@pytest.mark.parametrize("refcount_bits", [1, 2])
def test_refcounts_that_are_full(refcount_bits: int, tmp_path: Path) -> None:
    """It is found out before anything is changed."""
    path = create(tmp_path / "image", MIB, refcount_bits=refcount_bits)
    qemu_io(path, "write -P 1 0 300k")
    file, layer = open_recorded(path.read_bytes())
    with open_stack(layer) as disk:
        for number in range(2**refcount_bits - 2):
            layer.create_snapshot(f"{number}")
        disk.flush()
        disk.flush()
        before, writes = bytes(file.data), len([each for each in file.log if each.name == "write"])
        with pytest.raises(RequestError, match=rf"{refcount_bits} bits? cannot count one snapshot more") as caught:
            layer.create_snapshot("too many")
        assert caught.value.errno == errno.ENOTSUP
        assert file.data == before and len([each for each in file.log if each.name == "write"]) == writes
    assert not own_check(file.data).errors and not own_check(file.data).leaks


# -- with QEMU -------------------------------------------------------------------------------------------------------


def test_flags_that_qemu_leaves_in_tables_of_snapshots(tmp_path: Path) -> None:
    """A table that only a snapshot has may have COPIED set: it must not be believed once the disk has it, too."""
    path = create(tmp_path / "image", MIB, cluster_size=4096)
    qemu_io(path, "write -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "a", path)
    run("qemu-img", "snapshot", "-c", "b", path)
    qemu_io(path, "write -P 2 0 1M")
    run("qemu-img", "snapshot", "-d", "b", path)
    image = Image(path.read_bytes())
    ((_, snapshot),) = image.snapshot_table()
    (table,) = image.numbers(snapshot.l1_offset, 1)
    assert any(entry >> 63 for entry in image.numbers(table & ~(1 << 63), 256)), "QEMU has changed: this shows nothing"
    layer = _opened(path)
    with open_stack(layer) as disk:
        layer.apply_snapshot("a")
        disk.write(0, b"\3" * 8192)
    check(path)
    assert content(path) == b"\3" * 8192 + b"\1" * (MIB - 8192)
    assert _snapshot_content(path, "a") == b"\1" * MIB


def test_in_turns_with_qemu(tmp_path: Path) -> None:
    size, pick = 2 * MIB, random.Random(SEED)
    path = create(tmp_path / "image", size, cluster_size=pick.choice((512, 4096, 65536)))
    known: dict[str, bytes] = {}
    now = bytes(size)
    for turn in range(amount(6, 20)):
        layer = _opened(path)
        with open_stack(layer) as disk:
            _some(pick, f"ours {turn}", known, _Ours(layer, disk))
            now = disk.read(0, size)
        check(path)
        assert content(path) == now
        _some(pick, f"theirs {turn}", known, _Theirs(path))
        check(path)
        for name, before in known.items():
            assert _snapshot_content(path, name) == before, (turn, name)


class _Ours:
    def __init__(self, layer: Qcow2, disk: Reference) -> None:
        self._disk = disk
        self.create, self.apply, self.delete = layer.create_snapshot, layer.apply_snapshot, layer.delete_snapshot

    def write(self, offset: int, length: int, value: int) -> None:
        self._disk.write(offset, bytes([value]) * length)

    def content(self) -> bytes:
        return self._disk.read(0, self._disk.size)


class _Theirs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self, name: str) -> None:
        run("qemu-img", "snapshot", "-c", name, self._path)

    def apply(self, name: str) -> None:
        run("qemu-img", "snapshot", "-a", name, self._path)

    def delete(self, name: str) -> None:
        run("qemu-img", "snapshot", "-d", name, self._path)

    def write(self, offset: int, length: int, value: int) -> None:
        qemu_io(self._path, f"write -P {value} {offset} {length}")

    def content(self) -> bytes:
        return content(self._path)


def _some(pick: random.Random, name: str, known: dict[str, bytes], disk: _Ours | _Theirs) -> None:
    """A write, a snapshot, another write, and now and then an old snapshot applied or deleted."""
    for _ in range(2):
        length = pick.randrange(512, 300 * KIB, 512)
        disk.write(pick.randrange(0, 2 * MIB - length, 512), length, pick.randrange(1, 256))
    disk.create(name)
    known[name] = disk.content()
    if len(known) > 2 and pick.random() < 0.5:
        old = pick.choice(list(known))
        disk.apply(old)
        assert disk.content() == known[old]
    if len(known) > 3:
        old = pick.choice(list(known))
        disk.delete(old)
        del known[old]
    disk.write(pick.randrange(0, MIB, 512), 64 * KIB, pick.randrange(1, 256))


def test_vm_state_behind_the_disk_is_kept(tmp_path: Path) -> None:
    """A snapshot's VM state is in its L1 table, behind the disk's end: it is counted like everything else."""
    path = create(tmp_path / "image", MIB, cluster_size=4096)
    qemu_io(path, "write -P 1 0 1M")
    layer = _opened(path)
    with open_stack(layer):
        layer.create_snapshot("with state")
    run("qemu-io", "-f", "qcow2", "-c", "write -b -P 9 0 64k", path)
    layer = _opened(path)
    with open_stack(layer) as disk:
        layer.create_snapshot("second")
        disk.write(0, b"\7" * MIB)
        layer.apply_snapshot("with state")
        layer.apply_snapshot("second")
        layer.delete_snapshot("with state")
    check(path)
    qemu = run("qemu-io", "-f", "qcow2", "-c", "read -b -P 9 0 64k", path)
    assert "verification failed" not in qemu, qemu


# -- while others are at it ------------------------------------------------------------------------------------------


def test_writes_in_place_end_before_a_snapshot_is_made(tmp_path: Path) -> None:
    """And no other begins: the permission to write in place is taken away first."""
    layer = _opened(create(tmp_path / "image", MIB))
    with open_stack(layer) as disk:
        disk.write(0, b"old")
        leaf = next(flatten(layer, 0, 3, Intent.WRITE))
        assert isinstance(leaf.target, PlainFile)
        with leaf.target.use(leaf.offset, 3):
            making = Thread(lambda: layer.create_snapshot("s"))
            assert making.waits()
            assert next(flatten(layer, 0, 3, Intent.WRITE)).target is CODE
            writing = Thread(lambda: disk.write(0, b"new"))
            assert writing.waits()
        making.done()
        writing.done()
        assert disk.read(0, 3) == b"new"
        layer.apply_snapshot("s")
        assert disk.read(0, 3) == b"old"


def test_applying_marks_all_as_dirty(tmp_path: Path) -> None:
    layer = _opened(create(tmp_path / "image", MIB))
    with open_stack(layer) as disk:
        disk.write(0, b"old")
        layer.create_snapshot("s")
        bitmap, log = Bitmap(MIB, 65536), Log()
        log.set([bitmap])
        layer.dirty_log = log
        layer.create_snapshot("t")
        assert bitmap.count() == 0
        layer.apply_snapshot("s")
        assert bitmap.count() == 16


# -- when the file fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("what", ["create", "apply", "delete"])
def test_the_file_fails(what: str, error: int, tmp_path: Path) -> None:
    """At each operation in turn: it has happened, or it has not, and what could not be undone is leaked."""
    path = create(tmp_path / "image", 128 * KIB, cluster_size=1024)
    qemu_io(path, "write -P 1 0 100k")
    run("qemu-img", "snapshot", "-c", "a", path)
    qemu_io(path, "write -P 2 0 50k")
    data = path.read_bytes()
    old, new = {"create": (("a",), ("a", "b")), "apply": (("a",), ("a",)), "delete": (("a",), ())}[what]
    disks = {b"\2" * 50 * KIB + b"\1" * 50 * KIB + bytes(28 * KIB)}
    if what == "apply":
        disks.add(b"\1" * 100 * KIB + bytes(28 * KIB))
    for number in itertools.count():
        file, layer = open_recorded(data)
        calls = {"create": layer.create_snapshot, "apply": layer.apply_snapshot, "delete": layer.delete_snapshot}
        fails = Fails(number, error)
        failed = False
        with contextlib.suppress(OSError), open_stack(layer) as disk:  # a failed sync is final: closing fails, too
            file.before = fails
            try:
                calls[what]("b" if what == "create" else "a")
            except OSError:
                failed = True
            file.before = lambda operation: None
            assert disk.read(0, 128 * KIB) in disks
            assert tuple(each.name for each in layer.snapshots()) in (old, new)
        report = own_check(file.data)
        assert set(report.errors) == set(report.flags), (number, report.errors)
        assert tuple(snapshots(file.data)) in (old, new) and read(file.data) in disks
        if not failed:
            assert fails.left >= 0
            break
    assert number > 5
