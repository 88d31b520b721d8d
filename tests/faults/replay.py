"""Crash states from a recording of the engine's I/O (``nbdserver serve --record DIR``).

The recording is the order of events; the beginning and the end of an operation are two events. A crash at an event
leaves a file in which

* everything is present that ended before a sync began which itself ended, without error, before the crash;
* of the rest, whatever had begun may be there or not: the *optional* operations;
* two operations, one of which ended before the other began, are never seen in the other order.

Record layout: nbdserver/engine/src/record.rs.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

MAGIC: Final = 0x4E424452
_RECORD: Final = struct.Struct("<IBBHIIQQQ")
#: What a disk writes whole or not at all, bytes.
SECTOR: Final = 512


class Event(IntEnum):
    BEGIN = 1
    END = 2
    FILE = 3


class Action(IntEnum):
    WRITE = 1
    ZERO = 2
    DISCARD = 3
    SYNC = 4
    RESIZE = 5


@dataclass(eq=False)
class Recorded:
    """One operation on one file. ``begin`` and ``end`` (None: it never did) are byte positions in the recording,
    after the record. ``durable`` is the position from which on it cannot be lost (None: never, as when it
    ``failed``: then nobody knows what it did). A RESIZE has its new size in ``offset``."""

    action: Action
    file: str
    offset: int
    length: int
    payload: bytes
    begin: int
    end: int | None = None
    failed: bool = False
    durable: int | None = None


def load(path: Path) -> list[Recorded]:
    """All operations of a recording, in the order they began. A record cut off at the end is left out."""
    names: dict[int, str] = {}
    open_operations: dict[int, Recorded] = {}
    operations: list[Recorded] = []
    for position, event, action, file, value, sequence, offset, length, payload in _records(path.read_bytes()):
        if event is Event.FILE:
            names[file] = payload.decode()
        elif event is Event.BEGIN:
            recorded = Recorded(Action(action), names[file], offset, length, payload, position)
            open_operations[sequence] = recorded
            operations.append(recorded)
        else:
            recorded = open_operations.pop(sequence)
            recorded.end, recorded.failed = position, value != 0
    _mark_durable(operations)
    return operations


def _records(data: bytes) -> Iterator[tuple[int, Event, int, int, int, int, int, int, bytes]]:
    position = 0
    while position + _RECORD.size <= len(data):
        magic, event, action, _, file, value, sequence, offset, length = _RECORD.unpack_from(data, position)
        assert magic == MAGIC, f"no record at byte {position}"
        position += _RECORD.size
        has_payload = event == Event.FILE or (event == Event.BEGIN and action == Action.WRITE)
        payload = data[position : position + length] if has_payload else b""
        if has_payload:
            if len(payload) < length:
                return
            position += length
        yield position, Event(event), action, file, value, sequence, offset, length, payload


def _mark_durable(operations: list[Recorded]) -> None:
    """From the last sync backwards: the earliest end of a sync that began after the operation had ended."""
    moments: list[tuple[int, Recorded, bool]] = []
    for operation in operations:
        if operation.end is not None and not operation.failed:
            is_sync = operation.action is Action.SYNC
            moments.append((operation.begin if is_sync else operation.end, operation, is_sync))
    earliest: dict[str, int] = {}
    for _, operation, is_sync in sorted(moments, key=lambda moment: moment[0], reverse=True):
        if is_sync:
            assert operation.end is not None
            earliest[operation.file] = min(operation.end, earliest.get(operation.file, operation.end))
        else:
            operation.durable = earliest.get(operation.file)


class Replay:
    """The states that ``file`` can be in after a crash, ``initial`` being its content when the recording began."""

    def __init__(self, operations: list[Recorded], file: str, initial: bytes) -> None:
        self.operations = [o for o in operations if o.file == file and o.action is not Action.SYNC]
        self._initial = initial

    def positions(self) -> list[int]:
        """Every crash point that matters: where an operation begins or ends, in order."""
        return sorted({p for o in self.operations for p in (o.begin, o.end) if p is not None})

    def prefix(self, position: int) -> bytearray:
        """The file if everything that had begun by ``position`` is there."""
        return self._apply([o for o in self.operations if o.begin <= position])

    def is_all(self, content: bytes) -> bool:
        """Whether a file that nobody stopped, and that now holds ``content``, can be the outcome of the recording.

        Where two operations ran at the same time on the same bytes, nobody knows which of them was the last.
        """
        state = self.prefix(self.positions()[-1])
        if len(state) != len(content):
            return False
        seen = bytearray(content)
        for start, stop in self._undecided():
            seen[start:stop] = state[start:stop]
        return seen == state

    def _undecided(self) -> Iterator[tuple[int, int]]:
        """The ranges that two operations had in common while both ran."""
        running: list[Recorded] = []
        for operation in self.operations:
            running = [other for other in running if other.end is None or other.end > operation.begin]
            for other in running:
                start = max(operation.offset, other.offset)
                stop = min(operation.offset + operation.length, other.offset + other.length)
                if start < stop:
                    yield start, stop
            running.append(operation)

    def reordered(self, position: int, pick: random.Random) -> bytearray:
        """The file if ``pick`` chooses which optional operations are there, and which only in part."""
        share = pick.choice((0.05, 0.3, 0.5, 0.7, 0.95))
        chosen = []
        for operation in self.operations:
            if operation.begin > position:
                break
            if operation.durable is not None and operation.durable <= position:
                chosen.append((_moment(operation, position, pick), operation))
            elif pick.random() < share:
                chosen.append((_moment(operation, position, pick), _torn(operation, pick)))
        return self._apply([operation for _, operation in sorted(chosen, key=lambda choice: choice[0])])

    def _apply(self, operations: list[Recorded]) -> bytearray:
        state = bytearray(self._initial)
        for operation in operations:
            _apply(state, operation)
        return state


def _moment(operation: Recorded, position: int, pick: random.Random) -> float:
    """Some moment while the operation ran. Sorting by it keeps what was in sequence in sequence."""
    end = position if operation.end is None else min(operation.end, position)
    return pick.uniform(operation.begin, end)


def _torn(operation: Recorded, pick: random.Random) -> Recorded:
    """Now and then only some sectors of a longer write are there."""
    if operation.action is not Action.WRITE or operation.length <= SECTOR or pick.random() < 0.8:
        return operation
    # A sector boundary of the file, not of the payload.
    sectors = range(operation.offset // SECTOR + 1, -(-(operation.offset + operation.length) // SECTOR))
    if not sectors:
        return operation
    cut = pick.choice(sectors) * SECTOR - operation.offset
    start, stop = (0, cut) if pick.random() < 0.5 else (cut, operation.length)
    return Recorded(
        Action.WRITE,
        operation.file,
        operation.offset + start,
        stop - start,
        operation.payload[start:stop],
        operation.begin,
        operation.end,
    )


def _apply(state: bytearray, operation: Recorded) -> None:
    """Do to ``state`` what the operation does to a file. A discard reads as zeroes, as a hole does."""
    end = operation.offset + operation.length
    if operation.action is Action.RESIZE:
        del state[operation.offset :]
        state.extend(bytes(operation.offset - len(state)))
        return
    if operation.action is Action.DISCARD:
        end = min(end, len(state))
    elif end > len(state):
        state.extend(bytes(end - len(state)))
    if end > operation.offset:
        state[operation.offset : end] = operation.payload or bytes(end - operation.offset)
