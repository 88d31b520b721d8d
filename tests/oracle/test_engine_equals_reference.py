"""The engine equals the reference, byte and errno, on random graphs and random request streams.

A stack of layers is built twice on equal files: one is served by the engine and asked over NBD, the other is run by
`nbdserver.reference`. Meanwhile a thread keeps dropping ranges from the engine's cache (``changed`` of random layers
of the stack), so that faults, fills and shoot-downs race with the requests.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.raw import Raw
from nbdserver.errors import RequestError
from nbdserver.extent import Extent, Intent
from nbdserver.layer import Layer, finish
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag, Request, Vector
from nbdserver.server import FAST_ZERO, FUA, NO_HOLE, Export
from nbdserver.testing import NbdServers
from tests.interop.wire import FLUSH, READ, REQUEST, REQUEST_MAGIC, WRITE, Wire
from tests.serving import SEED, amount, check, create, run

TRIM, CACHE, WRITE_ZEROES = 4, 5, 6


# -- layers of the test's own: one of each kind ----------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Invert(Layer):
    """A data layer: every byte is the child's, inverted."""

    file: Layer

    @property
    def size(self) -> int:
        return self.file.size

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def read(self, request: Request) -> None:
        finish(self.file.read(request))
        for view in request.vector.views():
            view[:] = bytes(byte ^ 0xFF for byte in view)

    async def write(self, request: Request) -> None:
        data = bytes(byte ^ 0xFF for byte in request.vector.tobytes())
        finish(self.file.write(request.with_vector(Vector.of(data))))


@dataclasses.dataclass(eq=False)
class Interleave(Layer):
    """A mapping layer with extents of odd lengths: stripes of the child in another order."""

    file: Layer
    stripe: int

    @property
    def size(self) -> int:
        return self.file.size - self.file.size % (2 * self.stripe)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((0, self.size),)

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        while offset < self.size:
            number, start = divmod(offset, self.stripe)
            yield Extent(self.stripe - start, self.file, (number ^ 1) * self.stripe + start, writable=True)
            offset += self.stripe - start


# -- stacks ----------------------------------------------------------------------------------------------------------

Stack = Callable[[Path], Layer]


def raw_file(size: int, seed: int) -> Stack:
    def build(directory: Path) -> Layer:
        path = directory / f"{seed}.raw"
        path.write_bytes(random.Random(seed).randbytes(size // 2))
        with path.open("r+b") as file:
            file.truncate(size)
        return File(path=str(path))

    return build


def memory(size: int) -> Stack:
    return lambda directory: Memory(size=size)


def qcow2(size: int, cluster_size: int, version: str, base_size: int, seed: int) -> Stack:
    """An overlay with some clusters written, zeroed and compressed, on a base of another size and cluster size."""

    def build(directory: Path) -> Layer:
        dice = random.Random(seed)
        base = directory / f"{seed}.base"
        raw = directory / f"{seed}.content"
        raw.write_bytes(dice.randbytes(base_size // 2) + bytes(base_size - base_size // 2))
        run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"cluster_size={dice.choice([4096, 65536])}", raw, base)
        top = create(directory / f"{seed}.qcow2", size, backing=base, cluster_size=cluster_size, compat=version)
        return Qcow2(file=File(path=str(top)))

    return build


def raw(below: Stack, offset: int) -> Stack:
    return lambda directory: Raw(file=below(directory), offset=offset)


def invert(below: Stack) -> Stack:
    return lambda directory: Invert(file=below(directory))


def interleave(below: Stack, stripe: int) -> Stack:
    return lambda directory: Interleave(file=below(directory), stripe=stripe)


SIZES = st.sampled_from([1 << 16, (1 << 18) + 512, (1 << 18) + 4097, 1 << 20])
SOURCES = st.one_of(
    st.builds(raw_file, SIZES, st.integers(0, 99)),
    st.builds(memory, SIZES),
    st.builds(
        qcow2,
        st.sampled_from([1 << 18, (1 << 18) + 512, 1 << 20]),
        st.sampled_from([512, 4096, 65536]),
        st.sampled_from(["0.10", "1.1"]),
        st.sampled_from([1 << 17, 1 << 20, 1 << 21]),
        st.integers(0, 99),
    ),
)
STACKS = st.recursive(
    SOURCES,
    lambda below: st.one_of(
        st.builds(raw, below, st.sampled_from([0, 512, 4096, 10001])),
        st.builds(invert, below),
        st.builds(interleave, below, st.sampled_from([512, 1000, 4096])),
    ),
    max_leaves=1,
)


# -- both sides ------------------------------------------------------------------------------------------------------


class Client:
    """The engine's side."""

    def __init__(self, uri: str) -> None:
        self.wire = Wire(uri)
        self.wire.go()

    def run(self, command: int, flags: int, offset: int, length: int, data: bytes) -> tuple[int, bytes]:
        """(errno, data read)."""
        self.wire.send(REQUEST.pack(REQUEST_MAGIC, flags, command, 7, offset, length) + data)
        cookie, error = self.wire.reply()
        assert cookie == 7
        return error, self.wire.receive(length) if command == READ and not error else b""


def expected(
    reference: Reference, command: int, flags: int, offset: int, length: int, data: bytes
) -> tuple[int, bytes]:
    """The reference's side: the same."""
    fua = Flag.FUA if flags & FUA else Flag.NONE
    try:
        match command:
            case 0:
                return 0, reference.read(offset, length)
            case 5:
                reference.read(offset, length)  # a read that answers no data
            case 1:
                reference.write(offset, data, fua)
            case 3:
                reference.flush()
            case 4:
                reference.trim(offset, length, fua)
            case 6:
                unmap = Flag.NONE if flags & NO_HOLE else Flag.MAY_UNMAP
                fast = Flag.NO_FALLBACK if flags & FAST_ZERO else Flag.NONE
                reference.zero(offset, length, fua | unmap | fast)
    except RequestError as error:
        return error.errno, b""
    return 0, b""


def requests(dice: random.Random, size: int, count: int) -> Iterator[tuple[int, int, int, int, bytes]]:
    """(command, flags, offset, length, data); some of them past the end."""
    for _ in range(count):
        command = dice.choices([READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, CACHE], [40, 35, 3, 8, 12, 2])[0]
        if command == FLUSH:
            yield FLUSH, 0, 0, 0, b""
            continue
        length = dice.choice([1, 511, 512, 513, 4096, 4097, 65536, dice.randrange(1, 1 << 17)])
        length = min(length, size)
        offset = dice.randrange(size - length + 1)
        if dice.random() < 0.5:
            offset -= offset % 512
        if dice.random() < 0.03:
            offset = size - length // 2
        flags = FUA if command != READ and dice.random() < 0.1 else 0
        if command == WRITE_ZEROES:
            flags |= dice.choice([0, NO_HOLE, FAST_ZERO, NO_HOLE | FAST_ZERO])
        yield command, flags, offset, length, dice.randbytes(length) if command == WRITE else b""


class Disturbance:
    """A thread that keeps telling the graph that mappings have changed, though they have not."""

    def __init__(self, export: Export, dice: random.Random) -> None:
        self._export, self._dice = export, dice
        self._layers = list(_all(export.root))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.wait(self._dice.random() / 500):
            layer = self._dice.choice(self._layers)
            offset = self._dice.randrange(layer.size)
            layer.changed(offset, self._dice.randrange(1, layer.size - offset + 1))

    def __enter__(self) -> Disturbance:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _all(layer: Layer) -> Iterator[Layer]:
    layer = getattr(layer, "layer", layer)
    yield layer
    for _, child in layer.children():
        yield from _all(child)


@settings(max_examples=amount(25, 400), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(stack=STACKS, seed=st.integers(0, 1 << 30))
def test_byte_and_errno(
    nbd_servers_of_example: Callable[[], NbdServers], tmp_path_factory: pytest.TempPathFactory, stack: Stack, seed: int
) -> None:
    dice = random.Random(seed ^ SEED)
    directory = tmp_path_factory.mktemp("stacks")
    ours, theirs = directory / "engine", directory / "reference"
    ours.mkdir()
    theirs.mkdir()
    engine_root, reference_root = stack(ours), stack(theirs)
    backend = dice.choice(["auto", "threads"])
    server, uri = nbd_servers_of_example().start(engine_root, backend=backend, pool=1 << 22)
    with open_stack(reference_root) as reference, Disturbance(server._exports[""], dice):
        assert engine_root.size == reference.size
        client = Client(uri)
        for request in requests(dice, reference.size, amount(60, 200)):
            assert client.run(*request) == expected(reference, *request), request[:4]
        assert client.run(READ, 0, 0, reference.size, b"") == (0, reference.read(0, reference.size))
        client.wire.close()
    server.stop()
    for image in directory.rglob("*.qcow2"):
        check(image)


@pytest.fixture
def nbd_servers_of_example(request: pytest.FixtureRequest) -> Callable[[], NbdServers]:
    """The fixture is one for all examples; each stops its own server."""
    servers: NbdServers = request.getfixturevalue("nbd_server")
    return lambda: servers
