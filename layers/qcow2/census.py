"""The census: all that an image's metadata refers to, gone over once, and what is wrong with it by itself.

::

    header │ active L1 ──> L2 ──> data, compressed data
           │ snapshot table ──> L1 ──> L2 ──> data
           │ refcount table ──> refcount blocks
           │ encryption header │ bitmap directory ──> bitmap tables ──> bitmaps

A table that several others name (snapshots share most of theirs) is read once, and what it says counts as often as it
is named. What counts as an error, and how often, is what ``qemu-img check`` counts: the same images get the same
numbers. Memory is bounded by the number of tables in the file, and by `limits.CHECKED_COUNT`.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

from layers.ondisk.qcow2 import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    ZERO,
)
from layers.qcow2.clusters import equal_length
from layers.qcow2.findings import Findings, Unchecked
from layers.qcow2.limits import CHECKED_MISPLACED_MAX
from layers.qcow2.places import Place, bitmaps, encryption, snapshots
from layers.qcow2.subject import UNKNOWN, Subject
from layers.qcow2.tally import Tally
from nbdserver.format import Progress

#: The next byte that says anything.
SOMETHING: Final = re.compile(rb"[^\0]")

#: Entries that are compared at once to find out how far clusters are contiguous.
STEPS: Final = (4096, 256, 16)

#: Entries that are many enough to be looked at all at once.
MANY: Final = 16

#: How an entry of an L2 table is named.
ENTRY: Final = "L2 table at %#x, entry %d is %#018x"

#: Bits of an extended entry's bitmap: what is allocated.
ALLOCATED: Final = 0xFFFF_FFFF


class Run(NamedTuple):
    """``span`` L2 entries from number ``at`` on, the first of which is ``entry``: they name contiguous host clusters,
    or there is but one. ``bitmap`` is their second half, where entries are extended.

    One that names no aligned host cluster is there ``times`` times in a row, all of it the same: a table that was
    overwritten is mostly that.
    """

    at: int
    span: int
    entry: int
    bitmap: int = 0
    times: int = 1


class Window:
    """A range of the file's clusters under census: references to them, and what the file says of them."""

    def __init__(self, subject: Subject, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.tally = Tally(start, stop)
        #: The refcounts in the file, as `tally.Refcounts.small` puts them.
        self.stored = bytearray(stop - start)
        self.is_first = start == 0
        for number in range(start // subject.per_block, -(-stop // subject.per_block)):
            first = number * subject.per_block - start
            count = min(subject.per_block, stop - start - first)
            if known := subject.refcounts_of(number, count):
                self.stored[first : first + count] = known


class Census:
    """What an image refers to. Making one goes over all tables but the L2 tables and refcount blocks.

    Raises Unchecked, ImageError, OSError.
    """

    def __init__(self, subject: Subject, findings: Findings) -> None:
        self._subject, self._findings = subject, findings
        #: How often each L2 table, by its place, is named; and how often by the active L1 table.
        self.tables: Counter[int] = Counter()
        self.active: Counter[int] = Counter()
        #: Metadata other than L2 tables and refcount blocks, within the file.
        self.places: list[Place] = []
        self._refer(Place("header", 0, subject.cluster_size))
        header = subject.header
        if header.l1_count:
            self._l1_table(Place("L1 table", header.l1_offset, header.l1_count * 8), is_active=True)
        table, tables = snapshots(subject, findings)
        if header.snapshots_count and subject.has_data_file:
            findings.corrupt(f"{header.snapshots_count} snapshots in an image with an external data file")
        different = Counter((place.offset, place.length) for place in tables)
        if sum(max(min(length, subject.size - offset), 0) for offset, length in different) > subject.size:
            # To go over all of them would take forever, and no two of them may overlap.
            findings.corrupt(
                f"{len(different)} L1 tables of snapshots: more than the file, {subject.size:#x}, can hold"
            )
            raise Unchecked
        for place, times in different.items():
            self._l1_table(Place("L1 table of a snapshot", *place), times=times)
        length = header.refcount_table_clusters * subject.cluster_size
        refcount_table = Place("refcount table", header.refcount_table_offset, length)
        for each in (table, refcount_table, *encryption(subject), *bitmaps(subject, findings)):
            self._refer(each)

    # -- tables that name tables ------------------------------------------------------------------------------------

    def _l1_table(self, place: Place, *, is_active: bool = False, times: int = 1) -> None:
        self._refer(place, times)
        misplaced = 0
        there = max(min(place.length, self._subject.size - place.offset), 0)  # behind it there would be zeroes
        for index, entry, alike in repeated(self._subject.entries(place.offset, -(-there // 8))):
            which, named = (place.what, index, entry), times * alike
            if entry & L1_RESERVED:
                self._findings.corrupt("%s, entry %d is %#018x: reserved bits", named, which)
            table = entry & OFFSET_MASK
            if table % self._subject.cluster_size:
                self._findings.corrupt("%s, entry %d is %#018x: not aligned to clusters", named, which)
                misplaced += self._subject.cluster_size
                if misplaced > CHECKED_MISPLACED_MAX:
                    continue
            if is_active and table:
                copied, refcount = bool(entry & COPIED), self._subject.refcount(table >> self._subject.cluster_bits)
                if _is_wrong(copied, refcount):
                    self._findings.miscopied(f"%s, entry %d is %#018x: {_copied(copied)}", alike, which)
            if not self._is_within(table, self._subject.cluster_size):
                self._findings.corrupt("%s, entry %d is %#018x: behind the end of the file", named, which)
                continue  # it reads as zeroes
            self.tables[table] += named
            if is_active:
                self.active[table] += named

    def _refer(self, place: Place, times: int = 1) -> None:
        if not place.length:
            return
        if not self._is_within(place.offset, place.length):
            text = f"{place.what}: {place.offset:#x} is behind the end of the file, {self._subject.size:#x}"
            self._findings.corrupt(text, times)
            return
        self.places.extend([place] * times)

    def _is_within(self, offset: int, length: int) -> bool:
        """Whether a range is in the file; the last cluster of that may be cut off."""
        return offset + length - self._subject.size < self._subject.cluster_size

    # -- counting ---------------------------------------------------------------------------------------------------

    def count(self, window: Window, progress: Progress, *, refcounts: bool = True) -> None:
        """Count all references to the clusters of a window; without those to the refcount table and blocks, if these
        are to be made anew. In the first window, find what is wrong with entries."""
        counting = _Counting(self._subject, self._findings, window)
        for place in self.places:
            if refcounts or place.what != "refcount table":
                counting.refer(place.offset, place.length, 1)
        for done, (table, times) in enumerate(sorted(self.tables.items())):
            counting.refer(table, self._subject.cluster_size, times)
            counting.table(table, times, self.active[table])
            progress(done + 1, len(self.tables))
        if refcounts:
            self._blocks(window)

    def _blocks(self, window: Window) -> None:
        """Count the refcount blocks, each of which must be all by itself in its cluster."""
        subject, findings = self._subject, self._findings if window.is_first else Findings()
        end = subject.clusters
        for number, entry, alike in repeated(subject.table):
            what, which = "refcount table, entry %d is %#018x: ", (number, entry)
            place = subject.block_place(number)
            cluster = place >> subject.cluster_bits
            if entry & REFCOUNT_TABLE_RESERVED or place % subject.cluster_size:
                wrong = "reserved bits" if entry & REFCOUNT_TABLE_RESERVED else "not aligned"
                findings.corrupt(what + wrong, alike, which)
                findings.rebuild = True
            elif cluster >= end:
                findings.corrupt(what + "behind the end of the file", alike, which)
                findings.has_stray = True
            elif window.start <= cluster < window.stop:
                is_first = window.tally.is_empty(cluster, cluster + 1)
                window.tally.add(cluster, cluster + 1, alike)
                shared = alike - is_first if subject.refcounts.most > 1 else 0
                if shared:
                    self._findings.corrupt(what + "something else is there too", shared, which)
                    self._findings.rebuild = True


class _Counting:
    """Counts what L2 tables name, for one window."""

    def __init__(self, subject: Subject, findings: Findings, window: Window) -> None:
        self._subject, self._window, self._tally = subject, window, window.tally
        #: What is wrong with clusters of the window; and with entries by themselves, told once.
        self._always, self._findings = findings, findings if window.is_first else Findings()
        self._bits, self._size = subject.cluster_bits, subject.cluster_size

    def refer(self, offset: int, length: int, times: int) -> None:
        """Count the clusters that a range within the file touches."""
        self._tally.add(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1, times)

    def table(self, place: int, times: int, active: int) -> None:
        """Count what the L2 table at ``place`` names, which is named ``times`` times, ``active`` times of these by the
        active L1 table."""
        subject, findings, behind = self._subject, self._findings, 0
        table = read_l2(subject, place)
        if self._scattered(table, times, active if place else 0):
            return
        for run in table.runs():
            named, alike = times * run.times, active * run.times
            if run.entry & COMPRESSED:
                self._compressed(run, place, named, alike)
                continue
            if run.entry & L2_RESERVED:
                self._wrong(run, place, "reserved bits", named)
            if not has_host_cluster(subject, run.entry):
                if run.bitmap & ALLOCATED:
                    self._wrong(run, place, "allocated subclusters without a cluster", named)
                continue
            if run.bitmap >> 32 & run.bitmap:
                self._wrong(run, place, "subclusters that are both allocated and zero", named * run.span)
            offset = run.entry & OFFSET_MASK
            if offset & (self._size - 1):
                self._wrong(run, place, "not aligned to clusters", named)
                findings.has_idle |= is_idle(subject, run)
            if active:
                findings.result.allocated_clusters += alike * run.span
                if behind and offset != behind:
                    findings.result.fragmented_clusters += active
                findings.result.fragmented_clusters += active * (run.times - 1)
                behind = offset + run.span * self._size
                if place:  # an L1 entry that names the header is wrong for other reasons
                    self._copied(run, place, alike)
            if not subject.has_data_file:
                self._data(run, place, offset, named)

    def _scattered(self, table: L2Table, times: int, active: int) -> bool:
        """Count a table all of whose clusters are plain, alike and in this window, but one here and one there. Whether
        it is such a table: going through it by runs would take ten times as long."""
        window = self._window
        clusters = table.plain(window.stop) if window.is_first else None
        if clusters is None:
            return False
        if active:
            ones = bytes(itemgetter(*clusters)(window.stored)).count(1)
            if ones != (len(clusters) if table.is_copied else 0):
                return False
            result = self._findings.result
            result.allocated_clusters += active * len(clusters)
            result.fragmented_clusters += active * sum(
                here != before + 1 for before, here in itertools.pairwise(clusters)
            )
        self._tally.add_each(clusters, times)
        return True

    def _data(self, run: Run, place: int, offset: int, times: int) -> None:
        within = min(max(-(-(self._subject.size - offset) // self._size), 0), run.span)
        if within < run.span:
            self._wrong(run, place, "behind the end of the file", times * (run.span - within))
        if within:
            self.refer(offset, within * self._size, times)

    def _compressed(self, run: Run, place: int, times: int, active: int) -> None:
        if run.entry & COPIED:
            self._wrong(run, place, "compressed and COPIED", times)
        if self._subject.has_data_file:
            self._wrong(run, place, "compressed, with an external data file", times)
            return
        if run.bitmap:
            self._wrong(run, place, "compressed, with subclusters", times)
            return
        offset, length = self._subject.header.geometry.compressed(run.entry & ~COPIED)
        if offset + length - self._subject.size >= self._size:
            self._wrong(run, place, "compressed data behind the end of the file", times)
        else:
            self.refer(offset, length, times)
        result = self._findings.result
        result.allocated_clusters += active
        result.compressed_clusters += active
        result.fragmented_clusters += active

    def _copied(self, run: Run, place: int, times: int) -> None:
        wrong = len(miscopied(self._subject, self._window, run))
        if wrong:
            text = f"{ENTRY}: {_copied(bool(run.entry & COPIED))} (%d of %d)"
            self._always.miscopied(text, times * wrong, (place, run.at, run.entry, wrong, run.span))

    def _wrong(self, run: Run, place: int, text: str, times: int) -> None:
        self._findings.corrupt(f"{ENTRY}: {text}", times, (place, run.at, run.entry))


def _copied(copied: bool) -> str:
    return "COPIED, but its refcount is not 1" if copied else "not COPIED, but its refcount is 1"


def has_host_cluster(subject: Subject, entry: int) -> bool:
    """Whether an entry that is not compressed names a host cluster. In a data file, offset 0 is one if it is COPIED."""
    if entry & OFFSET_MASK:
        return True
    is_zero = bool(entry & ZERO) and not subject.is_extended
    return subject.has_data_file and bool(entry & COPIED) and not is_zero


def miscopied(subject: Subject, window: Window, run: Run) -> Sequence[int]:
    """Which entries of a run of an active L2 table, counted from its first, contradict the refcounts in the file by
    their flag COPIED: of those whose clusters are in the window, or, in the first window, in none."""
    if run.entry & COMPRESSED or not has_host_cluster(subject, run.entry):
        return ()
    copied = bool(run.entry & COPIED)
    if subject.has_data_file:
        return range(run.span if window.is_first and not copied else 0)
    first = (run.entry & OFFSET_MASK) >> subject.cluster_bits
    wrong: list[int] = []
    start, stop = max(first, window.start), min(first + run.span, window.stop)
    if start < stop:
        part = window.stored[start - window.start : stop - window.start]
        if part.count(1) != (len(part) if copied else 0):
            wrong = [start - first + at for at, refcount in enumerate(part) if _is_wrong(copied, refcount)]
    if window.is_first:
        behind = range(max(first, subject.clusters + 1), first + run.span)
        wrong += [cluster - first for cluster in behind if _is_wrong(copied, subject.refcount(cluster))]
    return wrong


def _is_wrong(copied: bool, refcount: int) -> bool:
    return refcount != UNKNOWN and copied != (refcount == 1)


def is_idle(subject: Subject, run: Run) -> bool:
    """Whether there is no data in the host cluster that an entry names."""
    return not run.bitmap & ALLOCATED if subject.is_extended else bool(run.entry & ZERO)


class L2Table:
    """An L2 table as it is in the file."""

    def __init__(self, subject: Subject, data: bytes) -> None:
        self._subject, self._data = subject, data
        self._entries, self._bitmaps = array("Q", data), array("Q")
        if sys.byteorder == "little":
            self._entries.byteswap()
        if subject.is_extended:
            self._entries, self._bitmaps = self._entries[::2], self._entries[1::2]

    @property
    def is_copied(self) -> bool:
        """Whether COPIED is set in any entry; so it is in all `plain` ones, or in none."""
        return max(self._entries) >= COPIED

    @functools.cached_property
    def is_one_run(self) -> bool:
        """Whether all entries name one cluster after the other, from the first to the last."""
        first, step, last = self._entries[0], self._subject.cluster_size, len(self._entries) - 1
        if self._bitmaps or not self._is_named(first) or self._entries[-1] != first + last * step:
            return False
        ones, ramp = _ramp(last + 1, step)
        return int.from_bytes(self._data, "big") == first * ones + ramp

    def _is_named(self, entry: int) -> bool:
        """Whether an entry names a host cluster and has no other flags than those that a run may have."""
        named = OFFSET_MASK & ~(self._subject.cluster_size - 1)
        return bool(entry & named) and not entry & ~(named | COPIED | ZERO)

    def runs(self) -> Iterator[Run]:
        """What the entries say, those left out that are all zeroes."""
        subject, entries, bitmaps = self._subject, self._entries, self._bitmaps
        if self.is_one_run:
            yield Run(0, len(entries), entries[0])
            return
        at = 0
        while found := SOMETHING.search(self._data, at * subject.entry_size):
            at = found.start() // subject.entry_size
            entry, bitmap, span, times = entries[at], bitmaps[at] if bitmaps else 0, 1, 1
            if self._is_named(entry):
                span = _contiguous(entries, at, subject.cluster_size)
                if bitmaps:
                    span = next((index for index in range(1, span) if bitmaps[at + index] != bitmap), span)
            elif at + 1 < len(entries) and entries[at + 1] == entry:
                times = equal_length(entries, at)
                if bitmaps:
                    times = min(times, equal_length(bitmaps, at))
            yield Run(at, span, entry, bitmap, times)
            at += span * times

    def plain(self, stop: int) -> list[int] | None:
        """The host clusters that the entries name, in order, if they name plain ones below ``stop`` and say nothing
        else; None too if there are few, or if they come in long runs."""
        subject, data = self._subject, self._data
        if subject.is_extended or subject.has_data_file or self.is_one_run:
            return None
        if _contiguous(self._entries, 0, subject.cluster_size) >= MANY:
            return None
        used = list(filter(None, self._entries))
        flag = COPIED if used and max(used) >= COPIED else 0
        if len(used) < MANY or min(used) <= flag or (max(used) - flag) >> subject.cluster_bits >= stop:
            return None
        # No bit below a cluster's size is set in any entry: neither flags nor parts of offsets.
        whole, rest = divmod(subject.cluster_bits, 8)
        low = [data[7 - index :: 8] for index in range(whole)]
        if rest:
            low.append(data[7 - whole :: 8].translate(_masked(rest)))
        if any(part.count(0) != len(part) for part in low):
            return None
        return [entry - flag >> subject.cluster_bits for entry in used]


def repeated(table: array[int]) -> Iterator[tuple[int, int, int]]:
    """(index, entry, how often it is there in a row) of the entries of a table that are not 0."""
    data, at = table.tobytes(), 0
    while found := SOMETHING.search(data, at * 8):
        at = found.start() // 8
        alike = equal_length(table, at) if table[at : at + 2] == table[at : at + 1] * 2 else 1
        yield at, table[at], alike
        at += alike


def read_l2(subject: Subject, place: int) -> L2Table:
    """The L2 table at ``place``, wherever that is."""
    return L2Table(subject, subject.read(place, subject.cluster_size))


@functools.cache
def _ramp(count: int, step: int) -> tuple[int, int]:
    """Tables of ``count`` entries as one number each: of ones, and of 0, ``step``, 2 * ``step``, ..."""
    ones = int.from_bytes((bytes(7) + b"\1") * count, "big")
    ramp = array("Q", range(0, count * step, step))
    if sys.byteorder == "little":
        ramp.byteswap()
    return ones, int.from_bytes(ramp.tobytes(), "big")


@functools.cache
def _masked(bits: int) -> bytes:
    """Bytes to bytes: the lowest bits."""
    return bytes(value & (1 << bits) - 1 for value in range(256))


def _contiguous(entries: array[int], at: int, step: int) -> int:
    """How many entries from ``at`` on each name the cluster behind the last one's, with the same flags."""
    start, wanted, stop = at, entries[at] + step, len(entries)
    at += 1
    if at == stop or entries[at] != wanted:
        return 1
    for size in STEPS:
        while stop - at >= size and entries[at : at + size] == array("Q", range(wanted, wanted + size * step, step)):
            at, wanted = at + size, wanted + size * step
    while at < stop and entries[at] == wanted:
        at, wanted = at + 1, wanted + step
    return at - start
