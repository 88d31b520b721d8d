"""What tests of the registered-buffer flag have in common: every layer in a stack, with spies as its children."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from layers.blkverify import Blkverify
from layers.compress import Compress
from layers.copy_before_write import CopyBeforeWrite
from layers.copy_on_read import CopyOnRead
from layers.detect_zeroes import DetectZeroes
from layers.file import File
from layers.luks import Luks
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.quorum import Quorum
from layers.raw import Raw
from layers.snapshot import Snapshot
from layers.snapshot_access import SnapshotAccess
from layers.throttle import Throttle
from nbdserver.extent import BlockLimits
from nbdserver.layer import Buffers, Layer
from nbdserver.reference import Reference
from nbdserver.request import Flag, Operation, Request
from tests.layers import luks_kit
from tests.registered import Seen, Spy, open_registered, registered
from tests.serving import create, qemu_io
from tests.serving import run as run_tool

KIB, MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(eq=False)
class Invert(Layer):
    """Turns every bit over: the smallest layer that lives by code."""

    file: Layer

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, request: Request) -> None:
        self.file.read(request)
        request.vector.fill(_inverted(request.vector.tobytes()))

    def write(self, request: Request) -> None:
        bounced = self.allocate(request.length)
        bounced.fill(_inverted(request.vector.tobytes()))
        self.file.write(request.with_vector(bounced))


def _inverted(data: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in data)


@dataclasses.dataclass(eq=False)
class Blocks(Layer):
    """Takes whole blocks only, and not many at once: what becomes of requests before its code is called."""

    file: Layer

    supported_write_flags: ClassVar[Flag] = Flag.MAY_UNMAP
    buffers: ClassVar[Buffers] = Buffers(
        read="keeps: cut up; padded to whole blocks, with pool memory",
        write="bounces: cut up; what blocks hold around the request is read into pool memory beside it",
        zero="bounces: what is no whole block is written, from pool memory",
    )

    @property
    def limits(self) -> BlockLimits:
        return BlockLimits(request_alignment=512, max_transfer=16 * KIB)

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, request: Request) -> None:
        assert request.offset % 512 == request.length % 512 == 0
        getattr(self.file, request.operation.value)(request)

    write = zero = read


class Stack(NamedTuple):
    """``layer`` is looked at, ``spies`` are its children; ``root`` is where requests are made."""

    root: Layer
    layer: Layer
    spies: list[Spy]


class Growing(Spy):
    """A spy on a file that may be resized, which tells data from a layer's own metadata (`Layer.pread`,
    `Layer.pwrite`): that is not in ``seen``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.metadata_count = 0

    def read(self, request: Request) -> None:
        super().read(request)
        if any(frame.function in ("pread", "pwrite") for frame in inspect.stack(0)[1:12]):
            self.seen.pop()
            self.metadata_count += 1

    write = zero = trim = read

    def resize(self, size: int) -> None:
        self.file.resize(size)


class Compressing(Growing):
    """A spy on what can compress."""

    is_filter: ClassVar[bool] = True
    supported_write_flags: ClassVar[Flag] = Growing.supported_write_flags | Flag.WRITE_COMPRESSED


def memory() -> Spy:
    return Spy(Memory(MIB))


def _on(kind: Callable[..., Layer], count: int = 1) -> Stack:
    spies = [memory() for _ in range(count)]
    layer = kind(*spies)
    return Stack(layer, layer, spies)


def _copy_on_read(directory: Path) -> Stack:
    return _above(CopyOnRead, Qcow2(File(str(_chain(directory)))))


def _compress(directory: Path) -> Stack:
    spy = Compressing(Qcow2(File(str(_chain(directory)))))
    layer = Compress(spy)
    return Stack(layer, layer, [spy])


def _chain(directory: Path) -> Path:
    """An overlay that has nothing of its own yet; unless it is there already."""
    base, top = directory / "base.raw", directory / "top.qcow2"
    if top.exists():
        return top
    base.write_bytes(b"b" * MIB)
    return create(top, MIB, backing=base, backing_format="raw")


def _above(kind: Callable[[Spy], Layer], below: Layer) -> Stack:
    spy = Growing(below)
    layer = kind(spy)
    return Stack(layer, layer, [spy])


def _luks(directory: Path) -> Stack:
    path = directory / "disk.luks"
    if not path.exists():
        luks_kit.create(path)
    key = luks_kit.secret(directory)
    return _above(lambda spy: Luks(spy, key_file=str(key)), File(str(path)))


def _copy_before_write(directory: Path) -> Stack:
    disk = directory / "disk.raw"
    disk.write_bytes(b"d" * MIB)  # or there would be nothing to copy
    spies = [Spy(File(str(disk))), memory()]
    layer = CopyBeforeWrite(spies[0], spies[1])
    return Stack(layer, layer, spies)


def _snapshot(directory: Path) -> Stack:
    below = _copy_before_write(directory)
    layer = SnapshotAccess(below.layer)
    return Stack(layer, layer, below.spies)


def _internal_snapshot(directory: Path) -> Stack:
    path = directory / "disk.qcow2"
    if not path.exists():
        create(path, MIB)
        qemu_io(path, f"write -P 1 0 {MIB}")
        run_tool("qemu-img", "snapshot", "-c", "shown", path)
    spy = Growing(File(str(path)))
    layer = Snapshot(Qcow2(spy), "shown")
    return Stack(layer, layer, [spy])


#: A stack for every layer that stands on others.
STACKS: dict[str, Callable[[Path], Stack]] = {
    "blkverify": lambda directory: _on(Blkverify, 2),
    "compress": _compress,
    "copy-before-write": _copy_before_write,
    "copy-on-read": _copy_on_read,
    "detect-zeroes": lambda directory: _on(DetectZeroes),
    "luks": _luks,
    "qcow2": lambda directory: _above(Qcow2, File(str(_chain(directory)))),
    "quorum": lambda directory: _on(lambda *spies: Quorum([*spies], 2), 3),
    "raw": lambda directory: _on(Raw),
    "snapshot": _internal_snapshot,
    "snapshot-access": _snapshot,
    "throttle": lambda directory: _on(Throttle),
}

#: Further ones, and variants.
VARIANTS: dict[str, Callable[[Path], Stack]] = {
    "blocks": lambda directory: _on(Blocks),
    "invert": lambda directory: _on(Invert),
    "quorum fifo": lambda directory: _on(lambda *spies: Quorum([*spies], 2, read_pattern="fifo"), 3),
}

#: What is asked of each: whole sectors and clusters, and parts of them.
RANGES = ((0, 64 * KIB), (3 * 64 * KIB + 100, 5000), (MIB - 4096, 4096))

#: Zeroed alone: part of a cluster that has not been written yet.
FRESH = (6 * 64 * KIB + 100, 3000)


class Hops(NamedTuple):
    """What children were asked for, by the operation that was asked of the layer; and all that was read."""

    seen: dict[Operation, list[list[Seen]]]
    data: list[bytes]


def run(stack: Stack) -> Hops:
    """Read, write, read again and zero, with registered memory; from children that begin alike."""
    hops = Hops({operation: [] for operation in Operation}, [])
    with _opened(stack) as export:
        for operation in (Operation.READ, Operation.WRITE, Operation.READ, Operation.ZERO):
            if operation is not Operation.READ and stack.layer.read_only:
                continue
            for offset, length in (*RANGES, FRESH) if operation is Operation.ZERO else RANGES:
                _ask(export, operation, offset, length, hops.data)
                hops.seen[operation] += [spy.take() for spy in stack.spies]
    return hops


@contextlib.contextmanager
def _opened(stack: Stack) -> Iterator[Reference]:
    with open_registered(stack.root) as export:
        for spy in stack.spies:
            spy.take()  # what opening takes
        yield export


def _ask(export: Reference, operation: Operation, offset: int, length: int, data: list[bytes]) -> None:
    if operation is Operation.ZERO:
        export.zero(offset, length)
        return
    vector = registered(length)
    if operation is Operation.WRITE:
        vector.fill(bytes(1 + at % 255 for at in range(length)))
    export.execute(Request(operation, offset, length, vector))
    if operation is Operation.READ:
        data.append(vector.tobytes())


def is_payload(seen: Seen) -> bool:
    """Whether the request has memory."""
    return seen.operation in (Operation.READ, Operation.WRITE)
