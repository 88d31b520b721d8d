"""qcow2, writing compressed clusters: what becomes of them in the file, and that QEMU reads what we wrote."""

from __future__ import annotations

import errno
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.qcow2.clusters import Kind, Run
from layers.qcow2.compression import compress, decompress
from nbdserver.errors import RequestError
from nbdserver.graph import execute
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag, Request, Vector
from tests.image.kit import image_json
from tests.layers.flag_kit import Growing
from tests.layers.qcow2_check import check
from tests.layers.qcow2_kit import GARBAGE, Fails, Operation, RecordedFile, Thread, open_recorded
from tests.registered import Seen, open_registered, registered
from tests.serving import SEED, amount, content, create, qemu_io, run, run_json
from tests.serving import check as qemu_check

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
COMPRESSED = Flag.WRITE_COMPRESSED


def write(disk: Reference, offset: int, data: bytes) -> None:
    """A compressed write."""
    disk.execute(Request.write(offset, Vector.of(data), COMPRESSED))


def text(number: int, length: int = CLUSTER) -> bytes:
    """Data that can be compressed, and differs with ``number``."""
    return (f"{number:07} ".encode() * (length // 8 + 1))[:length]


def noise(length: int = CLUSTER) -> bytes:
    """Data that cannot."""
    return random.Random(SEED).randbytes(length)


def run_at(layer: Qcow2, offset: int) -> Run:
    return next(layer.reader.spans(offset, 1))[0]


def place_at(layer: Qcow2, offset: int) -> tuple[int, int]:
    """(place, length) of the compressed cluster of the disk at ``offset``."""
    run = run_at(layer, offset)
    assert run.kind is Kind.COMPRESSED, run
    return layer.reader.geometry.compressed(run.entry)


def new(size: int, path: Path, **options: Any) -> bytes:
    """A new image's bytes."""
    return create(path / "new", size, **({"cluster_size": CLUSTER} | options)).read_bytes()


# -- with QEMU --------------------------------------------------------------------------------------------------------

MATRIX: dict[str, dict[str, Any]] = {
    "64k": {},
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "2M": {"cluster_size": 2 * MIB},
    "version 2": {"compat": "0.10", "cluster_size": 4096},
    "zstd": {"compression_type": "zstd"},
    "zstd 512": {"compression_type": "zstd", "cluster_size": 512},
    "subclusters": {"extended_l2": "on", "cluster_size": 32 * KIB},
    "subclusters, zstd": {"extended_l2": "on", "compression_type": "zstd"},
    "refcounts of 1 bit": {"refcount_bits": 1, "cluster_size": 4096},
    "refcounts of 2 bits": {"refcount_bits": 2, "cluster_size": 4096},
    "refcounts of 64 bits": {"refcount_bits": 64, "cluster_size": 1024},
    "lazy refcounts": {"lazy_refcounts": "on", "cluster_size": 4096},
}


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("tail", [0, 1536])
def test_qemu_reads_what_we_compressed(name: str, tail: int, tmp_path: Path) -> None:
    """Compressed writes, others over them, and they over others; the disk ends within a cluster, or with one."""
    options = {"cluster_size": CLUSTER} | MATRIX[name]
    cluster = options["cluster_size"]
    size = 48 * max(cluster, 4096) // (16 if cluster > MIB else 1) + tail
    path, pick = create(tmp_path / "disk", size, **options), random.Random(f"{SEED} {name} {tail}")
    model = bytearray(size)
    with open_stack(Qcow2(File(str(path)))) as disk:
        for number in range(120 if cluster < MIB else 20):
            first = pick.randrange(-(-size // cluster))
            start, end = first * cluster, min((first + pick.randint(1, 5)) * cluster, size)
            data = noise(end - start) if pick.random() < 0.2 else text(number, end - start)
            kind = pick.random()
            if kind < 0.6:
                write(disk, start, data)
            else:
                start, end = start + (end - start) // 3, end - (end - start) // 5
                data = bytes(end - start) if kind < 0.8 else data[: end - start]
                if kind < 0.7:
                    disk.zero(start, end - start, Flag.MAY_UNMAP)
                else:
                    disk.write(start, data)
            model[start:end] = data
            if kind > 0.95:
                disk.flush()
        assert disk.read(0, size) == model
    qemu_check(path)
    assert content(path) == model
    found = check(path.read_bytes())
    assert not found.errors and not found.leaks


@pytest.mark.parametrize("name", ["4k", "subclusters, zstd", "version 2"])
def test_in_turns_with_qemu(name: str, tmp_path: Path) -> None:
    """Each compresses, discards and writes over parts of what the other has compressed; now and then a snapshot."""
    cluster = ({"cluster_size": CLUSTER} | MATRIX[name])["cluster_size"]
    size = 64 * cluster + 512
    path, pick = create(tmp_path / "disk", size, **({"cluster_size": cluster} | MATRIX[name])), random.Random(SEED)
    model = bytearray(size)
    for turn in range(amount(4, 40)):
        with open_stack(Qcow2(File(str(path)))) as disk:
            assert disk.read(0, size) == model
            for number in range(20):
                start = pick.randrange(64) * cluster
                length = min(pick.randint(1, 4) * cluster, size - start)
                data = text(turn * 100 + number, length)
                if pick.random() < 0.6:
                    write(disk, start, data)
                else:
                    start, data = start + 1000, data[: length - 1500]
                    disk.write(start, data)
                model[start : start + len(data)] = data
        starts = [cluster * index for index in pick.sample(range(64), 10)]
        for letter, start in enumerate(starts):
            model[start : start + cluster] = bytes([letter + 65]) * cluster
            model[start + 512 : start + 1536] = bytes([letter + 97]) * 1024
        # One after the other: once a cluster has been discarded, QEMU 10 may compress into what is another's by now.
        qemu_io(path, *(f"discard {start} {cluster}" for start in starts))
        qemu_io(path, *(f"write -c -P {letter + 65} {start} {cluster}" for letter, start in enumerate(starts)))
        qemu_io(path, *(f"write -P {letter + 97} {start + 512} 1024" for letter, start in enumerate(starts)))
        qemu_check(path)
        if turn % 3 == 0:
            run("qemu-img", "snapshot", "-c", f"s{turn}", path)
    assert content(path) == model


def test_both_count_the_same(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", 2 * MIB)
    with open_stack(Qcow2(File(str(path)))) as disk:
        write(disk, 0, text(1, MIB))
        write(disk, MIB, noise(128 * KIB))
    found = run_json("qemu-img", "check", "--output=json", path)
    assert (found["compressed-clusters"], found["allocated-clusters"]) == (16, 18)
    ours = image_json("check", path)
    assert {key: ours[key] for key in ours if key.endswith("clusters")} == {
        key: found[key] for key in found if key.endswith("clusters")
    }
    entries = run_json("qemu-img", "map", "--output=json", path)
    assert [(entry["length"], entry["compressed"]) for entry in entries if entry["data"]] == [
        (MIB, True),
        (128 * KIB, False),
    ]


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_as_much_is_saved_as_by_qemu(compression: str, tmp_path: Path) -> None:
    pick = random.Random(SEED)
    words = [pick.randbytes(pick.randrange(3, 9)) for _ in range(2000)]
    data = b"".join(pick.choices(words, k=4 * MIB // 6))[: 3 * MIB]
    (tmp_path / "raw").write_bytes(data)
    path = create(tmp_path / "disk", len(data), compression_type=compression)
    with open_stack(Qcow2(File(str(path)))) as disk:
        write(disk, 0, data)
    options = f"compression_type={compression}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, tmp_path / "raw", tmp_path / "theirs")
    theirs = (tmp_path / "theirs").stat().st_size
    assert theirs * 0.97 - CLUSTER < path.stat().st_size < theirs * 1.03 + CLUSTER
    assert content(path) == data


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 512), (512, CLUSTER), (0, CLUSTER + 512), (MIB, 100), (MIB + 100, 412), (CLUSTER - 1, 1)]
)
def test_parts_of_clusters_are_refused(offset: int, length: int, tmp_path: Path) -> None:
    file, layer = open_recorded(new(MIB + 512, tmp_path))
    with open_stack(layer) as disk:
        with pytest.raises(RequestError, match="compressed is what has whole clusters of 65536") as refused:
            write(disk, offset, bytes(length))
        assert refused.value.errno == errno.EINVAL
        assert not any(operation.name == "write" for operation in file.log)


def test_the_last_cluster_may_be_shorter(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", MIB + 512)
    with open_stack(Qcow2(File(str(path)))) as disk:
        write(disk, MIB, b"x" * 512)
        disk.root.resize(2 * MIB)
        assert disk.read(MIB, CLUSTER) == b"x" * 512 + bytes(CLUSTER - 512)
    qemu_check(path)
    assert content(path)[MIB:] == b"x" * 512 + bytes(MIB - 512)


@pytest.mark.parametrize("raw", ["off", "on"])
def test_an_external_data_file_has_none(raw: str, tmp_path: Path) -> None:
    path = create(tmp_path / "disk", MIB, data_file="beside", data_file_raw=raw)
    with (
        open_stack(Qcow2(File(str(path)))) as disk,
        pytest.raises(RequestError, match="external data file") as refused,
    ):
        execute(disk.root, Request.write(0, Vector.of(CLUSTER), COMPRESSED))
    assert refused.value.errno == errno.ENOTSUP


# -- where they are ---------------------------------------------------------------------------------------------------


def test_they_share_clusters_of_the_file_byte_by_byte(tmp_path: Path) -> None:
    file, layer = open_recorded(new(MIB, tmp_path))
    with open_stack(layer) as disk:
        for number in range(4):
            write(disk, number * CLUSTER, text(number))
        first = place_at(layer, 0)[0]
        lengths = [len(compress(text(number), 0) or b"") for number in range(4)]
        assert [place_at(layer, number * CLUSTER)[0] - first for number in range(4)] == [
            sum(lengths[:number]) for number in range(4)
        ]
        assert layer.writer.refcounts.get(first // CLUSTER) == 4
        written = [o for o in file.log if o.name == "write" and first <= o.offset < first + CLUSTER]
        assert [operation.length for operation in written] == lengths, "a neighbour was written over"


def test_what_does_not_fit_goes_on_in_the_next_cluster_if_that_is_free(tmp_path: Path) -> None:
    """A third of it is noise, so that a cluster of the file holds less than three."""
    _, layer = open_recorded(new(MIB, tmp_path))
    with open_stack(layer) as disk:
        for number in range(4):
            write(disk, number * CLUSTER, noise(CLUSTER // 5 * 2) + bytes(CLUSTER - CLUSTER // 5 * 2))
        places = [place_at(layer, number * CLUSTER)[0] for number in range(4)]
        assert places[2] // CLUSTER < (places[3] - 1) // CLUSTER, "none lies in two clusters"
        used = {place // CLUSTER for place in places}
        assert len(used) == 2 and [layer.writer.refcounts.get(cluster) for cluster in sorted(used)] == [3, 2]


@pytest.mark.parametrize(("bits", "most"), [(1, 1), (2, 3), (4, 15)])
def test_no_more_share_a_cluster_than_can_be_counted(bits: int, most: int, tmp_path: Path) -> None:
    file, layer = open_recorded(new(MIB, tmp_path, refcount_bits=bits, cluster_size=16 * KIB))
    with open_stack(layer) as disk:
        for number in range(16):
            write(disk, number * 16 * KIB, text(number, 16 * KIB))
        places = [place_at(layer, number * 16 * KIB)[0] // (16 * KIB) for number in range(16)]
        assert max(places.count(place) for place in places) == most
    assert not check(file.data).errors and not check(file.data).leaks


def test_what_cannot_be_compressed_is_written_as_it_is_from_the_memory_it_is_in(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", MIB)
    spy = Growing(File(str(path)))
    layer = Qcow2(spy)
    with open_registered(layer) as disk:
        disk.flush()
        spy.take()
        disk.execute(Request.write(CLUSTER, registered(noise()), COMPRESSED))
        run = run_at(layer, CLUSTER)
        assert run.kind is Kind.NORMAL and run.copied
        assert Seen(spy.seen[-1].operation, run.place or 0, CLUSTER, Flag.REGISTERED_BUF) in spy.take()
        # And so over again, where it is; and nothing is allocated beside it.
        disk.execute(Request.write(CLUSTER, registered(noise()[::-1]), COMPRESSED))
        assert [seen[1:] for seen in spy.take()] == [(run.place, CLUSTER, Flag.REGISTERED_BUF)]
        assert run_at(layer, 2 * CLUSTER).kind is Kind.UNALLOCATED
        disk.execute(Request.write(CLUSTER, registered(text(1)), COMPRESSED))
        assert not any(seen.is_registered for seen in spy.take())


# -- written over -----------------------------------------------------------------------------------------------------


def test_what_is_written_again_in_the_same_sectors_lets_go_of_what_was_there(tmp_path: Path) -> None:
    """The two descriptors differ in nothing but where in the sector the data begins."""
    file, layer = open_recorded(new(MIB, tmp_path))
    with open_stack(layer) as disk:
        write(disk, 0, b"a" * CLUSTER)
        first = place_at(layer, 0)
        write(disk, 0, b"b" * CLUSTER)
        second = place_at(layer, 0)
        assert first[0] // 512 == second[0] // 512 and first[0] < second[0]
        disk.flush()
        assert layer.writer.refcounts.get(first[0] // CLUSTER) == 1
    assert not check(file.data).errors and not check(file.data).leaks


def test_another_one_in_the_same_place_is_not_taken_for_what_was_there(tmp_path: Path) -> None:
    """Of the same length, so that its L2 entry is the same; what the first one held is still in memory."""
    _, layer = open_recorded(new(MIB, tmp_path))
    with open_stack(layer) as disk:
        write(disk, 0, b"a" * CLUSTER)
        entry = run_at(layer, 0).entry
        assert disk.read(0, CLUSTER) == b"a" * CLUSTER
        disk.trim(0, CLUSTER)
        disk.flush()
        write(disk, 3 * CLUSTER, b"b" * CLUSTER)
        assert run_at(layer, 3 * CLUSTER).entry == entry
        assert disk.read(3 * CLUSTER, CLUSTER) == b"b" * CLUSTER
        layer.reader._decompressed.clear()
        assert disk.read(3 * CLUSTER, CLUSTER) == b"b" * CLUSTER


@pytest.mark.parametrize("before", ["data", "compressed", "zeroes with a cluster", "a snapshot's", "backing file's"])
def test_it_may_be_written_over_anything(before: str, tmp_path: Path) -> None:
    """QEMU fails with EIO where there is a cluster already."""
    (tmp_path / "below").write_bytes(b"b" * MIB)
    options = {"backing": tmp_path / "below", "backing_format": "raw"} if before.startswith("backing") else {}
    path = create(tmp_path / "disk", MIB, **options)
    layer = Qcow2(File(str(path)))
    with open_stack(layer) as disk:
        if not options:
            (write if before == "compressed" else Reference.write)(disk, 0, text(1, 4 * CLUSTER))
        if before.startswith("zeroes"):
            disk.zero(0, 4 * CLUSTER)
        if before.startswith("a snapshot"):
            layer.create_snapshot("before")
        was = run_at(layer, CLUSTER)
        write(disk, CLUSTER, text(2))
        assert run_at(layer, CLUSTER).kind is Kind.COMPRESSED
        if was.place is not None:
            assert layer.writer.refcounts.get(was.place // CLUSTER) == (2 if "snapshot" in before else 1)
        disk.flush()
        if was.place is not None:
            assert layer.writer.refcounts.get(was.place // CLUSTER) == (1 if "snapshot" in before else 0)
    qemu_check(path)
    assert content(path)[CLUSTER : 2 * CLUSTER] == text(2)
    if "snapshot" in before:
        run("qemu-img", "snapshot", "-a", "before", path)
        assert content(path)[: 4 * CLUSTER] == text(1, 4 * CLUSTER)


# -- failures and races -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_what_fails_leaves_nothing_behind(number: int, tmp_path: Path) -> None:
    """Growing the file, or writing the data or the new L2 table."""
    file, layer = open_recorded(new(MIB, tmp_path))
    with open_stack(layer) as disk:
        file.before = Fails(number, errno.ENOSPC)
        with pytest.raises(RequestError, match="as told"):
            write(disk, 0, text(1))
        file.before = lambda _: None
        assert disk.read(0, CLUSTER) == bytes(CLUSTER)
        disk.write(CLUSTER, noise())  # to a cluster that is free again, which compressed data has begun to fill
        write(disk, 0, text(2))
        layer.reader._decompressed.clear()
        assert disk.read(0, 2 * CLUSTER) == text(2) + noise()
    assert not check(file.data).errors and not check(file.data).leaks


def _stopped(file: RecordedFile, name: str) -> tuple[threading.Event, threading.Event]:
    """(reached, go): the next operation of that name waits for ``go``."""
    reached, go = threading.Event(), threading.Event()

    def before(operation: Operation) -> None:
        if operation.name == name and not reached.is_set():
            reached.set()
            assert go.wait(10), "never let go"

    file.before = before
    return reached, go


def test_nothing_is_put_beside_what_is_about_to_be_discarded(tmp_path: Path) -> None:
    """The last compressed cluster in a cluster of the file has gone, durably. While that is discarded, another comes:
    there would be room for it just there."""
    file, layer = open_recorded(new(MIB, tmp_path))
    with open_stack(layer) as disk:
        write(disk, 0, text(1))
        disk.flush()
        disk.trim(0, CLUSTER)
        reached, go = _stopped(file, "discard")
        flush = Thread(disk.flush)
        assert reached.wait(10)
        write(disk, CLUSTER, text(2))
        go.set()
        flush.done()
        layer.reader._decompressed.clear()
        assert disk.read(CLUSTER, CLUSTER) == text(2)
    assert bytes([GARBAGE]) * 16 in file.data, "nothing was discarded"
    assert not check(file.data).errors and not check(file.data).leaks


def test_what_is_being_written_keeps_its_neighbours_cluster(tmp_path: Path) -> None:
    """The first one goes, and all of that is flushed, while the one beside it is written and not linked yet."""
    file, layer = open_recorded(new(MIB, tmp_path))
    with open_stack(layer) as disk:
        write(disk, 0, text(1))
        disk.flush()
        reached, go = _stopped(file, "write")
        slow = Thread(lambda: write(disk, CLUSTER, text(2)))
        assert reached.wait(10)
        disk.trim(0, CLUSTER)
        disk.flush()
        disk.write(4 * CLUSTER, noise(8 * CLUSTER))  # would take what is free
        go.set()
        slow.done()
        disk.flush()
        layer.reader._decompressed.clear()
        assert disk.read(CLUSTER, CLUSTER) == text(2)
        assert disk.read(4 * CLUSTER, 8 * CLUSTER) == noise(8 * CLUSTER)
    assert not check(file.data).errors and not check(file.data).leaks


def test_many_threads_pack_into_the_same_clusters(tmp_path: Path) -> None:
    file, layer = open_recorded(new(4 * MIB, tmp_path, cluster_size=4096))
    with open_stack(layer) as disk:

        def work(thread: int) -> None:
            for turn in range(3):
                for cluster in range(thread, 1024, 4):
                    if cluster % 16 < 8 or turn:
                        write(disk, cluster * 4096, text(cluster * 10 + turn, 4096))
                disk.flush()

        threads = [Thread(lambda thread=thread: work(thread)) for thread in range(4)]  # type: ignore[misc]
        for thread in threads:
            thread.join(60)
            thread.done()
        layer.reader._decompressed.clear()
        for cluster in range(1024):
            assert disk.read(cluster * 4096, 4096) == text(cluster * 10 + 2, 4096)
    assert not check(file.data).errors and not check(file.data).leaks


# -- the compressor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [0, 1])
@pytest.mark.parametrize("bits", [9, 16, 21])
def test_nothing_as_long_as_a_cluster_comes_out_of_it(bits: int, compression: int) -> None:
    size = 1 << bits
    pick = random.Random(SEED)
    for share in (0, 0.1, 0.5, 0.9, 0.97, 0.98, 0.985, 0.99, 0.995, 1):
        plain = pick.randbytes(int(size * share)).ljust(size, b"z")
        data = compress(plain, compression)
        assert data is None or (len(data) < size and decompress(data, compression, size) == plain)
    assert compress(pick.randbytes(size), compression) is None
