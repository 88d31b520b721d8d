"""Sets of numbers as half-open runs, (start, stop)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator


def joined(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The union of runs, disjoint and in order."""
    start = stop = -1
    for first, end in sorted(runs):
        if first > stop:
            if stop > start:
                yield start, stop
            start, stop = first, end
        stop = max(stop, end)
    if stop > start:
        yield start, stop


def common(some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What two ordered sequences of disjoint runs have in common."""
    one, two = iter(some), iter(others)
    a, b = next(one, None), next(two, None)
    while a is not None and b is not None:
        start, stop = max(a[0], b[0]), min(a[1], b[1])
        if start < stop:
            yield start, stop
        if a[1] < b[1]:
            a = next(one, None)
        else:
            b = next(two, None)


def without(some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is in the first and not in the second of two ordered sequences of disjoint runs."""
    two = iter(others)
    b = next(two, None)
    for start, stop in some:
        while b is not None and b[0] < stop:
            if start < b[0]:
                yield start, b[0]
            start = max(start, b[1])
            if b[1] >= stop:
                break
            b = next(two, None)
        if start < stop:
            yield start, stop


def counted(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, how often): what is in half-open runs, in order."""
    steps = Counter[int]()
    for first, end in runs:
        steps[first] += 1
        steps[end] -= 1
    start = times = 0
    for cluster, step in sorted(steps.items()):
        if times:
            yield start, cluster, times
        start, times = cluster, times + step
