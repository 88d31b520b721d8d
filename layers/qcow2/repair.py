"""Repairing an image, so that a crash at any instant leaves it no worse.

::

    entries    that name misplaced clusters with nothing in them say just zero
       |
    refcounts  are what was counted: in place, or, if blocks are missing or not where they can be, in a new table
       |       and new blocks behind all that is there, which the header then names in one write
    COPIED     is what refcounts say
       |
    header     no longer says dirty, or corrupt, if nothing is left that is wrong

``|`` is a sync. Within a step the order is free: every number that is written is right by itself, given what is in the
file already; what it takes the place of was wrong. Nothing that is in use, or that a broken image may still want, is
written over: new tables are put where nothing is.

What is repaired is what ``qemu-img check -r`` repairs.
"""

from __future__ import annotations

import errno
import logging
import sys
from array import array
from collections.abc import Iterator

from layers.ondisk.qcow2 import (
    AUTOCLEAR_AT,
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_DATA_FILE_RAW,
    AUTOCLEAR_FIELD,
    COMPRESSED,
    COPIED,
    INCOMPATIBLE_AT,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_FIELD,
    OFFSET_MASK,
    REFCOUNT_TABLE_AT,
    REFCOUNT_TABLE_FIELDS,
    ZERO,
)
from layers.qcow2.cache import SECTOR
from layers.qcow2.census import ALLOCATED, Census, is_idle, miscopied, read_l2
from layers.qcow2.check import blocks, examine, windows
from layers.qcow2.create import refcount_clusters
from layers.qcow2.findings import Findings
from layers.qcow2.header import read_header
from layers.qcow2.limits import REFCOUNT_TABLE_MAX
from layers.qcow2.subject import Subject
from layers.qcow2.tally import Tally
from nbdserver.errors import ImageError
from nbdserver.format import ImageCheck, Progress, Repair, grow, no_progress
from nbdserver.layer import Layer, finish

log = logging.getLogger(__name__)


def check(file: Layer, repair: Repair, progress: Progress) -> ImageCheck:
    """Check the image in ``file``, and repair it (see `nbdserver.format.Checks`)."""
    found = examine(file, progress)
    if repair is Repair.NONE or found.is_cut_short:
        return found.result
    if found.rebuild and repair is Repair.LEAKS:
        found.unread("refcounts have to be made anew, which repairing leaks does not do (repair all)")
        return found.result
    repairs = _Repairs(file, repair, progress)
    left = repairs.run(found)
    result = left.result
    result.leaks_fixed = max(found.result.leaks - result.leaks, 0)
    others = (found.result.corruptions - found.copied) - (result.corruptions - left.copied)
    result.corruptions_fixed = max(others, 0) + repairs.copied_fixed
    result.messages = found.result.messages + result.messages
    return result


def clean_up(file: Layer) -> None:
    """Count the references of an image that was not closed properly, so that it can be written. Raises ImageError if
    that is not enough, OSError."""
    log.warning("%s: was not closed properly; its refcounts are counted anew", file.filename)
    result = check(file, Repair.ALL, no_progress)
    if result.corruptions or result.check_errors:
        raise ImageError(
            f"was not closed properly, and cannot be repaired: {result.messages[-1]}; it can be opened read-only",
            path=file.filename,
        )
    log.warning("%s: is repaired", file.filename)


class _Repairs:
    """What is done to one image."""

    def __init__(self, file: Layer, repair: Repair, progress: Progress) -> None:
        self._file, self._repair, self._progress = file, repair, progress
        #: Flags COPIED that have been corrected.
        self.copied_fixed = 0

    def run(self, found: Findings) -> Findings:
        """Repair what was ``found``; what is wrong then."""
        result, is_all = found.result, self._repair is Repair.ALL
        left = found
        if result.leaks or (is_all and result.corruptions):
            self._disown()
            if is_all and found.has_idle:
                self._zero_idle()
            if is_all and (found.rebuild or found.has_stray):
                self._rebuild(result.image_end_offset)
            else:
                self._recount()
            left = examine(self._file, self._progress)
        # Repairing leaks, flags are corrected only where refcounts are certain.
        rest = left.result.corruptions - left.copied
        if left.copied and (is_all or not (left.result.check_errors or rest or left.result.leaks)):
            self._disown()
            self._correct_copied()
            left = examine(self._file, self._progress)
        if not (left.result.corruptions or left.result.check_errors):
            self._clear_bits()
        return left

    def _begin(self) -> tuple[Subject, Census]:
        """The image as it is now."""
        subject = Subject(self._file, read_header(self._file, checking=True))
        return subject, Census(subject, Findings())

    def _sync(self) -> None:
        finish(self._file.flush())

    # -- header -----------------------------------------------------------------------------------------------------

    def _disown(self) -> None:
        """Withdraw what others promise by autoclear bits that are not known here, before anything changes."""
        header = read_header(self._file, checking=True)
        known = header.autoclear & (AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW)
        if known != header.autoclear:
            self._file.pwrite(AUTOCLEAR_AT, AUTOCLEAR_FIELD.pack(known))
            self._sync()

    def _clear_bits(self) -> None:
        header = read_header(self._file, checking=True)
        clean = header.incompatible & ~(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT)
        if clean != header.incompatible:
            self._sync()
            self._file.pwrite(INCOMPATIBLE_AT, INCOMPATIBLE_FIELD.pack(clean))
            self._sync()

    # -- refcounts --------------------------------------------------------------------------------------------------

    def _recount(self) -> None:
        """Correct refcounts where they are: all of them, or only those that are too high."""
        subject, census = self._begin()
        for window in windows(subject, subject.clusters + 1):
            census.count(window, self._progress)
            stop = min(window.stop, subject.clusters)
            for first, count in blocks(subject, window.start, stop):
                block = subject.block(first // subject.per_block)
                if block is not None:
                    self._recount_block(subject, window.tally, block, first, count)
        self._sync()

    def _recount_block(self, subject: Subject, tally: Tally, block: bytes, first: int, count: int) -> None:
        refcounts = subject.refcounts
        if block.startswith(refcounts.encode(tally, first, first + count)):
            return
        stored = refcounts.decode(block, subject.per_block)
        wanted = [min(value, refcounts.most) for value in tally.values(first, first + count)]
        if self._repair is Repair.LEAKS:
            wanted = [min(pair) for pair in zip(stored, wanted, strict=False)]
        data = refcounts.pack(wanted + stored[count:])
        if data != block:
            place = subject.block_place(first // subject.per_block)
            grow(self._file, place + len(data))
            self._file.pwrite(place, data)

    def _rebuild(self, end: int) -> None:
        """Make a new refcount table and new blocks; behind ``end`` nothing is in use."""
        subject, census = self._begin()
        size, per_block = subject.cluster_size, subject.per_block
        # As far as the new ones can reach: what is in use may pass the end of the file by a cluster.
        stop = subject.clusters + 1
        stop += sum(refcount_clusters(stop, size, subject.refcounts.bits))
        used: set[int] = set()
        tallies: list[Tally] = []
        for tally in self._references(subject, census, stop):
            for first, count in blocks(subject, tally.start, tally.stop):
                if not tally.is_empty(first, first + count):
                    used.add(first // per_block)
            tallies.append(tally)
            del tallies[:-1]
        is_one = tallies[0].start == 0
        start, table_clusters, numbers = self._room(subject, used, end)
        places = {number: start + table_clusters + index for index, number in enumerate(numbers)}
        for tally in tallies if is_one else self._references(subject, census, stop):
            tally.add(start, start + table_clusters + len(numbers), 1)
            for first, count in blocks(subject, tally.start, tally.stop):
                place = places.get(first // per_block)
                if place is not None:
                    data = subject.refcounts.encode(tally, first, first + count)
                    self._file.pwrite(place * size, data.ljust(size, b"\0"))
        table = array("Q", bytes(table_clusters * size))
        for number, place in places.items():
            table[number] = place * size
        self._file.pwrite(start * size, _big_endian(table))
        self._sync()
        self._file.pwrite(REFCOUNT_TABLE_AT, REFCOUNT_TABLE_FIELDS.pack(start * size, table_clusters))
        self._sync()

    def _references(self, subject: Subject, census: Census, stop: int) -> Iterator[Tally]:
        """References to the clusters below ``stop``; not those to what counts them, which is to be made anew."""
        for window in windows(subject, stop):
            census.count(window, self._progress, refcounts=False)
            yield window.tally

    def _room(self, subject: Subject, used: set[int], end: int) -> tuple[int, int, list[int]]:
        """Where a new refcount table and blocks go: (first cluster, clusters of the table, numbers of the blocks).

        Behind the end of the file, which grows; on what cannot grow, behind all that is in use.
        """
        start = max(subject.clusters, end // subject.cluster_size)
        table_clusters, numbers = _layout(subject, used, start)
        try:
            grow(self._file, (start + table_clusters + len(numbers)) * subject.cluster_size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            start = end // subject.cluster_size
            table_clusters, numbers = _layout(subject, used, start)
            if (start + table_clusters + len(numbers)) * subject.cluster_size > subject.size:
                raise
        return start, table_clusters, numbers

    # -- entries ----------------------------------------------------------------------------------------------------

    def _zero_idle(self) -> None:
        """Have entries that name misplaced clusters, in which nothing is, name none."""
        subject, census = self._begin()
        guard = _Guard(subject, census)
        for place in sorted(census.tables):
            table = _Table(subject, place)
            for run in read_l2(subject, place).runs():
                offset = run.entry & OFFSET_MASK
                if offset % subject.cluster_size and not run.entry & COMPRESSED and is_idle(subject, run):
                    bitmap = (run.bitmap | run.bitmap << 32) & ~ALLOCATED if subject.is_extended else None
                    table.set(run.at, 0 if subject.is_extended else ZERO, bitmap)
            if table.changed and guard.allows(place):
                table.write(self._file)
        self._sync()

    def _correct_copied(self) -> None:
        """Have COPIED say what refcounts say, in the active L1 table and its L2 tables."""
        subject, census = self._begin()
        guard = _Guard(subject, census)
        for window in windows(subject, subject.clusters + 1):
            for place in sorted(census.active):
                table = _Table(subject, place)
                for run in read_l2(subject, place).runs():
                    for index in miscopied(subject, window, run):
                        table.set(run.at + index, table.entry(run.at + index) ^ COPIED)
                if table.changed and guard.allows(place):
                    table.write(self._file)
                    self.copied_fixed += len(table.changed) * census.active[place]
        header = subject.header
        if header.l1_count and guard.allows(header.l1_offset, header.l1_count * 8):
            self._correct_l1(subject)
        self._sync()

    def _correct_l1(self, subject: Subject) -> None:
        header = subject.header
        table = _Table(subject, header.l1_offset, header.l1_count)
        for index in range(header.l1_count):
            entry = table.entry(index)
            place = entry & OFFSET_MASK
            if place and bool(entry & COPIED) != (subject.refcount(place >> subject.cluster_bits) == 1):
                table.set(index, entry ^ COPIED)
        table.write(self._file)
        self.copied_fixed += len(table.changed)


def _layout(subject: Subject, used: set[int], start: int) -> tuple[int, list[int]]:
    """(clusters of a refcount table, numbers of the blocks) that count what is in the blocks ``used``, and, from
    cluster ``start`` on, themselves. Raises ImageError if that is more than the format can have."""
    numbers, table_clusters = set(used), 1
    while True:
        stop = start + table_clusters + len(numbers)
        needed = numbers | set(range(start // subject.per_block, (stop - 1) // subject.per_block + 1))
        length = -(-(max(needed) + 1) * 8 // subject.cluster_size)
        if needed == numbers and length == table_clusters:
            break
        numbers, table_clusters = needed, length
    if table_clusters * subject.cluster_size > REFCOUNT_TABLE_MAX:
        raise ImageError("needs more refcounts than the format can have", path=subject.file.filename)
    return table_clusters, sorted(numbers)


class _Table:
    """An L1 or L2 table that is being corrected."""

    def __init__(self, subject: Subject, place: int, count: int | None = None) -> None:
        self._place = place
        #: Words of an entry.
        self._width = subject.entry_size // 8 if count is None else 1
        self._words = subject.entries(place, subject.cluster_size // 8 if count is None else count)
        #: The numbers of the entries that have changed.
        self.changed: set[int] = set()

    def entry(self, index: int) -> int:
        """The (first word of the) entry."""
        return self._words[index * self._width]

    def set(self, index: int, entry: int, bitmap: int | None = None) -> None:
        """Change an entry; its second word, too, if it is given."""
        self._words[index * self._width] = entry
        if bitmap is not None:
            self._words[index * self._width + 1] = bitmap
        self.changed.add(index)

    def write(self, file: Layer) -> None:
        """Write the sectors that have changed."""
        words = SECTOR // 8
        for sector in sorted({index * self._width // words for index in self.changed}):
            file.pwrite(self._place + sector * SECTOR, _big_endian(self._words[sector * words : (sector + 1) * words]))


class _Guard:
    """Keeps repairs of one table from other metadata, where an image's tables overlap."""

    def __init__(self, subject: Subject, census: Census) -> None:
        self._subject = subject
        places = [(place.offset, place.length) for place in census.places if place.what != "L1 table"]
        size = subject.cluster_size
        places += [(place, size) for place in map(subject.block_place, range(len(subject.table))) if place]
        self._ranges = sorted((offset // size, -(-(offset + length) // size)) for offset, length in places)

    def allows(self, place: int, length: int | None = None) -> bool:
        """Whether the table at ``place``, as a rule of one cluster, is in the file and on nothing else."""
        size = self._subject.cluster_size
        length = size if length is None else length
        if place % size or place + length > self._subject.clusters * size:
            return False
        first, stop = place // size, -(-(place + length) // size)
        return not any(start < stop and first < end for start, end in self._ranges)


def _big_endian(words: array[int]) -> bytes:
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()
