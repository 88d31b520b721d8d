"""Writing qcow2: against a model, against QEMU, with several threads, and when the file fails."""

from __future__ import annotations

import errno
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.errors import RequestError
from nbdserver.extent import Intent
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag
from tests.layers.qcow2_check import Image
from tests.layers.qcow2_check import check as own_check
from tests.layers.qcow2_kit import VARIANTS, Operation, open_recorded
from tests.serving import SEED, amount, check, content, create, data_beside, qemu_io, run, run_json

KIB, MIB = 1 << 10, 1 << 20

MATRIX: list[tuple[int, int, dict[str, Any]]] = [
    (512, 2 * MIB + 512, {}),
    (512, 1 * MIB, {"refcount_bits": 64}),
    (512, 1 * MIB, {"refcount_bits": 1}),
    (4096, 4 * MIB + 1024, {"refcount_bits": 2}),
    (4096, 4 * MIB, {"compat": "0.10"}),
    (65536, 16 * MIB + 512, {}),
    (65536, 16 * MIB, {"preallocation": "metadata", "refcount_bits": 8}),
    (65536, 16 * MIB, {"compression_type": "zstd", "refcount_bits": 32}),
    (2 * MIB, 24 * MIB, {}),
    (2 * MIB, 24 * MIB + 512, {"preallocation": "falloc", "refcount_bits": 4}),
    (16 * KIB, 4 * MIB + 512, {"extended_l2": "on"}),
    (2 * MIB, 24 * MIB, {"extended_l2": "on", "preallocation": "metadata"}),
    (512, 1 * MIB, {"data_file": "beside"}),
    (65536, 16 * MIB + 512, {"data_file": "beside", "extended_l2": "on"}),
    (4096, 4 * MIB, {"data_file": "beside", "data_file_raw": "on"}),
]

MATRIX_IDS = [f"{cluster} {' '.join(map(str, options.values()))}" for cluster, _, options in MATRIX]


def _opened(path: Path, **options: Any) -> Qcow2:
    return Qcow2(File(str(path)), **options)


class Model:
    """What a disk should hold. Trimmed bytes may be anything that is their own: they are looked up."""

    def __init__(self, disk: Reference, content: bytes) -> None:
        self.disk, self.bytes = disk, bytearray(content)

    def random(self, pick: random.Random, start: int, end: int, longest: int) -> None:
        """One request within [start, end), checked if it reads."""
        offset = pick.randrange(start, end)
        if pick.random() < 0.3:
            offset = max(offset // 4096 * 4096, start)
        length = min(pick.randint(1, longest), end - offset)
        part = slice(offset, offset + length)
        choice = pick.random()
        if choice < 0.45:
            data = pick.randbytes(length)
            self.disk.write(offset, data, pick.choice((Flag.NONE, Flag.NONE, Flag.FUA)))
            self.bytes[part] = data
        elif choice < 0.6:
            flags = pick.choice((Flag.NONE, Flag.MAY_UNMAP, Flag.MAY_UNMAP | Flag.NO_FALLBACK))
            try:
                self.disk.zero(offset, length, flags)
            except RequestError as error:
                if error.errno != errno.ENOTSUP or not flags & Flag.NO_FALLBACK:
                    raise
                self.disk.zero(offset, length)
            self.bytes[part] = bytes(length)
        elif choice < 0.7:
            self.disk.trim(offset, length)
            self.bytes[part] = self.disk.read(offset, length)
        elif choice < 0.95:
            assert self.disk.read(offset, length) == self.bytes[part], (offset, length)
        else:
            self.disk.flush()


@pytest.mark.parametrize(("cluster", "size", "options"), MATRIX, ids=MATRIX_IDS)
def test_random_requests(cluster: int, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    path = create(tmp_path / "image", size, cluster_size=cluster, **options)
    pick = random.Random(f"{SEED} {cluster} {options}")
    for _ in range(2):
        with open_stack(_opened(path)) as disk:
            model = Model(disk, disk.read(0, size))
            for _ in range(amount(150, 3000)):
                model.random(pick, 0, size, min(4 * cluster + 20000, 3 * MIB))
            assert disk.read(0, size) == model.bytes
        check(path)
        assert content(path) == model.bytes
        if "data_file_raw" in options:
            assert data_beside(path).read_bytes() == model.bytes


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_random_requests_over_backing_and_compressed_clusters(compat: str, tmp_path: Path) -> None:
    size, pick = 3 * MIB, random.Random(SEED)
    base = create(tmp_path / "base", 2 * MIB + 512, cluster_size=512)
    qemu_io(base, "write -P 1 100k 1500k", "write -P 2 2000k 48k")
    path = create(tmp_path / "image", size, backing=base, cluster_size=4096, compat=compat)
    qemu_io(path, *(f"write -c -P {3 + at} {at * 40}k 4k" for at in range(70)), "write -P 99 1M 300k")
    with open_stack(_opened(path)) as disk:
        model = Model(disk, content(path))
        for _ in range(amount(400, 5000)):
            model.random(pick, 0, size, 30000)
    check(path)
    assert content(path) == model.bytes


def test_internal_snapshots_keep_what_they_had(tmp_path: Path) -> None:
    size, pick = 2 * MIB, random.Random(SEED)
    path = create(tmp_path / "image", size, cluster_size=4096)
    then = []
    for number in range(3):
        with open_stack(_opened(path)) as disk:
            model = Model(disk, disk.read(0, size))
            for _ in range(amount(60, 1000)):
                model.random(pick, 0, size, 50000)
        check(path)
        then.append(bytes(model.bytes))
        run("qemu-img", "snapshot", "-c", f"s{number}", path)
    with open_stack(_opened(path)) as disk:
        for offset in range(0, size, MIB):
            disk.write(offset, b"new" * 100_000)
            disk.trim(offset + 512 * KIB, 300 * KIB)
    check(path)
    for number in (1, 0, 2):
        run("qemu-img", "snapshot", "-a", f"s{number}", path)
        assert content(path) == then[number]
        check(path)


@pytest.mark.parametrize(
    "options", [{"cluster_size": 512, "refcount_bits": 64}, *VARIANTS.values()], ids=["many refcount blocks", *VARIANTS]
)
def test_taking_turns_with_qemu(options: dict[str, Any], tmp_path: Path) -> None:
    size, pick = 2 * MIB, random.Random(SEED)
    path = create(tmp_path / "image", size, **options)
    for turn in range(amount(6, 50)):
        with open_stack(_opened(path)) as disk:
            model = Model(disk, content(path) if turn else bytes(size))
            for _ in range(30):
                model.random(pick, 0, size, 20000)
        assert content(path) == model.bytes
        commands = []
        for _ in range(20):
            offset = pick.randrange(size // 512) * 512
            length = min(pick.randint(1, 200) * 512, size - offset)
            commands.append(f"{pick.choice(('write -P 7', 'write -z -u', 'write -z', 'discard'))} {offset} {length}")
        qemu_io(path, *commands)
        check(path)


@pytest.mark.parametrize("kind", ["small", "large", "subclusters", "data file", "raw data file"])
@pytest.mark.parametrize("backing", [False, True])
def test_several_threads(kind: str, backing: bool, tmp_path: Path) -> None:
    """Each has its own bytes, but they share clusters: thread n has every fourth part, 1,000 bytes long or so."""
    size, parts = 2 * MIB + 512, 500
    base = None
    if backing and kind != "raw data file":
        base = create(tmp_path / "base", size)
        qemu_io(base, "write -P 9 0 2M")
    options = {"small": {"cluster_size": 512}, "large": {}, **VARIANTS}[kind]
    path = create(tmp_path / "image", size, backing=base, **options)
    expected = bytearray(content(path))
    edges = [size * part // parts for part in range(parts + 1)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        pick = random.Random(f"{SEED} {number}")
        try:
            for _ in range(amount(300, 10_000)):
                part = pick.randrange(number, parts, 4)
                start, end = edges[part], edges[part + 1]
                choice = pick.random()
                if choice < 0.5:
                    data = pick.randbytes(end - start)
                    disk.write(start, data)
                    expected[start:end] = data
                elif choice < 0.7:
                    disk.zero(start, end - start, pick.choice((Flag.NONE, Flag.MAY_UNMAP)))
                    expected[start:end] = bytes(end - start)
                elif choice < 0.95:
                    assert disk.read(start, end - start) == expected[start:end], (start, end)
                else:
                    disk.flush()
        except BaseException as error:
            errors.append(error)

    with open_stack(_opened(path, l2_cache_size=0)) as disk:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    check(path)
    assert content(path) == expected


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_threads_that_free_and_allocate_whole_clusters(options: dict[str, Any], tmp_path: Path) -> None:
    """Freed clusters are reused by others at once: nobody may see what is not theirs."""
    cluster = int(options["cluster_size"])
    size = 256 * cluster
    path = create(tmp_path / "image", size, **options)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        pick = random.Random(f"{SEED} {number}")
        mine = range(number * 64, number * 64 + 64)
        holds = dict.fromkeys(mine, bytes(cluster))
        try:
            for turn in range(amount(500, 20_000)):
                at = pick.choice(mine)
                choice = pick.random()
                if choice < 0.4:
                    holds[at] = f"{at:06}{turn:06}".encode().ljust(16, b"-") * (cluster // 16)
                    disk.write(at * cluster, holds[at])
                elif choice < 0.7:
                    disk.trim(at * cluster, cluster)
                    holds[at] = bytes(cluster)
                elif choice < 0.95:
                    assert disk.read(at * cluster, cluster) == holds[at], at
                else:
                    disk.flush()
        except BaseException as error:
            errors.append(error)

    with open_stack(_opened(path)) as disk:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    check(path)
    assert path.stat().st_size < 3 * size, "freed clusters are reused"


# -- what is written, and where -------------------------------------------------------------------------------------


def _made(directory: Path, size: int = MIB, *before: str, **options: Any) -> bytes:
    path = create(directory / "made", size, **options)
    if before:
        qemu_io(path, *before)
    return path.read_bytes()


def _data_writes(log: list[Operation], longer_than: int) -> list[Operation]:
    return [operation for operation in log if operation.name == "write" and operation.length > longer_than]


def test_a_write_of_many_new_clusters_is_one_write(tmp_path: Path) -> None:
    file, layer = open_recorded(_made(tmp_path, 8 * MIB, cluster_size=4096))
    with open_stack(layer) as disk:
        disk.write(1000, b"x" * 5 * MIB)  # three L2 tables
        writes = _data_writes(file.log, 4096)
    # What surrounds it is zero, and new in the file: not written at all.
    assert [write.length for write in writes] == [5 * MIB]
    assert own_check(file.data).errors == []


def test_sequential_writes_are_contiguous_in_the_file(tmp_path: Path) -> None:
    file, layer = open_recorded(_made(tmp_path, 8 * MIB))
    with open_stack(layer) as disk:
        for offset in range(0, 8 * MIB, 256 * KIB):
            disk.write(offset, b"x" * 256 * KIB)
        (extent,) = layer.resolve(0, 8 * MIB, Intent.READ)
    assert (extent.length, extent.writable) == (8 * MIB, True)
    assert len(file.log) < 90


def test_small_writes_leave_large_clusters_sparse(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 64 * MIB, cluster_size=2 * MIB)
    with open_stack(_opened(path)) as disk:
        for offset in range(0, 64 * MIB, 2 * MIB):
            disk.write(offset + MIB, b"x")
    assert path.stat().st_blocks * 512 < 12 * MIB
    check(path)


def test_data_is_written_once_and_in_place_afterwards(tmp_path: Path) -> None:
    file, layer = open_recorded(_made(tmp_path))
    with open_stack(layer) as disk:
        disk.write(0, b"a" * 65536)
        disk.flush()
        before = len(file.log)
        disk.write(100, b"b" * 200)
        disk.flush()
        assert [operation.name for operation in file.log[before:]] == ["write", "sync"]


def test_a_flush_with_nothing_to_link_is_one_sync(tmp_path: Path) -> None:
    file, layer = open_recorded(_made(tmp_path))
    with open_stack(layer) as disk:
        before = len(file.log)
        disk.flush()
        assert [operation.name for operation in file.log[before:]] == ["sync"]


def test_freed_clusters_are_discarded_after_they_are_unlinked(tmp_path: Path) -> None:
    file, layer = open_recorded(_made(tmp_path, MIB, "write -P 1 0 1M"))
    with open_stack(layer) as disk:
        disk.trim(0, 512 * KIB)
        assert "discard" not in [operation.name for operation in file.log]
        disk.flush()
        names = [operation.name for operation in file.log]
        assert names.count("discard") == 1 and names.index("discard") > max(
            index for index, name in enumerate(names) if name == "sync"
        )
        assert file.log[names.index("discard")].length == 512 * KIB


@pytest.mark.parametrize("key", ["pass_discard_request", "pass_discard_other"])
@pytest.mark.parametrize("wanted", [False, True])
def test_discards_as_configured(key: str, wanted: bool, tmp_path: Path) -> None:
    data = _made(tmp_path, MIB, "write -c -P 1 0 64k", "write -P 1 64k 64k")
    file, layer = open_recorded(data, **{key: wanted})
    with open_stack(layer) as disk:
        if key == "pass_discard_request":
            disk.zero(64 * KIB, 64 * KIB, Flag.MAY_UNMAP)
        else:
            disk.write(0, b"x" * 64 * KIB)
        disk.flush()
        assert ("discard" in [operation.name for operation in file.log]) == wanted


def test_zeroing_without_unmapping_keeps_the_cluster(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"x" * 128 * KIB)
        place = next(iter(disk.root.resolve(0, 1, Intent.WRITE))).offset
        disk.zero(0, 128 * KIB)
        assert disk.read(0, 128 * KIB) == bytes(128 * KIB)
        disk.write(5, b"y")
        assert next(iter(disk.root.resolve(0, 1, Intent.WRITE))).offset == place
        assert disk.read(0, 128 * KIB) == bytes(5) + b"y" + bytes(128 * KIB - 6)
    check(path)


def test_fast_zeroing_says_no_where_data_would_be_written(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * MIB)
    path = create(tmp_path / "image", MIB, backing=tmp_path / "base", backing_format="raw")
    with open_stack(_opened(path)) as disk:
        disk.zero(0, 128 * KIB, Flag.NO_FALLBACK)
        with pytest.raises(RequestError) as caught:
            disk.zero(200 * KIB, 1, Flag.NO_FALLBACK)
        assert caught.value.errno == errno.ENOTSUP
        assert disk.read(0, 256 * KIB) == bytes(128 * KIB) + b"b" * 128 * KIB


def test_trimming_version_2_does_not_bring_back_the_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * 512 * KIB)
    path = create(tmp_path / "image", MIB, backing=tmp_path / "base", backing_format="raw", compat="0.10")
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"x" * MIB)
        disk.trim(0, MIB)
        assert set(disk.read(0, MIB)) <= set(b"x\0")
        disk.trim(512 * KIB, 512 * KIB)
        assert disk.read(512 * KIB, 512 * KIB) == bytes(512 * KIB)
        disk.zero(0, MIB)
        assert disk.read(0, MIB) == bytes(MIB)
    check(path)


def test_the_refcount_table_grows_as_far_as_the_file(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 12 * MIB, cluster_size=512, refcount_bits=64)
    with open_stack(_opened(path)) as disk:
        for offset in range(0, 12 * MIB, 1 * MIB):
            disk.write(offset, bytes([offset // MIB + 1]) * MIB)
    check(path)
    assert Image(path.read_bytes()).table_clusters >= 6
    assert content(path) == b"".join(bytes([number + 1]) * MIB for number in range(12))


def test_an_image_on_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """As on a block device: the disk is full where the file ends, and nothing is lost or leaked."""
    from layers.raw import Raw

    path = create(tmp_path / "image", 4 * MIB, cluster_size=4096)
    with path.open("r+b") as file:
        file.truncate(2 * MIB)
    with open_stack(Qcow2(Raw(File(str(path)), size=2 * MIB))) as disk:
        written, full = 0, False
        while not full:
            try:
                disk.write(written, b"x" * 40960)
                written += 40960
            except RequestError as error:
                full = error.errno == errno.ENOSPC
        assert written > 1800 * KIB
        disk.trim(0, 400 * KIB)
        disk.flush()
        disk.write(3 * MIB, b"y" * 300 * KIB)
    check(path)
    found = content(path)
    assert found[400 * KIB : written] == b"x" * (written - 400 * KIB)
    assert found[3 * MIB : 3 * MIB + 300 * KIB] == b"y" * 300 * KIB


def test_bounded_metadata_is_written_back_in_time(tmp_path: Path) -> None:
    """No flush ever comes, but neither do changed tables pile up, nor freed clusters."""
    path = create(tmp_path / "image", 4 * MIB, cluster_size=512)
    layer = _opened(path, l2_cache_size=8192, refcount_cache_size=8192)
    with open_stack(layer) as disk:
        for offset in range(0, 4 * MIB, 32 * KIB):
            disk.write(offset, b"x" * 512)
            assert len(layer.writer._mapping._cache._kept) < 16
    check(path)


def test_what_clients_are_told_of_allocation(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"x" * 200 * KIB)
        disk.trim(0, 64 * KIB)
        told = disk.status(0, MIB)
    qemu = [(e["length"], (0 if e["data"] else 1) | (2 if e["zero"] else 0)) for e in _map(path)]
    merged: list[tuple[int, int]] = []
    for length, flags in qemu:
        if merged and merged[-1][1] == flags:
            length += merged.pop()[0]
        merged.append((length, flags))
    assert told == merged


def _map(path: Path) -> Any:
    return run_json("qemu-img", "map", "--output=json", path)


# -- when the file fails --------------------------------------------------------------------------------------------


def _failing(error: OSError, when: Callable[[Operation], bool]) -> Callable[[Operation], None]:
    def before(operation: Operation) -> None:
        if when(operation):
            raise error

    return before


def _no_failure(operation: Operation) -> None:
    pass


@pytest.mark.parametrize("at", [*range(8), "data"])
def test_a_failed_write_leaves_nothing_behind(at: int | str, tmp_path: Path) -> None:
    """ENOSPC at the n-th operation on the file, or at the data, of a write of many clusters: all or nothing."""
    file, layer = open_recorded(_made(tmp_path, MIB, "write -P 1 100k 1k", cluster_size=512, refcount_bits=64))
    with open_stack(layer) as disk:
        disk.write(0, b"a" * 512)
        disk.flush()
        done = 0

        def before(operation: Operation) -> None:
            nonlocal done
            if operation.name in ("write", "resize"):
                if done == at or (at == "data" and b"bbb" in operation.data):
                    raise OSError(errno.ENOSPC, "full")
                done += 1

        file.before = before
        with pytest.raises(RequestError) as caught:
            disk.write(600, b"b" * 200 * KIB)
        assert caught.value.errno == errno.ENOSPC
        file.before = _no_failure
        assert disk.read(0, 600) == b"a" * 512 + bytes(88)
        disk.write(700 * KIB, b"c" * 512)
        disk.flush()
    report = own_check(file.data)
    assert not report.errors and not report.leaks


def test_a_flush_that_failed_to_write_is_done_again(tmp_path: Path) -> None:
    data = _made(tmp_path, MIB, "write -P 1 0 100k", cluster_size=512, refcount_bits=64)
    for at in range(12):
        file, layer = open_recorded(data)
        with open_stack(layer) as disk:
            disk.write(MIB // 2, b"a" * 100 * KIB)
            disk.trim(0, 50 * KIB)
            done = 0

            def before(operation: Operation, at: int = at) -> None:
                nonlocal done
                done += operation.name == "write"
                if operation.name == "write" and done == at + 1:
                    raise OSError(errno.EIO, "no")

            file.before = before
            with pytest.raises(RequestError):
                disk.flush()
            assert not own_check(file.data).errors
            file.before = _no_failure
            disk.write(MIB // 2 + 3000, b"b" * 1000)
            disk.write(0, b"c" * 512)
            disk.flush()
            saved = bytes(file.data)
            assert not own_check(saved).errors
        report = own_check(file.data)
        assert not report.errors and not report.leaks
        path = tmp_path / "after"
        path.write_bytes(saved)
        found = content(path)
        wanted = bytearray(b"a" * 100 * KIB)
        wanted[3000:4000] = b"b" * 1000
        assert found[MIB // 2 :][: 100 * KIB] == wanted
        assert found[: 50 * KIB] == b"c" * 512 + bytes(50 * KIB - 512)


@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_sync_is_never_followed_by_a_success(at: int, tmp_path: Path) -> None:
    file, layer = open_recorded(_made(tmp_path, MIB, "write -P 1 0 100k"), allocation_ahead=0)
    syncs = 0

    def before(operation: Operation) -> None:
        nonlocal syncs
        syncs += operation.name == "sync"
        if operation.name == "sync" and syncs == at:
            raise OSError(errno.EIO, "lost")

    def use() -> None:
        with open_stack(layer) as disk:
            disk.write(MIB // 2, b"a" * 100 * KIB)
            file.before = before
            for _ in range(3):
                with pytest.raises(RequestError, match="lost"):
                    disk.flush()
            written = len(file.log)
            with pytest.raises(RequestError, match="lost"):
                disk.write(MIB - 4096, b"b" * 4096)  # needs metadata, which cannot reach the file any more
            disk.write(0, b"c" * 512)
            assert disk.read(0, 513) == b"c" * 512 + b"\1"
            assert [operation.length for operation in file.log[written:]] == [512]

    with pytest.raises(OSError, match="lost"):
        use()
    assert file.log[-1].length == 512, "nothing is written on closing either"
    assert not own_check(file.data).errors


def test_json_of_check_is_clean_after_everything(tmp_path: Path) -> None:
    """qemu-img check's own counts, once: allocated, and no cluster more in the file than is used."""
    path = create(tmp_path / "image", 4 * MIB)
    with open_stack(_opened(path)) as disk:
        disk.write(0, b"x" * 4 * MIB)
    report = json.loads(run("qemu-img", "check", "--output=json", path))
    assert report["allocated-clusters"] == report["total-clusters"] == 64
    assert report["image-end-offset"] == path.stat().st_size
