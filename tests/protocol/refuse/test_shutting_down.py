"""A server that stops: what it had accepted is answered, requests that come then get ESHUTDOWN, options ERR_SHUTDOWN,
and all connections end (proto.md, "Terminating the transmission phase")."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.handshake import Option, ReplyType, Style
from nbdserver.server import Server
from tests.protocol.kit import ESHUTDOWN, FLUSH, READ, SIZE, TRIM, WRITE, Client, Held
from tests.serving import eventually


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Server, Held]]:
    """A server that stops while a request of its disk is held."""
    disk = Held(SIZE)
    server = Server(listen=[f"nbd+unix:///?socket={tmp_path}/socket"])
    server.export("", disk)
    server.start()
    yield server, disk
    disk.go.set()
    server.stop()


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_eshutdown(held: tuple[Server, Held], style: Style) -> None:
    server, disk = held
    uri = server.listening[0]
    client, negotiating, old, silent = Client(uri).enter(style), Client(uri), Client(uri), Client(uri).enter()
    client.issue(READ, 0, 512)
    assert disk.reading.wait(20)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    eventually(lambda: refuses(negotiating))
    eventually(lambda: client.do(FLUSH).error == ESHUTDOWN)
    for command, data in ((READ, b""), (WRITE, bytes(4096)), (FLUSH, b""), (TRIM, b""), (99, b"")):
        answer = client.do(command, 0, len(data), data=data)
        assert answer.error == ESHUTDOWN
        assert style is Style.SIMPLE or answer.message == "the server is shutting down"
    old.option(Option.EXPORT_NAME, b"")
    old.is_cut_off()
    assert negotiating.ask(Option.ABORT) == [(ReplyType.ACK, b"")]
    negotiating.is_cut_off()
    disk.go.set()
    assert client.answer(0, 512).error == 0
    client.is_cut_off()
    silent.is_cut_off()
    stopping.join(20)
    assert not stopping.is_alive()


def refuses(client: Client) -> bool:
    """Whether options are refused by now."""
    return client.ask(Option.LIST)[-1][0] == ReplyType.ERR_SHUTDOWN


def test_who_goes_on_asking_does_not_hold_up_the_end(held: tuple[Server, Held]) -> None:
    server, disk = held
    client, eager = Client(server.listening[0]).enter(), Client(server.listening[0]).enter()
    client.issue(READ, 0, 512)
    assert disk.reading.wait(20)
    asking = threading.Thread(target=ask_on, args=(eager,))
    asking.start()
    threading.Timer(0.2, disk.go.set).start()
    begin = time.monotonic()
    server.stop()
    assert time.monotonic() - begin < 20
    assert client.answer(0, 512).error == 0
    asking.join(20)
    assert not asking.is_alive()


def ask_on(client: Client) -> None:
    """Ask as long as there is an answer."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            client.do(FLUSH)
