"""CVE-2024-7409, QEMU: clients that connected and said nothing kept a server from being taken offline in order: what
they held was used after it was gone. A server stops in time, whoever is there or comes meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

from layers.memory import Memory
from nbdserver.handshake import Option
from nbdserver.server import Server
from tests.interop.wire import Wire
from tests.protocol.kit import SIZE, Client
from tests.serving import amount


@pytest.mark.parametrize("attempt", range(amount(3, 50)))
def test_stopping_under_clients_that_come_and_stay(tmp_path: Path, attempt: int) -> None:
    server = Server(listen=[f"nbd+unix:///?socket={tmp_path}/socket"])
    server.export("", Memory(SIZE))
    server.start()
    uri, gone = server.listening[0], threading.Event()
    silent = [Wire(uri) for _ in range(50)]
    greeted = [Client(uri) for _ in range(50)]
    within = [Client(uri).enter() for _ in range(5)]

    def come() -> None:
        with contextlib.suppress(ConnectionError, FileNotFoundError, EOFError):
            while not gone.is_set():
                Client(uri).option(Option.LIST)

    coming = [threading.Thread(target=come) for _ in range(3)]
    for thread in coming:
        thread.start()
    time.sleep(attempt * 0.02)
    begin = time.monotonic()
    server.stop()
    assert time.monotonic() - begin < 20
    gone.set()
    for thread in coming:
        thread.join(20)
        assert not thread.is_alive()
    for client in (*silent, *greeted, *within):
        client.rest()
        client.close()
