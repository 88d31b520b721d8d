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

import functools
import logging
import sys
from array import array
from typing import Final

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
    L2_RESERVED,
    OFFSET_MASK,
    SNAPSHOTS_AT,
    SNAPSHOTS_FIELDS,
    ZERO,
)
from layers.qcow2.cache import SECTOR
from layers.qcow2.census import Census, is_idle, miscopied, read_l2, repeated
from layers.qcow2.check import blocks, examine, part_of, windows, windows_count
from layers.qcow2.findings import Findings
from layers.qcow2.header import read_header
from layers.qcow2.rebuild import rebuild
from layers.qcow2.snapshot_table import encode_table, read_table
from layers.qcow2.storage import Storage
from layers.qcow2.subject import Subject
from layers.qcow2.tally import Tally
from nbdserver.errors import ImageError
from nbdserver.format import ImageCheck, Progress, Repair, grow, no_progress
from nbdserver.layer import Layer, finish

log = logging.getLogger(__name__)

#: How many times an image is gone over, as a rule: what is wrong, refcounts, what is left, flags, what is left.
STAGES: Final = 5


def check(file: Layer, repair: Repair, progress: Progress) -> ImageCheck:
    """Check the image in ``file``, and repair it (see `nbdserver.format.Checks`)."""
    if repair is Repair.NONE:
        return examine(file, progress).result
    stages = _Stages(progress)
    found = examine(file, stages.next())
    if found.is_cut_short:
        return found.result
    if found.rebuild and repair is Repair.LEAKS:
        found.unread("refcounts have to be made anew, which repairing leaks does not do (repair all)")
        return found.result
    repairs = _Repairs(file, repair, stages)
    left = repairs.run(found)
    stages.end()
    result = left.result
    result.leaks_fixed = max(found.result.leaks - result.leaks, 0)
    others = (found.result.corruptions - found.copied) - (result.corruptions - left.copied)
    result.corruptions_fixed = max(others, 0) + repairs.copied_fixed
    still = set(result.messages)
    repaired = [f"repaired: {message}" for message in found.result.messages if message not in still]
    result.messages = repaired + result.messages
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

    def __init__(self, file: Layer, repair: Repair, stages: _Stages) -> None:
        self._file, self._repair, self._stages = file, repair, stages
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
            table, count = self._completed() if is_all and found.has_incomplete else (b"", 0)
            if table:
                self._complete_snapshots(table, count, result.image_end_offset)
            elif is_all and (found.rebuild or found.has_stray):
                rebuild(*self._begin(), result.image_end_offset, self._stages.next())
            else:
                self._recount()
            left = examine(self._file, self._stages.next())
        # Repairing leaks, flags are corrected only where refcounts are certain.
        rest = left.result.corruptions - left.copied
        if left.copied and (is_all or not (left.result.check_errors or rest or left.result.leaks)):
            self._disown()
            self._correct_copied()
            left = examine(self._file, self._stages.next())
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
        (subject, census), progress = self._begin(), self._stages.next()
        behind = subject.clusters + 1
        for part, window in enumerate(windows(subject, behind)):
            census.count(window, part_of(progress, part, windows_count(subject, behind)))
            stop = min(window.stop, subject.clusters)
            for first, count in blocks(subject, window.start, stop):
                block = subject.block(first // subject.per_block, count)
                if block is not None:
                    self._recount_block(subject, window.tally, block, first, count)
        self._sync()

    def _recount_block(self, subject: Subject, tally: Tally, block: bytes, first: int, count: int) -> None:
        refcounts = subject.refcounts
        if block.startswith(refcounts.encode(tally, first, first + count)):
            return
        # The last byte may count clusters behind the end of the file, too: as it does now.
        stored = refcounts.decode(block, len(block) * 8 // refcounts.bits)
        wanted = [min(value, refcounts.most) for value in tally.values(first, first + count)]
        if self._repair is Repair.LEAKS:
            wanted = [min(pair) for pair in zip(stored, wanted, strict=False)]
        data = refcounts.pack(wanted + stored[count:])
        if data != block:
            place = subject.block_place(first // subject.per_block)
            grow(self._file, place + len(data))
            self._file.pwrite(place, data)

    def _complete_snapshots(self, table: bytes, count: int, end: int) -> None:
        """Have another snapshot table, which is counted before it is named, and the old one after."""
        place = rebuild(*self._begin(), end, self._stages.next(), extra=table)
        self._file.pwrite(SNAPSHOTS_AT, SNAPSHOTS_FIELDS.pack(count, place))
        self._sync()
        self._recount()

    def _completed(self) -> tuple[bytes, int]:
        """A snapshot table with all that version 3 needs, and how many are in it; none if the old one cannot be
        understood."""
        header = read_header(self._file, checking=True)
        storage = Storage(self._file, header.geometry.cluster_size)
        try:
            entries, _ = read_table(storage, header.snapshots_offset, header.snapshots_count)
        except ImageError:
            return b"", 0
        return encode_table(entry.completed(header.size) for entry in entries), len(entries)

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
                    for index in range(run.at, run.at + run.times):
                        table.set(index, 0 if subject.is_extended else ZERO)
            if table.changed and guard.allows_l2(table, place):
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
                        for each in range(run.at + index, run.at + index + run.times):
                            table.set(each, table.entry(each) ^ COPIED)
                if table.changed and guard.allows_l2(table, place):
                    table.write(self._file)
                    self.copied_fixed += len(table.changed) * census.active[place]
        header = subject.header
        if header.l1_count and guard.allows(header.l1_offset, header.l1_count * 8):
            self._correct_l1(subject)
        self._sync()

    def _correct_l1(self, subject: Subject) -> None:
        header = subject.header
        table = _Table(subject, header.l1_offset, header.l1_count)
        for first, entry, alike in repeated(subject.entries(header.l1_offset, header.l1_count)):
            place = entry & OFFSET_MASK
            if place and bool(entry & COPIED) != (subject.refcount(place >> subject.cluster_bits) == 1):
                for index in range(first, first + alike):
                    table.set(index, entry ^ COPIED)
        table.write(self._file)
        self.copied_fixed += len(table.changed)


class _Stages:
    """The progress of a repair: how many times the image is gone over is not known when it begins."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._number = progress, -1

    def next(self) -> Progress:
        """That of the next time."""
        self._number += 1
        number = self._number
        return lambda done, total: self._progress(number * total + done, max(STAGES, number + 1) * total)

    def end(self) -> None:
        self._progress(1, 1)


class _Table:
    """An L1 or L2 table that is being corrected."""

    def __init__(self, subject: Subject, place: int, count: int | None = None) -> None:
        self._place = place
        #: Words of an entry.
        self._width = subject.entry_size // 8 if count is None else 1
        self._words = subject.entries(place, subject.cluster_size // 8 if count is None else count)
        #: The numbers of the entries that have changed.
        self.changed: set[int] = set()
        #: Whether it says (said) what no L2 table says, so that it may be something else.
        different = set(self._words[:: self._width])
        self.is_doubtful = any(entry & L2_RESERVED and not entry & COMPRESSED for entry in different)

    def entry(self, index: int) -> int:
        """The (first word of the) entry."""
        return self._words[index * self._width]

    def set(self, index: int, entry: int) -> None:
        """Change (the first word of) an entry."""
        self._words[index * self._width] = entry
        self.changed.add(index)

    def write(self, file: Layer) -> None:
        """Write the sectors that have changed."""
        words = SECTOR // 8
        for sector in sorted({index * self._width // words for index in self.changed}):
            file.pwrite(self._place + sector * SECTOR, _big_endian(self._words[sector * words : (sector + 1) * words]))


class _Guard:
    """Keeps repairs of one table from other metadata, where an image's tables overlap, and from data."""

    def __init__(self, subject: Subject, census: Census) -> None:
        self._subject, self._census = subject, census
        places = [(place.offset, place.length) for place in census.places if place.what != "L1 table"]
        size = subject.cluster_size
        blocks = {subject.block_place(number) for number, _, _ in repeated(subject.table)}
        places += [(place, size) for place in blocks if place]
        self._ranges = sorted((offset // size, -(-(offset + length) // size)) for offset, length in places)

    def allows(self, place: int, length: int | None = None) -> bool:
        """Whether the table at ``place``, as a rule of one cluster, is in the file and on nothing else."""
        size = self._subject.cluster_size
        length = size if length is None else length
        if place % size or place + length > self._subject.clusters * size:
            return False
        first, stop = place // size, -(-(place + length) // size)
        return not any(start < stop and first < end for start, end in self._ranges)

    def allows_l2(self, table: _Table, place: int) -> bool:
        """Whether the L2 table at ``place`` is on nothing else. If it does not look like one, and something else is
        said to be there, it is that, and an L1 entry is wrong."""
        return self.allows(place) and not (table.is_doubtful and place >> self._subject.cluster_bits in self._shared)

    @functools.cached_property
    def _shared(self) -> set[int]:
        """The clusters of L2 tables that are not only that."""
        subject, census, shared = self._subject, self._census, set[int]()
        tables = {place >> subject.cluster_bits: times for place, times in census.tables.items()}
        for window in windows(subject, subject.clusters + 1):
            census.count(window, no_progress)
            here = ((cluster, times) for cluster, times in tables.items() if window.start <= cluster < window.stop)
            shared.update(cluster for cluster, times in here if window.tally.get(cluster) != times)
        return shared


def _big_endian(words: array[int]) -> bytes:
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()
