"""Sessions spoilt by a mutator: the handshake without a socket, and a server with one. (What the engine parses has a
mutator of its own, at a higher rate: ``nbdserver/engine/src/fuzz.rs``.)"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nbdserver.handshake import Handshake, Option, Reply, StartTls, Style, TlsMode
from nbdserver.limits import MIB, OPTION_MAX
from nbdserver.testing import NbdServers
from tests.protocol.kit import READ, WRITE, Client, half_close, is_served
from tests.protocol.mutator import corpus, mutated
from tests.protocol.test_handshake_fuzz import EXPORTS, check
from tests.serving import FULL, SEED, amount

ENGINE = Path(__file__).parents[2] / "nbdserver" / "engine"

#: Of 10 million inputs in all, how many go to each.
WIRE_INPUTS = 9_000_000
HANDSHAKE_INPUTS = 1_000_000
SERVER_INPUTS = 20_000

#: What a run may add to the memory of whoever is fuzzed: nothing is kept from one input to the next.
GROWTH_MAX = 16 * MIB


def resident(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def options(session: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The options of a session, framed as the engine frames them: (code, data, or its length if that is too much)."""
    while len(session) >= 16:
        magic, code, length = struct.unpack_from(">8sII", session)
        if magic != b"IHAVEOPT" or (length <= OPTION_MAX and len(session) < 16 + length):
            return
        yield code, session[16 : 16 + length] if length <= OPTION_MAX else length
        session = session[16 + length :]


def negotiate(session: bytes, mode: TlsMode) -> int:
    """Hold every answer to proto.md; how many there were."""
    handshake = Handshake(lambda: EXPORTS, peer="fuzz", tls=mode)
    if len(session) < 4 or handshake.client_flags(int.from_bytes(session[:4])) is not None:
        return 0
    answers = 0
    for code, data in options(session[4:]):
        action = handshake.option(code, data) if isinstance(data, bytes) else handshake.oversized(code, data)
        answers += 1
        if isinstance(action, StartTls):
            assert code == Option.STARTTLS and mode is not TlsMode.OFF
            handshake.secured()
            continue
        check(action, code)
        if not isinstance(action, Reply):
            break
    return answers


def test_handshakes() -> None:
    pick, sessions, answers, before = random.Random(SEED), corpus("handshake"), 0, 0
    inputs = amount(10_000, HANDSHAKE_INPUTS)
    for number in range(inputs):
        answers += negotiate(mutated(sessions, pick), pick.choice(list(TlsMode)))
        if number == inputs // 10:
            before = resident()
    assert answers > inputs
    assert resident() - before < GROWTH_MAX


def test_a_server(nbd_server: NbdServers, config: Path) -> None:
    """Whole sessions, handshake and all, by sockets: the server neither ends, nor grows, nor disturbs anybody."""
    server = nbd_server.process(config)
    witness = Client(server.uri()).enter(name="witness")
    pick, inputs, before = random.Random(SEED), amount(300, SERVER_INPUTS), 0
    greetings = corpus("handshake")
    requests = {style: corpus(style) for style in Style}
    for number in range(inputs):
        style = pick.choice(list(Style))
        with contextlib.suppress(ConnectionError, EOFError):
            if number % 3 == 0:
                client = Client(server.uri(), flags=None)
                client.send(mutated(greetings, pick))
            else:
                contexts = [] if style is Style.SIMPLE else ["base:allocation"]
                client = Client(server.uri()).enter(style, contexts=contexts)
                client.send(mutated(requests[style], pick))
            half_close(client)
            client.rest()
        client.close()
        if number % 64 == 0:
            assert witness.do(WRITE, 0, data=number.to_bytes(512)).error == 0
            assert witness.do(READ, 0, 512).data == number.to_bytes(512)
        if number == inputs // 10:
            before = resident(server.pid)
    is_served(server.uri())
    assert resident(server.pid) - before < GROWTH_MAX
    assert server.terminate() == 0


if FULL:

    def test_the_engines_parser() -> None:
        command = ["cargo", "test", "--quiet", "--release", "--no-default-features", "fuzz"]
        environment = {**os.environ, "NBDSERVER_FUZZ_INPUTS": str(WIRE_INPUTS), "NBDSERVER_SEED": str(SEED)}
        subprocess.run(command, cwd=ENGINE, env=environment, check=True)
