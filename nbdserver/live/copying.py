"""What jobs that copy have in common: ranges, piece by piece, with a checkpoint between any two."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from nbdserver.extent import DirtyBitmap
from nbdserver.graph import execute
from nbdserver.image.allocation import Run
from nbdserver.jobs import Job
from nbdserver.layer import Layer
from nbdserver.limits import MIB
from nbdserver.request import Flag, Request

if TYPE_CHECKING:
    from nbdserver.server import Server

_log = logging.getLogger("nbdserver")

#: What is read and written at once: requests of guests wait no longer than that takes.
PIECE: Final = MIB

#: What is looked up in the metadata at once; zeroes of this length are one request.
SPAN: Final = 256 * MIB

#: Runs of a dirty bitmap that are asked for at once.
RUNS_COUNT_MAX: Final = 1024


def wind_up(server: Server, layer: Layer, ending: contextlib.ExitStack) -> None:
    """Undo what a job took to begin, in a drained section of ``layer``; as often as it takes until requests have ended.
    Raises what undoing raises."""
    while True:
        with contextlib.ExitStack() as section:
            try:
                section.enter_context(server.drained(layer))
            except TimeoutError as error:
                _log.warning("a job cannot end yet: %s", error)
                continue
            ending.close()
            return


def spans(size: int) -> Iterator[tuple[int, int]]:
    """The bytes of a disk, by (start, end)."""
    for start in range(0, size, SPAN):
        yield start, min(start + SPAN, size)


def dirty_spans(bitmap: DirtyBitmap) -> Iterator[tuple[int, int]]:
    """What is marked in a bitmap, by (start, end)."""
    offset = 0
    while offset < bitmap.size:
        for length, is_dirty in bitmap.runs(offset, bitmap.size - offset, RUNS_COUNT_MAX):
            if is_dirty:
                yield offset, min(offset + length, bitmap.size)
            offset += length


def copy(source: Layer, target: Layer, runs: Iterable[Run], job: Job | None) -> None:
    """Copy runs of a disk to the same places of another, zeroes as such. ``job`` comes to a checkpoint before each
    piece; None: it must not. Raises CancelledError, RequestError, OSError, ImageError."""
    for run in runs:
        if run.entry.zero:
            _checkpoint(job, 0)
            execute(target, Request.zero(run.start, run.length, Flag.MAY_UNMAP))
            continue
        for start in range(run.start, run.end, PIECE):
            length = min(PIECE, run.end - start)
            _checkpoint(job, length)
            vector = source.allocate(length)
            execute(source, Request.read(start, vector))
            execute(target, Request.write(start, vector))


def _checkpoint(job: Job | None, length: int) -> None:
    if job is not None:
        job.checkpoint(length)
