"""Checking an image: references are counted, and held against the refcounts in the file.

What is found, and how often it counts, is what ``qemu-img check`` finds. `repair` mends it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from layers.qcow2.census import Census, Window
from layers.qcow2.findings import Findings, Unchecked
from layers.qcow2.header import read_header
from layers.qcow2.limits import CHECKED_COUNT
from layers.qcow2.subject import Misplaced, Subject
from nbdserver.format import Progress
from nbdserver.layer import Layer

#: QEMU measures disks in these.
SECTOR = 512


def examine(file: Layer, progress: Progress) -> Findings:
    """What is wrong with the image in ``file``, which only is read. Raises ImageError, OSError."""
    subject, findings = Subject(file, read_header(file, checking=True)), Findings()
    sectors = subject.header.size // SECTOR
    findings.result.total_clusters = subject.header.geometry.clusters(sectors * SECTOR)
    try:
        census = Census(subject, findings)
    except Unchecked:
        findings.unread("the check ends here, for it cannot be told what is in use")
        findings.is_cut_short = True
        return findings
    stop = subject.clusters + 1
    for part, window in enumerate(windows(subject, stop)):
        census.count(window, part_of(progress, part, windows_count(subject, stop)))
        _compare(subject, window, findings)
    return findings


def windows(subject: Subject, stop: int) -> Iterator[Window]:
    """The clusters of the file below ``stop``, in ranges that can be counted at once."""
    step = _window_step(subject)
    for start in range(0, stop, step):
        yield Window(subject, start, min(start + step, stop))


def windows_count(subject: Subject, stop: int) -> int:
    """How many there are of `windows`."""
    return -(-stop // _window_step(subject))


def part_of(progress: Progress, part: int, parts: int) -> Progress:
    """The progress of one of equal parts."""
    return lambda done, total: progress(part * total + done, parts * total)


def _window_step(subject: Subject) -> int:
    return max(CHECKED_COUNT // subject.per_block, 1) * subject.per_block


def _compare(subject: Subject, window: Window, findings: Findings) -> None:
    """Hold the references to the clusters of a window against the refcounts in the file."""
    most = subject.refcounts.most
    for cluster, count in window.tally.excess(most):
        findings.corrupt(f"cluster {cluster}: {count} references, but refcounts end at {most}", count - most)
    stop = window.stop
    if stop > subject.clusters and window.tally.is_empty(stop - 1, stop):
        stop -= 1  # nothing refers to what would be behind the file's end
    highest = -1
    for first, count in blocks(subject, window.start, stop):
        try:
            block = subject.block(first // subject.per_block, count)
        except Misplaced:
            findings.unread(f"refcounts of clusters {first} to {first + count - 1}: the block is misplaced", count)
            continue
        highest = max(highest, _compare_block(subject, window, findings, block, first, count))
    if highest >= 0 or window.is_first:
        findings.result.image_end_offset = (max(highest, 0) + 1) * subject.cluster_size


def _compare_block(
    subject: Subject, window: Window, findings: Findings, block: bytes | None, first: int, count: int
) -> int:
    """The last cluster that is in use or counts as such, of ``count`` from ``first`` on, whose block is given."""
    tally, refcounts = window.tally, subject.refcounts
    if block is None and tally.is_empty(first, first + count):
        return -1
    counted = refcounts.encode(tally, first, first + count)
    if block is not None and block.startswith(counted):
        return first + len(tally.small(first, first + count).rstrip(b"\0")) - 1
    stored = refcounts.decode(block or bytes(refcounts.length(count)), count)
    references = [min(value, refcounts.most) for value in tally.values(first, first + count)]
    at, highest = first, -1
    for (refcount, wanted), run in itertools.groupby(zip(stored, references, strict=True)):
        length = sum(1 for _ in run)
        at += length
        if refcount or wanted:
            highest = at - 1
        if refcount == wanted:
            continue
        which = f"cluster {at - 1}" if length == 1 else f"clusters {at - length} to {at - 1}"
        text = f"{which}: refcount {refcount}, {wanted} reference{'' if wanted == 1 else 's'}"
        if refcount > wanted:
            findings.leaked(f"{text}: leaked", length)
        else:
            findings.corrupt(text, length)
            findings.rebuild |= refcount == 0
    return highest


def blocks(subject: Subject, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first, how many) of the clusters [start, stop) by refcount block; ``start`` is the first one of a block."""
    for first in range(start, stop, subject.per_block):
        yield first, min(subject.per_block, stop - first)
