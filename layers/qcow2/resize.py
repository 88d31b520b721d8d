"""Resizing: another size for the disk, made so in one switch, as `order` describes it.

::

    grow      │ what is behind the old end is made to read as zeroes │ the header says the new size
    shrink    │ the header says the new size │ what is behind it is let go of

What lies behind the end of a disk in its tables is nobody's, but it may be anything: the rest of the last cluster; what
a crash during shrinking has left; VM state, which QEMU keeps there; and the backing file, if it is longer. Growing must
show none of it.
"""

from __future__ import annotations

import contextlib
import errno
from typing import NoReturn

from layers.qcow2.cache import SECTOR, encoded
from layers.qcow2.limits import L1_TABLE_MAX
from layers.qcow2.points import Image
from layers.qcow2.snapshots import ACTIVE
from layers.qcow2.storage import Storage
from layers.qcow2.writing import Fill
from nbdserver.errors import RequestError
from nbdserver.format import Progress, no_progress, preallocate
from nbdserver.limits import DISK_MAX


def resize(image: Image, size: int, *, preallocation: str = "off", progress: Progress = no_progress) -> None:
    """Give the disk another size, bytes. ``preallocation``: what it grows by has clusters ("metadata"), and storage
    ("falloc"), and zeroes written there ("full").

    What fails before the switch has not happened; once it has, space that cannot be freed is leaked. Raises
    RequestError (EINVAL: no multiple of 512; EFBIG: more than the format can have; ENOTSUP), OSError, ImageError.
    """
    _check(image, size)
    if size < image.head.size:
        if preallocation != "off":
            _refuse(image, errno.EINVAL, "a disk that shrinks cannot be preallocated")
        _shrink(image, size)
    elif size > image.head.size:
        _grow(image, size, preallocation, progress)


def _check(image: Image, size: int) -> None:
    geometry = image.geometry
    if size % SECTOR:
        _refuse(image, errno.EINVAL, f"a size of {size} bytes cannot be: it must be a multiple of {SECTOR}")
    most = min(L1_TABLE_MAX // 8 * geometry.table_span, DISK_MAX)
    if size > most:
        _refuse(image, errno.EFBIG, f"a size of {size} bytes cannot be: with these clusters it is {most} at most")
    if image.head.snapshots_count and not geometry.has_zero:
        _refuse(image, errno.ENOTSUP, "has snapshots, and in version 2 these need not say their size: no resizing")


def _refuse(image: Image, number: int, message: str) -> NoReturn:
    raise RequestError(number, f"{image.storage.file.filename}: {message}")


# -- larger ----------------------------------------------------------------------------------------------------------


def _grow(image: Image, size: int, preallocation: str, progress: Progress) -> None:
    head, reader, old = image.head, image.reader, image.head.size
    with image.alone():
        _lengthen_l1(image, image.geometry.l1_count(size))
        if image.geometry.has_data_file:
            reader.data.reserve(0, size)
            if image.writer.is_raw and preallocation == "off":
                preallocation = "metadata"  # what is in the data file is on the disk, as QEMU has it
        reader.size = size  # nobody knows yet: the exports are drained
        try:
            _clear(image, old)
            if preallocation != "off":
                _preallocate(image, old, _fill(preallocation), progress)
            image.order.flush()
        except BaseException:
            reader.size = old
            raise
        with image.lock:
            head.size = size
            image.mapping.resize(image.geometry.clusters(size))
            image.changed(0, size)
        image.order.flush()


def _lengthen_l1(image: Image, count: int) -> None:
    """Have at least so many L1 entries: in another place, which the header names before anything else depends on it."""
    if count <= image.head.l1_count:
        return
    with contextlib.ExitStack() as undo:
        entries = image.mapping.l1_entries[:]
        entries.extend([0] * (count - len(entries)))
        place = image.put(encoded(entries), undo)
        undo.pop_all()
    image.become(image.head.size, entries, place)
    image.order.flush()


def _clear(image: Image, start: int) -> None:
    """Have everything behind ``start`` read as zeroes."""
    span, end = image.geometry.table_span, image.reader.size
    _, first = image.geometry.span(start, start)
    # The rest of the last cluster, and whatever the backing file has: version 3 has entries that say zero.
    hidden = min(max(first, image.reader.below_size), end)
    image.writer.clear(start, hidden)
    for index, entry in enumerate(image.active_l1()):
        if entry and (index + 1) * span > hidden and index * span < end:
            image.writer.clear(max(index * span, hidden), min((index + 1) * span, end))


def _preallocate(image: Image, start: int, fill: Fill, progress: Progress) -> None:
    """Have clusters for everything behind ``start``, which reads as zeroes."""
    _, first = image.geometry.span(start, start)
    end = image.reader.size
    image.writer.write_zeroes(start, min(first, end))
    if first < end:
        image.writer.preallocate(first, end, fill, lambda done: progress(done - start, end - start))


def _fill(preallocation: str) -> Fill:
    def fill(data: Storage, place: int, length: int, is_zeroed: bool) -> None:
        if preallocation != "metadata":
            preallocate(data.file, place, length, written=preallocation == "full")
        elif not is_zeroed:
            data.zero(place, length)

    return fill


# -- smaller ---------------------------------------------------------------------------------------------------------


def _shrink(image: Image, size: int) -> None:
    geometry, head = image.geometry, image.head
    with image.frozen():
        old = head.size
        _, first = geometry.span(size, size)
        edge = -(-first // geometry.table_span) * geometry.table_span
        if first < edge and image.mapping.l1_entries[first // geometry.table_span]:
            with image.lock:
                image.mapping.own(first // geometry.table_span)  # what may find no room is done before the switch
        with image.lock:
            head.size = image.reader.size = size
            image.mapping.resize(geometry.clusters(size))
            image.changed(size, old - size)
        image.order.flush()
        image.writer.empty(first, min(edge, len(image.mapping.l1_entries) * geometry.table_span), discard=True)
        with image.lock:
            gone = image.mapping.cut_l1(geometry.l1_count(size))
        image.let_go(gone, ACTIVE, discard=True)
        image.order.flush()
        _truncate(image, size)


def _truncate(image: Image, size: int) -> None:
    """Have the file end behind the last cluster in use, and an external data file with the disk."""
    if image.geometry.has_data_file:
        image.reader.data.truncate(size)
    with image.lock:
        image.storage.truncate(image.refcounts.used_end() * image.geometry.cluster_size)
