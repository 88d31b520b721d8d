"""The order of writes: how metadata reaches the file so that a crash at any instant leaves a sound image.

Metadata is written back: requests change tables in memory only, and a *flush* brings them into the file. What a flush
writes is a *cut*: copies of all that has changed, taken at one instant under the metadata lock, and so consistent in
itself. It goes out in this order (``|`` is a sync of the file; within a step the order is free, and sectors may be
lost)::

    prepare   refcount blocks; new L2 tables; a new refcount table
       |      (also makes durable all guest data and copied data written so far, in an external data file, too, and new
       |      tables for the switch)
    publish   refcount table entries of new blocks; the header's pointer to a new refcount table
       |      (both only if there are any)
    link      changed L2 entries; L1 entries
       |
    switch    the header's pointer to the L1 table, and the disk's size with it; its pointer to the snapshot table
       |      (both only if they have changed)
    release   what the links above no longer refer to: wait until unused, lower its refcounts (in memory),
              discard it, let it be taken again

Why, step by step. Let a *reference* be anything in the file that names a cluster.

- *No reference without a refcount.* A cluster counts from the moment it is taken, and whatever refers to it is of the
  same cut or a later one: refcount in prepare, L2 or L1 entry in link, a sync between. A cluster that only a *new*
  block counts is counted in the file only once the table names that block, so that is published before anything is
  linked. The block itself is durable before it is named: a stale cluster must not be believed as refcounts. A block
  that counts itself is consistent before it is named (it is no reference) and after.
- *No refcount below the references.* Counts are lowered only by release, when the sync after link has made it certain
  that no old reference comes back. The lowered counts are written whenever, by the next cut.
- *COPIED is true.* It is set only in entries that name clusters whose refcount of exactly 1 is durable before: they
  were just taken, or given up by a snapshot. Only making a snapshot raises refcounts above 1, and sees to the flags
  (below). What shares a cluster with a snapshot has no COPIED flag here, and the snapshot's flags do not count.
- *No range shows what was written to another.* Data is in its new cluster before the L2 entry in memory names it,
  hence before the cut that has this entry, hence durable (sync after prepare) before the entry is linked. The old
  cluster is neither rewritten nor reused before release.
- *An L2 table is not seen half-made.* A new one (or the copy of one that a snapshot shares) is durable before an L1
  entry names it. From then on it is rewritten in place, in link: entries of 8 or 16 bytes, each of them right by
  itself whether its sector got out or not (none crosses one).
- *The refcount table moves in one write*, of two fields in the header's first sector. The longer table is durable
  before, and the old one is released after.
- *A cluster kept for zeroes, or for subclusters yet to be written* (COPIED) is filled in place before it is linked as
  data. An older entry that a crash brings back names it as data of the same place of the disk, with nothing flushed
  since, or does not name it at all.
- *In an external data file* that is so of every cluster, for each has its one place there. Nothing is counted; but
  storage is given back by release, where it cannot be missed by an older entry, unless it is in use again.
- *Compressed clusters share clusters of the file*, each of which counts all that have bytes in it. A count is raised as
  that of a new cluster is set: before an entry can be in the file. Compressed data never changes; what goes beside it
  is written without it, so that a sector of which both have a part shows its bytes whether that got out or not. And
  from the cut on that retires one of them, nothing more is put beside it: release looks once, before it discards,
  whether a cluster has other users.

Points in time (`snapshots`, `resize`) change what the image is. Each is a switch, which one sector brings about, with
whatever it takes before and after. What comes before may be spread over any number of cuts, and so may what comes
after: none of it changes what the disk holds, or any snapshot. All guest clusters are held meanwhile.

========= ===================================== ====================================== =================================
..        before                                switch                                 after
========= ===================================== ====================================== =================================
create    refcounts of all that the L1 table    the header names a snapshot table      the old snapshot table goes
          leads to are raised; then COPIED is   with one entry more, which names a
          cleared on the way to it              copy of the L1 table
apply     refcounts of all that the snapshot's  the header names a copy of the         what only the old L1 table leads
          L1 table leads to are raised; COPIED  snapshot's L1 table, and the size that  to goes, and that table
          is cleared in its L2 tables           the disk had
delete                                          the header names a snapshot table      what only the snapshot's L1 table
                                                with one entry less                    leads to goes; then COPIED is set
                                                                                       where a refcount is 1 again
empty     an empty L1 table is written          the header names that                  what only the old L1 table leads
                                                                                       to goes, and that table
grow      a longer L1 table takes the place of  the header says the size
          the old one, by a switch of its own;
          behind the end all is made zeroes
shrink                                          the header says the size               what lies behind the end goes
========= ===================================== ====================================== =================================

- A crash before the switch leaves refcounts that are too high, which are leaks, and COPIED flags that do not agree with
  them. Either is harmless: no two entries lead to a place that is COPIED. ``qemu-img check -r leaks`` mends both.
- When the switch is made COPIED has been cleared durably, so that nothing that the snapshot has is written in place.
- What goes is retired in the cut that has the switch, or a later one, and so released when that is durable.

A step that fails leaves everything of its cut marked as changed; the next flush does all again. That is sound for the
same reasons: what may be in the file already is of a cut whose refcounts were durable, and nothing of it has been
released. Only a failed *sync* is final. What it lost, nobody knows; so from then on no metadata is written, every
flush fails, and the image in the file stays as its last good flush left it, data written in place apart.

*Lazy refcounts*, if the image asks for them: refcount blocks are not part of a cut, as long as the refcount table is as
it is in the file. Before the first cut that lacks some, the image is marked as dirty, durably; who opens it then counts
all references anew before using a refcount or a COPIED flag, so that the rules about those need not hold. What is left
of the order is what keeps data: what is written goes before what names it, and nothing that the file may still name is
written over. Closing brings the blocks into the file, and then takes the mark away.

A crash loses at most refcounts of clusters taken and never linked (leaks, which ``qemu-img check -r leaks`` takes
back), and what was not flushed.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from layers.ondisk.qcow2 import INCOMPATIBLE_DIRTY
from layers.qcow2.cache import Table, Write
from layers.qcow2.intervals import common, counted, joined
from nbdserver.errors import ImageError
from nbdserver.layer import Layer, finish

if TYPE_CHECKING:
    from layers.qcow2.head import Head
    from layers.qcow2.host import DataFile
    from layers.qcow2.mapping import WritableMapping
    from layers.qcow2.marks import Marks
    from layers.qcow2.refcounts import Refcounts
    from layers.qcow2.storage import Storage


class Retired(NamedTuple):
    """Clusters [start, stop) that one reference each was taken from; ``discard`` if they become free."""

    start: int
    stop: int
    discard: bool


class Cut:
    """All changes of the metadata at one instant, by the step that writes them."""

    def __init__(self) -> None:
        self.prepares: list[Write] = []
        self.publishes: list[Write] = []
        self.links: list[Write] = []
        self.switches: list[Write] = []
        self.retired: list[Retired] = []
        #: (start, end) of what was let go of in the external data file.
        self.bared: list[tuple[int, int]] = []
        #: The refcount table that the header names when this is through, if it changes.
        self.published: Table | None = None
        self._taken: list[tuple[Table, set[int]]] = []

    def prepare(self, table: Table) -> None:
        """Write a table that nothing refers to yet, or a refcount block."""
        self._take(table, self.prepares)

    def publish(self, table: Table) -> None:
        """Write entries of the refcount table in place."""
        self._take(table, self.publishes)

    def publish_header(self, write: Write, table: Table) -> None:
        """Make the header name another refcount table."""
        self.publishes.append(write)
        self.published = table

    def link(self, table: Table) -> None:
        """Write entries of the L1 table, or of an L2 table in use, in place."""
        self._take(table, self.links)

    def switch(self, write: Write) -> None:
        """Have the header say that the image is another disk, or has other snapshots."""
        self.switches.append(write)

    def _take(self, table: Table, writes: list[Write]) -> None:
        sectors, table.changed = table.changed, set()
        table.in_flight = True
        self._taken.append((table, sectors))
        writes.extend(table.encode(sectors))

    def prepared(self) -> None:
        """What `prepare` took is durable, so that from now on it may be referred to, and is changed in place."""
        for table, _ in self._taken:
            table.unlinked = False

    def end(self, *, written: bool) -> None:
        """Let the tables go: they are in the file, or else have changed as they had before."""
        for table, sectors in self._taken:
            table.in_flight = False
            if not written:
                table.changed |= sectors


class Order:
    """Flushes: one at a time, shared by those who wait for it."""

    def __init__(
        self,
        storage: Storage,
        lock: threading.Lock,
        mapping: WritableMapping,
        refcounts: Refcounts,
        head: Head,
        data_file: DataFile | None,
        lazy: Marks | None,
        *,
        users: Layer,
    ) -> None:
        """``users``: what knows who uses places in the file: that itself, or what guest data there goes through.
        ``lazy``: marks the image as dirty while its refcounts lag behind; None: they do not."""
        self._storage, self._lock, self._mapping, self._refcounts = storage, lock, mapping, refcounts
        self._head, self._data_file, self._lazy, self._users = head, data_file, lazy, users
        self._closing = False
        self._turn = threading.Condition()
        self._running = False
        self._begun = self._done = 0
        #: How the last flush that is done ended.
        self._outcome: BaseException | None = None
        #: The failed sync after which nothing more is written.
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Raise OSError if metadata can no longer reach the file."""
        if self._failure is not None:
            raise _again(self._failure)

    def flush(self) -> None:
        """Make all that completed before this call durable. Raises OSError, RequestError, ImageError.

        A flush that begins from now on covers it, whoever runs it.
        """
        with self._turn:
            wanted = self._begun + 1
            self._turn.wait_for(lambda: self._done >= wanted or not self._running)
            if self._done >= wanted:
                if self._outcome is not None:
                    raise _again(self._outcome)
                return
            self._running = True
            self._begun += 1
        outcome: BaseException | None = None
        try:
            self._flush()
        except BaseException as error:
            outcome = error
            raise
        finally:
            with self._turn:
                self._running, self._done, self._outcome = False, self._begun, outcome
                self._turn.notify_all()

    def close(self) -> None:
        """Flush until the file has everything, lowered refcounts too, and ends where it is needed to."""
        self._closing = True
        self.flush()
        while not (self._mapping.is_clean and self._refcounts.is_clean and self._head.is_clean):
            self.flush()
        self._storage.close()
        if self._lazy is not None:
            self._lazy.clear(INCOMPATIBLE_DIRTY)

    def condemn(self, error: ImageError) -> None:
        """Have no metadata reach the file from now on: it is wrong."""
        self._failure = error

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Have no flush run."""
        with self._turn:
            self._turn.wait_for(lambda: not self._running)
            self._running = True
        try:
            self.check()
            yield
        finally:
            with self._turn:
                self._running = False
                self._turn.notify_all()

    def _flush(self) -> None:
        self.check()
        with self._lock:
            cut = Cut()
            lag = self._lazy is not None and self._refcounts.may_lag and not self._closing
            dirties = lag and self._refcounts.is_changed
            self._refcounts.cut(cut, lag=lag)
            self._mapping.cut(cut)
            self._head.cut(cut)
            if self._data_file is not None:
                cut.bared = self._data_file.cut()
        try:
            if dirties:
                self._mark_dirty()
            self._write_out(cut)
        except BaseException:
            with self._lock:
                cut.end(written=False)
                self._retire_again(cut)
            raise
        with self._lock:
            cut.end(written=True)
            self._refcounts.settle(cut)
            self._mapping.settle()
            self._head.settle(cut)
        self._release(cut)

    def _write_out(self, cut: Cut) -> None:
        self._write(cut.prepares)
        if self._data_file is not None:
            self._sync(self._data_file.storage)
        if cut.prepares or cut.switches or self._data_file is None:
            self._sync(self._storage)
        cut.prepared()
        for step in (cut.publishes, cut.links, cut.switches):
            if step:
                self._write(step)
                self._sync(self._storage)

    def _mark_dirty(self) -> None:
        assert self._lazy is not None
        try:
            self._lazy.set(INCOMPATIBLE_DIRTY)
        except BaseException as error:
            self._failure = error
            raise

    def _write(self, writes: Iterable[Write]) -> None:
        for write in writes:
            self._storage.file.pwrite(write.offset, write.data)

    def _sync(self, storage: Storage) -> None:
        try:
            finish(storage.file.flush())
        except BaseException as error:
            self._failure = error
            raise

    def _retire_again(self, cut: Cut) -> None:
        self._refcounts.retire_again(cut.retired)
        if self._data_file is not None:
            self._data_file.retire_again(cut.bared)

    def _release(self, cut: Cut) -> None:
        """Nothing in the file refers any more to what ``cut`` let go of: set it free."""
        try:
            self._wait_unused(cut.retired)
            self._discard(cut.retired)
            if self._data_file is not None:
                self._data_file.release(cut.bared)
        except BaseException:
            with self._lock:
                self._retire_again(cut)
            raise
        with self._lock:  # never twice: should this fail half-way, the rest leaks
            for start, stop, times in counted((run.start, run.stop) for run in cut.retired):
                self._refcounts.drop(start, stop, times)

    def _wait_unused(self, retired: list[Retired]) -> None:
        size = self._storage.cluster_size
        for start, stop in joined((run.start, run.stop) for run in retired):
            self._users.wait_unused(start * size, (stop - start) * size)

    def _discard(self, retired: list[Retired]) -> None:
        """Give back the storage of what has been let go of for the last time, and is to be discarded."""
        with self._lock:
            unused = [
                (first, end)
                for start, stop, times in counted((run.start, run.stop) for run in retired)
                for first, end, refcount in self._refcounts.runs(start, stop)
                if 0 < refcount <= times  # what counts 0, in an image that is wrong, may be somebody's by now
            ]
        size = self._storage.cluster_size
        for start, stop in common(joined(unused), joined((run.start, run.stop) for run in retired if run.discard)):
            self._storage.discard(start * size, stop * size)


def _again(error: BaseException) -> Exception:
    """An error of the same meaning for another thread."""
    if isinstance(error, ImageError):
        return OSError(errno.EIO, f"the image is corrupt and takes no more writes: {error}")
    number = getattr(error, "errno", None) or errno.EIO
    return OSError(number, f"the image's metadata could not be written: {error}")
