"""Where the server listens: all addresses of a name, one port, and paths that are removed only while they are ours."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from nbdserver.errors import ConfigError
from nbdserver.listening import bind, unix_socket
from nbdserver.server import Server
from nbdserver.uri import NbdUri, parse
from tests.interop.wire import Wire
from tests.serving import eventually


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have every host name stand for the addresses that are given."""

    def resolve(*addresses: str) -> None:
        def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
            found = []
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                where = (address, port, 0, 0) if ":" in address else (address, port)
                found.append((family, socket.SOCK_STREAM, 6, "", where))
            return found

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return resolve


def names(listener: Any) -> list[str]:
    return [bound.getsockname()[0] for bound in listener.sockets]


def test_every_address_of_a_name_is_bound_with_one_port(resolve: Any) -> None:
    resolve("127.0.0.1", "127.0.0.2", "127.0.0.1")
    listener = bind(NbdUri(host="both", port=0))
    assert names(listener) == ["127.0.0.1", "127.0.0.2"]
    assert {bound.getsockname()[1] for bound in listener.sockets} == {listener.address.port}
    assert str(listener.address) == f"nbd://both:{listener.address.port}"
    listener.close()


def test_a_server_answers_on_every_address_of_a_name(resolve: Any) -> None:
    resolve("127.0.0.1", "127.0.0.2")
    with Server(listen=["nbd://both:0"]) as server:
        port = parse(server.listening[0]).port
        for address in ("127.0.0.1", "127.0.0.2"):
            with socket.socket() as client:
                client.settimeout(20)
                client.connect((address, port))
                assert client.recv(8) == b"NBDMAGIC"


def test_an_address_that_the_machine_does_not_have_is_left_out(resolve: Any) -> None:
    resolve("198.51.100.7", "127.0.0.1")
    listener = bind(NbdUri(host="partly", port=0))
    assert names(listener) == ["127.0.0.1"]
    listener.close()


def test_a_name_with_no_address_of_this_machine_is_refused(resolve: Any) -> None:
    resolve("198.51.100.7", "203.0.113.7")
    with pytest.raises(ConfigError, match=r"cannot listen on nbd://elsewhere:0: Cannot assign requested address"):
        bind(NbdUri(host="elsewhere", port=0))


def test_a_port_that_is_taken_on_one_address_is_refused_and_the_others_let_go(resolve: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        port = other.getsockname()[1]
        resolve("127.0.0.1", "127.0.0.2")
        with pytest.raises(ConfigError, match="Address already in use"):
            bind(NbdUri(host="both", port=port))
    bind(NbdUri(host="both", port=port)).close()


def test_a_unix_socket_has_its_mode_from_the_start(tmp_path: Path) -> None:
    for mode in (0o600, 0o660):
        path = tmp_path / f"{mode:o}"
        with unix_socket(str(path), mode):
            assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_path_that_somebody_else_has_taken_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = bind(NbdUri(socket=str(path)))
    path.unlink()
    path.write_text("not ours")
    listener.close()
    assert path.read_text() == "not ours"


def test_listeners_come_and_go(tmp_path: Path) -> None:
    with Server(listen=[f"nbd+unix:///?socket={tmp_path / 'first'}"]) as server:
        second = bind(NbdUri(socket=str(tmp_path / "second")))
        server.accept(second)
        assert server.listening == [f"nbd+unix:///?socket={tmp_path / name}" for name in ("first", "second")]
        there = Wire(server.listening[1])
        eventually(lambda: len(server.clients) == 1)
        server.refuse(second)
        assert not os.path.exists(tmp_path / "second")
        there.greet()  # who is connected stays
        with pytest.raises(FileNotFoundError):
            Wire(f"nbd+unix:///?socket={tmp_path / 'second'}")
        again = bind(NbdUri(socket=str(tmp_path / "second")))
        server.accept(again)
        Wire(server.listening[1]).greet()
    assert not list(tmp_path.iterdir())
