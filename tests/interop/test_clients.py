"""Clients that leave, fall silent or talk nonsense at every stage: the next client is served as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import nbd
import pytest

from nbdserver.testing import NbdServers, ServerProcess
from tests.interop.wire import DISC, FLUSH, OPT_GO, READ, WRITE, Wire
from tests.serving import SEED, amount, check, content, create

SIZE = 16 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2", SIZE)


@pytest.fixture
def server(nbd_server: NbdServers, disk: Path, backend: str, tcp: bool) -> ServerProcess:
    return nbd_server.process(disk, "--format", "qcow2", "--backend", backend, tcp=tcp)


def is_served(uri: str) -> None:
    """A client that behaves gets its due, within the time limit of `Wire`."""
    wire = Wire(uri)
    wire.go()
    wire.request(WRITE, 4096, 4, cookie=1, data=b"here")
    assert wire.reply() == (1, 0)
    wire.request(READ, 4096, 4, cookie=2)
    assert wire.reply() == (2, 0)
    assert wire.receive(4) == b"here"
    wire.request(DISC)
    wire.close()


#: One thing a client does.
Step = Callable[[Wire], object]


def sends(data: bytes) -> Step:
    return lambda wire: wire.send(data)


def asks(command: int, length: int = 0, data: bytes = b"") -> Step:
    return lambda wire: wire.request(command, 0, length, data=data)


def option_header(length: int) -> bytes:
    """A GO whose payload is so long."""
    return struct.pack(">8sII", b"IHAVEOPT", OPT_GO, length)


def walk(wire: Wire, steps: Iterable[Step]) -> None:
    for step in steps:
        step(wire)


#: How far a client gets before it leaves.
STAGES: dict[str, list[Step]] = {
    "connected": [],
    "within its flags": [sends(b"\0\0")],
    "greeted": [Wire.greet],
    "within an option's header": [Wire.greet, sends(b"IHAVE")],
    "within an option's data": [Wire.greet, sends(option_header(99))],
    "before the option's reply": [Wire.greet, lambda wire: wire.option(OPT_GO, bytes(6))],
    "in transmission": [Wire.go],
    "within a request": [Wire.go, sends(b"\x25\x60\x95\x13\0")],
    "within a payload": [Wire.go, asks(WRITE, 1 << 20, b"x" * 1000)],
    "before a reply": [Wire.go, asks(READ, 1 << 20)],
    "within a reply": [Wire.go, asks(READ, 8 << 20), lambda wire: wire.receive(1000)],
    "with many requests in flight": [Wire.go, *100 * [asks(WRITE, 4096, b"y" * 4096)]],
    "after DISC": [Wire.go, asks(DISC)],
}


@pytest.mark.parametrize("manner", ["close", "reset", "half-close"])
def test_leaving_at_each_stage(server: ServerProcess, manner: str) -> None:
    for stage, steps in STAGES.items():
        wire = Wire(server.uri())
        walk(wire, steps)
        if manner == "reset":
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif manner == "half-close":
            wire.socket.shutdown(socket.SHUT_WR)
            wire.rest()
        wire.close()
        try:
            is_served(server.uri())
        except (OSError, EOFError) as error:
            raise AssertionError(f"a client that left {stage} left the server unusable: {error}") from error


def test_what_was_sent_before_a_half_close_is_answered(server: ServerProcess) -> None:
    wire = Wire(server.uri())
    wire.go()
    for cookie in range(50):
        wire.request(WRITE, cookie * 4096, 4096, cookie=cookie, data=bytes([cookie]) * 4096)
    wire.socket.shutdown(socket.SHUT_WR)
    assert sorted(wire.reply() for _ in range(50)) == [(cookie, 0) for cookie in range(50)]
    assert wire.rest() == b""


GARBAGE: dict[str, list[Step]] = {
    "instead of flags": [sends(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")],
    "unknown client flags": [sends(b"\xff" * 4)],
    "instead of an option": [Wire.greet, sends(b"x" * 64)],
    "an option of 4 GiB": [Wire.greet, sends(option_header(0xFFFFFFFF))],
    "instead of a request": [Wire.go, sends(b"x" * 4096)],
    "a write of 4 GiB": [Wire.go, asks(WRITE, 0xFFFFFFFF)],
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_ends_the_connection_and_nothing_else(server: ServerProcess, what: str) -> None:
    other = nbd.NBD()
    other.connect_uri(server.uri())
    wire = Wire(server.uri())
    # The server may hang up while we are still talking.
    with contextlib.suppress(ConnectionError):
        walk(wire, GARBAGE[what])
        wire.socket.shutdown(socket.SHUT_WR)
    wire.rest()
    wire.close()
    assert bytes(other.pread(1, 0)) == b"\0", "a connection from before goes on"
    is_served(server.uri())


def test_random_garbage_at_every_stage(server: ServerProcess) -> None:
    pick = random.Random(SEED)
    for _ in range(amount(100, 2_000)):
        wire = Wire(server.uri())
        with contextlib.suppress(ConnectionError, EOFError):
            pick.choice((lambda: None, wire.greet, wire.go))()
            wire.send(pick.randbytes(pick.randrange(1, 300)))
        wire.close()
    is_served(server.uri())


def test_a_client_that_reads_no_replies_holds_up_nobody(server: ServerProcess) -> None:
    rude = [Wire(server.uri()) for _ in range(4)]
    for wire in rude:
        wire.go()
        wire.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for cookie in range(200):
                wire.request(READ, 0, 4 << 20, cookie=cookie)
    is_served(server.uri())
    for wire in rude:
        wire.close()


def test_a_connection_that_says_nothing_holds_up_nobody(server: ServerProcess) -> None:
    silent = [Wire(server.uri()) for _ in range(50)]
    is_served(server.uri())
    for wire in silent:
        wire.close()


# -- leaks -----------------------------------------------------------------------------------------------------------


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _settled(count: Callable[[int], int], pid: int, expected: int) -> int:
    """The count, once it is no more than expected, or after some seconds."""
    deadline = time.monotonic() + 10
    while count(pid) > expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return count(pid)


def test_connections_leave_nothing_behind(server: ServerProcess) -> None:
    def visit(times: int) -> None:
        for number in range(times):
            if number % 5:
                is_served(server.uri())
            else:
                wire = Wire(server.uri())
                walk(wire, list(STAGES.values())[number % len(STAGES)])
                wire.close()

    visit(100)  # what is taken once and kept
    descriptors, threads = _descriptors(server.pid), _threads(server.pid)
    memory = _memory(server.pid)
    visit(500)
    assert _settled(_descriptors, server.pid, descriptors) <= descriptors
    assert _settled(_threads, server.pid, threads) <= threads
    assert _memory(server.pid) - memory < 8 << 20


# -- shutdown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_was_accepted(server: ServerProcess, disk: Path, number: signal.Signals) -> None:
    """Every write that is answered is in the image; the server ends by itself, with success."""
    wire = Wire(server.uri())
    wire.go()
    answered: dict[int, int] = {}
    stopped = threading.Event()
    # Fewer in flight than there are places, so that writes to one place never overlap.
    room = threading.Semaphore(128)

    def write() -> None:
        for cookie in range(100_000):
            room.acquire(timeout=20)
            if stopped.is_set():
                return
            try:
                wire.request(WRITE, cookie % 256 * 65536, 4096, cookie=cookie, data=struct.pack(">Q", cookie + 1) * 512)
            except OSError:
                return

    writer = threading.Thread(target=write)
    writer.start()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            cookie, error = wire.reply()
            room.release()
            if error == 0:
                answered[cookie % 256] = max(cookie + 1, answered.get(cookie % 256, 0))
            if len(answered) == 100 and not stopped.is_set():
                os.kill(server.pid, number)
                stopped.set()
    stopped.set()
    assert server.wait() == 0
    writer.join()
    wire.close()
    check(disk)
    data = content(disk)
    assert len(answered) >= 100
    for place, value in answered.items():
        (found,) = struct.unpack_from(">Q", data, place * 65536)
        # Later writes to the same place may have been done and their replies lost; an earlier value may not be.
        assert found >= value, place
        assert data[place * 65536 : place * 65536 + 4096] == struct.pack(">Q", found) * 512


def test_idle_and_silent_clients_do_not_hold_up_the_end(server: ServerProcess) -> None:
    idle = nbd.NBD()
    idle.connect_uri(server.uri())
    silent = Wire(server.uri())
    began = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - began < 10
    silent.close()


def test_nothing_is_left_after_the_end(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    server = nbd_server.process(disk, "--format", "qcow2", "--backend", backend)
    assert server.listen.socket is not None
    assert server.terminate() == 0
    assert not Path(server.listen.socket).exists()
    check(disk)


def test_a_flush_on_the_way_out_is_answered(server: ServerProcess) -> None:
    wire = Wire(server.uri())
    wire.go()
    wire.request(WRITE, 0, 4096, cookie=1, data=bytes(4096))
    assert wire.reply() == (1, 0)
    wire.request(FLUSH, cookie=2)
    wire.request(DISC)
    assert wire.reply() == (2, 0)
    assert wire.rest() == b""


def test_a_second_server_on_the_same_socket_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    other = create(tmp_path / "other.qcow2", SIZE)
    command = ["-m", "nbdserver", "serve", "--format", "qcow2", str(other), "--listen", str(server.listen)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    is_served(server.uri())
