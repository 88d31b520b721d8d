"""A storm: random requests over several NBD connections, many in flight and overlapping, checked against a `Model`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import nbd

from tests.oracle.model import Kind, Model, Operation

#: The context of block status queries, and its flag for ranges that read as zeroes (proto.md).
ALLOCATION = nbd.CONTEXT_BASE_ALLOCATION
STATE_ZERO = 2


@dataclass(frozen=True)
class Weather:
    """What a storm is made of. Lengths in bytes."""

    weights: dict[Kind, int] = field(
        default_factory=lambda: {
            Kind.READ: 30,
            Kind.WRITE: 40,
            Kind.ZERO: 10,
            Kind.TRIM: 8,
            Kind.STATUS: 4,
            Kind.FLUSH: 2,
        }
    )
    length_max: int = 64 << 10
    #: Requests a connection has in flight.
    depth: int = 16
    connections: int = 4
    #: Part of the requests that aim at the few hot spots, so that they overlap.
    hot: float = 0.5
    hot_spots: int = 8
    fua: float = 0.05


class Storm:
    """Connections to ``uri`` and random requests on them. A context manager; leaving it disconnects."""

    def __init__(
        self,
        uri: str,
        model: Model,
        *,
        seed: int,
        weather: Weather | None = None,
        acknowledged: Callable[[Operation], None] = lambda _: None,
    ) -> None:
        """``acknowledged`` is called after each successful reply has been taken in."""
        self._acknowledged = acknowledged
        self.model, self.weather = model, weather or Weather()
        self.random = random.Random(seed)
        self.done: Counter[Kind] = Counter()
        self._memory: list[bytearray] = []
        self._failure: BaseException | None = None
        self._killed = False
        self._handles = [_connect(uri) for _ in range(self.weather.connections)]
        for handle in self._handles:
            assert handle.get_size() == model.size, (handle.get_size(), model.size)
        self._in_flight = dict.fromkeys(range(len(self._handles)), 0)
        self._hot = [self.random.randrange(model.count) for _ in range(self.weather.hot_spots)]
        self._shortest = min(end - start for start, end in itertools.pairwise(model.edges))
        self._kinds = list(self.weather.weights)
        self._weights = list(self.weather.weights.values())

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            if handle.aio_is_ready():
                handle.shutdown()
        self._handles.clear()

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, *, seconds: float | None = None, operations: int | None = None) -> None:
        """Keep all connections busy for so long, or for so many requests; then leave them in flight. Mismatch."""
        end = None if seconds is None else time.monotonic() + seconds
        limit = None if operations is None else sum(self.done.values()) + operations
        sent = sum(self.done.values()) + sum(self._in_flight.values())
        while (end is None or time.monotonic() < end) and (limit is None or sent < limit):
            for index in self._in_flight:
                while self._in_flight[index] < self.weather.depth and (limit is None or sent < limit):
                    self._send(index)
                    sent += 1
            self._wait(1.0)

    def drain(self) -> None:
        """Wait for every reply."""
        deadline = time.monotonic() + 60
        while any(self._in_flight.values()):
            assert time.monotonic() < deadline, f"requests unanswered for a minute: {self._in_flight}"
            self._wait(1.0)

    def verify(self) -> bytes:
        """With nothing in flight, read all of the disk through the first connection; the model checks it."""
        self.drain()
        model, data = self.model, b""
        while len(data) < model.size:
            length = model.edges[model.grain_at(min(len(data) + (1 << 20), model.size))] - len(data)
            operation = model.submit(Kind.READ, len(data), length)
            part = bytes(self._handles[0].pread(length, len(data)))
            model.complete(operation, part)
            data += part
        return data

    def run_until_killed(self, killer: threading.Timer) -> None:
        """Keep all connections busy until ``killer`` has killed the server, and take in the replies it still sent.

        What has no reply then stays in flight in the model.
        """
        self._killed = True
        killer.start()
        while not all(_gone(handle) for handle in self._handles):
            for index, handle in enumerate(self._handles):
                with contextlib.suppress(nbd.Error):
                    while not _gone(handle) and self._in_flight[index] < self.weather.depth:
                        self._send(index)
            self._wait(0.1)
        killer.join()
        assert killer.finished.is_set(), "the server went away by itself"

    # -- one request --------------------------------------------------------------------------------------------

    def _send(self, index: int) -> None:
        kind = self.random.choices(self._kinds, self._weights)[0]
        if kind is Kind.FLUSH:
            self._start(index, kind, 0, 0, fua=False)
            return
        offset, length = self._range()
        fua = kind not in (Kind.READ, Kind.STATUS) and self.random.random() < self.weather.fua
        self._start(index, kind, offset, length, fua=fua)

    def _range(self) -> tuple[int, int]:
        """A random range of whole grains: lengths spread over the orders of magnitude, up to the longest."""
        model, pick, longest = self.model, self.random, self.weather.length_max
        length = int(self._shortest * (longest / self._shortest) ** pick.random())
        if pick.random() < self.weather.hot:
            start = model.edges[pick.choice(self._hot)] + pick.randrange(-length, length + 1)
        else:
            start = pick.randrange(model.size)
        first = model.grain_at(max(0, min(start, model.size - length)))
        last = max(first + 1, model.grain_at(min(model.edges[first] + length, model.size)))
        return model.edges[first], model.edges[last] - model.edges[first]

    def _start(self, index: int, kind: Kind, offset: int, length: int, *, fua: bool) -> None:
        handle = self._handles[index]
        operation = self.model.submit(kind, offset, length, fua=fua)
        flags = nbd.CMD_FLAG_FUA if fua else 0
        self._in_flight[index] += 1
        if kind is Kind.READ:
            self._read(handle, operation, index, offset, length)
        elif kind is Kind.WRITE:
            memory = self._take_memory()
            memory[:length] = self.model.payload(operation)
            ended = self._ended(operation, index, memory=memory)
            handle.aio_pwrite(nbd.Buffer.from_buffer(memoryview(memory)[:length]), offset, ended, flags)
        elif kind is Kind.ZERO:
            flags |= self.random.choice((0, 0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO))
            handle.aio_zero(length, offset, self._ended(operation, index), flags)
        elif kind is Kind.TRIM:
            handle.aio_trim(length, offset, self._ended(operation, index), flags)
        elif kind is Kind.FLUSH:
            handle.aio_flush(self._ended(operation, index))
        else:
            self._status(handle, operation, index, offset, length)

    def _read(self, handle: Any, operation: Operation, index: int, offset: int, length: int) -> None:
        memory = self._take_memory()
        buffer = nbd.Buffer.from_buffer(memoryview(memory)[:length])

        def complete() -> None:
            self.model.complete(operation, memory[:length])

        ended = self._ended(operation, index, complete, memory)
        if self.random.random() < 0.2:
            handle.aio_pread_structured(buffer, offset, lambda *_: 0, ended, nbd.CMD_FLAG_DF)
        else:
            handle.aio_pread(buffer, offset, ended)

    def _status(self, handle: Any, operation: Operation, index: int, offset: int, length: int) -> None:
        runs: list[tuple[int, bool]] = []

        def extents(_context: str, _offset: int, entries: list[int], _error: object) -> int:
            runs.extend((entries[i], bool(entries[i + 1] & STATE_ZERO)) for i in range(0, len(entries), 2))
            return 0

        ended = self._ended(operation, index, lambda: self.model.complete_status(operation, runs))
        handle.aio_block_status(length, offset, extents, ended, self.random.choice((0, nbd.CMD_FLAG_REQ_ONE)))

    def _take_memory(self) -> bytearray:
        """Memory for one request: libnbd's bindings never let a buffer go, so that each is used again and again."""
        return self._memory.pop() if self._memory else bytearray(self.weather.length_max)

    def _ended(
        self,
        operation: Operation,
        index: int,
        complete: Callable[[], None] | None = None,
        memory: bytearray | None = None,
    ) -> Callable[[Any], int]:
        """The callback for the reply. It must not raise into libnbd: what it finds wrong is raised by `_wait`."""

        def ended(error: Any) -> int:
            self._in_flight[index] -= 1
            self.done[operation.kind] += 1
            try:
                if error.value == 0:
                    (complete or (lambda: self.model.complete(operation)))()
                    self._acknowledged(operation)
                elif not (self._killed and error.value == errno.ENOTCONN):
                    self._refused(operation, error.value)
            except BaseException as failure:
                self._failure = self._failure or failure
            if memory is not None:
                self._memory.append(memory)
            return 1

        return ended

    def _refused(self, operation: Operation, error: int) -> None:
        """Only a fast zero may be refused."""
        self.model.fail(operation)
        if not (operation.kind is Kind.ZERO and error == errno.EOPNOTSUPP):
            raise AssertionError(f"{operation.kind.value} of grains {operation.first}..{operation.last}: error {error}")

    # -- waiting ------------------------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        """Wait for something to happen on any connection, and deal with it."""
        poll = select.poll()
        handles = {}
        for handle in self._handles:
            if _gone(handle):
                continue
            direction = handle.aio_get_direction()
            events = (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0) | (
                select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            )
            handles[handle.aio_get_fd()] = handle
            poll.register(handle.aio_get_fd(), events)
        for fd, events in poll.poll(seconds * 1000):
            try:
                _notify(handles[fd], events)
            except nbd.Error:
                if not self._killed:
                    raise
        if self._failure is not None:
            raise self._failure
        if not self._killed and any(_gone(handle) for handle in self._handles):
            raise AssertionError("the server closed a connection")


def _notify(handle: Any, events: int) -> None:
    direction = handle.aio_get_direction()
    if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_READ:
        handle.aio_notify_read()
    elif events & (select.POLLOUT | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_WRITE:
        handle.aio_notify_write()


def _gone(handle: Any) -> bool:
    return bool(handle.aio_is_dead() or handle.aio_is_closed())


def _connect(uri: str) -> Any:
    handle = nbd.NBD()
    handle.add_meta_context(ALLOCATION)
    # Out-of-order answers of several connections are the point: the server must say that they are coherent.
    handle.connect_uri(uri)
    assert handle.can_multi_conn() and handle.can_meta_context(ALLOCATION)
    return handle
