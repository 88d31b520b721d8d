"""Reading qcow2: images that qemu-img made say what qemu-img says, in content and in allocation."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from nbdserver.errors import RequestError
from nbdserver.extent import CODE, ZERO, Extent, Intent
from nbdserver.graph import Graph
from nbdserver.layer import STATE_HOLE, STATE_ZERO
from nbdserver.reference import Reference, open_stack
from tests.serving import SEED, amount, content, create, qemu_io, run, run_json

KIB, MIB = 1 << 10, 1 << 20

#: (cluster size, disk size): not a multiple of the cluster, and several L2 tables where that is small.
SIZES = [(512, 1 * MIB + 512), (4096, 3 * MIB + 1024), (65536, 5 * MIB + 512), (2 * MIB, 11 * MIB + 512)]

FORMATS: list[dict[str, object]] = [
    {},
    {"compat": "0.10"},
    {"compression_type": "zstd"},
    {"refcount_bits": 1},
    {"refcount_bits": 64},
    {"preallocation": "metadata"},
    {"extended_l2": "on"},
    {"extended_l2": "on", "preallocation": "metadata"},
    {"data_file": "beside"},
    {"data_file": "beside", "extended_l2": "on"},
    {"data_file": "beside", "data_file_raw": "on"},
]


def _patch(path: Path, size: int, cluster: int, tag: str, *, zero: bool = True, compress: bool = True) -> None:
    """Writes of data, zeroes and compressed data, discards, all over the image."""
    pick = random.Random(f"{SEED} {tag}")
    clusters = pick.sample(range(size // cluster), min(20, size // cluster)) if compress else []
    commands = [f"write -c -P {pick.randrange(1, 256)} {at * cluster} {cluster}" for at in clusters]
    for _ in range(20):
        kind = pick.choice(["write -P"] * 3 + ["discard"] + ["write -z", "write -z -u"] * zero)
        if kind == "discard":
            offset = pick.randrange(size // cluster) * cluster
            length = min(pick.randint(1, 9) * cluster, size - offset)
        else:
            offset = pick.randrange(size // 512) * 512
            length = min(pick.randint(1, 10 * cluster // 512) * 512, size - offset)
        pattern = f" {pick.randrange(1, 256)}" if kind.endswith("-P") else ""
        commands.append(f"{kind}{pattern} {offset} {length}")
    qemu_io(path, *commands)


def _qemu_map(path: Path) -> list[tuple[int, int]]:
    """(length, flags) as qemu-nbd would report base:allocation, from qemu-img map."""
    runs: list[tuple[int, int]] = []
    for entry in run_json("qemu-img", "map", "--output=json", path):
        flags = (0 if entry["data"] else STATE_HOLE) | (STATE_ZERO if entry["zero"] else 0)
        length = entry["length"] + (runs.pop()[0] if runs and runs[-1][1] == flags else 0)
        runs.append((length, flags))
    return runs


def _agrees(disk: Reference, path: Path) -> None:
    assert disk.read(0, disk.size) == content(path)
    assert disk.status(0, disk.size) == _qemu_map(path)


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: " ".join(map(str, options.values())) or "default")
@pytest.mark.parametrize(("cluster", "size"), SIZES)
def test_images_read_as_qemu_reads_them(cluster: int, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    if "extended_l2" in options:
        cluster = max(cluster, 16 * KIB)
    path = create(tmp_path / "image", size, cluster_size=cluster, **options)
    _patch(
        path,
        size,
        cluster,
        f"{cluster} {options}",
        zero="compat" not in options,
        compress=options.keys().isdisjoint({"preallocation", "data_file"}),
    )
    with open_stack(Qcow2(File(str(path))), read_only=True) as disk:
        assert disk.size == size
        _agrees(disk, path)
        pick = random.Random(SEED)
        whole = disk.read(0, size)
        for _ in range(50):
            offset = pick.randrange(size)
            length = pick.randint(1, min(3 * cluster, size - offset))
            assert disk.read(offset, length) == whole[offset : offset + length]


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_preallocated_images(preallocation: str, tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, preallocation=preallocation)
    qemu_io(path, "write -P 7 100k 50k", "write -z 500k 100k")
    with open_stack(Qcow2(File(str(path))), read_only=True) as disk:
        _agrees(disk, path)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize(("cluster", "size"), SIZES)
def test_converted_and_compressed(cluster: int, size: int, compression: str, tmp_path: Path) -> None:
    pick = random.Random(SEED)
    raw, path = tmp_path / "raw", tmp_path / "image"
    with raw.open("wb") as file:
        while file.tell() < size:
            file.write(pick.choice((pick.randbytes(7) * 9000, pick.randbytes(30000), bytes(70000))))
        file.truncate(size)
    options = f"cluster_size={cluster},compression_type={compression}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    with open_stack(Qcow2(File(str(path))), read_only=True) as disk:
        _agrees(disk, path)
        assert disk.read(0, size) == raw.read_bytes()


def _chain(directory: Path) -> list[Path]:
    """Four deep on a raw file: cluster sizes, disk sizes, versions and formats differ."""
    raw = directory / "base.raw"
    pick = random.Random(SEED)
    raw.write_bytes(pick.randbytes(200 * KIB) + bytes(300 * KIB) + pick.randbytes(100 * KIB + 700))
    with raw.open("r+b") as file:
        file.truncate(700 * KIB + 300)
    chain = [raw]
    for number, (cluster, size) in enumerate([(4096, 1 * MIB), (512, 400 * KIB), (2 * MIB, 3 * MIB), (65536, 2 * MIB)]):
        options = {"compat": "0.10"} if number == 1 else {}
        format = "raw" if number == 0 else "qcow2"
        path = directory / f"{number}.qcow2"
        create(path, size, backing=chain[-1], backing_format=format, cluster_size=cluster, **options)
        if number != 2:
            _patch(path, size, min(cluster, 65536), str(number), zero=number != 1, compress=cluster <= 65536)
        chain.append(path)
    return chain


def test_a_chain_of_differing_images(tmp_path: Path) -> None:
    for path in _chain(tmp_path)[1:]:
        with open_stack(Qcow2(File(str(path))), read_only=True) as disk:
            _agrees(disk, path)


def test_a_given_backing_overrides_the_named_one(tmp_path: Path) -> None:
    (tmp_path / "named").write_bytes(b"n" * MIB)
    (tmp_path / "given").write_bytes(b"g" * 100 * KIB)
    path = create(tmp_path / "image", MIB, backing=tmp_path / "named", backing_format="raw")
    with open_stack(Qcow2(File(str(path)), backing=File(str(tmp_path / "given"))), read_only=True) as disk:
        assert disk.read(0, MIB) == b"g" * 100 * KIB + bytes(MIB - 100 * KIB)


def test_no_backing_at_all_if_so_wished(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, backing_format="raw")
    (tmp_path / "gone").touch()
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", "gone", path)
    (tmp_path / "gone").unlink()
    with open_stack(Qcow2(File(str(path)), backing=False), read_only=True) as disk:
        assert disk.read(0, MIB) == bytes(MIB)


def test_a_backing_file_of_unnamed_format_is_probed(tmp_path: Path) -> None:
    base = create(tmp_path / "base", MIB)
    qemu_io(base, "write -P 5 0 1M")
    path = create(tmp_path / "image", MIB, backing=base)
    data = path.read_bytes()
    extension = data.index(bytes.fromhex("e2792aca00000005"))
    path.write_bytes(data[:extension] + struct.pack(">I", 0x12345678) + data[extension + 4 :])
    with open_stack(Qcow2(File(str(path))), read_only=True) as disk:
        assert disk.read(0, MIB) == b"\5" * MIB


# -- extents --------------------------------------------------------------------------------------------------------


def _opened(path: Path, **options: Any) -> Qcow2:
    return Qcow2(File(str(path)), **options)


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The extents, those joined that continue one another: more than was asked for comes in pieces."""
    found: list[Extent] = []
    for extent in extents:
        last = found.pop() if found else Extent(0, extent.target, extent.offset, extent.writable)
        continues = extent.target in (ZERO, CODE) or last.offset + last.length == extent.offset
        if continues and last._replace(length=0, offset=0) == extent._replace(length=0, offset=0):
            extent = last._replace(length=last.length + extent.length)
        else:
            found.append(last)
        found.append(extent)
    return found


def test_contiguous_clusters_are_told_to_the_end_of_the_table(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 8 * MIB, cluster_size=4096)  # an L2 table maps 2 MiB
    qemu_io(path, "write -P 1 0 1M", "write -z 1M 512k", "write -c -P 2 1536k 4k")
    layer = _opened(path)
    with open_stack(layer, read_only=True):
        extents = merged(layer.resolve(4096, 4096, Intent.READ))
    assert [(e.length, e.target) for e in extents] == [
        (1 * MIB - 4096, layer.file), (512 * KIB, ZERO), (4096, CODE), (508 * KIB, ZERO),
    ]  # fmt: skip


def test_absent_tables_are_not_searched_beyond_what_is_asked(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 8 * MIB, cluster_size=4096)
    layer = _opened(path)
    with open_stack(layer, read_only=True):
        assert merged(layer.resolve(4096, 3 * MIB, Intent.READ)) == [Extent(4 * MIB - 4096, ZERO)]


def test_unallocated_is_the_backing_file_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * (100 * KIB + 5))
    path = create(tmp_path / "image", MIB, backing=tmp_path / "base", backing_format="raw")
    layer = _opened(path)
    with open_stack(layer, read_only=True):
        extents = merged(layer.resolve(4096, 1, Intent.READ))
        assert layer.backing
        assert extents == [Extent(96 * KIB + 5, layer.backing, 4096), Extent(MIB - 100 * KIB - 5, ZERO)]
        assert merged(layer.resolve(100 * KIB + 5, 1, Intent.READ)) == [Extent(MIB - 100 * KIB - 5, ZERO)]


def test_intents_on_a_writable_image(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=4096)
    qemu_io(path, "write -P 1 0 16k", "write -c -P 2 16k 4k", "write -z 20k 4k")
    run("qemu-img", "snapshot", "-c", "s", path)
    qemu_io(path, "write -P 3 0 8k")
    layer = _opened(path)
    with open_stack(layer):
        file = layer.file

        def kinds(offset: int, length: int, intent: Intent) -> list[tuple[int, object, bool]]:
            runs: list[tuple[int, object, bool]] = []
            left = length
            for extent in layer.resolve(offset, length, intent):
                runs.append((min(extent.length, left), extent.target, extent.writable))
                left -= runs[-1][0]
                if left == 0:
                    break
            return runs

        assert kinds(0, 32 * KIB, Intent.READ) == [
            (8192, file, True), (8192, file, False), (4096, CODE, False), (12288, ZERO, False),
        ]  # fmt: skip
        assert kinds(0, 32 * KIB, Intent.WRITE) == [(8192, file, True), (24576, CODE, False)]
        # Zeroing: parts of clusters in place, whole ones by their L2 entry, nothing for what is zero.
        assert kinds(100, 8000, Intent.ZERO) == [(8000, file, True)]
        assert kinds(100, 8092, Intent.ZERO) == [(3996, file, True), (4096, CODE, False)]
        assert kinds(0, 32 * KIB, Intent.ZERO) == [(20480, CODE, False), (12288, ZERO, False)]


def test_nothing_is_writable_in_a_read_only_image(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    qemu_io(path, "write -P 1 0 1M")
    layer = _opened(path)
    with open_stack(layer, read_only=True) as disk:
        assert not any(extent.writable for extent in layer.resolve(0, MIB, Intent.READ))
        assert {extent.target for extent in layer.resolve(0, MIB, Intent.WRITE)} == {CODE}
        with pytest.raises(RequestError):
            disk.write(0, b"x")


def test_changes_of_the_backing_file_pass_through(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    memory = Memory(100 * KIB)
    layer = _opened(path, backing=memory)
    graph = Graph()
    seen: list[tuple[int, int]] = []
    with open_stack(layer, graph=graph):
        graph.subscribe(layer, lambda offset, length: seen.append((offset, length)))
        memory.changed(4096, 512)
    assert seen == [(4096, 512)]


def test_an_empty_disk(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 0)
    with open_stack(Qcow2(File(str(path)))) as disk:
        assert disk.size == 0 and disk.status(0, 0) == []


def test_tables_come_and_go_in_a_small_cache(tmp_path: Path) -> None:
    size = 2 * MIB
    path = create(tmp_path / "image", size, cluster_size=512)
    _patch(path, size, 512, "cache")
    expected = content(path)
    with open_stack(_opened(path, l2_cache_size=0), read_only=True) as disk:

        def reads(seed: int) -> None:
            pick = random.Random(seed)
            for _ in range(amount(200, 5000)):
                offset = pick.randrange(size)
                length = pick.randint(1, min(100 * KIB, size - offset))
                if disk.read(offset, length) != expected[offset : offset + length]:
                    wrong.append((offset, length))

        wrong: list[tuple[int, int]] = []
        threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_the_last_cluster_of_the_file_may_be_cut_off(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    qemu_io(path, "write -P 1 0 64k")
    os.truncate(path, path.stat().st_size - 60 * KIB)
    with open_stack(Qcow2(File(str(path))), read_only=True) as disk:
        assert disk.read(0, 64 * KIB) == b"\1" * 4 * KIB + bytes(60 * KIB) == content(path)[: 64 * KIB]
