"""Host clusters: where guest data is kept, in the image itself or in an external data file.

=============== ============================ ===============================
..              `InImage`                    `DataFile`
=============== ============================ ===============================
a cluster is    any that counts as free      always where it is in the disk
it is shared    with snapshots, perhaps      never
letting it go   lowers its refcount, once    gives storage back, once
                the unlinking is durable     the unlinking is durable
=============== ============================ ===============================

Specification: "Host cluster management"; "Header", incompatible feature bit 2.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from layers.qcow2.clusters import Run
from layers.qcow2.head import Head
from layers.qcow2.intervals import joined, without
from layers.qcow2.limits import DISCARD_PIECE, FREED_COUNT_MAX
from layers.qcow2.occupied import Occupied
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.storage import Storage
from nbdserver.ranges import RangeLock


class Host(Protocol):
    """Where guest data is kept. Places and lengths are bytes of ``storage``.

    All but `reserve` is called under the metadata lock.
    """

    storage: Storage

    def take(self, start: int, count: int) -> tuple[int, int]:
        """Take host clusters for up to ``count`` guest clusters from the one at ``start`` on: (place, how many).

        Raises OSError, ImageError.
        """

    def give_back(self, place: int, count: int) -> None:
        """Free clusters that were taken and that nothing has referred to since."""

    def reserve(self, place: int, length: int) -> bool:
        """Have room for the clusters that the bytes are in; whether they are zeroes, being new. Raises OSError."""

    def has(self, place: int, length: int) -> bool:
        """Whether the bytes are in the file, and not where metadata is, so that they may be overwritten."""

    def is_alone(self, place: int) -> bool:
        """Whether the cluster at ``place`` has one user only, so that COPIED is right."""

    def check(self, place: int, length: int, what: str, named_at: int) -> None:
        """Raise ImageError if guest data that ``what``, at ``named_at``, is to let go of cannot be there."""

    def retire(self, place: int, length: int, *, discard: bool) -> None:
        """Let go of the clusters that the bytes are in, once the change that did is durable; ``discard``: give their
        storage back, too."""


class InImage:
    """Guest data among the metadata, in clusters that are counted."""

    def __init__(self, storage: Storage, refcounts: Refcounts, occupied: Occupied) -> None:
        self.storage, self._refcounts, self._occupied = storage, refcounts, occupied
        self._size = storage.cluster_size

    def take(self, start: int, count: int) -> tuple[int, int]:
        first, count = self._refcounts.take(count)
        return first * self._size, count

    def give_back(self, place: int, count: int) -> None:
        self._refcounts.give_back(place // self._size, count)

    def reserve(self, place: int, length: int) -> bool:
        start, stop = self._clusters(place, length)
        return self.storage.reserve(start * self._size, (stop - start) * self._size)

    def has(self, place: int, length: int) -> bool:
        start = place // self._size
        count = (place + length - 1) // self._size + 1 - start
        return (start + count) * self._size <= self.storage.size and not self._occupied.overlaps(start, count)

    def is_alone(self, place: int) -> bool:
        return self._refcounts.get(place // self._size) == 1

    def check(self, place: int, length: int, what: str, named_at: int) -> None:
        start, stop = self._clusters(place, length)
        if self._occupied.overlaps(start, stop - start):
            raise self.storage.error(what, named_at, f"place {place:#x}", "one that does not hold metadata")
        self._refcounts.check_counted(place, length, what, named_at)

    def retire(self, place: int, length: int, *, discard: bool) -> None:
        self._refcounts.retire(place, length, discard=discard)

    def _clusters(self, place: int, length: int) -> tuple[int, int]:
        return place // self._size, (place + length - 1) // self._size + 1


class DataFile:
    """Guest data in a file of its own, each byte at the offset that it has in the disk.

    A cluster that was let go of may be in use again, at the same place, before that is durable and its storage can be
    given back. So `release` holds its guest clusters (by ``clusters``) while it looks whether they are still without
    it (by ``runs``, as `Mapping.runs`) and gives storage back. What somebody else holds is left for the next time: a
    flush waits for no request.
    """

    def __init__(
        self,
        storage: Storage,
        head: Head,
        *,
        lock: threading.Lock,
        clusters: RangeLock,
        runs: Callable[[int, int], Iterator[Run]],
    ) -> None:
        self.storage, self._head = storage, head
        self._lock, self._clusters, self._runs = lock, clusters, runs
        #: (start, end) of what has been let go of since the last cut, or was held at the last release.
        self._retired: list[tuple[int, int]] = []

    def take(self, start: int, count: int) -> tuple[int, int]:
        if not self.has(start, count * self.storage.cluster_size):
            raise self.too_short()
        return start, count

    def too_short(self) -> OSError:
        """The error for places behind the end of a file that cannot grow, as a block device."""
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.storage.file.filename)

    def give_back(self, place: int, count: int) -> None:
        pass

    def reserve(self, place: int, length: int) -> bool:
        return False

    def has(self, place: int, length: int) -> bool:
        return min(place + length, self._head.size) <= self.storage.size

    def is_alone(self, place: int) -> bool:
        return True

    def check(self, place: int, length: int, what: str, named_at: int) -> None:
        pass

    def retire(self, place: int, length: int, *, discard: bool) -> None:
        if discard:
            end = place + length
            if self._retired and self._retired[-1][1] == place:
                place = self._retired.pop()[0]
            self._retired.append((place, end))

    # -- giving storage back ----------------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """Whether so much waits that the metadata should be written back."""
        return len(self._retired) > FREED_COUNT_MAX

    def cut(self) -> list[tuple[int, int]]:
        """All that has been let go of. Under the metadata lock, with the cut that unlinks it."""
        retired, self._retired = self._retired, []
        return retired

    def retire_again(self, retired: list[tuple[int, int]]) -> None:
        """What `cut` gave has not been released. Under the metadata lock."""
        self._retired[:0] = retired

    def release(self, retired: list[tuple[int, int]]) -> None:
        """Give back the storage of what `cut` gave; its unlinking is durable. Holds no lock before and after."""
        held: list[tuple[int, int]] = []
        for start, end in _pieces(joined(retired)):
            with self._clusters.attempt(start, end - start) as is_free:
                if is_free:
                    self._discard_unused(start, end)
                else:
                    held.append((start, end))
        if len(held) <= FREED_COUNT_MAX:  # else it stays as it is: it is storage, and nothing depends on it
            with self._lock:
                self.retire_again(held)

    def _discard_unused(self, start: int, end: int) -> None:
        """Discard what of the range no entry names: neither in memory nor, perhaps, in the file, where one that has
        been linked since may have been let go of again."""
        bare = [(max(run.start, start), min(run.end, end)) for run in self._runs(start, end) if run.place is None]
        with self._lock:
            pending = list(self._retired)
        for first, stop in without(joined(bare), joined(pending)):
            stop = min(stop, self._head.size)
            if first < stop:
                self.storage.file.wait_unused(first, stop - first)
                self.storage.discard(first, stop)


def _pieces(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same runs, none longer than DISCARD_PIECE."""
    for start, end in runs:
        for first in range(start, end, DISCARD_PIECE):
            yield first, min(first + DISCARD_PIECE, end)
