"""Free clusters behind the allocation cursor: runs that have been freed, lowest first.

The cursor of `refcounts` goes over the file once; what becomes free behind it is remembered here, so that a search
never looks at the same clusters again. Bounded: too many runs, and the upper half is forgotten and the cursor set back
to where it began.
"""

from __future__ import annotations

from bisect import bisect_left

from layers.qcow2.limits import FREE_RUNS_COUNT_MAX


class FreeRuns:
    """Disjoint, maximal runs of clusters."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._counts: dict[int, int] = {}

    def add(self, start: int, count: int) -> int | None:
        """Add clusters that are not in. The cluster from which on everything has been forgotten, if it has."""
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + count:
            count += self._counts.pop(self._starts.pop(at))
        if at and self._starts[at - 1] + self._counts[self._starts[at - 1]] == start:
            self._counts[self._starts[at - 1]] += count
        else:
            self._starts.insert(at, start)
            self._counts[start] = count
        return self._forget() if len(self._starts) > FREE_RUNS_COUNT_MAX else None

    def take(self, count: int) -> tuple[int, int] | None:
        """Remove and give (start, how many) of at most ``count`` clusters, the lowest; None if there are none."""
        if not self._starts:
            return None
        start = self._starts[0]
        there = self._counts.pop(start)
        if there > count:
            self._starts[0] = start + count
            self._counts[start + count] = there - count
            return start, count
        del self._starts[0]
        return start, there

    def take_whole(self, count: int) -> int | None:
        """Remove ``count`` clusters in a row, the lowest there are, and give the first; None if there are none."""
        for at, start in enumerate(self._starts):
            there = self._counts[start]
            if there < count:
                continue
            del self._counts[start]
            if there > count:
                self._starts[at] = start + count
                self._counts[start + count] = there - count
            else:
                del self._starts[at]
            return start
        return None

    def _forget(self) -> int:
        half = len(self._starts) // 2
        cursor = self._starts[half]
        for start in self._starts[half:]:
            del self._counts[start]
        del self._starts[half:]
        return cursor
