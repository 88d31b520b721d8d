"""``nbdserver explain``: the way of one request through an export's stack, and what becomes of REGISTERED_BUF.

::

    request ──> hop: root ──extent──> hop: child ──extent──> open file      memory passed on: the flag is kept
                             └──CODE: the layer's code, which says what it does with memory (`Layer.buffers`)

The layers answer for themselves (`Layer.resolve`), as they would in a server; no data is read or written. The files are
open for reading only: what a layer writes while it opens for writing stays in memory (`Unwritten`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from nbdserver import registry
from nbdserver.config import Config, ExportConfig
from nbdserver.errors import ConfigError
from nbdserver.extent import CODE, FILE_MODE, ZERO, Extent, FileMode, Special, Transform, clip, lawful
from nbdserver.files import SOMEBODY, FileOpener, Files, PlainFile
from nbdserver.graph import INTENTS, Child, Graph, Leaf, flatten
from nbdserver.layer import Buffers, Layer
from nbdserver.limits import EXTENTS_SHOWN_COUNT_MAX, PAYLOAD_MAX
from nbdserver.permissions import ONLOOKER, READER, Grant
from nbdserver.request import Flag, Operation, Request, Segment, Vector

OPERATIONS: Final = {operation.value: operation for operation in (Operation.READ, Operation.WRITE, Operation.ZERO)}

MAPPED: Final = Buffers("none: always mapped", "none: always mapped", "none: always mapped")


@dataclass(frozen=True)
class Step:
    """One extent of a hop: where these bytes of the layer live, and what becomes of the request's memory there.

    ``target``: a child's role, a file's name, "ZERO" or "CODE". ``flag``: "kept", "bounced" (pool memory takes its
    place, or stands beside it), "lost", "ends" (the memory is filled here, and goes no further), or "no memory".
    """

    offset: int
    length: int
    target: str
    target_offset: int
    writable: bool
    through: str | None
    flag: str
    why: str


@dataclass(frozen=True)
class Hop:
    """A request as it arrives at one layer. ``role``: what the layer is to the one above, at ``depth`` - 1."""

    depth: int
    role: str
    layer: str
    name: str | None
    offset: int
    length: int
    flags: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Part:
    """A range of the request, and whether the engine needs Python for it: where it has been asked (``cached`` is not
    None), now; else once it knows where the range lives. ``cached``: whether it does."""

    offset: int
    length: int
    faults: bool
    why: str
    cached: bool | None = None


@dataclass(frozen=True)
class Explanation:
    """``hops`` in the order of a walk, parents before children. ``refused``: why nothing of it is done."""

    export: str
    operation: str
    offset: int
    length: int
    size: int
    refused: str | None
    hops: tuple[Hop, ...]
    engine: tuple[Part, ...]
    is_cut_off: bool

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, told: dict[str, Any]) -> Explanation:
        """What `as_json` gave."""
        hops = tuple(Hop(**{**hop, "steps": tuple(Step(**step) for step in hop["steps"])}) for hop in told["hops"])
        return cls(**{**told, "hops": hops, "engine": tuple(Part(**part) for part in told["engine"])})


def explain(wanted: Config, name: str, operation: Operation, offset: int, length: int) -> Explanation:
    """Open one export of ``wanted`` and explain a request to it. ValueError for a request that no client may make,
    ConfigError, ImageError."""
    export = find(wanted, name)
    with _opened(wanted, export) as (root, read_only):
        return explain_layers(export.name, root, read_only, operation, offset, length)


#: Which parts of a range the engine has cached, to be written or not: (offset, length, write) -> (length, is it?) runs.
Known = Callable[[int, int, bool], Sequence[tuple[int, bool]]]


def explain_layers(
    name: str, root: Layer, read_only: bool, operation: Operation, offset: int, length: int, known: Known | None = None
) -> Explanation:
    """Explain a request to an export whose layers are open, and of which the engine, asked by ``known``, may have met a
    part already. ValueError for a request that no client may make."""
    _check(operation, offset, length, root.size)
    refused = None
    if operation is not Operation.READ and (read_only or root.read_only):
        refused = "the export is read-only: EPERM"
    walk = _Walk(root, _request(operation, offset, length))
    hops = () if refused else tuple(walk.hops())
    engine = () if refused else tuple(_engine(root, operation, offset, length))
    if known is not None:
        engine = tuple(part for whole in engine for part in _met(whole, operation, known))
    return Explanation(name, operation.value, offset, length, walk.size, refused, hops, engine, walk.is_cut_off)


def find(wanted: Config, name: str) -> ExportConfig:
    """The export of that name; the empty name is the default's, or the only one's. Raises ConfigError."""
    for export in wanted.exports:
        if export.name == name:
            return export
    if name == "":
        for export in wanted.exports:
            if export.default or len(wanted.exports) == 1:
                return export
    names = ", ".join(repr(export.name) for export in wanted.exports)
    raise ConfigError(f"there is no export {name!r}; there are: {names}")


def parse_range(text: str) -> tuple[int, int]:
    """OFFSET+LENGTH, each with a unit ("1M+4K") or in hexadecimal ("0x10000+512"). ValueError."""
    offset, plus, length = text.partition("+")
    if not plus:
        raise ValueError(f"found {text!r}, allowed is OFFSET+LENGTH, such as 1M+4K")
    return _number(offset), _number(length)


def _number(text: str) -> int:
    if text[:2].lower() == "0x":
        return int(text, 16)
    return registry.parse_size(text)


def _check(operation: Operation, offset: int, length: int, size: int) -> None:
    if length == 0:
        raise ValueError("a request has at least 1 byte")
    if offset + length > size:
        raise ValueError(f"{length} bytes at {offset:#x} pass the end of the disk, which has {size} bytes")
    if operation is not Operation.ZERO and length > PAYLOAD_MAX:
        raise ValueError(f"a request carries at most {PAYLOAD_MAX} bytes, found {length}")


# -- opening -------------------------------------------------------------------------------------------------------


class Unwritten(PlainFile):
    """A file that is only read: what is written to it stays in memory, and is read from there."""

    def __init__(self, fd: int, name: str, read_only: bool) -> None:
        super().__init__(fd, name, read_only)
        #: (offset, bytes, or how many zeroes), in the order in which they were written.
        self._changes: list[tuple[int, bytes | int]] = []
        self._size = super().size

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, vector: Vector) -> None:
        super().read(offset, vector)
        for start, change in self._changes:
            count = change if isinstance(change, int) else len(change)
            first, stop = max(start, offset), min(start + count, offset + vector.length)
            if first >= stop:
                continue
            part = vector.slice(first - offset, stop - first)
            if isinstance(change, int):
                part.zero()
            else:
                part.fill(change[first - start : stop - start])

    def write(self, offset: int, vector: Vector) -> None:
        self._change(offset, vector.tobytes(), vector.length)

    def zero(self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool) -> None:
        self._change(offset, length, length)

    def _change(self, offset: int, change: bytes | int, length: int) -> None:
        self._changes.append((offset, change))
        self._size = max(self._size, offset + length)

    def discard(self, offset: int, length: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def resize(self, size: int) -> None:
        if size < self._size:
            self._changes.append((size, self._size - size))
        self._size = size

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        there = max(min(super().size - offset, length), 0)
        runs = super().status(offset, there) if there else []
        return [*runs, (length - there, True)] if there < length else runs


class UnwrittenFiles(Files):
    """Files that are opened for reading alone, also by who wants to write."""

    def __init__(self, *, locked: bool = True) -> None:
        super().__init__(lambda fd, name, read_only, mode: Unwritten(fd, name, read_only))
        self._grant = READER if locked else ONLOOKER

    def open(
        self,
        path: str,
        *,
        read_only: bool,
        mode: FileMode = FILE_MODE,
        grant: Grant | None = None,
        user: str = SOMEBODY,
    ) -> PlainFile:
        file = super().open(path, read_only=True, mode=mode, grant=self._grant, user=user)
        assert isinstance(file, Unwritten)
        file.read_only = read_only
        return file


def trial(wanted: Config, export: ExportConfig) -> None:
    """Open and close an export of ``wanted`` and change nothing, though its files be locked: to see that it can be.
    Nobody may write them meanwhile. Raises ConfigError, ImageError."""
    with _opened(wanted, export, locked=False):
        pass


@contextlib.contextmanager
def _opened(wanted: Config, export: ExportConfig, *, locked: bool = True) -> Iterator[tuple[Layer, bool]]:
    """The root layer, open, and whether the configuration has it read-only."""
    root, read_only = export.build()
    graph = Graph()
    graph.open(root, FileOpener(graph, UnwrittenFiles(locked=locked), roots=wanted.roots, read_only=read_only))
    try:
        yield root, read_only
    finally:
        graph.close(root)


# -- walking -------------------------------------------------------------------------------------------------------


class _Slot:
    """Registered memory that nobody looks at."""

    view = memoryview(bytearray())
    registration = (0, 0, 0)


def _request(operation: Operation, offset: int, length: int) -> Request:
    """A client's request, as the engine would make it: its memory is a slot of the registered pool."""
    if operation is Operation.ZERO:
        return Request.zero(offset, length, Flag.MAY_UNMAP)
    return Request(operation, offset, length, Vector((Segment(_Slot(), 0, length),)))


class _Arrival(NamedTuple):
    """A request on its way to a layer, and the transform that was set above."""

    depth: int
    role: str
    layer: Layer
    request: Request
    transform: Transform | None


class _Walk:
    """A walk from ``root`` down, one hop for every range that a layer is asked for."""

    def __init__(self, root: Layer, request: Request) -> None:
        self._pending = [_Arrival(0, "", root, request, None)]
        self._left = EXTENTS_SHOWN_COUNT_MAX
        #: Whether there was more than is shown.
        self.is_cut_off = False
        self.size = root.size

    def hops(self) -> Iterator[Hop]:
        while self._pending and not self.is_cut_off:
            yield self._hop(self._pending.pop())

    def _hop(self, arrival: _Arrival) -> Hop:
        layer, request = arrival.layer, arrival.request
        answers = layer.resolve(request.offset, request.length, INTENTS[request.operation])
        extents = clip(lawful(answers, request.offset, request.length, layer.size, layer.type), request.length)
        steps: list[Step] = []
        below: list[_Arrival] = []
        done = 0
        for extent in extents:
            if self._left == 0:
                self.is_cut_off = True
                break
            self._left -= 1
            part = request.slice(done, extent.length)
            transform = extent.through if isinstance(extent.through, Transform) else arrival.transform
            target = _target(layer, extent)
            flag, why = _fate(layer, extent, part, transform)
            steps.append(
                Step(part.offset, part.length, target, extent.offset, extent.writable, _through(extent), flag, why)
            )
            if isinstance(extent.target, Layer):
                child = extent.target.layer if isinstance(extent.target, Child) else extent.target
                below.append(_Arrival(arrival.depth + 1, target, child, part.moved(extent.offset), transform))
            done += extent.length
        self._pending.extend(reversed(below))
        names = tuple(flag.name or "" for flag in request.flags)
        return Hop(
            arrival.depth, arrival.role, layer.type, layer.filename, request.offset, request.length, names, tuple(steps)
        )


def _target(layer: Layer, extent: Extent) -> str:
    target = extent.target
    if isinstance(target, Special):
        return target.name
    if not isinstance(target, Layer):
        return target.name
    return next((role for role, child in layer.children() if child is target), target.type)


def _through(extent: Extent) -> str | None:
    if extent.through is None:
        return None
    return extent.through.cipher if isinstance(extent.through, Transform) else "meter"


def _fate(layer: Layer, extent: Extent, part: Request, transform: Transform | None) -> tuple[str, str]:
    """What becomes of the memory, and so of the flag, at one extent; and why."""
    operation = part.operation
    if extent.target is CODE:
        word, _, why = getattr(buffers_of(type(layer)), operation.value).partition(": ")
        called = f"the code of {layer.type} is called"
        word = {"keeps": "kept", "bounces": "bounced", "loses": "lost"}.get(word, word)
        return ("no memory" if word == "none" else word), f"{called}: {why}" if why else called
    if operation is Operation.ZERO:
        done = "nothing to do: it reads as zeroes" if extent.target is ZERO else "zeroed there"
        return "no memory", done
    if extent.target is ZERO:
        return "ends", "the memory is filled with zeroes"
    if isinstance(extent.target, Layer):
        return "kept", "the memory is passed on"
    if transform is not None and operation is Operation.WRITE:
        return "bounced", "encrypted into pool memory by the engine, and written from there"
    return "kept", "read into the memory, and decrypted there" if transform is not None else "I/O on the memory"


def buffers_of(layer: type[Layer]) -> Buffers:
    """What the layer's code does with memory; of an operation that it has no code for, that it is mapped."""
    has_code = layer.read is not Layer.read or layer.write is not Layer.write
    return layer.buffers if has_code else MAPPED


# -- the engine ----------------------------------------------------------------------------------------------------


def _engine(root: Layer, operation: Operation, offset: int, length: int) -> Iterator[Part]:
    """What the engine does with each part of the request, like neighbours joined."""
    last: Part | None = None
    end = offset + length
    for leaf in flatten(root, offset, length, INTENTS[operation]):
        count = min(leaf.length, end - offset)
        faults, why = _fault(leaf, operation, count)
        if last is not None and (last.faults, last.why) == (faults, why):
            last = dataclasses.replace(last, length=last.length + count)
        else:
            if last is not None:
                yield last
            last = Part(offset, count, faults, why)
        offset += count
        if offset == end:
            break
    if last is not None:
        yield last


def _met(part: Part, operation: Operation, known: Known) -> Iterator[Part]:
    """What the engine would do now: a part that it has not met faults, to be resolved."""
    offset = part.offset
    for length, cached in known(part.offset, part.length, operation is Operation.WRITE):
        unknown = not part.faults and not cached
        why = f"not cached: it is to be resolved; then {part.why}" if unknown else part.why
        yield Part(offset, length, part.faults or unknown, why, cached)
        offset += length


def _fault(leaf: Leaf, operation: Operation, length: int) -> tuple[bool, str]:
    if operation is Operation.ZERO:
        return True, "zero requests are always run by the layers"
    if leaf.target is CODE:
        assert leaf.layer is not None
        return True, f"CODE of {leaf.layer.type}"
    if leaf.target is ZERO:
        return False, "zeroes, with no I/O"
    assert not isinstance(leaf.target, Special)
    if operation is Operation.WRITE and not leaf.writable:
        return True, f"not writable where it is, in {leaf.target.name}"
    if leaf.transform is not None and (leaf.position | leaf.position + length) % leaf.transform.sector_size:
        return True, f"part of a sector of {leaf.transform.sector_size} bytes"
    return False, f"mapped, in {leaf.target.name}"


# -- showing -------------------------------------------------------------------------------------------------------


def table(explanation: Explanation) -> str:
    """The explanation as text, in columns."""
    it = explanation
    lines = [f"{it.operation} of {it.length} bytes at {it.offset:#x} of export {it.export!r} ({it.size} bytes)"]
    if it.refused is not None:
        return f"{lines[0]}\nrefused: {it.refused}"
    rows: list[tuple[str, ...]] = [("LAYER", "RANGE", "FLAGS", "LIVES AT", "FLAG", "WHY")]
    for hop in it.hops:
        rows.extend(_rows(hop))
    lines += ["", *columns(rows)]
    if it.is_cut_off:
        lines.append(f"... and more: only {EXTENTS_SHOWN_COUNT_MAX} extents are shown")
    engine = [("RANGE", "ENGINE", "CACHED", "WHY")]
    cached = {None: "?", True: "yes", False: "no"}
    engine += [
        (_range(part.offset, part.length), "faults" if part.faults else "no fault", cached[part.cached], part.why)
        for part in it.engine
    ]
    lines += ["", *columns(engine)]
    if any(part.cached is None for part in it.engine):
        lines += ["", "A range that the engine has not met before faults once more, to be resolved."]
    return "\n".join(lines)


def _rows(hop: Hop) -> Iterator[tuple[str, ...]]:
    role = f"{hop.role}: " if hop.role else ""
    layer = f"{'  ' * hop.depth}{role}{hop.layer}"
    flags = " ".join(hop.flags) or "-"
    for step in hop.steps:
        yield layer, _range(step.offset, step.length), flags, _place(step), step.flag, step.why
        layer, flags = "", ""


def _place(step: Step) -> str:
    if step.target in (ZERO.name, CODE.name):
        return step.target
    through = f" through {step.through}" if step.through else ""
    return f"{step.target} {step.target_offset:#x}{through}, {'writable' if step.writable else 'not writable'}"


def _range(offset: int, length: int) -> str:
    return f"{offset:#x}+{length}"


def columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """A table's rows as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
