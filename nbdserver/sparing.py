"""A log that clients cannot flood: of many lines at once some are left out, and their number is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from nbdserver.limits import CLIENT_LINES_COUNT_MAX, CLIENT_LINES_PERIOD


class Sparing:
    """Passes lines on to ``log``: CLIENT_LINES_COUNT_MAX of them in CLIENT_LINES_PERIOD seconds. Thread-safe."""

    def __init__(self, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._lock = threading.Lock()
        self._began = clock()
        self._count = self._omitted = 0

    def __call__(self, line: str) -> None:
        with self._lock:
            now = self._clock()
            if now - self._began >= CLIENT_LINES_PERIOD:
                omitted, self._began, self._count, self._omitted = self._omitted, now, 0, 0
                if omitted:
                    self._log(f"{omitted} more lines about clients were left out")
            if self._count >= CLIENT_LINES_COUNT_MAX:
                self._omitted += 1
                return
            self._count += 1
        self._log(line)
