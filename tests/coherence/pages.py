"""A layer for tests of coherence: a page table whose entries a test changes while requests run."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator

from nbdserver.extent import CODE, Extent, Intent
from nbdserver.layer import Layer
from nbdserver.request import Request

PAGE = 4096
#: How long anything that should happen may take, and how long is watched that something does not, seconds.
SOON = 20.0
LITTLE = 0.2


class Gate:
    """A place in Python code where a test holds the next thread that passes."""

    def __init__(self) -> None:
        self._reached, self._open = threading.Event(), threading.Event()
        self._open.set()

    def close(self) -> None:
        self._reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        if not self._open.is_set():
            self._reached.set()
            assert self._open.wait(SOON), "nobody opened the gate"

    def wait_reached(self) -> None:
        assert self._reached.wait(SOON), "nobody reached the gate"


@dataclasses.dataclass(eq=False)
class Pages(Layer):
    """Page ``i`` of the layer is page ``table[i]`` of ``file``, writable if ``i`` is in ``writable``.

    Pages in ``code`` are CODE: read and written through Python, at their place all the same.
    """

    file: Layer
    pages: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.table = list(range(self.pages))
        self.writable = set(range(self.pages))
        self.code: set[int] = set()
        #: After the answer is complete, before it is given; and in the code of ``read`` and ``write``.
        self.resolved, self.reading, self.writing = Gate(), Gate(), Gate()
        self.resolve_calls: list[int] = []
        self.read_calls: list[int] = []
        self.write_calls: list[int] = []

    @property
    def size(self) -> int:
        return self.pages * PAGE

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        first = offset // PAGE
        self.resolve_calls.append(first)
        # All of the table, read-ahead included.
        answer = [self._extent(page, intent) for page in range(first, self.pages)]
        self.resolved.pass_through()
        skip = offset % PAGE
        yield answer[0].cut(skip, PAGE - skip)
        yield from answer[1:]

    def _extent(self, page: int, intent: Intent) -> Extent:
        writable = page in self.writable
        if page in self.code or (intent is not Intent.READ and not writable):
            return Extent(PAGE, CODE)
        return Extent(PAGE, self.file, self.table[page] * PAGE, writable)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ()  # the file's own mapping never changes

    def read(self, request: Request) -> None:
        self.read_calls.append(request.offset // PAGE)
        self.reading.pass_through()
        for page, part in self._parts(request):
            self.file.read(part.moved(self.table[page] * PAGE + part.offset % PAGE))

    def write(self, request: Request) -> None:
        self.write_calls.append(request.offset // PAGE)
        self.writing.pass_through()
        for page, part in self._parts(request):
            self.file.write(part.moved(self.table[page] * PAGE + part.offset % PAGE))

    def _parts(self, request: Request) -> Iterator[tuple[int, Request]]:
        done = 0
        while done < request.length:
            offset = request.offset + done
            length = min(PAGE - offset % PAGE, request.length - done)
            yield offset // PAGE, request.slice(done, length)
            done += length


class Background:
    """Something that may block, on a thread of its own."""

    def __init__(self, call: object, *arguments: object) -> None:
        assert callable(call)
        self._call, self._arguments = call, arguments
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call(*self._arguments)
        except BaseException as error:
            self._error = error

    def is_done(self, within: float = LITTLE) -> bool:
        """Whether it has ended, after waiting at most ``within`` seconds for that."""
        self._thread.join(within)
        return not self._thread.is_alive()

    def finish(self) -> None:
        """It ends soon, and raises nothing."""
        assert self.is_done(SOON), "it does not end"
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def stopped_at(name: str) -> Iterator[object]:
    """The next thread of the engine's that reaches the point ``name`` is held until ``release``, or the end."""
    from nbdserver import _engine

    stop = _engine.stop_at(name)
    try:
        yield stop
    finally:
        stop.release()
