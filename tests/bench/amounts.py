"""What is measured by itself, in bytes and seconds: memory, and the time that opening many exports takes."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.clients import Copy, Fio
from tests.bench.idle import idle_connections
from tests.bench.images import MIB, Images
from tests.bench.servers import SERVERS, Disk, Running, running

IDLE_COUNT = 1000
#: The disk whose clusters each lie apart from their neighbours, and their size: each is an extent of its own.
APART_SIZE, APART_CLUSTER = 256 * MIB, 4 << 10
EXPORTS = (1, 100, 1000)


@dataclass(frozen=True)
class Amount:
    """One figure; ``maximum`` in the same unit, None where nothing is asked."""

    name: str
    value: float
    unit: str
    maximum: float | None = None

    def is_met(self) -> bool:
        return self.maximum is None or self.value <= self.maximum


def amounts(images: Images, directory: Path, rounds: int) -> list[tuple[str, Callable[[], list[Amount]]]]:
    """Names, and what measures each."""
    return [
        ("memory", lambda: [_one_client(images, directory), _idle(images, directory)]),
        ("memory-of-clusters", lambda: [_clusters(images, directory)]),
        ("exports", lambda: [_opening(images, directory, count, rounds) for count in EXPORTS]),
    ]


def _one_client(images: Images, directory: Path) -> Amount:
    """One export that one client has read and written, 4k and 256k at a time."""
    disk = Disk(images.raw(), read_only=False)
    with running(SERVERS[0], disk, directory / "memory") as server:
        for pattern in ("randread", "randwrite"):
            work = Fio(pattern, 4096, 16, images.size, 1, 0.3)
            work.run(server.uri, directory)
            replace(work, block=256 << 10).run(server.uri, directory)
        with idle_connections(disk, server.address, 1):
            return Amount("one export, one client: resident beside the pool", server.resident() / MIB, "MiB", 60)


def _idle(images: Images, directory: Path) -> Amount:
    disk = Disk(images.raw())
    with running(SERVERS[0], disk, directory / "memory") as server, idle_connections(disk, server.address, 1):
        before = server.resident()
        with idle_connections(disk, server.address, IDLE_COUNT):
            return Amount("an idle connection", (server.resident() - before) / IDLE_COUNT / 1024, "KiB", 50)


def _clusters(images: Images, directory: Path) -> Amount:
    disk = Disk(images.fragmented(APART_SIZE, APART_CLUSTER, apart=True), "qcow2")
    with running(SERVERS[0], disk, directory / "memory") as server:
        Fio("randread", 4096, 1, APART_CLUSTER, 1, amount=APART_CLUSTER).run(server.uri, directory)
        before = server.resident()
        Copy("nbdcopy", APART_SIZE).run(server.uri, directory)
        count = APART_SIZE // APART_CLUSTER
        return Amount("a mapped cluster apart from its neighbours", (server.resident() - before) / count, "bytes")


def _opening(images: Images, directory: Path, count: int, rounds: int) -> Amount:
    """From the start of the process until it takes connections; each export a qcow2 image of its own."""
    place = directory / f"exports-{count}"
    place.mkdir(exist_ok=True)
    template = images.empty("template", 64 * MIB)
    lines = []
    for number in range(count):
        path = place / f"{number}.qcow2"
        shutil.copy(template, path)
        lines.append(f'[exports."{number}"]\nimage = "{path}"\nformat = "qcow2"\n')
    configuration = place / "exports.toml"
    configuration.write_text("\n".join(lines))
    name = f"opening {count} export{'s' if count > 1 else ''}"
    return Amount(name, statistics.median(_started(configuration, directory) for _ in range(rounds)), "s", 5)


def _started(configuration: Path, directory: Path) -> float:
    server: Running
    with running(SERVERS[0], Disk(configuration, "toml"), directory / "memory") as server:
        return server.opening
