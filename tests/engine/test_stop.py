"""Stopping a server in which something has gone wrong: it ends, in time, and what can be closed is."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from layers.file import File
from nbdserver import _engine
from nbdserver.layer import Layer
from nbdserver.request import Request
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.coherence.pages import SOON
from tests.interop.wire import READ, Wire

KIB, MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(eq=False)
class Hanging(Layer):
    """Reads hang until ``go`` is set, as those of a host that does not answer; it notes whether it has been closed."""

    file: Layer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.go, self.reading, self.closed = threading.Event(), threading.Semaphore(0), False

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, request: Request) -> None:
        self.reading.release()
        assert self.go.wait(SOON)
        self.file.read(request)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.raw" for number in range(2)]
    for path in paths:
        path.write_bytes(bytes(MIB))
    return paths


def test_a_layer_that_hangs_does_not_keep_a_server_from_stopping(
    disks: list[Path], tmp_path: Path, backend: str
) -> None:
    server = Server(listen=[f"nbd+unix:///?socket={tmp_path}/socket"], backend=backend, fault_threads=4)
    hanging, other = (Hanging(File(path=str(path))) for path in disks)
    server.export("hanging", hanging, default=True)
    server.export("other", other)
    server.start()
    client = Wire(server.listening[0])
    client.go()
    for cookie in range(8):  # more than there are threads for
        client.request(READ, 0, 512, cookie=cookie)
    assert hanging.reading.acquire(timeout=SOON)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="requests of export 'hanging' have not ended within 1 s"):
        server.stop(timeout=1)
    assert time.monotonic() - begin < SOON / 2
    assert (hanging.closed, other.closed) == (False, True)
    assert client.rest() == b""
    server.wait()
    hanging.go.set()


def test_requests_that_end_in_time_are_answered(disks: list[Path], tmp_path: Path, backend: str) -> None:
    server = Server(listen=[f"nbd+unix:///?socket={tmp_path}/socket"], backend=backend, fault_threads=4)
    hanging = Hanging(File(path=str(disks[0])))
    server.export("", hanging)
    server.start()
    client = Wire(server.listening[0])
    client.go()
    for cookie in range(8):
        client.request(READ, 0, 512, cookie=cookie)
    assert hanging.reading.acquire(timeout=SOON)
    timer = threading.Timer(0.3, hanging.go.set)
    timer.start()
    server.stop(timeout=SOON)
    assert len(client.rest()) == 8 * (16 + 512)
    assert hanging.closed
    timer.join()


def test_a_worker_that_panics_takes_nobody_else_with_it(
    nbd_server: NbdServers, disks: list[Path], backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    server = Server(listen=[str(nbd_server.socket())], backend=backend, workers=2)
    layer = File(path=str(disks[0]), cache="none")
    server.export("", layer)
    server.start()
    uri = server.listening[0]

    def connected() -> Wire:
        client = Wire(uri)
        client.go()
        return client

    def is_served(client: Wire) -> None:
        client.request(READ, 0, 4 * KIB)
        assert client.reply() == (0, 0)
        assert client.receive(4 * KIB) == bytes(4 * KIB)

    clients = [connected() for _ in range(4)]
    for client in clients:
        is_served(client)
    panic = _engine.panic_at("worker.read")
    clients[0].request(READ, 0, 4 * KIB)
    assert panic.wait_reached(SOON)
    # One worker's clients are hung up on; the other's, and all that come now, are served.
    assert clients[0].rest() == b""
    alive = [client for client in clients[1:] if _is_open(client)]
    assert len(alive) == 2
    alive += [connected() for _ in range(6)]
    for client in alive:
        is_served(client)
    assert server.stats()["connections"] == len(server.stats()["clients"]) == 8
    pool = server.stats()["pool"]
    assert pool["free"] == pool["size"]
    with pytest.raises(RuntimeError, match="a worker of the engine has panicked"):
        server.stop()
    assert "a test wants this" in capfd.readouterr().err


def _is_open(client: Wire) -> bool:
    client.socket.settimeout(0.3)
    try:
        return client.socket.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    finally:
        client.socket.settimeout(SOON)


def test_memory_that_the_kernel_still_fills_is_not_given_to_others(
    nbd_server: NbdServers, disks: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker panics while its ring reads: the ring waits for the kernel before it gives the memory back."""
    server = Server(listen=[str(nbd_server.socket())], backend="io_uring", workers=1)
    server.export("", File(path=str(disks[0]), cache="none"))
    server.start()
    client = Wire(server.listening[0])
    client.go()
    client.request(READ, 0, 4 * KIB)
    assert client.reply() == (0, 0)
    panic = _engine.panic_at("ring.completed")
    for cookie in range(16):
        client.request(READ, cookie * 4 * KIB, 4 * KIB, cookie=cookie)
    assert panic.wait_reached(SOON)
    client.rest()
    deadline = time.monotonic() + SOON
    while (pool := server.stats()["pool"])["free"] < pool["size"]:
        assert time.monotonic() < deadline, pool
    with pytest.raises(RuntimeError):
        server.stop()
    capfd.readouterr()
