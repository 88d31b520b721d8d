"""Which clusters hold metadata: the overlap check, against images whose refcounts or mappings lie.

What is known without reading the whole image: header, L1 table, L2 tables that it names, refcount table and blocks,
snapshot table and the snapshots' L1 tables, bitmaps and their directory (QEMU's ``overlap-check=cached``, and more; not
L2 tables that only snapshots have). No cluster that is in here is ever taken for anything else; what is taken for
metadata is put in. So each table is written to its own clusters and to no others, and a write need not look.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise


class Occupied:
    """An ordered set of cluster numbers."""

    def __init__(self) -> None:
        self._clusters = array("Q")

    def fill(self, clusters: list[int]) -> int | None:
        """Take all of these at once; the first that occurs twice, if any does."""
        clusters.sort()
        self._clusters = array("Q", clusters)
        if len(set(clusters)) == len(clusters):
            return None
        return next(here for here, after in pairwise(clusters) if here == after)

    def add(self, start: int, count: int = 1) -> None:
        """Add ``count`` clusters, none of which is in the set."""
        at = bisect_left(self._clusters, start)
        self._clusters[at:at] = array("Q", range(start, start + count))

    def merge(self, clusters: Iterable[int]) -> None:
        """Add all of these that are not in."""
        self._clusters = array("Q", sorted({*self._clusters, *clusters}))

    def remove(self, start: int, count: int) -> None:
        """Take those of ``count`` clusters from ``start`` out that are in."""
        del self._clusters[bisect_left(self._clusters, start) : bisect_left(self._clusters, start + count)]

    def overlaps(self, start: int, count: int = 1) -> bool:
        """Whether any of ``count`` clusters from ``start`` is in the set."""
        at = bisect_left(self._clusters, start)
        return at < len(self._clusters) and self._clusters[at] < start + count
