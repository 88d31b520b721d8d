"""What the qcow2 tests have in common: a file in memory that remembers, stops and fails, and the crash states of it."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from layers.qcow2 import Qcow2
from nbdserver.layer import Layer
from nbdserver.reference import Reference
from nbdserver.request import Flag, Request

SECTOR = 512

#: Kinds of images that differ in how writing goes, as options of `tests.serving.create`.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"cluster_size": 4096},
    "subclusters": {"cluster_size": 16384, "extended_l2": "on"},
    "data file": {"cluster_size": 4096, "data_file": "beside"},
    "data file, subclusters": {"cluster_size": 16384, "extended_l2": "on", "data_file": "beside"},
    "raw data file": {"cluster_size": 4096, "data_file": "beside", "data_file_raw": "on"},
}

#: What discarded bytes look like: undefined, so not like anything.
GARBAGE = 0xDB


class Operation(NamedTuple):
    """What was done to a file. ``name``: write, zero, discard, resize, sync; or mark, of what the test does."""

    name: str
    offset: int
    data: bytes
    length: int
    #: Which file it was done to, by its number.
    file: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.offset:#x}+{self.length:#x}"


@dataclasses.dataclass(eq=False)
class RecordedFile(Layer):
    """A file in memory: every operation is logged when it has been done, and ``before`` is called ahead of it.

    ``_beside``: another file, whose log this one's operations go into as well, with the next number.
    """

    data: bytearray
    _beside: RecordedFile | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log: list[Operation] = [] if self._beside is None else self._beside.log
        self.number = 0 if self._beside is None else self._beside.number + 1
        self.before: Callable[[Operation], None] = lambda operation: None
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def filename(self) -> str:
        return "recorded"

    def mark(self, name: str) -> int:
        """Enter something of the test's own; its position."""
        with self._lock:
            self.log.append(Operation(name, 0, b"", 0))
            return len(self.log) - 1

    def read(self, request: Request) -> None:
        self.before(Operation("read", request.offset, b"", request.length))
        with self._lock:
            request.vector.fill(self.data[request.offset : request.end])

    def write(self, request: Request) -> None:
        self._do(Operation("write", request.offset, request.vector.tobytes(), request.length))

    def zero(self, request: Request) -> None:
        self._do(Operation("zero", request.offset, bytes(request.length), request.length))

    def trim(self, request: Request) -> None:
        self._do(Operation("discard", request.offset, bytes([GARBAGE]) * request.length, request.length))

    def flush(self) -> None:
        self._do(Operation("sync", 0, b"", 0))

    def resize(self, size: int) -> None:
        self._do(Operation("resize", size, b"", 0))

    def _do(self, operation: Operation) -> None:
        operation = operation._replace(file=self.number)
        self.before(operation)
        with self._lock:
            apply(self.data, operation)
            self.log.append(operation)


def apply(data: bytearray, operation: Operation, sectors: Callable[[int], bool] | None = None) -> None:
    """Do an operation to a file's bytes, or only those of its sectors that ``sectors`` picks."""
    if operation.name == "resize":
        del data[operation.offset :]
        data.extend(bytes(operation.offset - len(data)))
    elif operation.data:
        end = operation.offset + operation.length
        data.extend(bytes(max(end - len(data), 0)))
        start = operation.offset
        while start < end:
            stop = min((start // SECTOR + 1) * SECTOR, end) if sectors else end
            if sectors is None or sectors(start // SECTOR):
                data[start:stop] = operation.data[start - operation.offset : stop - operation.offset]
            start = stop


# -- crash states ---------------------------------------------------------------------------------------------------


def crash_states(
    initial: bytes, log: list[Operation], pick: random.Random, count: int
) -> Iterator[tuple[int, bytearray]]:
    """`crash_states_of` one file."""
    return ((position, state) for position, (state,) in crash_states_of([initial], log, pick, count))


def crash_states_of(
    initial: Sequence[bytes], log: list[Operation], pick: random.Random, count: int
) -> Iterator[tuple[int, list[bytearray]]]:
    """(position, files): what a crash can leave that comes when all of ``log[:position]`` has begun.

    ``count`` prefixes (or all there are), and ``count`` states in which operations since the last sync of their file
    are lost, or torn by sectors: anywhere, but mostly just before a sync, when most can be.
    """
    positions = [position for position in range(len(log) + 1) if position == 0 or log[position - 1].name in CHANGES]
    before_syncs = [position for position, operation in enumerate(log) if operation.name == "sync"]
    prefixes = pick.sample(positions, min(count, len(positions)))
    shuffled = [pick.choice(before_syncs if before_syncs and pick.random() < 0.8 else positions) for _ in range(count)]
    crashes = sorted([(position, True) for position in prefixes] + [(position, False) for position in shuffled])
    durable, pending, at = [bytearray(data) for data in initial], list[Operation](), 0
    for position, is_prefix in crashes:
        for operation in log[at:position]:
            if operation.name == "sync":
                for earlier in pending:
                    if earlier.file == operation.file:
                        apply(durable[earlier.file], earlier)
                pending = [earlier for earlier in pending if earlier.file != operation.file]
            else:
                pending.append(operation)
        at = position
        states = [bytearray(data) for data in durable]
        for operation, sectors in _survivors(pending, pick, everything=is_prefix):
            apply(states[operation.file], operation, sectors)
        yield position, states


def _survivors(
    pending: list[Operation], pick: random.Random, *, everything: bool
) -> Iterator[tuple[Operation, Callable[[int], bool] | None]]:
    """Which operations got out, and which of their sectors (None: all)."""
    changes = [operation for operation in pending if operation.name in CHANGES]
    one = pick.randrange(len(changes)) if changes else 0
    mode = pick.choice(("one is lost", "one is torn", "one gets out", "some get out", "some get out, torn"))
    share = pick.choice((0.1, 0.5, 0.9))
    for index, operation in enumerate(changes):
        if everything or (mode.startswith("one is") and index != one):
            yield operation, None
        elif mode == "one gets out":
            if index == one:
                yield operation, None
        elif mode == "one is torn" or (mode.startswith("some") and pick.random() < share):
            torn = mode.endswith("torn") and pick.random() < 0.7
            yield operation, (lambda sector: pick.random() < 0.5) if torn else None


CHANGES = ("write", "zero", "discard", "resize", "sync")


class History:
    """What each sector of a disk may hold after a crash: the flushed value, or what was written to it since."""

    def __init__(self, initial: bytes) -> None:
        #: For each sector: (began, ended, value), positions in the log.
        self._values = [[(-1, -1, initial[at : at + SECTOR])] for at in range(0, len(initial), SECTOR)]
        #: (began, ended) of each flush.
        self._flushes: list[tuple[int, int]] = [(0, 0)]

    def changed(self, offset: int, data: bytes, began: int, ended: int) -> None:
        """``data`` has been written to whole sectors, which the disk may just have grown by."""
        while len(self._values) * SECTOR < offset + len(data):
            self._values.append([])
        for index in range(len(data) // SECTOR):
            value = data[index * SECTOR : (index + 1) * SECTOR]
            self._values[offset // SECTOR + index].append((began, ended, value))

    def flushed(self, began: int, ended: int) -> None:
        self._flushes.append((began, ended))

    def wrong(self, position: int, disk: bytes) -> list[str]:
        """The sectors of ``disk``, which may have shrunk, that a crash at ``position`` cannot have left like that."""
        flushed = max(began for began, ended in self._flushes if ended <= position)
        wrong = []
        for sector, values in enumerate(self._values[: len(disk) // SECTOR]):
            found = disk[sector * SECTOR : (sector + 1) * SECTOR]
            allowed = []
            for began, ended, value in reversed(values):
                if began < position:
                    allowed.append(value)
                    if ended <= flushed:
                        break
            if found not in allowed:
                wrong.append(f"sector {sector}: {found[:16].hex()}, allowed {[value[:16].hex() for value in allowed]}")
        return wrong


def stamp(sector: int, number: int, length: int) -> bytes:
    """Data that no other write of the test has: each sector says which it is and who wrote it."""
    one = (f"{sector + index:08x}{number:08x}".encode() * 32 for index in range(length // SECTOR))
    return b"".join(one)


class Drive:
    """Random requests to an image in a `RecordedFile`, one after another, remembered in a `History`."""

    def __init__(self, file: RecordedFile, disk: Reference, initial: bytes, pick: random.Random, cluster: int) -> None:
        self.file, self.disk, self.pick, self.cluster = file, disk, pick, cluster
        self.history = History(initial)
        self.model = bytearray(initial)
        self._number = 0

    def step(self, *, writes: float = 0.6, longest: int = 8) -> None:
        """One write, zero, trim or flush; of ``longest`` clusters at most."""
        self._number += 1
        choice = self.pick.random()
        if choice < writes:
            self._change("write", SECTOR, longest)
        elif choice < writes + 0.15:
            self._change("zero", SECTOR, longest)
        elif choice < writes + 0.25:
            self._change("trim", self.cluster, longest)
        else:
            self.flush()

    def flush(self) -> None:
        began = self.file.mark("flush begins")
        self.disk.flush()
        self.history.flushed(began, self.file.mark("flush ended"))

    def _change(self, kind: str, unit: int, longest: int) -> None:
        start = self.pick.randrange(len(self.model) // unit) * unit
        length = min(self.pick.randint(1, longest * self.cluster // unit) * unit, len(self.model) - start)
        data = stamp(start // SECTOR, self._number, length) if kind == "write" else bytes(length)
        began = self.file.mark(f"{kind} {start:#x}+{length:#x} begins")
        if kind == "write":
            self.disk.write(start, data)
        elif kind == "zero":
            self.disk.zero(start, length, self.pick.choice((Flag.NONE, Flag.MAY_UNMAP)))
        else:
            self.disk.trim(start, length)
            data = self.disk.read(start, length)  # zeroes, except where the file is trimmed in place
        self.history.changed(start, data, began, self.file.mark(f"{kind} ended"))
        self.model[start : start + length] = data


def open_recorded(data: bytes, data_file: bytes | None = None, **options: object) -> tuple[RecordedFile, Qcow2]:
    """An image in memory, and a layer over it, not open yet. ``data_file``: what is in its external data file, which
    is recorded along with it."""
    file = RecordedFile(bytearray(data))
    if data_file is not None:
        options["data_file"] = RecordedFile(bytearray(data_file), file)
    return file, Qcow2(file, **options)  # type: ignore[arg-type]


class Thread(threading.Thread):
    """A call on a thread of its own; `done` waits for it and passes on what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def done(self) -> None:
        self.join(10)
        assert not self.is_alive(), "stuck"
        if self._error is not None:
            raise self._error

    def waits(self) -> bool:
        self.join(0.1)
        return self.is_alive()


class Fails:
    """Has the operation with this number, of those that change a file, fail."""

    def __init__(self, number: int, error: int) -> None:
        self.left, self._error = number, error

    def __call__(self, operation: Operation) -> None:
        self.left -= operation.name in ("write", "sync", "resize")
        if self.left == -1:
            raise OSError(self._error, "as told")
