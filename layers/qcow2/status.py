"""Block status, as QEMU reports it for qcow2.

Allocated here or in a backing file: data. Zero clusters, and what nobody has: holes of zeroes. In an image with
preallocated metadata, where most of what is allocated was never written, the file's own holes read as zeroes, but
are allocated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from layers.qcow2.bitmaps import Bitmaps
from layers.qcow2.clusters import Kind, Run
from layers.qcow2.reading import Reader
from layers.qcow2.refcounts import Refcounts
from nbdserver.format import MapEntry
from nbdserver.layer import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, STATE_DIRTY, STATE_HOLE, STATE_ZERO, Layer
from nbdserver.limits import STATUS_COUNT_MAX

#: QEMU measures disks in sectors: a file that ends within one reaches to the sector's end.
SECTOR = 512

ABSENT = STATE_HOLE | STATE_ZERO


def status(reader: Reader, context: str, offset: int, length: int, *, preallocated: bool) -> Iterator[tuple[int, int]]:
    """(length, flags) runs that cover the range exactly. ``preallocated``: see `has_preallocation`."""
    for run, start, stop in reader.spans(offset, length):
        if run.kind is Kind.UNALLOCATED:
            yield from _below(reader, context, start, stop)
        elif context == ALLOCATION_DEPTH:
            yield stop - start, 1
        elif run.kind is Kind.NORMAL and preallocated:
            yield from _in_file(reader, run, start, stop)
        else:
            yield stop - start, 0 if run.kind in (Kind.NORMAL, Kind.COMPRESSED) else ABSENT


def entries(reader: Reader, offset: int, length: int, *, preallocated: bool) -> Iterator[MapEntry]:
    """What the image itself says of a range: `nbdserver.format.Maps`."""
    for run, start, stop in reader.spans(offset, length):
        is_zero = run.kind is Kind.ZERO
        if run.kind is Kind.COMPRESSED:
            yield MapEntry(stop - start, data=True, compressed=True)
        elif run.place is None:
            yield MapEntry(stop - start, zero=is_zero)
        elif reader.data.is_encrypted:  # nowhere does the file have these bytes
            yield MapEntry(stop - start, data=run.kind is Kind.NORMAL, zero=is_zero)
        elif run.kind is not Kind.NORMAL:
            # There is room, and what was there once; QEMU says where, too.
            yield MapEntry(stop - start, zero=is_zero, child=reader.data.file, offset=reader.place(run, start))
        else:
            place = reader.place(run, start)
            runs = _in_file(reader, run, start, stop) if preallocated else ((stop - start, 0),)
            for count, flags in runs:
                yield MapEntry(count, data=True, zero=bool(flags), child=reader.data.file, offset=place)
                place += count


def dirty(reader: Reader, bitmaps: Bitmaps, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """`Layer.status` of a dirty bitmap: this image's, or else the next one's below. What lies past its end is clean."""
    name, end = context.removeprefix(DIRTY_BITMAP), offset + length
    if name in bitmaps:
        yield from (
            (run, STATE_DIRTY * is_dirty) for run, is_dirty in bitmaps.runs(name, offset, length, STATUS_COUNT_MAX)
        )
        return
    edge = max(min(reader.backing.size, end), offset) if reader.backing is not None else offset
    if reader.backing is not None and offset < edge:
        yield from _exactly(reader.backing, offset, edge - offset, context)
    if edge < end:
        yield end - edge, 0


def has_preallocation(reader: Reader, refcounts: Refcounts, lock: threading.Lock) -> bool:
    """Whether much more of the file is in use than takes up storage: QEMU's test, with QEMU's numbers.

    Raises ImageError, OSError.
    """
    storage = reader.storage
    bytes_stored = storage.file.stored
    if bytes_stored is None:
        return False
    # What SEEK_DATA finds would not do: storage that is reserved but was never written counts too.
    stored = bytes_stored // storage.cluster_size
    threshold = max(stored * 10 // 9, stored + 2)
    with lock:
        return refcounts.count_used(reader.geometry.clusters(storage.size), threshold) >= threshold


def _below(reader: Reader, context: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    is_depth = context == ALLOCATION_DEPTH
    edge = min(reader.below_size, end)
    if reader.backing is not None and start < edge:
        flags = ABSENT
        for length, below in _exactly(reader.backing, start, edge - start, context):
            flags = below + 1 if is_depth and below else below
            yield length, flags
        rest = min(-edge % SECTOR, end - edge)
        if rest:
            yield rest, flags
        start = edge + rest
    if start < end:
        # QEMU counts the zeroes behind the end of a short backing file as that file's.
        nowhere = 0 if reader.backing is None else 2
        yield end - start, nowhere if is_depth else ABSENT


def _in_file(reader: Reader, run: Run, start: int, end: int) -> Iterator[tuple[int, int]]:
    place = reader.place(run, start)
    there = max(min(end - start, reader.data.size - place), 0)
    for length, flags in _exactly(reader.data.file, place, there):
        yield length, flags & STATE_ZERO
    if there < end - start:
        yield end - start - there, STATE_ZERO


def _exactly(layer: Layer, offset: int, length: int, context: str = BASE_ALLOCATION) -> Iterator[tuple[int, int]]:
    """A child's status, asked as often as it takes, and cut where the range ends."""
    end = offset + length
    while offset < end:
        for run, flags in layer.status(context, offset, end - offset):
            run = min(run, end - offset)
            offset += run
            yield run, flags
            if offset == end:
                return
