"""What happens to a process, in order: signals, and what other threads have to say to its main thread."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import weakref
from types import TracebackType


class Events:
    """A queue that signal handlers may put to, and that the main thread gets from. A context manager, for that thread.

    A thread that begins to wait for a lock, as that of a queue, does not notice a signal that has come just before. So
    here it waits for a byte in a pipe, which the interpreter writes (``signal.set_wakeup_fd``) before it does anything
    else about a signal.
    """

    def __init__(self) -> None:
        # A signal handler may interrupt anything, also a put on the same queue: SimpleQueue is made for that.
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Not when the block is left: other threads may put something all the same.
        for end in (self._read, self._write):
            weakref.finalize(self, os.close, end)

    def put(self, event: str) -> None:
        self._queue.put(event)
        with contextlib.suppress(BlockingIOError):  # full of bytes that have not been read: the reader wakes anyway
            os.write(self._write, b"\0")

    def get(self) -> str:
        """The next event, waiting for it. Signal handlers run meanwhile."""
        while True:
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                os.read(self._read, 4096)

    def __enter__(self) -> Events:
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._before)
