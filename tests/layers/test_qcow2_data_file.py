"""External data files: guest data in a file of its own, each byte at its own offset, which may be a raw image."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.raw import Raw
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import ZERO, Intent
from nbdserver.graph import Graph
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag
from tests.layers.qcow2_check import Image
from tests.layers.qcow2_check import check as own_check
from tests.layers.qcow2_check import read as own_read
from tests.layers.qcow2_kit import Operation, RecordedFile, open_recorded
from tests.serving import SEED, amount, check, content, create, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
COPIED = 1 << 63
KINDS = ["data", "raw"]


def _create(directory: Path, size: int = MIB, kind: str = "data", **options: Any) -> tuple[Path, Path]:
    """An image and its data file."""
    raw = {"data_file_raw": "on"} if kind == "raw" else {}
    data = directory / "image.data"
    return create(directory / "image", size, data_file=data, **raw, **options), data


def _opened(path: Path, **options: Any) -> Qcow2:
    return Qcow2(File(str(path)), **options)


def _entries(path: Path) -> list[int]:
    image = Image(path.read_bytes())
    (l1_entry,) = image.numbers(image.l1_offset, 1)
    return list(image.numbers(l1_entry & 0x00FFFFFFFFFFFE00, image.cluster // 8))


def _recorded(path: Path, data: Path, **options: Any) -> tuple[RecordedFile, RecordedFile, Qcow2]:
    file, layer = open_recorded(path.read_bytes(), data.read_bytes(), **options)
    assert isinstance(layer.data_file, RecordedFile)
    return file, layer.data_file, layer


# -- what is where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster", [512, CLUSTER])
def test_data_is_at_its_own_offset(kind: str, cluster: int, tmp_path: Path) -> None:
    path, data = _create(tmp_path, kind=kind, cluster_size=cluster)
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"a" * 100)
        disk.write(300 * KIB + 5, b"b" * 100 * KIB)
        layer = disk.root
        extent = next(iter(layer.resolve(310 * KIB, 1, Intent.WRITE)))
        assert (extent.target, extent.offset, extent.writable) == (layer.data_file, 310 * KIB, True)  # type: ignore[attr-defined]
        found = disk.read(0, MIB)
    assert found[:100] == b"a" * 100 and found[300 * KIB + 5 :][: 100 * KIB] == b"b" * 100 * KIB
    assert data.read_bytes() == found == content(path)
    check(path)
    assert path.stat().st_size < 512 * KIB


def test_images_that_qemu_wrote_are_read(tmp_path: Path) -> None:
    path, _ = _create(tmp_path)
    qemu_io(
        path, "write -P 1 0 4k", "write -P 2 100k 200k", "write -z 150k 100k", "discard 0 64k", "write -P 3 1020k 4k"
    )
    with open_stack(_opened(path), read_only=True) as disk:
        assert disk.read(0, MIB) == content(path)


def test_junk_in_the_data_file_is_not_seen(tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    data.write_bytes(b"J" * MIB)
    with open_stack(_opened(path)) as disk:
        assert disk.read(0, MIB) == bytes(MIB)
        disk.write(100, b"x")
        disk.zero(CLUSTER, CLUSTER)
        disk.write(2 * CLUSTER + 5, b"y" * 2 * CLUSTER)
        found = disk.read(0, MIB)
    expected = bytearray(MIB)
    expected[100:101], expected[2 * CLUSTER + 5 : 4 * CLUSTER + 5] = b"x", b"y" * 2 * CLUSTER
    assert found == expected == content(path)
    check(path)


def test_the_backing_file_is_copied_to_its_own_offset(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"b" * 500 * KIB)
    path, data = _create(tmp_path, backing=backing, backing_format="raw")
    with open_stack(_opened(path)) as disk:
        disk.write(CLUSTER + 10, b"x")
        disk.write(490 * KIB, b"y")
        found = disk.read(0, MIB)
    assert data.read_bytes()[CLUSTER : 2 * CLUSTER] == b"b" * 10 + b"x" + b"b" * (CLUSTER - 11)
    assert found == content(path)
    check(path)


def test_what_lies_behind_the_end_of_the_disk_is_left_alone(tmp_path: Path) -> None:
    size = MIB + 512
    path, data = _create(tmp_path, size)
    with data.open("ab") as file:
        file.write(b"theirs" * 1000)
    with open_stack(_opened(path)) as disk:
        disk.write(size - 100, b"x" * 100)
        disk.zero(MIB, 512, Flag.MAY_UNMAP)
    assert data.read_bytes()[size:] == b"theirs" * 1000


def test_a_data_file_that_is_too_short_is_filled_up(tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    qemu_io(path, "write -P 1 0 1M")
    os.truncate(data, 100 * KIB)
    with open_stack(_opened(path), read_only=True) as disk:
        assert disk.read(0, MIB) == b"\1" * 100 * KIB + bytes(924 * KIB)
    assert data.stat().st_size == 100 * KIB
    with open_stack(_opened(path)) as disk:
        disk.write(900 * KIB, b"x")
        assert disk.read(99 * KIB, 2 * KIB) == b"\1" * KIB + bytes(KIB)
    assert data.stat().st_size == MIB


def test_one_that_cannot_grow_is_written_as_far_as_it_goes(tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    qemu_io(path, "write -P 1 512k 512k")
    layer = _opened(path, data_file=Raw(File(str(data)), size=512 * KIB))
    with open_stack(layer) as disk:
        disk.write(100 * KIB, b"x" * 100 * KIB)
        for offset in (460 * KIB, 600 * KIB):
            with pytest.raises(RequestError) as caught:
                disk.write(offset, b"y" * 100 * KIB)
            assert caught.value.errno == errno.ENOSPC
        assert disk.read(100 * KIB, 100 * KIB) == b"x" * 100 * KIB and disk.read(600 * KIB, 4) == bytes(4)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_preallocated(preallocation: str, tmp_path: Path) -> None:
    path, data = _create(tmp_path, preallocation=preallocation)
    size = path.stat().st_size
    with open_stack(_opened(path)) as disk:
        (extent,) = disk.root.resolve(0, MIB, Intent.WRITE)
        assert (extent.offset, extent.length, extent.writable) == (0, MIB, True)
        disk.write(5, b"x" * 500 * KIB)
    assert path.stat().st_size == size
    assert data.read_bytes() == content(path)


# -- zeroing and trimming -------------------------------------------------------------------------------------------


def test_zeroing_sets_flags_and_keeps_the_data_file(tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"x" * 4 * CLUSTER)
        disk.zero(CLUSTER, CLUSTER)
        disk.zero(0, CLUSTER)
        disk.write(CLUSTER + 1, b"y")
        found = disk.read(0, 4 * CLUSTER)
    assert found == bytes(CLUSTER + 1) + b"y" + bytes(CLUSTER - 2) + b"x" * 2 * CLUSTER
    assert _entries(path)[:3] == [COPIED | 1, COPIED | CLUSTER, COPIED | 2 * CLUSTER]
    assert data.read_bytes()[:CLUSTER] == b"x" * CLUSTER
    check(path)
    assert content(path)[: 4 * CLUSTER] == found


@pytest.mark.parametrize("how", ["trim", "zero"])
def test_storage_is_given_back_once_that_is_durable(how: str, tmp_path: Path) -> None:
    path, data_path = _create(tmp_path)
    file, data, layer = _recorded(path, data_path)
    with open_stack(layer) as disk:
        disk.write(0, b"x" * MIB)
        disk.flush()
        before = len(file.log)
        if how == "trim":
            disk.trim(100 * KIB, 500 * KIB)
        else:
            disk.zero(CLUSTER * 2, 7 * CLUSTER, Flag.MAY_UNMAP)
        assert not [operation for operation in file.log[before:] if operation.length > 100 * KIB]
        disk.flush()
        log = file.log[before:]
        (at,) = [number for number, operation in enumerate(log) if operation.length == 7 * CLUSTER]
        assert (log[at].name, log[at].file, log[at].offset) == ("discard", 1, 2 * CLUSTER)
        assert any(operation.name == "sync" and operation.file == 0 for operation in log[:at])
        assert disk.read(2 * CLUSTER, 7 * CLUSTER) == bytes(7 * CLUSTER)
    assert own_read(file.data, data_file=data.data)[2 * CLUSTER : 9 * CLUSTER] == bytes(7 * CLUSTER)


def test_what_was_trimmed_and_written_again_is_not_discarded(tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"x" * MIB)
        disk.trim(0, MIB)
        disk.write(3 * CLUSTER, b"y" * CLUSTER)
        disk.flush()
        assert disk.read(0, MIB) == bytes(3 * CLUSTER) + b"y" * CLUSTER + bytes(MIB - 4 * CLUSTER)
        assert data.stat().st_blocks * 512 <= 2 * CLUSTER
    assert content(path)[3 * CLUSTER : 4 * CLUSTER] == b"y" * CLUSTER


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_discards_as_configured(kind: str, wanted: bool, tmp_path: Path) -> None:
    path, data = _create(tmp_path, kind=kind)
    qemu_io(path, "write -P 1 0 1M")
    file, _, layer = _recorded(path, data, pass_discard_request=wanted)
    with open_stack(layer) as disk:
        disk.trim(0, 512 * KIB)
        disk.flush()
        assert wanted == any(operation.name == "discard" for operation in file.log)


# -- a raw image by itself ------------------------------------------------------------------------------------------


def _raw_ways(disk: Reference, pick: random.Random) -> None:
    offset = pick.randrange(MIB)
    length = min(pick.randint(1, 200 * KIB), MIB - offset)
    way = pick.choice(("write", "zero", "unmap", "trim", "flush"))
    if way == "write":
        disk.write(offset, pick.randbytes(length))
    elif way in ("zero", "unmap"):
        disk.zero(offset, length, Flag.MAY_UNMAP if way == "unmap" else Flag.NONE)
    elif way == "trim":
        disk.trim(offset, length)
    else:
        disk.flush()


@pytest.mark.parametrize("extended", ["on", "off"])
def test_a_raw_data_file_is_the_disk_at_every_moment(extended: str, tmp_path: Path) -> None:
    """With QEMU's zero clusters in it as well."""
    path, data = _create(tmp_path, kind="raw", extended_l2=extended)
    qemu_io(path, "write -P 1 0 900k", "write -z 100k 300k", "write -z -u 640k 64k", "discard 704k 64k")
    pick = random.Random(SEED)
    with open_stack(_opened(path)) as disk:
        for _ in range(amount(150, 3000)):
            _raw_ways(disk, pick)
            assert disk.read(0, MIB) == data.read_bytes()
    assert content(path) == data.read_bytes()
    check(path)
    assert Image(path.read_bytes()).is_raw


def test_zeroing_a_raw_data_file_changes_no_entry(tmp_path: Path) -> None:
    path, data_path = _create(tmp_path, kind="raw")
    qemu_io(path, "write -P 1 0 1M", "write -z 0 64k")
    data_path.write_bytes(b"J" * CLUSTER + data_path.read_bytes()[CLUSTER:])  # somebody else's doing
    file, data, layer = _recorded(path, data_path)
    with open_stack(layer) as disk:
        disk.zero(0, 200 * KIB)
        disk.trim(512 * KIB, CLUSTER)
        disk.flush()
        assert disk.read(0, 200 * KIB) == data.data[: 200 * KIB] == bytes(200 * KIB)
        assert {operation.file for operation in file.log} == {1}
        assert next(iter(layer.resolve(0, CLUSTER, Intent.READ))).target is ZERO


# -- what order things go to the files in ---------------------------------------------------------------------------


def test_data_is_durable_before_it_is_linked(tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    file, _, layer = _recorded(path, data)
    with open_stack(layer) as disk:
        disk.write(0, b"x" * CLUSTER)
        disk.flush()
        order = [(operation.name, operation.file) for operation in file.log if operation.name != "resize"]
        assert order[-1] == ("sync", 0), "the link"
        assert order.index(("sync", 1)) < max(number for number, each in enumerate(order) if each == ("write", 0))
        disk.write(100, b"y")
        before = len(file.log)
        disk.flush()
        assert [(operation.name, operation.file) for operation in file.log[before:]] == [("sync", 1)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_failed_sync_of_either_is_final(number: int, tmp_path: Path) -> None:
    path, data_path = _create(tmp_path)
    file, data, layer = _recorded(path, data_path)

    def fail(operation: Operation) -> None:
        if operation.name == "sync":
            raise OSError(5, "lost")

    def use() -> None:
        with open_stack(layer) as disk:
            disk.write(0, b"x" * CLUSTER)
            failing = (file, data)[number]
            failing.before = fail
            with pytest.raises(RequestError, match="lost"):
                disk.flush()
            failing.before = lambda operation: None
            with pytest.raises(RequestError, match="lost"):
                disk.flush()

    with pytest.raises(OSError, match="lost"):
        use()
    assert not own_check(file.data).errors


# -- finding it -----------------------------------------------------------------------------------------------------


def test_its_name_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So QEMU takes it, other than the name of a backing file."""
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    path = create(Path("sub/image"), MIB, data_file="sub/data")
    qemu_io(path, "write -P 1 0 1M")
    with open_stack(_opened(path)) as disk:
        assert disk.read(0, MIB) == b"\1" * MIB
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(ImageError, match=r"names 'sub/data'.*cannot be opened"), open_stack(_opened(Path("image"))):
        pass


def test_the_configuration_overrides_the_name(tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    qemu_io(path, "write -P 1 0 1M")
    data.rename(tmp_path / "elsewhere")
    with open_stack(_opened(path, data_file=File(str(tmp_path / "elsewhere")))) as disk:
        assert disk.read(0, MIB) == b"\1" * MIB
        disk.write(0, b"x")
    assert (tmp_path / "elsewhere").read_bytes()[:2] == b"x\1"


def test_outside_the_roots_it_is_not_opened(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = create(inside / "image", MIB, data_file=tmp_path / "outside")
    with pytest.raises(ImageError, match="outside the roots"), open_stack(_opened(path)):
        pass
    with open_stack(_opened(path), roots=[tmp_path]) as disk:
        assert disk.read(0, 1) == b"\0"


@pytest.mark.parametrize("read_only", [False, True])
def test_it_is_locked_with_the_image(read_only: bool, tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    with open_stack(_opened(path), read_only=read_only):
        assert "lock" in run("qemu-io", "-f", "raw", "-c", "write 0 1", data, status=1)


def _rename(path: Path, name: bytes) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack(">I", 0x44415441))
    end = at + 8 + -(-struct.unpack_from(">I", data, at + 4)[0] // 8) * 8
    new = struct.pack(">II", 0x44415441, len(name)) + name + bytes(-len(name) % 8)
    rest = bytes(data[end : 4 * KIB])
    data[at : at + len(new) + len(rest)] = new + rest
    path.write_bytes(data)


NAMES: dict[str, tuple[bytes, str]] = {
    "itself": (b"image", "closes a loop"),
    "a protocol": (b"nbd://localhost/x", "no other protocol"),
    "a directory": (b".", "directory"),
    "nothing there": (b"no", "cannot be opened"),
    "no path": (b"a\0b", "no path"),
    "nothing": (b"", "does not name it: set data-file"),
}


@pytest.mark.parametrize(("name", "words"), NAMES.values(), ids=NAMES)
def test_bad_names(name: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = _create(tmp_path)
    monkeypatch.chdir(tmp_path)
    _rename(path, name)
    with pytest.raises(ImageError, match=words) as caught, open_stack(_opened(path)):
        pass
    assert caught.value.path


def test_an_image_is_described_without_it(tmp_path: Path) -> None:
    path, data = _create(tmp_path)
    qemu_io(path, "write -P 1 0 64k")
    data.unlink()
    layer = _opened(path, data_file=False)
    with open_stack(layer) as disk:
        assert layer.header.data_file_name == str(data) and layer.info()
        assert layer.read_only and disk.read(MIB // 2, 1) == b"\0"
        with pytest.raises(RequestError, match="has not been opened"):
            disk.read(0, 1)
    with open_stack(_opened(create(tmp_path / "other", MIB), data_file=False)) as disk:
        assert disk.read(0, 1) == b"\0"


def test_an_image_without_one_is_given_none(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    with (
        pytest.raises(ConfigError, match="data-file: the image has no external data file"),
        open_stack(_opened(path, data_file=Memory(MIB))),
    ):
        pass


# -- what is refused ------------------------------------------------------------------------------------------------


def _poke_entry(path: Path, index: int, entry: int) -> None:
    data = bytearray(path.read_bytes())
    image = Image(data)
    table = image.numbers(image.l1_offset, 1)[0] & 0x00FFFFFFFFFFFE00
    struct.pack_into(">Q", data, table + index * 8, entry)
    path.write_bytes(data)


BAD = {
    "another place": (1, COPIED | 5 * CLUSTER, "the same as in the disk"),
    "place of zeroes": (1, COPIED | 5 * CLUSTER | 1, "the same as in the disk"),
    "the first cluster's place": (1, COPIED, "the same as in the disk"),
    "compressed": (0, 1 << 62 | 0x50000, "no compressed cluster"),
}


@pytest.mark.parametrize(("index", "entry", "words"), BAD.values(), ids=BAD)
def test_bad_entries(index: int, entry: int, words: str, tmp_path: Path) -> None:
    path, _ = _create(tmp_path)
    qemu_io(path, "write -P 1 0 1M")
    _poke_entry(path, index, entry)
    with open_stack(_opened(path)) as disk:
        requests: list[Callable[[], object]] = [
            lambda: disk.read(index * CLUSTER, 1),
            lambda: disk.write(index * CLUSTER, b"x"),
            lambda: disk.zero(index * CLUSTER, CLUSTER),
            lambda: disk.trim(index * CLUSTER, CLUSTER),
        ]
        for request in requests:
            with pytest.raises(RequestError, match=f"L2 table 0, entry {index} .*{words}"):
                request()
        assert disk.read(3 * CLUSTER, 1) == b"\1"


def _poke(path: Path, offset: int, data: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + data + whole[offset + len(data) :])


def test_snapshots_beside_a_data_file_are_not_written(tmp_path: Path) -> None:
    path, _ = _create(tmp_path)
    _poke(path, 60, struct.pack(">IQ", 1, CLUSTER))
    with pytest.raises(ImageError, match="internal snapshots"), open_stack(_opened(path)):
        pass
    with open_stack(_opened(path), read_only=True) as disk:
        assert disk.read(0, 1) == b"\0"


def test_internal_snapshots_are_not_made(tmp_path: Path) -> None:
    path, _ = _create(tmp_path)
    layer = _opened(path)
    with open_stack(layer), pytest.raises(RequestError, match="external data file") as caught:
        layer.create_snapshot("s")
    assert caught.value.errno == errno.ENOTSUP
    check(path)


def test_changes_of_the_data_file_pass_through(tmp_path: Path) -> None:
    path, _ = _create(tmp_path)
    memory = Memory(MIB)
    layer, graph = _opened(path, data_file=memory), Graph()
    seen: list[tuple[int, int]] = []
    with open_stack(layer, graph=graph):
        graph.subscribe(layer, lambda offset, length: seen.append((offset, length)))
        memory.changed(4096, 512)
    assert seen == [(4096, 512)]


def test_a_backing_file_below_a_raw_data_file_is_not_written(tmp_path: Path) -> None:
    path, _ = _create(tmp_path, kind="raw")
    with (
        pytest.raises(ImageError, match="backing file and a raw external data file"),
        open_stack(_opened(path, backing=Memory(MIB))),
    ):
        pass
    with open_stack(_opened(path, backing=Memory(MIB)), read_only=True) as disk:
        assert disk.read(0, 1) == b"\0"


def test_the_raw_flag_stays_and_others_go(tmp_path: Path) -> None:
    path, _ = _create(tmp_path, kind="raw")
    _poke(path, 88, struct.pack(">Q", 1 << 50 | 2))
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"x")
    assert struct.unpack_from(">Q", path.read_bytes(), 88) == (2,)
