"""For tests of the registered-buffer flag: memory that counts as registered, and a layer that sees what arrives."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

from nbdserver.errors import RequestError
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Graph
from nbdserver.layer import Layer, finish
from nbdserver.reference import Reference
from nbdserver.request import Flag, Operation, Registration, Request, Segment, Vector, add_region

_slots = itertools.count()


class RegisteredBuffer:
    """A live slot of a registered pool, as far as a request can tell. ``registration = None`` ends that."""

    def __init__(self, data: int | bytes) -> None:
        self.view = memoryview(bytearray(data))
        self.registration: tuple[int, int, int] | None = Registration(0, next(_slots), 1)
        add_region(self)

    @property
    def registered_region(self) -> tuple[int, int]:
        if self.registration is None or not self.view.nbytes:
            return 0, 0
        return ctypes.addressof(ctypes.c_char.from_buffer(self.view)), self.view.nbytes


def registered(data: int | bytes) -> Vector:
    """A vector of registered memory: these bytes, or so many zeroes. Fits `FileOpener`'s ``allocate``."""
    buffer = RegisteredBuffer(data)
    return Vector((Segment(buffer, 0, len(buffer.view)),))


class Seen(NamedTuple):
    """A request that has passed."""

    operation: Operation
    offset: int
    length: int
    flags: Flag

    @property
    def is_registered(self) -> bool:
        return Flag.REGISTERED_BUF in self.flags


@dataclasses.dataclass(eq=False)
class Spy(Layer):
    """Passes every request on to ``file``, all of them through code, and notes them in ``seen``.

    What is in ``fails`` it refuses with that errno instead; "flush" stands for flushes, which it only counts.
    """

    file: Layer

    supported_read_flags: ClassVar[Flag] = Flag.PREFETCH
    supported_write_flags: ClassVar[Flag] = Flag.MAY_UNMAP | Flag.NO_FALLBACK | Flag.WRITE_UNCHANGED

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[Seen] = []
        self.flushes = 0
        self.fails: dict[Operation | Literal["flush"], int] = {}

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, request: Request) -> None:
        self.seen.append(Seen(request.operation, request.offset, request.length, request.flags))
        self._refuse(request.operation)
        finish(getattr(self.file, request.operation.value)(request))

    write = zero = trim = read

    def flush(self) -> None:
        self.flushes += 1
        self._refuse("flush")
        finish(self.file.flush())

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self.file.status(context, offset, length)

    def take(self, operation: Operation | None = None) -> list[Seen]:
        """What has passed since the last time; or what of it was this operation."""
        seen, self.seen = self.seen, []
        return [one for one in seen if operation in (None, one.operation)]

    def _refuse(self, what: Operation | Literal["flush"]) -> None:
        if what in self.fails:
            raise RequestError(self.fails[what], "the spy refuses")


@contextlib.contextmanager
def open_registered(root: Layer) -> Iterator[Reference]:
    """`reference.open_stack`, with bounce memory that counts as registered."""
    graph = Graph()
    graph.open(root, FileOpener(graph, Files(), allocate=registered))
    try:
        yield Reference(root)
    finally:
        graph.close(root)
