"""For tests of the registered-buffer flag: memory that counts as registered, and a layer that sees what arrives."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

from nbdserver.layer import Layer
from nbdserver.request import Flag, Operation, Registration, Request, Segment, Vector

_slots = itertools.count()


class RegisteredBuffer:
    """A live slot of a registered pool, as far as a request can tell. ``registration = None`` ends that."""

    def __init__(self, data: int | bytes) -> None:
        self.view = memoryview(bytearray(data))
        self.registration: tuple[int, int, int] | None = Registration(0, next(_slots), 1)


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
    """Passes every request on to ``file``, all of them through code, and notes them in ``seen``."""

    file: Layer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[Seen] = []

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, request: Request) -> None:
        self.seen.append(Seen(request.operation, request.offset, request.length, request.flags))
        getattr(self.file, request.operation.value)(request)

    write = zero = trim = read
