"""Requests longer than the pool can hold are carried out in parts, each of them on registered memory."""

from __future__ import annotations

import errno
import random
import socket
import time
from pathlib import Path

import nbd
import pytest

from layers.file import File
from nbdserver.limits import PAYLOAD_MAX
from nbdserver.request import Request
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.coherence.pages import SOON, Background
from tests.interop.wire import CHUNK_DATA, CHUNK_ERROR, DONE, PAYLOAD_LEN, READ, WRITE, Wire
from tests.oracle.model import Model
from tests.oracle.storm import Storm, Weather
from tests.registered import Spy
from tests.serving import SEED, amount

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB
#: The smallest there is.
POOL = 2 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def connect(uri: str) -> nbd.NBD:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def counters(server: Server) -> dict[str, int]:
    (counted,) = server.stats()["exports"][""]["files"].values()
    return dict(counted)


def test_the_longest_requests_on_the_smallest_pool(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    server, uri = nbd_server.start(File(path=str(disk), cache="none"), backend=backend, pool=POOL)
    handle = connect(uri)
    data = random.Random(SEED).randbytes(PAYLOAD_MAX)
    handle.pwrite(data, MIB)
    assert handle.pread(PAYLOAD_MAX, MIB) == data
    assert handle.pread(4 * KIB, 0) == bytes(4 * KIB)
    export, file = server.stats()["exports"][""], counters(server)
    assert (export["reads"], export["writes"]) == (2, 1), "a request is one, however many parts it has"
    assert (export["bytes_read"], export["bytes_written"]) == (PAYLOAD_MAX + 4 * KIB, PAYLOAD_MAX)
    assert file["writes"] >= PAYLOAD_MAX // POOL
    if backend == "io_uring":
        assert file["plain"] == 0
    handle.shutdown()
    assert disk.read_bytes()[MIB:][:PAYLOAD_MAX] == data


def test_what_is_answered_in_one_piece_is_not_cut(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    """Simple replies and DF: in ordinary memory."""
    uri = nbd_server(File(path=str(disk), cache="none"), backend=backend, pool=POOL)
    data = random.Random(SEED).randbytes(PAYLOAD_MAX)
    wire = Wire(uri)
    wire.go()
    wire.request(WRITE, 0, len(data), data=data)
    assert wire.reply() == (0, 0)
    wire.request(READ, 0, len(data))
    assert wire.reply() == (0, 0)
    assert wire.receive(len(data)) == data
    handle, chunks = connect(uri), list[tuple[int, int]]()
    read = handle.pread_structured(
        len(data), 0, lambda part, offset, _status, _error: chunks.append((offset, len(part))), nbd.CMD_FLAG_DF
    )
    assert read == data
    assert chunks == [(0, len(data))]


def test_chunks_of_parts_are_one_reply(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    wire = Wire(nbd_server(File(path=str(disk)), backend=backend, pool=POOL))
    wire.go(extended=True)
    data = random.Random(SEED).randbytes(9 * MIB)
    wire.ask(WRITE, 512, data=data, cookie=5)
    wire.ask(READ, 512, len(data), cookie=6)
    wire.ask(READ, 0, 512, cookie=7)
    flags, _, cookie, offset, _ = wire.chunk()
    assert (flags, cookie, offset) == (DONE, 5, 512)
    got, flags = b"", 0
    while not flags & DONE:
        flags, kind, cookie, offset, payload = wire.chunk()
        assert (kind, cookie, offset) == (CHUNK_DATA, 6, 512)
        assert int.from_bytes(payload[:8]) == 512 + len(got)
        got += payload[8:]
    assert got == data
    flags, _, cookie, offset, payload = wire.chunk()
    assert (flags, cookie, offset, payload[8:]) == (DONE, 7, 0, bytes(512))


class Failing(Spy):
    """Refuses what touches a certain byte."""

    bad = 5 * MIB

    def read(self, request: Request) -> None:
        self.fails = {request.operation: errno.EIO} if request.offset <= self.bad < request.end else {}
        super().read(request)

    write = zero = trim = read


def test_a_part_that_fails_ends_the_request_and_nothing_else(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    wire = Wire(nbd_server(Failing(File(path=str(disk))), backend=backend, pool=POOL))
    wire.go(extended=True)
    data = random.Random(SEED).randbytes(20 * MIB)
    wire.ask(WRITE, 0, data=data, cookie=1)
    wire.ask(WRITE, 0, data=b"x" * 512, cookie=2)
    for expected in ((CHUNK_ERROR, 1), (0, 2)):
        flags, kind, cookie, _, _ = wire.chunk()
        assert (flags, kind, cookie) == (DONE, *expected)
    wire.ask(READ, 0, len(data), cookie=3)
    got, kind = b"", CHUNK_DATA
    while kind == CHUNK_DATA:
        flags, kind, cookie, _, payload = wire.chunk()
        assert (cookie, bool(flags & DONE)) == (3, kind != CHUNK_DATA)
        got += payload[8:] if kind == CHUNK_DATA else b""
    assert kind == CHUNK_ERROR
    assert got == (b"x" * 512 + data[512:])[: len(got)]
    assert 4 * MIB <= len(got) <= Failing.bad
    wire.ask(READ, 0, 512, cookie=4)
    assert wire.chunk()[4][8:] == b"x" * 512


def test_fua_is_one_flush_at_the_end(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    spy = Spy(File(path=str(disk)))
    handle = connect(nbd_server(spy, backend=backend, pool=POOL))
    handle.pwrite(b"f" * (8 * MIB), 0, nbd.CMD_FLAG_FUA)
    assert len(spy.take()) > 4
    assert spy.flushes == 1


def test_a_client_that_goes_in_between_leaves_nothing_behind(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    server, uri = nbd_server.start(File(path=str(disk), cache="none"), backend=backend, pool=POOL)
    for half_closed in (False, True):
        rude = Wire(uri)
        rude.go(extended=True)
        rude.request(READ, 0, 0)
        rude.close()
        rude = Wire(uri)
        rude.go()
        rude.request(WRITE, 0, PAYLOAD_MAX, data=b"r" * (9 * MIB))
        if half_closed:
            rude.socket.shutdown(socket.SHUT_WR)
            assert rude.rest() == b""
        rude.close()
    reader = Wire(uri)
    reader.go(extended=True)
    reader.ask(READ, 0, PAYLOAD_MAX)
    reader.socket.shutdown(socket.SHUT_WR)  # what was asked for is answered all the same
    got = 0
    while got < PAYLOAD_MAX:
        got += len(reader.chunk()[4]) - 8
    assert reader.rest() == b""
    deadline = time.monotonic() + SOON
    while (pool := server.stats()["pool"])["free"] < pool["size"]:
        assert time.monotonic() < deadline, pool
        time.sleep(0.01)


def test_stopping_finishes_what_was_taken(disk: Path, tmp_path: Path, backend: str) -> None:
    server = Server(listen=[f"nbd+unix:///?socket={tmp_path}/socket"], backend=backend, pool=POOL)
    server.export("", File(path=str(disk)))
    with server:
        uri = server.listening[0]
        reader, writer = Wire(uri), Wire(uri)
        for wire in (reader, writer):
            wire.go(extended=True)
        reader.ask(READ, 0, PAYLOAD_MAX)
        writer.ask(WRITE, 0, PAYLOAD_MAX, flags=PAYLOAD_LEN)  # and no payload: it has not been accepted
        received: list[bytes] = [reader.receive(512)]
        reading = Background(lambda: received.append(reader.rest()))
        begin = time.monotonic()
        server.stop(timeout=SOON)
        reading.finish()
    assert sum(map(len, received)) > PAYLOAD_MAX
    assert time.monotonic() - begin < SOON


def test_storm(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    """Long and short requests that overlap, in little memory: the contents are right all the same."""
    size = 16 * MIB
    with disk.open("r+b") as file:
        file.truncate(size)
    model = Model(size, grain=4096)
    uri = nbd_server(File(path=str(disk), cache="none"), backend=backend, pool=POOL)
    weather = Weather(length_max=6 * MIB, connections=3, depth=6)
    with Storm(uri, model, seed=SEED, weather=weather) as storm:
        storm.run(seconds=amount(3, 20))
        final = storm.verify()
    assert disk.read_bytes() == final
