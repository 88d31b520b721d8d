"""The layer ``compress``."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from layers.compress import Compress
from layers.copy_on_read import CopyOnRead
from layers.detect_zeroes import DetectZeroes
from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.qcow2.clusters import Kind
from layers.raw import Raw
from layers.throttle import Throttle
from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import CODE, Intent
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Graph, execute, flatten
from nbdserver.layer import Layer
from nbdserver.reference import open_stack
from nbdserver.request import Flag, Operation, Request, Vector
from nbdserver.testing import NbdServers
from tests.layers.flag_kit import Compressing
from tests.layers.qcow2_kit import Thread
from tests.oracle.model import Model
from tests.oracle.storm import Storm, Weather
from tests.registered import open_registered, registered
from tests.serving import FULL, SEED, amount, backend, check, content, create, qemu_io, run, run_json

__all__ = ["backend"]

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB


def kinds(layer: Qcow2) -> list[Kind]:
    """What the clusters of the disk are."""
    return [next(layer.reader.spans(at, 1))[0].kind for at in range(0, layer.size, layer.cluster_size)]


def compressed(path: Path) -> int:
    """How many clusters are, as QEMU counts them."""
    return int(run_json("qemu-img", "check", "--output=json", path).get("compressed-clusters", 0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2", 4 * CLUSTER + 512)


def test_whole_clusters_are_passed_on_from_the_same_memory(path: Path) -> None:
    spy = Compressing(Qcow2(File(str(path))))
    with open_registered(Compress(spy)) as disk:
        disk.execute(Request.write(CLUSTER, registered(2 * CLUSTER)))
        disk.execute(Request.write(4 * CLUSTER, registered(512)))  # the last one, as far as it goes
        flags = Flag.WRITE_COMPRESSED | Flag.REGISTERED_BUF
        assert spy.take() == [
            (Operation.WRITE, CLUSTER, 2 * CLUSTER, flags),
            (Operation.WRITE, 4 * CLUSTER, 512, flags),
        ]


def test_parts_of_clusters_are_read_and_written_whole(path: Path) -> None:
    spy = Compressing(layer := Qcow2(File(str(path))))
    with open_registered(Compress(spy)) as disk:
        disk.write(0, b"a" * (4 * CLUSTER + 512))
        spy.take()
        disk.execute(Request.write(CLUSTER - 100, registered(b"b" * 200)))
        read, write = (Operation.READ, Operation.WRITE)
        flags = Flag.WRITE_COMPRESSED | Flag.REGISTERED_BUF
        assert spy.take() == [
            (read, 0, CLUSTER, Flag.REGISTERED_BUF),
            (read, CLUSTER, CLUSTER, Flag.REGISTERED_BUF),
            (write, 0, 2 * CLUSTER, flags),
        ]
        disk.write(4 * CLUSTER + 7, b"c")
        assert [seen[:3] for seen in spy.take()] == [(read, 4 * CLUSTER, 512), (write, 4 * CLUSTER, 512)]
        assert set(kinds(layer)) == {Kind.COMPRESSED}
        model = bytearray(b"a" * (4 * CLUSTER + 512))
        model[CLUSTER - 100 : CLUSTER + 100], model[4 * CLUSTER + 7] = b"b" * 200, ord("c")
        assert disk.read(0, disk.size) == model
    check(path)
    assert content(path) == model


def test_what_is_zeroed_in_part_stays_compressed(path: Path) -> None:
    with open_stack(Compress(layer := Qcow2(File(str(path))))) as disk:
        disk.write(0, b"a" * 4 * CLUSTER)
        disk.zero(100, 2 * CLUSTER)
        disk.trim(3 * CLUSTER - 1, CLUSTER + 1)
        assert kinds(layer)[:4] == [Kind.COMPRESSED, Kind.ZERO, Kind.COMPRESSED, Kind.ZERO]
        zeroed = b"a" * 100 + bytes(2 * CLUSTER) + b"a" * (CLUSTER - 100)
        assert disk.read(0, disk.size) == zeroed + bytes(CLUSTER + 512)


def test_only_reads_are_mapped(path: Path) -> None:
    qemu_io(path, f"write 0 {CLUSTER}")
    with open_stack(Compress(Qcow2(File(str(path))))) as disk:
        assert next(flatten(disk.root, 0, CLUSTER, Intent.READ)).target is not CODE
        for intent in (Intent.WRITE, Intent.ZERO):
            assert [leaf.target for leaf in flatten(disk.root, 0, disk.size, intent)] == [CODE]


def test_two_writers_of_one_cluster_lose_nothing(path: Path) -> None:
    with open_stack(Compress(Qcow2(File(str(path))))) as disk:

        def work(number: int) -> None:
            for at in range(number, 256, 4):
                disk.write(at * 256, bytes([at]) * 256)

        threads = [Thread(lambda number=number: work(number)) for number in range(4)]  # type: ignore[misc]
        for thread in threads:
            thread.join(60)
            thread.done()
        assert disk.read(0, CLUSTER) == b"".join(bytes([at]) * 256 for at in range(256))


def test_reading_through_it_writes_nothing(path: Path) -> None:
    before = path.read_bytes()
    with open_stack(Compress(Qcow2(File(str(path)))), read_only=True) as disk:
        assert disk.read(5, 1000) == bytes(1000)
        with pytest.raises(RequestError):
            disk.write(0, b"x")
    assert path.read_bytes() == before


def test_it_compresses_through_filters_that_let_it(path: Path) -> None:
    layer = Qcow2(File(str(path)))
    with open_stack(Compress(Throttle(DetectZeroes(layer), bps_total=1 << 40))) as disk:
        assert disk.root.limits.request_alignment == CLUSTER
        disk.write(10, b"a" * 3 * CLUSTER)
        disk.write(2 * CLUSTER, bytes(CLUSTER))
        assert kinds(layer)[:4] == [Kind.COMPRESSED, Kind.COMPRESSED, Kind.ZERO, Kind.COMPRESSED]
        assert disk.read(0, 4 * CLUSTER) == (
            bytes(10) + b"a" * (2 * CLUSTER - 10) + bytes(CLUSTER) + b"a" * 10 + bytes(CLUSTER - 10)
        )


def test_it_compresses_through_a_copy_on_read(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * MIB)
    layer = Qcow2(File(str(create(tmp_path / "disk", MIB, backing=tmp_path / "base", backing_format="raw"))))
    with open_stack(Compress(CopyOnRead(layer))) as disk:
        disk.write(CLUSTER + 1, b"a" * 10)
        disk.write(2 * CLUSTER, b"a" * CLUSTER)
        assert kinds(layer)[1:3] == [Kind.COMPRESSED] * 2
        assert disk.read(CLUSTER, 2 * CLUSTER) == b"b" + b"a" * 10 + b"b" * (CLUSTER - 11) + b"a" * CLUSTER


@pytest.mark.parametrize(
    ("below", "told"),
    [
        (Memory(MIB), "'memory'"),
        (Raw(Memory(MIB)), "'raw'"),
        (Throttle(Memory(MIB)), "'memory'"),
    ],
)
def test_what_cannot_compress_is_refused(below: Layer, told: str) -> None:
    with (
        pytest.raises(ConfigError, match=f"file: layers of the type {told} cannot compress"),
        open_stack(Compress(below)),
    ):
        pass


def test_an_image_that_can_have_nothing_compressed_is_refused(tmp_path: Path) -> None:
    """QEMU tells who writes."""
    path = create(tmp_path / "disk", MIB, data_file="beside")
    refused = pytest.raises(ConfigError, match=r"file: .*/disk: nothing is compressed in an external data file")
    with refused, open_stack(Compress(Qcow2(File(str(path))))):
        pass
    with open_stack(Compress(Qcow2(File(str(path)))), read_only=True) as disk:
        assert disk.read(0, 10) == bytes(10)


def test_nobody_else_may_write_what_it_reads_and_writes_back(path: Path) -> None:
    below = Qcow2(File(str(path)))
    with open_stack(Compress(below)) as disk:
        graph = disk.root._listener
        assert isinstance(graph, Graph)
        opener = FileOpener(graph, Files())
        with pytest.raises(ConfigError, match=r"other writes .*, which .* does not allow"):
            graph.open(below, opener, user="other")


def test_a_layer_that_does_not_have_the_flag_says_so(path: Path) -> None:
    with (
        open_stack(Throttle(Raw(File(str(path))))) as disk,
        pytest.raises(RequestError, match="raw does not") as refused,
    ):
        execute(disk.root, Request.write(0, Vector.of(512), Flag.WRITE_COMPRESSED))
    assert refused.value.errno == errno.ENOTSUP


# -- served -----------------------------------------------------------------------------------------------------------

STORMS: dict[str, dict[str, Any]] = {
    "64k": {},
    "4k, zstd": {"cluster_size": 4096, "compression_type": "zstd"},
    "subclusters": {"extended_l2": "on"},
    "refcounts of 2 bits": {"cluster_size": 4096, "refcount_bits": 2},
}


@pytest.mark.parametrize("name", STORMS if FULL else ("64k", "4k, zstd"))
def test_storm(nbd_server: NbdServers, tmp_path: Path, backend: str, name: str) -> None:
    """Four connections, requests that overlap; over a snapshot. What QEMU reads then is what the model holds."""
    path = create(tmp_path / "disk.qcow2", 8 * MIB, **STORMS[name])
    qemu_io(path, "write -P 1 0 1M", "write -c -P 2 1M 64k")
    if "refcount_bits" not in STORMS[name]:
        run("qemu-img", "snapshot", "-c", "before", path)
    model = Model(8 * MIB, initial=content(path))
    (tmp_path / "exports.toml").write_text(
        f'[exports.""]\nlayers = [{{type = "compress"}}, {{type = "qcow2"}}, {{type = "file", path = "{path}"}}]\n'
    )
    with (
        nbd_server.process(tmp_path / "exports.toml", "--backend", backend) as server,
        Storm(server.uri(), model, seed=SEED, weather=Weather(length_max=200 * KIB)) as storm,
    ):
        storm.run(seconds=amount(1, 20))
        final = storm.verify()
    check(path)
    run("qemu-img", "convert", "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == final
    assert compressed(path) > 10
