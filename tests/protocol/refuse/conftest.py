"""What every refusal is tried on; and after each, that nobody else has noticed anything."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from layers.memory import Memory
from nbdserver import tls
from nbdserver.handshake import Option, ReplyType, Style, TlsMode
from nbdserver.testing import NbdServers
from tests.protocol.kit import HUGE, MIB, READ, SIZE, WRITE, Broken, Client, Enter, Secure, Slow, is_served


@pytest.fixture(scope="session")
def plain(servers: NbdServers) -> str:
    """A server with the exports "disk" (also the default), "golden" (read-only), "sectors" (of 512 bytes, with a
    maximum of 1 MiB), "large", "huge", "broken" and "slow"."""
    server, uri = servers.start(Memory(SIZE), name="disk")
    server.change(default="disk")
    server.export("golden", Memory(SIZE), read_only=True)
    sectors = server.export("sectors", Memory(2 * SIZE))
    sectors.info = dataclasses.replace(sectors.info, minimum_block=512, maximum_payload=SIZE)
    server.export("large", Memory(64 * MIB))
    server.export("huge", Memory(HUGE))
    server.export("broken", Broken())
    server.export("slow", Slow())
    return uri.replace("///disk", "///")


@pytest.fixture(scope="session")
def witness(plain: str) -> Client:
    """A client that was there before all others."""
    return Client(plain).enter()


@pytest.fixture
def uri(plain: str, witness: Client) -> Iterator[str]:
    """The plain server. When the test is over, the witness goes on, and the next client is served."""
    assert witness.do(WRITE, 0, data=b"word").error == 0
    yield plain
    assert witness.do(READ, 0, 4).data == b"word"
    is_served(plain)


@pytest.fixture
def client(uri: str) -> Client:
    """One in its handshake."""
    return Client(uri)


@pytest.fixture(params=list(Style), ids=str)
def style(request: pytest.FixtureRequest) -> Style:
    """Every style of the transmission phase."""
    style: Style = request.param
    return style


@pytest.fixture
def enter(uri: str) -> Enter:
    return lambda style=Style.SIMPLE, name="", contexts=(): Client(uri).enter(style, name, contexts)


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def selective_server(servers: NbdServers, pki: Path) -> str:
    config = tls.TlsConfig(TlsMode.ALLOWED, certificates=str(pki))
    server, uri = servers.start(Memory(SIZE), name="disk", tls=config)
    server.change(default="disk")
    server.export("secret", Memory(SIZE), tls_required=True)
    return uri.replace("///disk", "///")


@pytest.fixture
def selective(selective_server: str) -> Iterator[str]:
    """A server where TLS is allowed, and needed for the export "secret"; "disk" is the default."""
    yield selective_server
    is_served(selective_server)


@pytest.fixture(scope="session")
def forced_server(servers: NbdServers, pki: Path) -> str:
    _, uri = servers.start(Memory(SIZE), tls=tls.TlsConfig(TlsMode.REQUIRED, certificates=str(pki)))
    return uri


@pytest.fixture
def forced(forced_server: str, secure: Secure) -> Iterator[str]:
    """A server that demands TLS."""
    yield forced_server
    assert secure(forced_server).enter().do(READ, 0, 4).data == bytes(4)


@pytest.fixture
def secure(pki: Path) -> Secure:
    context = ssl.create_default_context(cafile=pki / tls.CA_CERT)
    context.load_cert_chain(pki / tls.CLIENT_CERT, pki / tls.CLIENT_KEY)

    def secure(uri: str, before: Sequence[int] = ()) -> Client:
        client = Client(uri)
        for option in before:
            assert client.ask(option) == [(ReplyType.ACK, b"")]
        assert client.ask(Option.STARTTLS) == [(ReplyType.ACK, b"")]
        return client.secured(context.wrap_socket(client.socket, server_hostname="localhost"))

    return secure
