"""The buffer pool among clients of whom some are rude: one that sits on memory does not starve the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.coherence.pages import SOON
from tests.interop.wire import READ, WRITE, Wire

MIB = 1 << 20
LONGEST = 32 * MIB
DISK = 64 * MIB


@pytest.fixture
def uri(nbd_server: NbdServers, tmp_path: Path, backend: str) -> str:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(DISK)
    return nbd_server(path, format="raw", backend=backend, workers=1, pool=64 * MIB)


def _connect(uri: str) -> Wire:
    client = Wire(uri)
    client.go()
    return client


def _is_served(uri: str) -> None:
    client = _connect(uri)
    client.socket.settimeout(2 * SOON)
    client.request(READ, 0, 4096)
    assert client.reply() == (0, 0)
    assert client.receive(4096) == bytes(4096)
    client.close()


def test_clients_that_never_send_their_payloads_do_not_starve_others(uri: str) -> None:
    rude = [_connect(uri) for _ in range(4)]
    for client in rude:
        client.request(WRITE, 0, LONGEST)  # and no payload
    _is_served(uri)


def test_clients_that_never_take_their_replies_do_not_starve_others(uri: str) -> None:
    rude = [_connect(uri) for _ in range(4)]
    for client in rude:
        for cookie in range(4):
            client.request(READ, 0, LONGEST, cookie=cookie)
    _is_served(uri)


def test_a_slow_client_is_left_in_peace_while_nobody_wants_its_memory(uri: str) -> None:
    slow = _connect(uri)
    slow.request(WRITE, 0, LONGEST)
    for _ in range(6):
        _is_served(uri)
        slow.send(bytes(LONGEST // 6))
    slow.send(bytes(LONGEST - 6 * (LONGEST // 6)))
    assert slow.reply() == (0, 0)
