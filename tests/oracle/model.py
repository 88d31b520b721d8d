"""A model of a disk under overlapping requests: what may a read return now, and what after a crash?

The disk is a row of *grains*, of one length or of many, each holding one value: zeroes, its initial content, or the
unique tag of the write that put it there. Requests cover whole grains. NBD orders a request only after those whose
replies came before it was sent, so a grain has a *set* of allowed values::

    write A  |------------|              after both: A or B
    write B       |------------|
    write C                       |---|  after C: C alone

A write that has completed excludes whatever completed before it was submitted; what overlapped it in time stays
possible. A trim makes zero possible and excludes nothing. A read that no change overlaps must return one allowed value,
which from then on is the only one; a read that changes overlap may in addition return what they write, even mixed byte
by byte.

After a crash a value is excluded only by a *durable* change submitted after the value had been completed. A change is
durable if it completed before a flush was submitted that completed, or if it completed with FUA.

Times are ticks of the model's own clock: it advances at each submission and completion, as the client sees them.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

#: The value of a grain that reads as zeroes, and of one that nothing has written yet.
ZERO_TAG = 0
INITIAL_TAG = -1

_STAMP = struct.Struct("<qq")


class Kind(Enum):
    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"
    FLUSH = "flush"
    STATUS = "status"


CHANGES = (Kind.WRITE, Kind.ZERO, Kind.TRIM)


class Mismatch(AssertionError):
    """The disk did what the model forbids."""


class Value(NamedTuple):
    """A possible content of a grain: whose it is, and when that change completed."""

    tag: int
    completed: int


@dataclass(eq=False)
class Operation:
    """One request, from its submission on. ``first`` and ``last`` (exclusive) are grains."""

    kind: Kind
    first: int
    last: int
    tag: int
    fua: bool
    submitted: int
    completed: int | None = None
    #: For reads and status queries: the changes that overlapped it, in place and in time.
    changes: list[Operation] = field(default_factory=list)
    #: For reads and status queries: the possible values when it was submitted.
    before: list[tuple[Value, ...]] = field(default_factory=list)

    def overlaps(self, other: Operation) -> bool:
        return self.first < other.last and other.first < self.last

    def overlaps_in_time(self, other: Operation) -> bool:
        return not (
            (self.completed is not None and self.completed < other.submitted)
            or (other.completed is not None and other.completed < self.submitted)
        )

    def covers(self, grain: int) -> bool:
        return self.first <= grain < self.last


class Model:
    """The allowed contents of a disk of ``size`` bytes, whose content now is ``initial`` (None: zeroes).

    ``grain``: the length of all grains; or ``edges``: where each begins, ascending from 0, and at the end the size.
    (Grains shorter than a stamp may look alike, and then are told apart by their neighbours only.)
    ``crashes``: keep what `allowed_after_crash` needs, which takes memory with every change.
    """

    def __init__(
        self,
        size: int,
        *,
        grain: int = 512,
        edges: Sequence[int] | None = None,
        initial: bytes | None = None,
        crashes: bool = False,
    ) -> None:
        self.edges = range(0, size + 1, grain) if edges is None else edges
        assert self.edges[0] == 0 and self.edges[-1] == size
        self.size, self.count = size, len(self.edges) - 1
        self._initial = initial
        self._now = 0
        self._tags = 0
        tag = ZERO_TAG if initial is None else INITIAL_TAG
        #: What is on the disk after `replace`, by tag.
        self._replaced: dict[int, bytes] = {}
        self._possible: list[tuple[Value, ...]] = [(Value(tag, 0),)] * self.count
        self._in_flight: set[Operation] = set()
        # Flushes that have completed: when, and the latest submission among them all up to this one.
        self._flushes: list[tuple[int, int]] = []
        # Since the last crash (or the beginning): what a grain was then, and every change of it.
        self._crashes = crashes
        self._base: dict[int, tuple[Value, ...]] = {}
        self._history: dict[int, list[Operation]] = {}

    # -- the life of a request ----------------------------------------------------------------------------------

    def submit(self, kind: Kind, offset: int = 0, length: int = 0, *, fua: bool = False) -> Operation:
        """Note a request about to be sent. ``offset`` and ``length`` are bytes, whole grains."""
        first, last = self.grain_at(offset), self.grain_at(offset + length)
        assert self.edges[first] == offset and self.edges[last] == offset + length
        self._now += 1
        tag = ZERO_TAG
        if kind is Kind.WRITE:
            self._tags += 1
            tag = self._tags
        operation = Operation(kind, first, last, tag, fua, self._now)
        if kind in CHANGES:
            for other in self._in_flight:
                if other.kind in (Kind.READ, Kind.STATUS) and other.overlaps(operation):
                    other.changes.append(operation)
            if self._crashes:
                for grain in range(operation.first, operation.last):
                    self._base.setdefault(grain, self._possible[grain])
                    self._history.setdefault(grain, []).append(operation)
        elif kind in (Kind.READ, Kind.STATUS):
            operation.changes = [o for o in self._in_flight if o.kind in CHANGES and o.overlaps(operation)]
            operation.before = self._possible[operation.first : operation.last]
        self._in_flight.add(operation)
        return operation

    def replace(self, content: bytes) -> Operation:
        """Note that the whole disk is about to become ``content``, at once; `complete` it when it has."""
        operation = self.submit(Kind.WRITE, 0, self.size)
        self._replaced[operation.tag] = content
        return operation

    def payload(self, operation: Operation) -> bytearray:
        """The data a write sends."""
        return bytearray().join(self.content(operation.tag, grain) for grain in range(operation.first, operation.last))

    def complete(self, operation: Operation, data: bytes | bytearray | memoryview = b"") -> None:
        """Note a successful reply; for a read, with its ``data``. Raises Mismatch."""
        self._finish(operation)
        if operation.kind is Kind.READ:
            self._check_read(operation, memoryview(data))
        elif operation.kind is Kind.FLUSH:
            self._flushes.append((self._now, max(operation.submitted, self._flushed(self._now))))
        elif operation.kind in CHANGES:
            self._apply(operation)

    def complete_status(self, operation: Operation, runs: Sequence[tuple[int, bool]]) -> None:
        """Note a block status reply: (bytes, whether it claims zeroes). Raises Mismatch for a false claim."""
        self._finish(operation)
        start = self.edges[operation.first]
        for length, zero in runs:
            # Whole grains inside the run, and inside what was asked.
            first = bisect.bisect_left(self.edges, start)
            last = min(self.grain_at(min(start + length, self.size)), operation.last)
            for place in range(first, last) if zero else ():
                if self.content(ZERO_TAG, place) not in self._contents(operation, place):
                    raise Mismatch(f"grain {place} is said to be zero; {self._describe(operation, place)}")
            start += length

    def fail(self, operation: Operation) -> None:
        """Note an error reply: a change that failed may have happened or not, and so may it after a crash."""
        self._finish(operation)
        if operation.kind in CHANGES:
            operation.completed = None
            for grain in range(operation.first, operation.last):
                self._possible[grain] = (*self._possible[grain], Value(operation.tag, self._now))

    def _finish(self, operation: Operation) -> None:
        self._now += 1
        operation.completed = self._now
        self._in_flight.remove(operation)

    def _apply(self, operation: Operation) -> None:
        new = Value(operation.tag, self._now)
        possible = self._possible
        for grain in range(operation.first, operation.last):
            if operation.kind is Kind.TRIM:
                kept = possible[grain]
            else:
                kept = tuple(value for value in possible[grain] if value.completed > operation.submitted)
            possible[grain] = (*(value for value in kept if value.tag != operation.tag), new) if kept else (new,)

    # -- what may be read ---------------------------------------------------------------------------------------

    def grain_at(self, offset: int) -> int:
        """The grain that a byte lies in; ``count`` for the end."""
        return bisect.bisect_right(self.edges, offset) - 1

    def content(self, tag: int, grain: int) -> bytes:
        """The bytes of a grain that holds ``tag``."""
        start, end = self.edges[grain], self.edges[grain + 1]
        if tag == ZERO_TAG:
            return bytes(end - start)
        if tag in self._replaced:
            return self._replaced[tag][start:end]
        if tag == INITIAL_TAG:
            assert self._initial is not None
            return self._initial[start:end]
        return (_STAMP.pack(tag, grain) * -(-(end - start) // _STAMP.size))[: end - start]

    def _parts(self, operation: Operation, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The grains of a range, each with its part of the data."""
        base = self.edges[operation.first]
        for grain in range(operation.first, operation.last):
            yield grain, data[self.edges[grain] - base : self.edges[grain + 1] - base]

    def _check_read(self, operation: Operation, data: memoryview) -> None:
        for grain, got in self._parts(operation, data):
            overlapped = any(change.covers(grain) for change in operation.changes)
            if not overlapped:
                self._settle(grain, got, self._possible[grain], operation)
            else:
                contents = self._contents(operation, grain)
                if got not in contents and not _mixed(got, contents):
                    raise Mismatch(f"grain {grain} reads {_show(got)}; {self._describe(operation, grain)}")

    def _settle(self, grain: int, got: memoryview, possible: tuple[Value, ...], operation: Operation) -> None:
        """Nothing was changing: what was read is what the grain is from now on."""
        for value in possible:
            if got == self.content(value.tag, grain):
                if len(possible) > 1:
                    self._possible[grain] = (value,)
                return
        raise Mismatch(f"grain {grain} reads {_show(got)}; {self._describe(operation, grain)}")

    def _contents(self, operation: Operation, grain: int) -> list[bytes]:
        """What a read that ran while ``operation`` did may return, grain by grain."""
        changes = [change.tag for change in operation.changes if change.covers(grain)]
        values = operation.before[grain - operation.first] if changes else self._possible[grain]
        return [self.content(tag, grain) for tag in {*changes, *(value.tag for value in values)}]

    def _describe(self, operation: Operation, grain: int) -> str:
        values = sorted({value.tag for value in self._possible[grain]})
        changes = [f"{change.kind.value} {change.tag}" for change in operation.changes if change.covers(grain)]
        return f"allowed: {values}, then overlapped by {changes} (byte {self.edges[grain]:#x}, tick {self._now})"

    # -- crashes ------------------------------------------------------------------------------------------------

    def allowed_after_crash(self, grain: int, at: int | None = None) -> set[int]:
        """The tags a grain may hold after a crash; ``at`` is the last tick the client saw before it (None: now).

        A change of which the client saw no end until then may have happened, later ones included.
        """
        assert self._crashes
        if grain not in self._history:
            return {value.tag for value in self._possible[grain]}
        now = self._now if at is None else at
        flushed = self._flushed(now)
        history = self._history[grain]
        excluded = max(
            (
                change.submitted
                for change in history
                if change.completed is not None
                and change.kind is not Kind.TRIM
                and (change.completed < flushed or (change.fua and change.completed <= now))
            ),
            default=-1,
        )
        allowed = {change.tag for change in history if change.completed is None or change.completed > excluded}
        return allowed | {value.tag for value in self._base[grain] if excluded < 0}

    def _flushed(self, now: int) -> int:
        """When the last flush that had completed by ``now`` was submitted."""
        index = bisect.bisect_right(self._flushes, now, key=lambda flush: flush[0])
        return self._flushes[index - 1][1] if index else -1

    def is_tie(self, grain: int, one: bytes, other: bytes) -> bool:
        """Whether a grain came to hold either of these by changes that ran at the same time, so that nobody can say
        which of them came last."""
        changes = self._history.get(grain, ())
        ones = [change for change in changes if self.content(change.tag, grain) == one]
        others = [change for change in changes if self.content(change.tag, grain) == other]
        return any(a.overlaps_in_time(b) for a in ones for b in others)

    def check_crashed(self, data: bytes | bytearray | memoryview, at: int | None = None) -> None:
        """Hold the disk's whole content after a crash (see `allowed_after_crash`) against the model. Mismatch."""
        view = memoryview(data)
        assert len(view) == self.size
        for grain in range(self.count):
            self._crashed_tag(grain, view, at)

    def recover(self, data: bytes | bytearray | memoryview) -> None:
        """`check_crashed`, and go on from there: what is on the disk now is what it holds."""
        view = memoryview(data)
        assert len(view) == self.size
        found = [Value(self._crashed_tag(grain, view, None), self._now) for grain in range(self.count)]
        self._possible = [(value,) for value in found]
        self._in_flight.clear()
        self._base.clear()
        self._history.clear()
        self._flushes.clear()

    def _crashed_tag(self, grain: int, view: memoryview, at: int | None) -> int:
        got = view[self.edges[grain] : self.edges[grain + 1]]
        allowed = self.allowed_after_crash(grain, at)
        for tag in allowed:
            if got == self.content(tag, grain):
                return tag
        raise Mismatch(
            f"after the crash grain {grain} (byte {self.edges[grain]:#x}) reads {_show(got)}; allowed: "
            f"{sorted(allowed)}, of {list(self._lives(grain))}"
        )

    def _lives(self, grain: int) -> Iterator[str]:
        for change in self._history.get(grain, ()):
            fua = " FUA" if change.fua else ""
            yield f"{change.kind.value} {change.tag}{fua} [{change.submitted}, {change.completed}]"

    @property
    def now(self) -> int:
        """The model's clock."""
        return self._now

    @property
    def quiescent(self) -> bool:
        return not self._in_flight


def _mixed(got: memoryview, contents: list[bytes]) -> bool:
    """Whether each byte comes from one of ``contents``: memory being copied to while it is read."""
    return all(any(content[i] == byte for content in contents) for i, byte in enumerate(got))


def _show(got: memoryview) -> str:
    """A grain for a message: whose it is, if it bears a stamp."""
    if not any(got):
        return "zeroes"
    if len(got) < _STAMP.size:
        return got.hex()
    tag, grain = _STAMP.unpack_from(got)
    whole = got == (_STAMP.pack(tag, grain) * -(-len(got) // _STAMP.size))[: len(got)]
    return f"tag {tag} of grain {grain}{'' if whole else ', torn'}: {got[:32].hex()}"
