"""throttle: requests are held to the limits, on the fast path and through Python alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from layers.file import File
from layers.throttle import Throttle
from nbdserver.errors import ConfigError
from nbdserver.extent import CODE, Extent, Intent
from nbdserver.layer import Layer, finish
from nbdserver.reference import open_stack
from nbdserver.request import Request
from nbdserver.testing import NbdServers
from tests.serving import backend

__all__ = ["backend"]

KIB, MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(eq=False)
class Code(Layer):
    """Its child, through Python."""

    file: Layer

    @property
    def size(self) -> int:
        return self.file.size

    def resolve(self, offset: int, length: int, intent: Intent) -> tuple[Extent]:
        return (Extent(self.size - offset, CODE),)

    def read(self, request: Request) -> None:
        finish(self.file.read(request))

    def write(self, request: Request) -> None:
        finish(self.file.write(request))


@pytest.fixture
def image(tmp_path: Path) -> File:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"t" * (8 * MIB))
    return File(path=str(path))


def seconds(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def connect(uri: str) -> nbd.NBD:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


@pytest.mark.parametrize("code", [False, True], ids=["mapped", "code"])
def test_bytes_a_second(nbd_server: NbdServers, image: File, backend: str, code: bool) -> None:
    below: Layer = Code(file=image) if code else image
    handle = connect(nbd_server(Throttle(file=below, bps_total=4 * MIB), backend=backend))

    def read_and_write() -> None:
        for index in range(32):  # 4 MiB in all: a second, less the tenth of one that a bucket holds
            handle.pread(64 * KIB, index * 64 * KIB)
            handle.pwrite(b"w" * (64 * KIB), index * 64 * KIB)

    assert 0.6 < seconds(read_and_write) < 3


def test_operations_a_second_in_flight_together_and_in_order(nbd_server: NbdServers, image: File) -> None:
    handle = connect(nbd_server(Throttle(file=image, iops_read=50)))
    handle.pread(1, 0)  # resolved: from now on in order
    order: list[int] = []

    def reads() -> None:
        for number in range(40):
            handle.aio_pread(nbd.Buffer(512), number * 512, completion=lambda _, n=number: order.append(n) or 1)
        while len(order) < 40:
            handle.poll(1000)

    assert 0.5 < seconds(reads) < 3
    assert order == sorted(order)
    assert seconds(lambda: handle.pwrite(b"x" * MIB, 0)) < 0.5, "writes have no limit"


def test_a_burst(nbd_server: NbdServers, image: File) -> None:
    throttle = Throttle(file=image, bps_read=MIB, bps_read_max=16 * MIB)
    handle = connect(nbd_server(throttle))
    assert seconds(lambda: handle.pread(8 * MIB, 0)) < 1
    assert seconds(lambda: handle.pread(8 * MIB, 0)) < 1
    assert seconds(lambda: handle.pread(MIB, 0)) < 2
    assert seconds(lambda: handle.pread(MIB, 0)) > 0.3


def test_a_drained_section_lets_go(nbd_server: NbdServers, image: File) -> None:
    server, uri = nbd_server.start(Throttle(file=image, iops_total=1))
    handle = connect(uri)
    done: list[int] = []
    for _ in range(10):
        handle.aio_pread(nbd.Buffer(512), 0, completion=lambda _: done.append(1) or 1)
    while handle.aio_in_flight() and not handle.aio_get_direction() & nbd.AIO_DIRECTION_READ:
        handle.poll(10)
    handle.poll(200)
    with server._exports[""].drained(timeout=5):
        pass
    while len(done) < 10:
        assert handle.poll(5000) > 0


def test_throttles_add_up(nbd_server: NbdServers, image: File) -> None:
    handle = connect(nbd_server(Throttle(file=Throttle(file=image, iops_total=20), bps_total=64 * MIB)))
    assert seconds(lambda: [handle.pread(512, 0) for _ in range(20)]) > 0.5


def test_the_bytes_are_the_childs(image: File) -> None:
    with open_stack(Throttle(file=image, bps_total=1)) as disk:
        disk.write(1000, b"hello")
        assert disk.read(999, 7) == b"thellot"
        assert disk.status(0, disk.size) == [(disk.size, 0)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bps_total": 1, "bps_read": 1}, "bps_total and bps_read"),
        ({"iops_write_max": 5}, "iops_write_max needs iops_write"),
        ({"bps_read": 10, "bps_read_max": 5}, "bps_read_max: found 5; it must not be lower than bps_read, 10"),
        ({"bps_read": 10, "bps_read_max": 20, "bps_read_max_length": 0}, "at least 1 second"),
        ({"bps_read": 10, "bps_read_max_length": 2}, "needs bps_read_max"),
        ({"iops_total": -1}, "not negative"),
    ],
)
def test_limits_that_make_no_sense(image: File, keys: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words), open_stack(Throttle(file=image, **keys)):
        pass
