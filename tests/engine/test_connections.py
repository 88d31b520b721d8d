"""Connections are bounded, so that clients cannot take every descriptor the server has."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nbdserver.limits import PEER_PART
from nbdserver.testing import NbdServers
from tests.coherence.pages import SOON
from tests.interop.wire import READ, Wire

DESCRIPTORS = 300


def test_a_client_gets_three_quarters_of_half_of_the_descriptors_and_no_more(
    nbd_server: NbdServers, tmp_path: Path
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 4096)
    server = nbd_server.process("--format", "raw", path, command=["prlimit", f"--nofile={DESCRIPTORS}"])
    clients = [Wire(server.uri()) for _ in range(int(DESCRIPTORS / 2 * PEER_PART))]
    for client in clients:
        client.go()
    with pytest.raises((EOFError, ConnectionError)):
        Wire(server.uri()).go()
    clients[0].request(READ, 0, 4096)
    assert clients[0].reply() == (0, 0)
    clients.pop().close()
    deadline = time.monotonic() + SOON
    while True:  # until the server has seen that one has gone
        try:
            Wire(server.uri()).go()
            break
        except (EOFError, ConnectionError):
            assert time.monotonic() < deadline
