"""For tests of copy-before-write and snapshot-access: both ends of one graph, and layers that hold requests up."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from layers.copy_before_write import CLUSTER_MIN, CopyBeforeWrite
from layers.memory import Memory
from layers.snapshot_access import SnapshotAccess
from nbdserver.files import Files
from nbdserver.graph import Graph
from nbdserver.layer import Layer
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Request
from tests.coherence.pages import Gate

CLUSTER = CLUSTER_MIN
#: Five clusters and a part of one.
SIZE = 5 * CLUSTER + 12345


class Ends(NamedTuple):
    """The live disk, the disk as it was, and the layer that keeps them apart."""

    live: Reference
    snap: Reference
    layer: CopyBeforeWrite


@contextlib.contextmanager
def opened(file: Layer, target: Layer | None = None, **keys: Any) -> Iterator[Ends]:
    """``file`` with its snapshot, taken now. The target is by default memory."""
    layer = CopyBeforeWrite(file, target if target is not None else Memory(SIZE), **keys)
    graph, files = Graph(), Files()
    with (
        open_stack(layer, graph=graph, files=files) as live,
        open_stack(SnapshotAccess(layer), graph=graph, files=files) as snap,
    ):
        yield Ends(live, snap, layer)


class FirstGate(Gate):
    """Holds only the first thread that comes once it has been closed."""

    def pass_through(self) -> None:
        if not self._reached.is_set():
            super().pass_through()


@dataclasses.dataclass(eq=False)
class Coded(Layer):
    """The bytes of ``file``, through code only: who reads, changes it or asks its status at ``gated`` offsets passes
    ``reading``, ``writing`` or ``asking``, and meets ``failure``."""

    file: Layer
    gated: range = range(1 << 62)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reading, self.writing, self.asking = FirstGate(), FirstGate(), FirstGate()
        self.failure: Exception | None = None
        self.flushes = 0

    @property
    def size(self) -> int:
        return self.file.size

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def read(self, request: Request) -> None:
        self._pass(self.reading, request.offset)
        self.file.read(request)

    def write(self, request: Request) -> None:
        self._pass(self.writing, request.offset)
        self.file.write(request)

    def zero(self, request: Request) -> None:
        self._pass(self.writing, request.offset)
        self.file.zero(request)

    def trim(self, request: Request) -> None:
        self._pass(self.writing, request.offset)
        self.file.trim(request)

    def flush(self) -> None:
        self.flushes += 1

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        self._pass(self.asking, offset)
        return self.file.status(context, offset, length)

    def _pass(self, gate: Gate, offset: int) -> None:
        if offset in self.gated:
            gate.pass_through()
            if self.failure is not None:
                raise self.failure


def pattern(size: int = SIZE) -> bytes:
    """Bytes that tell where they are from, none of them zero."""
    return b"".join(b"%07d\n" % number for number in range(size // 8 + 1))[:size]
