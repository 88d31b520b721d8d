"""``image compare``: whether two images hold the same disk."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import click

from nbdserver.errors import NbdserverError
from nbdserver.format import Progress, no_progress
from nbdserver.image import wording
from nbdserver.image.ahead import run_ahead
from nbdserver.image.allocation import SECTOR, Run, chain, joined, runs
from nbdserver.image.copying import BATCH_COUNT_MAX, PIECE, read_still
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import (
    FORMAT,
    cache_option,
    force_share_option,
    output_option,
    progress_option,
    quiet_option,
)
from nbdserver.image.progress import progress
from nbdserver.layer import Layer
from nbdserver.request import Vector

#: qemu-img's exit statuses.
SAME, DIFFERENT, CANNOT_OPEN, CANNOT_MAP, CANNOT_READ = range(5)


@click.command("compare", short_help="Compare the disks in two images.")
@click.argument("one", metavar="FILE1")
@click.argument("other", metavar="FILE2")
@click.option("-f", "--a-format", type=FORMAT, metavar="FMT", help="The format of FILE1.  [default: probed]")
@click.option("-F", "--b-format", type=FORMAT, metavar="FMT", help="The format of FILE2.  [default: probed]")
@click.option("-s", "--strict", is_flag=True, help="Sizes and allocation must be the same, too.")
@cache_option("-T", "--cache")
@force_share_option
@output_option
@progress_option
@quiet_option
@access_options
def command(
    *,
    one: str,
    other: str,
    a_format: str | None,
    b_format: str | None,
    strict: bool,
    force_share: bool,
    as_json: bool,
    wants_progress: bool,
    quiet: bool,
    access: Access,
) -> None:
    """Compare the disks in two images; a longer one may be the same, if there is nothing but zeroes behind.

    Exit status: 0 if they are the same, 1 if they differ, 2 if an image cannot be opened, 3 if the allocation and 4 if
    the data of one cannot be read.
    """
    with access.images(force_share=force_share) as images:
        try:
            named = access.named(images, one, a_format), access.named(images, other, b_format)
            disks = images.open(*named[0]), images.open(*named[1])
        except (NbdserverError, OSError) as error:
            _fail(CANNOT_OPEN, error)
        with progress("comparing", wanted=wants_progress, quiet=quiet) as tell:
            try:
                verdict = compare(*disks, strict=strict, progress=tell)
            except MapError as error:
                _fail(CANNOT_MAP, error)
            except (NbdserverError, OSError) as error:
                _fail(CANNOT_READ, error)
    if as_json:
        click.echo(wording.as_json(verdict.as_json()))
    elif not quiet:
        click.echo("\n".join(verdict.in_words()))
    sys.exit(SAME if verdict.mismatch is None else DIFFERENT)


def _fail(status: int, error: BaseException) -> Any:
    click.echo(f"nbdserver: {error}", err=True)
    sys.exit(status)


class MapError(NbdserverError):
    """It cannot be told what is where in an image."""


class Verdict(NamedTuple):
    """What came out. ``mismatch``: "size", "status", "content", or None; ``offset``: where, to the sector, if that can
    be said. ``sizes``: of the disks."""

    mismatch: str | None
    offset: int | None
    sizes: tuple[int, int]

    def in_words(self) -> list[str]:
        """The lines that qemu-img prints."""
        if self.mismatch == "size":
            return ["Strict mode: Image size mismatch!"]
        if self.mismatch == "status":
            return [f"Strict mode: Offset {self.offset} block status mismatch!"]
        is_noticed = self.offset is None or self.offset >= min(self.sizes)
        warnings = ["Warning: Image size mismatch!"] if min(self.sizes) != max(self.sizes) and is_noticed else []
        if self.mismatch == "content":
            return [*warnings, f"Content mismatch at offset {self.offset}!"]
        return [*warnings, "Images are identical."]

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"identical": self.mismatch is None, "virtual-sizes": list(self.sizes)}
        if self.mismatch is not None:
            told["mismatch"] = self.mismatch
        if self.offset is not None:
            told["offset"] = self.offset
        return told


def compare(one: Layer, other: Layer, *, strict: bool = False, progress: Progress = no_progress) -> Verdict:
    """Compare two open disks. Raises MapError, ImageError, RequestError, OSError."""
    sizes = one.size, other.size
    if strict and one.size != other.size:
        return Verdict("size", None, sizes)
    batches = _batches(_checks(one, other, strict=strict))
    for end, verdict in run_ahead(functools.partial(_run, batch, sizes) for batch in batches):
        if verdict is not None:
            return verdict
        progress(end, max(sizes))
    return Verdict(None, None, sizes)


def _run(batch: list[_Check], sizes: tuple[int, int]) -> tuple[int, Verdict | None]:
    """Where a batch ends, and what came out of it if that is a mismatch."""
    for check in batch:
        offset = check.run()
        if offset is not None:
            return offset, Verdict("content" if check.disks else "status", offset, sizes)
    return batch[-1].start + batch[-1].length, None


class _Check(NamedTuple):
    """A range in which two disks must be alike; or one be zeroes; or of which it is known that something differs."""

    start: int
    length: int
    disks: tuple[Layer, ...]

    def run(self) -> int | None:
        """Where the first sector is that is not as it must be. Raises RequestError, OSError, ImageError."""
        if not self.disks:
            return self.start
        buffers = (_memory.one, _memory.other)
        data = [memoryview(buffer).cast("B")[: self.length] for buffer in buffers]
        for disk, view in zip(self.disks, data, strict=False):
            read_still(disk, self.start, view)
        if len(self.disks) == 2:
            at = None if _memory.is_alike(self.length) else Vector.of(data[0]).difference(Vector.of(data[1]))
        else:
            at = None if Vector.of(data[0]).is_zero() else self.length - len(data[0].tobytes().lstrip(b"\0"))
        return None if at is None else self.start + at // SECTOR * SECTOR


class _Memory(threading.local):
    """What a thread reads into, again and again."""

    def __init__(self) -> None:
        self.one, self.other = (ctypes.c_char * PIECE)(), (ctypes.c_char * PIECE)()

    def is_alike(self, length: int) -> bool:
        """Whether both begin with the same bytes. (Views compare byte by byte, bytes must be copied first, and both
        keep all other threads waiting.)"""
        return bool(_memcmp(self.one, self.other, length) == 0)


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


_memory = _Memory()


def _batches(checks: Iterable[_Check]) -> Iterator[list[_Check]]:
    """Checks that a thread runs at once: little ones cost more to hand out than to run."""
    batch: list[_Check] = []
    for check in checks:
        if batch and (len(batch) == BATCH_COUNT_MAX or check.start + check.length - batch[0].start > PIECE):
            yield batch
            batch = []
        batch.append(check)
    if batch:
        yield batch


def _checks(one: Layer, other: Layer, *, strict: bool) -> Iterator[_Check]:
    both, total = min(one.size, other.size), max(one.size, other.size)
    for start, length, here, there in _pairs(_runs(one, 0, both, strict), _runs(other, 0, both, strict)):
        if strict and _status(one, here) != _status(other, there):
            yield _Check(start, length, ())
            return
        disks = (*(() if here.entry.zero else (one,)), *(() if there.entry.zero else (other,)))
        yield from _cut(start, length, disks)
    longer = one if one.size == total else other
    for run in _runs(longer, both, total, strict):
        yield from _cut(run.start, run.length, () if run.entry.zero else (longer,))


def _cut(start: int, length: int, disks: tuple[Layer, ...]) -> Iterator[_Check]:
    if disks:
        for at in range(start, start + length, PIECE):
            yield _Check(at, min(PIECE, start + length - at), disks)


def _runs(disk: Layer, start: int, end: int, strict: bool) -> Iterator[Run]:
    if start == end:
        return
    try:
        found = runs(chain(disk), start, end)
        yield from found if strict else joined(found)
    except (NbdserverError, OSError) as error:
        raise MapError(f"its allocation cannot be read: {error}") from error


def _pairs(some: Iterator[Run], others: Iterator[Run]) -> Iterator[tuple[int, int, Run, Run]]:
    """(start, length, run, run): where neither changes, of two that cover the same range."""
    here, there = next(some, None), next(others, None)
    start = 0
    while here is not None and there is not None:
        end = min(here.end, there.end)
        yield start, end - start, here, there
        start = end
        if here.end == end:
            here = next(some, None)
        if there.end == end:
            there = next(others, None)


def _status(disk: Layer, run: Run) -> tuple[bool, ...]:
    """What ``--strict`` compares: QEMU's flags of a block's status. What lies behind the end of a backing file counts
    as that file's; and it is one of them whether the block is the last one of its image."""
    is_held = run.present or run.depth < len(chain(disk)) - 1
    entry = run.entry
    return entry.zero, entry.data, entry.compressed, entry.child is not None, is_held, run.end == disk.size
