"""Requests are a stream of bytes: however they are cut into pieces, each is understood, and none is mixed with another.

Large payloads are received straight into their memory, small requests many at once, so both are sent side by side.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.interop.wire import READ, REQUEST, REQUEST_MAGIC, WRITE, Wire
from tests.serving import SEED, amount

KIB = 1 << 10
SIZE = 4 << 20
#: Around what counts as large, around a record of TLS and a page, longer than a receive, and a pool's block.
LENGTHS = (1, 511, 513, 4 * KIB, 16 * KIB + 1, 32 * KIB - 1, 32 * KIB, 64 * KIB, 256 * KIB + 5, 2048 * KIB + 4096)


@pytest.fixture
def client(nbd_server: NbdServers, tmp_path: Path, backend: str, tcp: bool) -> Wire:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    wire = Wire(nbd_server(path, format="raw", backend=backend, tcp=tcp, workers=1))
    wire.go()
    return wire


@pytest.mark.parametrize("piece_max", [64, 700, 100 * KIB, SIZE])
def test_writes_and_reads_in_pieces_of_any_length(client: Wire, piece_max: int) -> None:
    pick = random.Random(SEED + piece_max)
    model = bytearray(SIZE)
    lengths = [length for length in LENGTHS if length <= 1024 * piece_max]
    for _ in range(amount(6, 60)):
        stream, reads = b"", {}
        for cookie in range(8):
            length = min(pick.choice(lengths), SIZE // 2)
            # Each in a part of the disk of its own: requests that are under way together have no order.
            offset = pick.randrange(SIZE // 2 - length + 1) if cookie % 2 else SIZE // 2
            if cookie % 2:
                stream += _request(READ, cookie, offset, length)
                reads[cookie] = bytes(model[offset : offset + length])
            else:
                length = min(length, SIZE // 8)
                offset += cookie // 2 * (SIZE // 8)
                data = pick.randbytes(length)
                stream += _request(WRITE, cookie, offset, length) + data
                model[offset : offset + length] = data
        # While replies are taken: no server takes in requests without end for a client that does not.
        sending = threading.Thread(target=_send, args=(client, stream, piece_max, pick))
        sending.start()
        for _ in range(8):
            cookie, error = client.reply()
            assert error == 0
            if cookie % 2:
                assert client.receive(len(reads[cookie])) == reads[cookie]
        sending.join()
        # What was just written is what is read next.
        model = model[SIZE // 2 :] + model[: SIZE // 2]
        client.request(READ, SIZE // 2, SIZE // 2)
        assert client.reply() == (0, 0)
        assert client.receive(SIZE // 2) == model[: SIZE // 2]
        client.request(WRITE, 0, SIZE // 2, data=bytes(model[: SIZE // 2]))
        assert client.reply() == (0, 0)
        client.request(WRITE, SIZE // 2, SIZE // 2, data=bytes(model[SIZE // 2 :]))
        assert client.reply() == (0, 0)


def _request(command: int, cookie: int, offset: int, length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, length)


def _send(client: Wire, stream: bytes, piece_max: int, pick: random.Random) -> None:
    position = 0
    while position < len(stream):
        length = pick.randrange(1, piece_max + 1)
        client.send(stream[position : position + length])
        position += length
        if not pick.randrange(200):
            time.sleep(0.001)  # so that the server sees the end of a piece
