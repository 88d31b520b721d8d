"""Random writes, zeroes, trims and reads, overlapping, on four connections, against a model of the disk."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdserver.testing import NbdServers
from tests.oracle.model import Model
from tests.oracle.storm import Storm, Weather
from tests.serving import SEED, amount, check, content, create, qemu_io, run

MIB = 1 << 20

#: Seconds of storm over each disk: the whole minute on the usual one, less on the others.
LONG_S, SHORT_S = amount(5, 60), amount(3, 20)


@dataclass(frozen=True)
class Disk:
    """What the storm goes over. ``grain``: the unit of offsets and lengths, bytes."""

    size: int
    format: str = "qcow2"
    options: tuple[tuple[str, Any], ...] = ()
    backed: bool = False
    grain: int = 512
    length_max: int = 64 << 10
    seconds: int = SHORT_S

    def make(self, directory: Path) -> Path:
        if self.format == "raw":
            path = directory / "disk.raw"
            with path.open("wb") as file:
                file.truncate(self.size)
            return path
        backing = _backing(directory, self.size - MIB // 2) if self.backed else None
        return create(directory / "disk.qcow2", self.size, backing=backing, **dict(self.options))


def _backing(directory: Path, size: int) -> Path:
    """A chain of two, shorter than the disk, with data, zeroes, holes and compressed clusters."""
    raw = directory / "base.raw"
    pick = random.Random(SEED)
    raw.write_bytes(b"".join(pick.randbytes(512) * 64 if pick.random() < 0.6 else bytes(32768) for _ in range(32)))
    base = directory / "base.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=16k", raw, base)
    run("qemu-img", "resize", "-q", base, str(size))
    middle = create(directory / "middle.qcow2", size, backing=base, cluster_size=4096)
    qemu_io(middle, "write -P 7 1M 333k", "write -z 100k 200k", "write -P 9 1500000 1")
    return middle


DISKS = {
    "qcow2": Disk(64 * MIB, seconds=LONG_S),
    "qcow2-512": Disk(4 * MIB, options=(("cluster_size", 512),), length_max=16 << 10),
    "qcow2-4k": Disk(32 * MIB, options=(("cluster_size", 4096),)),
    "qcow2-2M": Disk(64 * MIB, options=(("cluster_size", 2 * MIB),), length_max=MIB),
    "qcow2-v2": Disk(16 * MIB, options=(("compat", "0.10"), ("cluster_size", 4096))),
    "qcow2-refcount-1": Disk(8 * MIB, options=(("refcount_bits", 1), ("cluster_size", 4096))),
    "chain": Disk(8 * MIB, backed=True, options=(("cluster_size", 4096),)),
    "chain-64k": Disk(16 * MIB, backed=True),
    "subclusters": Disk(16 * MIB, backed=True, options=(("extended_l2", "on"), ("cluster_size", 65536))),
    "data-file": Disk(16 * MIB, backed=True, options=(("data_file", "beside"), ("cluster_size", 4096))),
    "unaligned": Disk(2 * MIB, backed=True, grain=16, length_max=6000),
    "raw": Disk(32 * MIB, format="raw"),
}


@pytest.mark.parametrize("name", DISKS)
def test_storm(nbd_server: NbdServers, tmp_path: Path, backend: str, name: str) -> None:
    disk = DISKS[name]
    path = disk.make(tmp_path)
    initial = content(path, format=disk.format)
    model = Model(disk.size, grain=disk.grain, initial=initial)
    with (
        nbd_server.process(path, "--format", disk.format, "--backend", backend) as server,
        Storm(server.uri(), model, seed=SEED, weather=Weather(length_max=disk.length_max)) as storm,
    ):
        storm.run(seconds=disk.seconds)
        final = storm.verify()
        assert sum(storm.done.values()) > 100 * disk.seconds, storm.done
    if disk.format == "qcow2":
        check(path)
    assert content(path, format=disk.format) == final


def test_storm_over_tcp(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    path = DISKS["qcow2"].make(tmp_path)
    model = Model(DISKS["qcow2"].size)
    with (
        nbd_server.process(path, "--format", "qcow2", "--backend", backend, tcp=True) as server,
        Storm(server.uri(), model, seed=SEED, weather=Weather(connections=8, depth=32)) as storm,
    ):
        storm.run(seconds=SHORT_S)
        final = storm.verify()
    check(path)
    assert content(path) == final


def test_snapshots_are_left_alone(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    """Clusters that a snapshot shares are copied on write; the snapshot reads as before."""
    path = _backing(tmp_path, 8 * MIB)
    before = content(path)
    run("qemu-img", "snapshot", "-c", "kept", path)
    model = Model(8 * MIB, initial=before)
    with (
        nbd_server.process(path, "--format", "qcow2", "--backend", backend) as server,
        Storm(server.uri(), model, seed=SEED) as storm,
    ):
        storm.run(seconds=SHORT_S)
        final = storm.verify()
    check(path)
    assert content(path) == final
    copy = shutil.copy(path, tmp_path / "copy.qcow2")
    run("qemu-img", "snapshot", "-a", "kept", copy)
    assert content(Path(copy)) == before
