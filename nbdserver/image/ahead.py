"""Tasks run ahead of who takes their results, in order."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

Result = TypeVar("Result")

#: Threads. Who reads two images at once needs no more, on what is in the page cache.
WORKERS: Final = 2

#: Tasks that are begun before the results of those before them are taken.
AHEAD: Final = 2 * WORKERS


def run_ahead(tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of ``tasks``, in order, raising what they raise. ``tasks`` is consumed on the caller's thread; what
    is not needed any more, because the caller stops or a task has failed, is not begun."""
    running: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
    try:
        for task in tasks:
            running.append(pool.submit(task))
            if len(running) == AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
