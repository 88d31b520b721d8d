"""Where the server listens: all addresses of a name, one port, and paths that are removed only while they are ours."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from nbdserver.access import Rule, network
from nbdserver.errors import ConfigError
from nbdserver.listening import ListenConfig, bind, inherited, keep_alive, unix_socket
from nbdserver.server import Server
from nbdserver.testing import free_port
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
    listener = bind(ListenConfig(NbdUri(host="both", port=0)))
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
    listener = bind(ListenConfig(NbdUri(host="partly", port=0)))
    assert names(listener) == ["127.0.0.1"]
    listener.close()


def test_a_name_with_no_address_of_this_machine_is_refused(resolve: Any) -> None:
    resolve("198.51.100.7", "203.0.113.7")
    with pytest.raises(ConfigError, match=r"cannot listen on nbd://elsewhere:0: Cannot assign requested address"):
        bind(ListenConfig(NbdUri(host="elsewhere", port=0)))


def test_a_port_that_is_taken_on_one_address_is_refused_and_the_others_let_go(resolve: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        port = other.getsockname()[1]
        resolve("127.0.0.1", "127.0.0.2")
        with pytest.raises(ConfigError, match="Address already in use"):
            bind(ListenConfig(NbdUri(host="both", port=port)))
    bind(ListenConfig(NbdUri(host="both", port=port))).close()


def test_a_unix_socket_has_its_mode_from_the_start(tmp_path: Path) -> None:
    for mode in (0o600, 0o660):
        path = tmp_path / f"{mode:o}"
        with unix_socket(str(path), mode):
            assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_path_that_somebody_else_has_taken_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = bind(ListenConfig(NbdUri(socket=str(path))))
    path.unlink()
    path.write_text("not ours")
    listener.close()
    assert path.read_text() == "not ours"


def test_listeners_come_and_go(tmp_path: Path) -> None:
    with Server(listen=[f"nbd+unix:///?socket={tmp_path / 'first'}"]) as server:
        second = bind(ListenConfig(NbdUri(socket=str(tmp_path / "second"))))
        server.accept(second)
        assert server.listening == [f"nbd+unix:///?socket={tmp_path / name}" for name in ("first", "second")]
        there = Wire(server.listening[1])
        eventually(lambda: len(server.clients) == 1)
        server.refuse(second)
        assert not os.path.exists(tmp_path / "second")
        there.greet()  # who is connected stays
        with pytest.raises(FileNotFoundError):
            Wire(f"nbd+unix:///?socket={tmp_path / 'second'}")
        again = bind(ListenConfig(NbdUri(socket=str(tmp_path / "second"))))
        server.accept(again)
        Wire(server.listening[1]).greet()
    assert not list(tmp_path.iterdir())


def test_a_unix_socket_has_its_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    owner, group = (1234, 2345) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    listener = bind(ListenConfig(NbdUri(socket=str(path)), 0o620, owner, group))
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o620, owner, group)
    listener.close()


def test_a_socket_that_cannot_be_permitted_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chown(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", chown)
    with pytest.raises(ConfigError, match=r"cannot listen on nbd\+unix.*: Operation not permitted"):
        bind(ListenConfig(NbdUri(socket=str(tmp_path / "socket")), owner=0))
    assert not list(tmp_path.iterdir())


def needs_ipv6(address: str) -> bool:
    """Whether the machine has IPv6; where it has not, that is said, and held here."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        with pytest.raises(ConfigError, match=f"cannot listen on .*: {error.strerror}"):
            bind(ListenConfig(parse(address)))
        return False
    return True


def test_any_address_is_of_both_families_and_ipv4_clients_are_known_as_such() -> None:
    if not needs_ipv6("nbd://[::1]:0"):
        return
    with Server(listen=["nbd://[::]:0"]) as server:
        port = parse(server.listening[0]).port
        for address, known in (("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")):
            with socket.create_connection((address, port), 20) as client:
                client.recv(18)
                assert server.clients[-1].connection.peer.startswith(known)


def test_any_address_of_either_family_may_be_listened_on_beside_the_other() -> None:
    if not needs_ipv6("nbd://[::1]:0"):
        return
    port = free_port()
    with Server(listen=[f"nbd://[::]:{port}", f"nbd://0.0.0.0:{port}"]):
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, port), 20) as client:
                assert client.recv(8) == b"NBDMAGIC"


def test_keepalive_is_off_by_default_and_the_connections_have_their_listeners() -> None:
    for seconds, wanted in ((None, (0, 7200)), (77, (1, 77))):
        bound = socket.create_server(("127.0.0.1", 0))
        keep_alive(bound, seconds)
        with bound, socket.create_connection(bound.getsockname()), bound.accept()[0] as accepted:
            there = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert (there, idle) == wanted


def test_vsock() -> None:
    """Where the kernel has vsock's loopback a client is served; elsewhere it is said that there is none."""
    address = ListenConfig(NbdUri(cid=1, port=0))
    try:
        with socket.socket(socket.AF_VSOCK) as probe:
            probe.bind((1, socket.VMADDR_PORT_ANY))
    except OSError as error:
        with pytest.raises(ConfigError, match=rf"listen: cannot listen on nbd\+vsock://1:0: {error.strerror}"):
            bind(address)
        return
    with Server(listen=[address]) as server, socket.socket(socket.AF_VSOCK) as client:
        client.settimeout(20)
        client.connect((1, parse(server.listening[0]).port))
        assert client.recv(8) == b"NBDMAGIC"
        assert server.clients[0].who.cid == 1


# -- sockets that are there already --------------------------------------------------------------------------------


def ready() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_a_socket_that_is_there_is_taken_for_its_address_and_the_others_are_served_too(tmp_path: Path) -> None:
    first, second, unix = ready(), ready(), unix_socket(str(tmp_path / "socket"))
    port = first.getsockname()[1]
    configured = ListenConfig(NbdUri(host="127.0.0.1", port=port), access=Rule(deny=(network("127.0.0.1"),)))
    where = [configured, f"nbd+unix:///?socket={tmp_path / 'socket'}", "nbd://127.0.0.1:0"]
    with Server(listen=where, ready=[second, unix, first]) as server:
        assert len(server.listening) == 4
        assert server.listening[0] == f"nbd://127.0.0.1:{port}"
        assert server.listeners[0].wanted is configured
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            assert client.recv(8) == b"", "the rule of its address holds"
        for address in server.listening[1:]:
            Wire(address).greet()
    assert (tmp_path / "socket").exists(), "its path is not ours"


def test_what_says_that_there_are_sockets_is_taken_out_of_the_environment() -> None:
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a", "HOME": "/"}
    assert inherited(environment) == []
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize("count", ["", "x", "-1", "1000000"])
def test_a_number_of_sockets_that_is_none(count: str) -> None:
    with pytest.raises(ConfigError, match=r"LISTEN_FDS is .*, which is no number of sockets"):
        inherited({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


@pytest.mark.parametrize(("kind", "cause"), [("pipe", "is no socket: "), ("udp", "is no stream socket that listens")])
def test_what_is_no_listening_socket_is_refused(
    kind: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "pipe":
        there: Any = (tmp_path / "file").open("w")
    else:
        there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with there:
        number = os.dup(there.fileno())
        monkeypatch.setattr("nbdserver.listening.INHERITED_FIRST", number)
        environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbd"}
        with pytest.raises(ConfigError, match=rf"descriptor {number} of LISTEN_FDS \(nbd\) {cause}"):
            inherited(environment)
