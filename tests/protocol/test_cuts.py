"""Good sessions cut after every byte, with every byte changed, and left in the middle of every reply: the server lives,
and a client that checks all it reads is disturbed by none of it.

A session is recorded as it is sent to a server. Shortly: a sample of the places; ``--full``: all of them.
"""

from __future__ import annotations

import contextlib
import random
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdserver import tls
from nbdserver.handshake import Option, Style
from nbdserver.testing import NbdServers, ServerProcess
from tests.interop.wire import Wire
from tests.protocol.kit import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    FLUSH,
    MIB,
    READ,
    REQ_ONE,
    SIZE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    Leave,
    go,
    half_close,
    is_served,
    meta,
    request,
    reset,
)
from tests.serving import BACKENDS, FULL, SEED

#: How many places of a session are tried in the short run.
SAMPLE = 40
#: A reply that does not fit into the sockets' buffers.
LONG = 24 * MIB


@pytest.fixture(scope="module", params=BACKENDS)
def server(servers: NbdServers, config: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    server = servers.process("--backend", request.param, config)
    pid = server.pid
    yield server
    assert server.pid == pid
    assert server.terminate() == 0
    assert "Traceback" not in server.log and "panicked" not in server.log


@pytest.fixture(scope="module")
def failures(server: ServerProcess) -> Iterator[list[BaseException]]:
    """What has gone wrong for a client that all the while writes, reads and compares."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def watch() -> None:
        pick, known = random.Random(SEED), bytearray(SIZE)
        try:
            client = Client(server.uri()).enter(Style.EXTENDED, "witness")
            assert client.do(WRITE_ZEROES, 0, SIZE).error == 0
            while not stop.wait(0.001):
                at, length = pick.randrange(SIZE - 4096), pick.randrange(1, 4096)
                known[at : at + length] = data = pick.randbytes(length)
                assert client.do(WRITE, at, data=data).error == 0
                at = pick.randrange(SIZE - 4096)
                assert client.do(READ, at, 4096).data == known[at : at + 4096]
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    yield failures
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def witness(server: ServerProcess, failures: list[BaseException]) -> Iterator[None]:
    """Nobody else notices what happens in the test, and the next client is served."""
    yield
    is_served(server.uri())
    assert not failures


# -- sessions --------------------------------------------------------------------------------------------------------


def option(code: int, data: bytes = b"") -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", code, len(data)) + data


def requests(style: Style) -> bytes:
    """Some of every command, within the first 1 MiB."""

    def one(command: int, offset: int, length: int, flags: int = 0) -> bytes:
        return request(style, command, offset, length, flags=flags)

    writing = 1 << 5 if style is Style.EXTENDED else 0
    sent = [
        request(style, WRITE, 4096, 64, flags=writing, data=bytes(range(64))),
        one(READ, 4096, 64),
        one(TRIM, 8192, 4096),
        one(WRITE_ZEROES, 4096, 4096),
        one(CACHE, 0, 4096),
        one(FLUSH, 0, 0),
        one(READ, 0, 8192),
    ]
    if style is not Style.SIMPLE:
        sent += [one(BLOCK_STATUS, 0, 65536), one(BLOCK_STATUS, 0, 65536, REQ_ONE)]
    if style is Style.EXTENDED:
        sent.append(request(style, BLOCK_STATUS, 0, 12, flags=writing, data=struct.pack(">QI", 65536, 1)))
    return b"".join([*sent, one(DISC, 0, 0)])


def session(style: Style) -> bytes:
    """From the client's flags to its farewell."""
    options = {Style.STRUCTURED: Option.STRUCTURED_REPLY, Style.EXTENDED: Option.EXTENDED_HEADERS}
    begin = (
        option(options[style]) + option(Option.SET_META_CONTEXT, meta("", "base:allocation"))
        if options.get(style)
        else b""
    )
    return struct.pack(">I", 3) + option(Option.LIST) + begin + option(Option.GO, go("", 3)) + requests(style)


def hello(pki: Path) -> tuple[bytes, bytes]:
    """STARTTLS, and what a client says first within TLS."""
    context = ssl.create_default_context(cafile=pki / tls.CA_CERT)
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return struct.pack(">I", 3) + option(Option.STARTTLS), outgoing.read()


def named(name: str, pki: Path) -> tuple[bytes, bytes]:
    """A session: what is sent, and what is sent after STARTTLS has been answered."""
    return hello(pki) if name == "tls" else (session(Style(name)), b"")


NAMES = [*map(str, Style), "tls"]


def places(length: int) -> Iterator[int]:
    """All places of a session, or a sample of them that has its ends."""
    pick = random.Random(SEED)
    return iter(range(length) if FULL else sorted({0, 1, length - 1, *pick.sample(range(length), min(length, SAMPLE))}))


def say(server: ServerProcess, plain: bytes, within: bytes, leave: Leave) -> None:
    """Send ``plain``, and once STARTTLS has been answered ``within``, and go."""
    client = Client(server.uri(), flags=None)
    with contextlib.suppress(ConnectionError, EOFError):
        client.send(plain)
        if within:
            client.receive(20)
            client.send(within)
        leave(client)
    client.close()


def half_close_and_read(wire: Wire) -> None:
    half_close(wire)
    wire.rest()


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leave", [half_close_and_read, reset, Wire.close], ids=["half-close", "reset", "close"])
def test_cut_after_every_byte(server: ServerProcess, pki: Path, name: str, leave: Leave) -> None:
    plain, within = named(name, pki)
    for end in places(len(plain) + len(within)):
        say(server, plain[:end], within[: max(0, end - len(plain))], leave)


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_changed(server: ServerProcess, pki: Path, name: str) -> None:
    pick = random.Random(SEED)
    plain, within = named(name, pki)
    for place in places(len(plain) + len(within)):
        changes = (1 << pick.randrange(8), 0xFF, pick.randrange(1, 256)) if FULL else (pick.randrange(1, 256),)
        for change in changes:
            spoilt = bytearray(plain + within)
            spoilt[place] ^= change
            # Who has spoilt STARTTLS may have no answer to wait for.
            after = bytes(spoilt[len(plain) :]) if place >= len(plain) else b""
            say(server, bytes(spoilt[: len(plain)]), after, half_close_and_read)


#: What is asked for, and how long the reply is at the most.
ASKED: dict[str, Callable[[Style], bytes]] = {
    "short reads": lambda style: b"".join(request(style, READ, at * 512, 512) for at in range(8)),
    "a long read": lambda style: request(style, READ, 0, LONG, flags=0 if style is Style.SIMPLE else 1 << 2),
    "a status": lambda style: request(style, BLOCK_STATUS, 0, SIZE),
}


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("leave", [half_close, reset, Wire.close], ids=["half-close", "reset", "close"])
def test_leaving_in_the_middle_of_every_reply(server: ServerProcess, asked: str, leave: Leave) -> None:
    for style in Style:
        contexts = [] if style is Style.SIMPLE else ["base:allocation"]
        for taken in (
            0,
            1,
            15,
            16,
            19,
            20,
            31,
            32,
            33,
            40,
            100,
            *((4096, 65536, LONG // 2) if "long" in asked else ()),
        ):
            client = Client(server.uri()).enter(style, contexts=contexts)
            client.send(ASKED[asked](style))
            with contextlib.suppress(EOFError):
                client.receive(min(taken, 16) if asked == "a status" else taken)
            leave(client)
            client.close()


def test_the_sessions_are_good(server: ServerProcess) -> None:
    """As they are, nothing in them is refused."""
    for style in Style:
        client = Client(server.uri(), flags=None)
        client.send(session(style))
        answers = client.rest()
        assert len(answers) > 8192
        assert struct.pack(">I", 1 << 31 | 1) not in answers[:1000]
