"""Making all refcounts of an image anew, by what refers to its clusters.

::

    all that is there │ refcount table │ refcount blocks │ (anything else that is to be counted)

The new ones are put where nothing is, behind the end of the file, and are durable before the header names them: in one
write, from which on nobody knows the old ones any more.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Iterator

from layers.ondisk.qcow2 import REFCOUNT_TABLE_AT, REFCOUNT_TABLE_FIELDS
from layers.qcow2.census import Census
from layers.qcow2.check import blocks, part_of, windows, windows_count
from layers.qcow2.create import refcount_clusters
from layers.qcow2.limits import REFCOUNT_TABLE_MAX
from layers.qcow2.subject import Subject
from layers.qcow2.tally import Tally
from nbdserver.errors import ImageError
from nbdserver.format import Progress, grow
from nbdserver.layer import finish


def rebuild(subject: Subject, census: Census, end: int, progress: Progress, *, extra: bytes = b"") -> int:
    """Make a new refcount table and new blocks; from ``end`` on nothing is in use. Where ``extra`` is, which is counted
    too, and durable. Raises ImageError, OSError: ENOSPC if there is no room."""
    return _Rebuild(subject, census, progress, extra).run(end)


class _Rebuild:
    def __init__(self, subject: Subject, census: Census, progress: Progress, extra: bytes) -> None:
        self._subject, self._census, self._progress, self._extra = subject, census, progress, extra
        self._size = subject.cluster_size
        self._extra_clusters = -(-len(extra) // self._size)
        # As far as all of it can reach: what is in use may pass the end of the file by a cluster.
        stop = subject.clusters + 1 + self._extra_clusters
        self._stop = stop + sum(refcount_clusters(stop, self._size, subject.refcounts.bits))

    def run(self, end: int) -> int:
        subject, file = self._subject, self._subject.file
        used: set[int] = set()
        tallies: list[Tally] = []
        for tally in self._references():
            for first, count in blocks(subject, tally.start, tally.stop):
                if not tally.is_empty(first, first + count):
                    used.add(first // subject.per_block)
            tallies.append(tally)
            del tallies[:-1]  # one that is the only one need not be made twice
        start, table_clusters, numbers = self._room(used, end)
        extra_at = start + table_clusters + len(numbers)
        places = {number: start + table_clusters + index for index, number in enumerate(numbers)}
        for tally in tallies if tallies[0].start == 0 else self._references():
            tally.add(start, extra_at + self._extra_clusters, 1)
            self._write_blocks(tally, places)
        table = array("Q", bytes(table_clusters * self._size))
        for number, place in places.items():
            table[number] = place * self._size
        if sys.byteorder == "little":
            table.byteswap()
        file.pwrite(start * self._size, table.tobytes())
        if self._extra:
            file.pwrite(extra_at * self._size, self._extra.ljust(self._extra_clusters * self._size, b"\0"))
        finish(file.flush())
        file.pwrite(REFCOUNT_TABLE_AT, REFCOUNT_TABLE_FIELDS.pack(start * self._size, table_clusters))
        finish(file.flush())
        return extra_at * self._size

    def _references(self) -> Iterator[Tally]:
        """References to clusters; not those to what counts them, which is made anew."""
        parts = windows_count(self._subject, self._stop)
        for part, window in enumerate(windows(self._subject, self._stop)):
            self._census.count(window, part_of(self._progress, part, parts), refcounts=False)
            yield window.tally

    def _write_blocks(self, tally: Tally, places: dict[int, int]) -> None:
        for first, count in blocks(self._subject, tally.start, tally.stop):
            place = places.get(first // self._subject.per_block)
            if place is not None:
                data = self._subject.refcounts.encode(tally, first, first + count)
                self._subject.file.pwrite(place * self._size, data.ljust(self._size, b"\0"))

    def _room(self, used: set[int], end: int) -> tuple[int, int, list[int]]:
        """Where it goes: (first cluster, clusters of the table, numbers of the blocks).

        Behind the end of the file, which grows; on what cannot grow, behind all that is in use.
        """
        subject = self._subject
        start = max(subject.clusters, end // self._size)
        table_clusters, numbers = self._layout(used, start)
        try:
            grow(subject.file, self._reach(start, table_clusters, numbers))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            start = end // self._size
            table_clusters, numbers = self._layout(used, start)
            if self._reach(start, table_clusters, numbers) > subject.size:
                raise
        return start, table_clusters, numbers

    def _reach(self, start: int, table_clusters: int, numbers: list[int]) -> int:
        return (start + table_clusters + len(numbers) + self._extra_clusters) * self._size

    def _layout(self, used: set[int], start: int) -> tuple[int, list[int]]:
        """(clusters of a refcount table, numbers of the blocks) that count what is in the blocks ``used`` and, from
        cluster ``start`` on, what is new. Raises ImageError if that is more than the format can have."""
        per_block, numbers, table_clusters = self._subject.per_block, set(used), 1
        while True:
            stop = start + table_clusters + len(numbers) + self._extra_clusters
            needed = numbers | set(range(start // per_block, (stop - 1) // per_block + 1))
            length = -(-(max(needed) + 1) * 8 // self._size)
            if needed == numbers and length == table_clusters:
                break
            numbers, table_clusters = needed, length
        if table_clusters * self._size > REFCOUNT_TABLE_MAX:
            raise ImageError("needs more refcounts than the format can have", path=self._subject.file.filename)
        return table_clusters, sorted(numbers)
