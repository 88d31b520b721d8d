"""What clients cost, and what one of them can do to the others: bounds, turns, memory, descriptors."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import resource
import socket
import ssl
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from layers.file import File
from layers.memory import Memory
from nbdserver import _engine, tls
from nbdserver.bounds import Bounds
from nbdserver.extent import Extent, Intent
from nbdserver.layer import Layer
from nbdserver.limits import KIB, MIB
from nbdserver.server import Server
from nbdserver.testing import NbdServers, ServerProcess, free_port
from tests.coherence.pages import stopped_at
from tests.interop.wire import BLOCK_STATUS, FLUSH, IHAVEOPT, OPT_GO, READ, REP_ACK, REQUEST, REQUEST_MAGIC, Wire
from tests.serving import amount, eventually

SIZE = 8 * MIB
OPT_STARTTLS = 5


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


def requests(command: int, count: int, length: int = 0) -> bytes:
    return b"".join(REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, 0, length) for cookie in range(count))


def connected(uri: str) -> Wire:
    client = Wire(uri)
    client.go()
    return client


def ask(client: Wire, length: int = 512) -> None:
    client.request(READ, 0, length)
    assert client.reply() == (0, 0)
    client.receive(length)


@dataclasses.dataclass(eq=False)
class Held(Layer):
    """Its child; flushing it takes until ``opened`` is set."""

    file: Layer
    opened: threading.Event = dataclasses.field(default_factory=threading.Event)
    flushes: int = 0

    @property
    def size(self) -> int:
        return self.file.size

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        return (Extent(length, self.file, offset),)

    def flush(self) -> None:
        self.flushes += 1
        assert self.opened.wait(60)


# -- turns -----------------------------------------------------------------------------------------------------------


def test_a_deep_queue_leaves_the_others_their_turns(nbd_server: NbdServers, disk: Path) -> None:
    """A thousand requests are there when another's single one comes: it does not wait for more than a turn of them."""
    server, uri = nbd_server.start(disk, format="raw", workers=1)
    deep, single = connected(uri), connected(uri)
    for client in (deep, single):
        ask(client)
    of_single = server.clients[1]
    first = _engine.stop_at("worker.read")
    deep.send(requests(READ, 1000, 512))
    assert first.wait_reached(20)
    single.request(READ, 0, 512)
    soon = _engine.stop_at("worker.read", 2 * 64)
    first.release()
    assert soon.wait_reached(20)
    begun = of_single.connection.counters()["requests"]
    soon.release()
    assert begun == 2
    assert single.reply() == (0, 0)
    for _ in range(1000):
        assert deep.reply()[1] == 0
        deep.receive(512)


@pytest.mark.parametrize("known", [False, True], ids=["found out by answering", "known before"])
def test_requests_that_were_sent_before_the_client_left_are_carried_out(
    nbd_server: NbdServers, disk: Path, known: bool
) -> None:
    """More than a turn of them."""
    _, uri = nbd_server.start(disk, format="raw", workers=1)
    client = connected(uri)
    client.request(1, 0, 512, data=bytes(512))
    assert client.reply() == (0, 0)  # from now on a worker writes
    count = 200
    with stopped_at("worker.write") if not known else contextlib.nullcontext() as stop:
        with client.together():
            for index in range(count):
                client.request(1, index * 512, 512, data=b"x" * 512)
        if stop is not None:
            assert stop.wait_reached(20)
        client.close()
    eventually(lambda: disk.read_bytes()[: count * 512] == b"x" * (count * 512))


# -- what is under way -----------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_not_read_from(nbd_server: NbdServers, disk: Path) -> None:
    server = nbd_server.process("--format", "raw", disk)
    hog, other = connected(server.uri()), connected(server.uri())
    before = memory(server)
    hog.socket.setblocking(False)
    piece, sent = requests(FLUSH, 4096), 0
    total = amount(100_000, 10_000_000)
    deadline = time.monotonic() + 2
    while sent < total * REQUEST.size and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            sent += hog.socket.send(piece[sent % len(piece) :])
            deadline = time.monotonic() + 2
    ask(other)
    assert sent < total * REQUEST.size, "the server has stopped reading"
    assert memory(server) - before < 8 * MIB
    hog.socket.setblocking(True)
    for _ in range(sent // REQUEST.size):
        assert hog.reply()[1] == 0


def test_a_client_that_comes_again_and_again_piles_up_nothing(nbd_server: NbdServers, disk: Path) -> None:
    """Its connections count until their requests have ended, and one more than it may have is turned away."""
    layer = Held(File(path=str(disk)))
    bounds = Bounds(connections_per_peer=4, requests_per_connection=16)
    server, uri = nbd_server.start(layer, bounds=bounds, fault_threads=2)
    for _ in range(4):
        client = connected(uri)
        client.send(requests(FLUSH, 100))
        counters = server.clients[-1].connection.counters
        eventually(lambda counters=counters: counters()["requests"] == 16)
        client.close()
    eventually(lambda: server.stats()["connections"] == 0)
    for _ in range(20):
        assert Wire(uri).rest() == b""
    assert server.stats()["turned_away"] == 20
    layer.opened.set()
    eventually(lambda: layer.flushes == 4 * 16 and server.stats()["reply_memory"] == 0)
    ask(connected(uri))


def test_replies_that_nobody_reads_are_bounded_over_all_connections(nbd_server: NbdServers, disk: Path) -> None:
    """Block status of 8,192 descriptors each. Beyond the limit others have one request under way each, and of those who
    do not read some are disconnected."""
    bounds = Bounds(reply_memory=2 * MIB)
    server, uri = nbd_server.start(Striped(File(path=str(disk))), bounds=bounds)
    hogs = [Wire(uri) for _ in range(4)]
    for hog in hogs:
        hog.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        hog.go(contexts=["base:allocation"], extended=True)
        with hog.together():
            for _ in range(100):
                hog.ask(BLOCK_STATUS, 0, SIZE)
    other = connected(uri)
    eventually(lambda: server.stats()["reply_memory"] >= bounds.reply_memory)
    most = 0
    deadline = time.monotonic() + 30
    while len(server.clients) == 5 and time.monotonic() < deadline:
        ask(other)
        most = max(most, server.stats()["reply_memory"])
    assert len(server.clients) < 5
    ask(other)
    # Each connection may have one request too many, and a worker may begin one as another does.
    assert most <= bounds.reply_memory + 8 * 2 * (8192 * 16 + 512)
    for hog in hogs:
        hog.close()
    eventually(lambda: server.stats()["reply_memory"] == 0)


@dataclasses.dataclass(eq=False)
class Striped(Layer):
    """Its child, of which every other block is said to be a hole."""

    file: Layer

    @property
    def size(self) -> int:
        return self.file.size

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        return (Extent(length, self.file, offset),)

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for block in itertools.count(offset // 512):
            yield 512, 3 * (block % 2)


# -- time ------------------------------------------------------------------------------------------------------------


def test_a_handshake_has_to_be_over_in_time(nbd_server: NbdServers, disk: Path) -> None:
    """However busy the client is with it; also within TLS's, and after its last option."""
    _, uri = nbd_server.start(disk, format="raw", bounds=Bounds(handshake_timeout=1))
    silent, slow, stays = Wire(uri), Wire(uri), connected(uri)
    slow.greet()
    deadline = time.monotonic() + 20
    with pytest.raises((ConnectionError, EOFError)):
        while time.monotonic() < deadline:
            slow.option(99)
            slow.option_reply()
            time.sleep(0.05)
    assert silent.rest() != b""  # the greeting, and then the end
    ask(stays)


def test_who_does_nothing_is_disconnected_if_so_wished(nbd_server: NbdServers, disk: Path) -> None:
    layer = Held(File(path=str(disk)))
    server, uri = nbd_server.start(layer, bounds=Bounds(idle_timeout=1.5))
    idle, busy, waiting = (connected(uri) for _ in range(3))
    waiting.request(FLUSH)
    eventually(lambda: layer.flushes == 1)
    began = time.monotonic()
    idle.socket.settimeout(0.1)
    while True:
        ask(busy)
        try:
            assert idle.socket.recv(1) == b""
            break
        except TimeoutError:
            assert time.monotonic() - began < 30
    assert time.monotonic() - began > 1
    eventually(lambda: len(server.clients) == 2)
    layer.opened.set()
    assert waiting.reply() == (0, 0), "who waits for us is not idle"


def test_by_default_nobody_is_disconnected_for_doing_nothing() -> None:
    assert (Bounds().idle_timeout, Bounds().keepalive) == (None, None)


def test_limits_by_default_follow_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, connections, peer in ((1024, 512, 384), (1 << 20, 4096, 3072), (resource.RLIM_INFINITY, 4096, 3072)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        found = Bounds().of_engine()
        assert (found["connections"], found["connections_per_peer"]) == (connections, peer)


# -- memory and descriptors ------------------------------------------------------------------------------------------


def memory(server: ServerProcess) -> int:
    """What the process has in memory, bytes: its own, not the pool."""
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("the kernel does not say")


def descriptors(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    tls.init(directory, hosts=["localhost"], client="alice")
    return directory


def secured(uri: str, pki: Path) -> ssl.SSLSocket:
    """A connection with TLS, in its handshake."""
    plain = Wire(uri)
    plain.greet()
    plain.option(OPT_STARTTLS)
    assert plain.option_reply() == (REP_ACK, b"")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki / tls.CA_CERT)
    context.load_cert_chain(pki / tls.CLIENT_CERT, pki / tls.CLIENT_KEY)
    return context.wrap_socket(plain.socket, server_hostname="localhost")


def enter(connection: socket.socket, export: str) -> Wire:
    client = Wire.of(connection)
    name = export.encode()
    client.option(OPT_GO, struct.pack(">I", len(name)) + name + bytes(2))
    while client.option_reply()[0] != REP_ACK:
        pass
    return client


@pytest.fixture
def both(nbd_server: NbdServers, disk: Path, pki: Path, tmp_path: Path) -> tuple[ServerProcess, str, str]:
    """A server that takes plain clients and TLS; by a Unix socket, and by TCP."""
    config = tmp_path / "exports.toml"
    config.write_text(f"""
        [tls]
        mode = "allowed"
        certificates = "{pki}"
        [exports.disk]
        image = "{disk}"
        format = "raw"
        """)
    tcp = f"nbd://127.0.0.1:{free_port()}"
    server = nbd_server.process("--listen", tcp, config)
    return server, server.uri("disk"), f"{tcp}/disk"


@pytest.mark.parametrize(("kind", "most"), [("plain", 16 * KIB), ("tls", 50 * KIB)])
def test_what_an_idle_connection_costs(both: tuple[ServerProcess, str, str], pki: Path, kind: str, most: int) -> None:
    """2,000 of them below 100 MiB: 50 KiB each."""
    server, unix, tcp = both
    count = amount(200, 2000)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def connect(uri: str) -> Wire:
        client = connected(uri) if kind == "plain" else enter(secured(uri, pki), "disk")
        ask(client, 64 * KIB)
        return client

    there = [connect(uri) for uri in (unix, tcp) * 20]
    before = memory(server)
    there += [connect(uri) for uri in (unix, tcp) * (count // 2)]
    cost = (memory(server) - before) / count
    print(f"an idle connection, {kind}: {cost / KIB:.1f} KiB")
    assert cost < most
    ask(there[-1])
    for client in there:
        client.close()


def stages(unix: str, tcp: str, pki: Path) -> list[Callable[[], None]]:
    """Ways in which a connection goes, each at another stage."""

    def silent(uri: str) -> None:
        Wire(uri).close()

    def half_an_option() -> None:
        client = Wire(unix)
        client.greet()
        client.send(IHAVEOPT + b"\0")
        client.close()

    def after_go(uri: str) -> None:
        client = connected(uri)
        ask(client)
        client.close()

    def in_a_write() -> None:
        client = connected(unix)
        client.send(REQUEST.pack(REQUEST_MAGIC, 0, 1, 0, 0, 64 * KIB) + bytes(100))
        client.close()

    def with_replies_unread() -> None:
        client = connected(tcp)
        client.send(requests(READ, 64, 64 * KIB))
        client.close()

    def reset() -> None:
        client = connected(tcp)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    def in_tls() -> None:
        client = Wire(tcp)
        client.greet()
        client.option(OPT_STARTTLS)
        client.option_reply()
        client.send(b"\x16\x03\x01\x00")
        client.close()

    def with_tls() -> None:
        client = enter(secured(unix, pki), "disk")
        ask(client)
        client.close()

    return [
        *(lambda: silent(unix), lambda: silent(tcp), half_an_option, lambda: after_go(unix), lambda: after_go(tcp)),
        *(in_a_write, with_replies_unread, reset, in_tls, with_tls),
    ]


def test_connections_that_come_and_go_leave_nothing(both: tuple[ServerProcess, str, str], pki: Path) -> None:
    server, unix, tcp = both
    ways = stages(unix, tcp, pki)

    def cycles(count: int) -> tuple[int, int]:
        """Memory and descriptors after so many connections, when all have gone."""
        for number in range(count):
            ways[number % len(ways)]()
        eventually(lambda: server.stats()["connections"] == 0)
        return memory(server), descriptors(server)

    before = cycles(200)
    count = amount(500, 10_000)
    after = cycles(count)
    print(f"{count} connections: {(after[0] - before[0]) / KIB:.0f} KiB, {after[1] - before[1]} descriptors")
    assert after[1] == before[1]
    assert after[0] - before[0] < 2 * MIB


# -- others ----------------------------------------------------------------------------------------------------------


#: A thread that another process had to make room for runs after so long, seconds; a page is read in a tenth of that.
SCHEDULED = 200e-6


def latencies(client: Wire, count: int) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        ask(client, 4 * KIB)
        found.append(time.perf_counter() - began)
    return found


def p99(found: list[float]) -> float:
    return statistics.quantiles(found, n=100)[-1]


@pytest.mark.alone
def test_slow_and_stuck_clients_do_not_slow_the_others(nbd_server: NbdServers, disk: Path) -> None:
    """200 slow handshakes, each sending a byte now and then, and a client that never reads its replies: the others' p99
    latency stays within twice what it was, or what a busy machine's scheduler costs. Rounds with and without them
    alternate."""
    server = nbd_server.process("--format", "raw", disk)
    client = connected(server.uri())
    rounds, count = amount(5, 15), amount(1000, 5000)
    without, beside = [], []
    latencies(client, count)
    for _ in range(rounds):
        without.append(p99(latencies(client, count)))
        with nuisances(server.uri()):
            beside.append(p99(latencies(client, count)))
    ratio = statistics.median(beside) / max(statistics.median(without), SCHEDULED)
    print(f"p99 beside slow and stuck clients: {ratio:.2f} times what it is without")
    assert ratio <= 2


@contextlib.contextmanager
def nuisances(uri: str) -> Iterator[None]:
    """`annoy`, in a process of its own: what it costs itself is not to be measured."""
    context = multiprocessing.get_context("spawn")
    ready, over = context.Event(), context.Event()
    process = context.Process(target=annoy, args=(uri, ready, over))
    process.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        over.set()
        process.join(60)
    assert process.exitcode == 0


def annoy(uri: str, ready: Event, over: Event) -> None:
    """200 slow handshakes and a client that does not read, until told to end."""
    slow = [Wire(uri) for _ in range(200)]
    for client in slow:
        client.greet()
    stuck = connected(uri)
    stuck.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            stuck.socket.send(requests(READ, 256, 64 * KIB))
    ready.set()
    data = IHAVEOPT + struct.pack(">II", 99, 60_000)
    for index in itertools.count():
        for client in slow:
            client.send(data[index : index + 1] or b"\0")
            if over.wait(0.01):
                return


def test_a_server_without_clients_counts_none() -> None:
    with Server() as server:
        server.export("", Memory(size=MIB))
        stats = server.stats()
        assert (stats["connections"], stats["turned_away"], stats["reply_memory"]) == (0, 0, 0)
