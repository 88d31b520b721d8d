"""Packed tables in the engine's cache: as coherent as any extent."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest

from layers.qcow2 import Qcow2
from nbdserver import _engine
from nbdserver.extent import Packed
from nbdserver.limits import KIB, MIB
from nbdserver.request import Request
from nbdserver.testing import NbdServers
from tests.coherence.test_room import Stage
from tests.serving import SEED, create, run

CLUSTER = 4 * KIB  # an L2 table maps 2 MiB
CLUSTERS = 2 * MIB // CLUSTER


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A disk of one table, every cluster apart from those beside it."""
    path = create(tmp_path_factory.mktemp("image") / "disk.qcow2", 2 * MIB, cluster_size=CLUSTER)
    order = random.Random(SEED).sample(range(CLUSTERS), CLUSTERS)
    commands = [f"write -q -P {1 + cluster % 251} {cluster * CLUSTER} {CLUSTER}" for cluster in order]
    run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    return path.read_bytes()


@pytest.fixture
def stage(nbd_server: NbdServers, tmp_path: Path, image: bytes) -> Stage:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    return Stage(nbd_server, path)


def content(cluster: int) -> bytes:
    return bytes([1 + cluster % 251]) * CLUSTER


def test_one_fault_brings_the_whole_table(stage: Stage) -> None:
    assert stage.read(0, CLUSTER) == content(0)
    assert stage.calls() == 1
    for cluster in range(CLUSTERS):
        assert stage.read(cluster * CLUSTER, CLUSTER) == content(cluster)
    assert stage.read(0, 2 * MIB) == b"".join(content(cluster) for cluster in range(CLUSTERS))
    assert stage.calls() == 1
    counters = stage.server.stats()["exports"][""]
    assert counters["packed"] == CLUSTERS and counters["extents"] == 1


def test_what_changes_is_dropped(stage: Stage) -> None:
    assert stage.read(0, CLUSTER) == content(0)
    stage.disk.create_snapshot("s")  # so that a write moves the cluster
    stage.write(5 * CLUSTER, b"new" * 100)
    assert stage.read(5 * CLUSTER, CLUSTER) == b"new" * 100 + content(5)[300:]
    assert stage.read(4 * CLUSTER, CLUSTER) == content(4)
    assert stage.read(6 * CLUSTER, CLUSTER) == content(6)


def test_what_has_changed_before_it_is_entered_is_left_out(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Qcow2.packed
    stage.disk.create_snapshot("s")

    def packed(self: Qcow2, offset: int) -> Packed | None:
        found = original(self, offset)
        self.writer.zero(Request.zero(5 * CLUSTER, CLUSTER))
        return found

    monkeypatch.setattr(Qcow2, "packed", packed)
    assert stage.read(0, CLUSTER) == content(0)
    assert stage.read(5 * CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert stage.read(6 * CLUSTER, CLUSTER) == content(6)


def test_it_is_not_written_by(stage: Stage) -> None:
    assert stage.read(0, CLUSTER) == content(0)
    stage.write(7 * CLUSTER, b"x" * CLUSTER)  # asks first
    assert stage.calls() > 1
    assert stage.read(7 * CLUSTER, CLUSTER) == b"x" * CLUSTER
    assert stage.read(8 * CLUSTER, CLUSTER) == content(8)


def test_a_unit_that_is_none_is_refused(stage: Stage) -> None:
    export = stage.server._exports[""].engine_export
    file = stage.disk.file.layer.open_file  # type: ignore[attr-defined]
    assert isinstance(file, _engine.File)
    for unit in (0, 1, 2, 3, 4097):
        with pytest.raises(ValueError, match="unit"):
            export.fill_table(0, 0, array("Q", [0]), file=file, unit=unit, places=0, refused=0, zeroes=(), limit=0)
