"""The storm over direct I/O, on a device with sectors of 4096 bytes and on a file system: any offset, any length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.oracle.model import Model
from tests.oracle.storm import Storm, Weather
from tests.serving import SEED, amount, check, create, loop_device, run

KIB, MIB = 1 << 10, 1 << 20
SIZE = 2 * MIB
#: A file that does not end where a block does.
ODD = SIZE - 1234
SECONDS = amount(3, 30)


def uneven(size: int) -> list[int]:
    """Edges of grains of 1 to 512 bytes. Where a sector begins a grain does: of two writes at once that overlap, each
    sector may be the one's or the other's."""
    dice = random.Random(SEED)
    edges = {*range(0, size, 512), size}
    edge = 0
    while (edge := edge + int(8192 ** dice.random())) < size:
        edges.add(edge)
    return sorted(edges)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "device.raw"
    path.write_bytes(random.Random(SEED).randbytes(SIZE))
    with loop_device(path) as name:
        yield Path(name)


def storm(nbd_server: NbdServers, disk: Path, layers: str, backend: str, initial: bytes, directory: Path) -> bytes:
    """Have one over the disk; what it then reads as."""
    model = Model(len(initial), edges=uneven(len(initial)), initial=initial)
    config = directory / "exports.toml"
    stack = f'[{layers}{{ type = "file", path = "{disk}", cache = "none" }}]'
    config.write_text(f'[engine]\npool = "32M"\n[exports.disk]\nlayers = {stack}\ndefault = true\n')
    with (
        nbd_server.process(config, "--backend", backend) as server,
        Storm(server.uri(), model, seed=SEED, weather=Weather(length_max=MIB, depth=8)) as weather,
    ):
        weather.run(seconds=SECONDS)
        final = weather.verify()
        assert sum(weather.done.values()) > 20 * SECONDS, weather.done
        stats = server.stats()
        assert stats["pool"]["free"] == stats["pool"]["size"]
    return final


def test_on_a_device(nbd_server: NbdServers, tmp_path: Path, device: Path, backend: str) -> None:
    final = storm(nbd_server, device, "", backend, device.read_bytes(), tmp_path)
    assert device.read_bytes() == final


def test_on_a_file_that_ends_within_a_block(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(random.Random(SEED).randbytes(ODD))
    final = storm(nbd_server, path, "", backend, path.read_bytes(), tmp_path)
    assert path.read_bytes() == final


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_on_an_image_on_a_device(nbd_server: NbdServers, tmp_path: Path, backend: str, cluster_size: int) -> None:
    """The image's metadata is written in Python, by parts of the blocks that clients write other parts of."""
    path = tmp_path / "device.raw"
    with path.open("wb") as file:
        file.truncate(4 * SIZE)
    with loop_device(path) as name:
        device = create(Path(name), SIZE, cluster_size=cluster_size)
        final = storm(nbd_server, device, '{ type = "qcow2" }, ', backend, bytes(SIZE), tmp_path)
        check(device)
        raw = tmp_path / "content.raw"
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", device, raw)
        assert raw.read_bytes() == final
