"""``copy-before-write``: what the disk below held is copied to a target before it is overwritten for the first time.

::

    guest ───> copy-before-write ──file───> the live disk, which goes on being written
                 │           └─────target─> what it held when this layer was opened, of each cluster written since
    snapshot ────┘ (`snapshot-access`): the disk as it was, from the target or, still untouched, from the file

QEMU's driver of this name (qapi/block-core.json, BlockdevOptionsCbw). The point in time is the opening of this layer:
nothing may hold permission to write ``file`` then, nor write it later past this layer. A cluster goes one way::

                 UNTOUCHED ───────────────────> COPIED ──────────────────────────> WRITABLE
    on the way   its data to the target         changed(): nobody begins to read
                                                it in the file for the snapshot;
                                                wait_unused(): nobody still does
    guest        calls this layer               calls this layer                   writes the file in place
    snapshot     reads the file                 reads the target                   reads the target

COPIED is a state of its own because the guest's other writers must wait too: from WRITABLE on they do not ask.

The target lives only as long as this layer: flushing does not make it durable, and nothing in it says what was copied.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import mmap
from collections.abc import Callable, Iterator
from typing import ClassVar, Final, Literal

from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import CODE, Extent, Intent, Size
from nbdserver.flags import PASSED_ON
from nbdserver.graph import flatten
from nbdserver.layer import BASE_ALLOCATION, STATE_ZERO, Buffers, Layer, Opener, finish
from nbdserver.limits import KIB, MIB
from nbdserver.permissions import CHANGING, ONLOOKER, READ, Grant, Permission
from nbdserver.ranges import RangeLock
from nbdserver.request import Flag, Request

#: The smallest cluster, QEMU's (BLOCK_COPY_CLUSTER_SIZE_DEFAULT); and the largest, which is copied in one piece.
CLUSTER_MIN: Final = 64 * KIB
CLUSTER_MAX: Final = 32 * MIB

#: Data that is copied, and held against its readers, at once: large enough for disks that seek.
COPY_MAX: Final = 1 * MIB

#: What a block status of the snapshot looks at, holding its clusters, before it answers.
STATUS_MAX: Final = 64 * MIB

#: Clusters of one state that are looked for at once: 256 MiB of the smallest.
RUN_COUNT_MAX: Final = 4 * KIB

#: Copies that run at once where each has a time limit: threads, of which those that hang are not replaced.
COPIES_COUNT_MAX: Final = 8

#: The longest time limit, QEMU's: an unsigned 32-bit number of seconds.
TIMEOUT_MAX: Final = (1 << 32) - 1

UNTOUCHED: Final = b"\0"
COPIED: Final = b"\1"
WRITABLE: Final = b"\2"
STATES: Final = UNTOUCHED + COPIED + WRITABLE


@dataclasses.dataclass(eq=False)
class CopyBeforeWrite(Layer):
    #: The live disk.
    file: Layer
    #: Where old data goes: at least as large as the disk, and nobody else's. What it held before does not matter.
    target: Layer
    #: What follows when copying fails: break-guest-write fails the write, so that the snapshot stays whole;
    #: break-snapshot lets the write pass and fails every later read of the snapshot.
    on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write"
    #: Seconds after which copying counts as failed; 0: never.
    cbw_timeout: int = 0
    #: What is copied at once, a power of two; at least 64K. Best no less than the target's own clusters.
    min_cluster_size: Size = 0

    is_filter: ClassVar[bool] = True
    supported_write_flags: ClassVar[Flag] = PASSED_ON
    buffers: ClassVar[Buffers] = Buffers(
        read="none: always mapped",
        write="bounces: it is passed on, after old data has been copied through pool memory",
        zero="bounces: old data is copied through pool memory; the disk zeroes",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Clusters: held alone by who moves them on, shared by who reads the snapshot through code.
        self._clusters = RangeLock()
        #: Why the snapshot is lost, if it is.
        self._failure: str | None = None
        self._copiers: concurrent.futures.Executor | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    def open(self, opener: Opener) -> None:
        self._cluster_size = self._checked_cluster_size()
        self._size = self.file.size
        if self.target.size < self._size:
            raise ConfigError(f"has {self.target.size} bytes, fewer than the disk's {self._size}", key="target")
        if self.target.read_only and not self.file.read_only:
            raise ConfigError("is read-only, but old data must be written there", key="target")
        if not 0 <= self.cbw_timeout <= TIMEOUT_MAX:
            raise ConfigError(f"found {self.cbw_timeout}, allowed are 0 to {TIMEOUT_MAX} seconds", key="cbw-timeout")
        #: The state of each cluster, a byte each, so that runs are found fast; the system gives the memory as
        #: clusters are written.
        count = max(1, self._stop(self._size))
        self._states = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self.cbw_timeout:
            self._copiers = concurrent.futures.ThreadPoolExecutor(COPIES_COUNT_MAX, "copy-before-write")

    def _checked_cluster_size(self) -> int:
        size = self.min_cluster_size
        if size & (size - 1) or size > CLUSTER_MAX:
            raise ConfigError(
                f"found {size}, allowed is a power of two of at most {CLUSTER_MAX}", key="min-cluster-size"
            )
        return max(size, CLUSTER_MIN)

    def close(self) -> None:
        if self._copiers is not None:
            self._copiers.shutdown()

    def child_grant(self, role: str, own: Grant) -> Grant:
        if role == "target":
            return Grant(READ | Permission.WRITE, READ | Permission.WRITE_UNCHANGED)
        # What changes it past this layer is not copied before. (A snapshot of it that nobody has need not be right.)
        return Grant(own.used | READ, own.shared & ~CHANGING) if own.used else ONLOOKER

    # -- the live disk -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The disk's size when the snapshot was taken, which stays."""
        return self._size

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        # How a child zeroes depends on where a request ends, so it is told of no more than was asked.
        end = offset + length if intent is Intent.ZERO else self._size
        for is_writable, start, stop in self._runs(offset, end, WRITABLE):
            if is_writable or intent is Intent.READ:
                yield Extent(stop - start, self.file, start, is_writable)
            else:
                yield Extent(stop - start, CODE)

    def translate(self, child: Layer, offset: int, length: int) -> Iterator[tuple[int, int]]:
        # The target's changes too: the snapshot is above this layer as the guest is.
        if offset < self._size:
            yield offset, min(length, self._size - offset)

    def write(self, request: Request) -> None:
        self._make_writable(request)
        finish(self.file.write(request))

    def zero(self, request: Request) -> None:
        self._make_writable(request)
        finish(self.file.zero(request))

    def trim(self, request: Request) -> None:
        self._make_writable(request)
        finish(self.file.trim(request))

    def flush(self) -> None:
        """Make the live disk's writes durable. Not the target's: it means nothing once this layer is closed."""
        if not self.file.read_only:
            finish(self.file.flush())

    # -- the snapshot ------------------------------------------------------------------------------------------------

    def resolve_snapshot(self, offset: int, length: int) -> Iterator[Extent]:
        """Where the disk as it was lives: as `Layer.resolve` for READ. CODE means `read_snapshot`."""
        if self._failure is not None:
            yield Extent(self._size - offset, CODE)
            return
        for is_untouched, start, stop in self._runs(offset, self._size, UNTOUCHED):
            if is_untouched:
                yield from self._resolve_untouched(start, stop)
            else:
                yield Extent(stop - start, self.target, start)

    def _resolve_untouched(self, start: int, stop: int) -> Iterator[Extent]:
        """Where the bytes [start, stop) of the file are.

        Walked down to the leaves here and now: had the graph to go on from the file, it would call for CODE that it
        meets a layer which knows nothing of the snapshot, perhaps only after the guest's write.
        """
        for leaf in flatten(self.file, start, stop - start, Intent.READ):
            length = min(leaf.length, stop - start)
            if leaf.target is CODE or leaf.meters or (leaf.transform is not None and leaf.position != start):
                yield Extent(length, CODE)
            else:
                yield Extent(length, leaf.target, leaf.offset, through=leaf.transform)
            start += length
            if start == stop:
                return

    def read_snapshot(self, request: Request) -> None:
        """Read any range of the disk as it was. Raises RequestError (EACCES: it is lost), OSError, ImageError."""
        self._check_snapshot()
        with self._held(request.offset, request.end):
            for is_untouched, start, stop in self._runs(request.offset, request.end, UNTOUCHED):
                child = self.file if is_untouched else self.target
                finish(child.read(request.slice(start - request.offset, stop - start)))
        # Whoever loses the snapshot then writes without waiting for us.
        self._check_snapshot()

    def status_snapshot(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """`Layer.status` of the disk as it was. Raises as `read_snapshot`."""
        end = offset + min(length, STATUS_MAX)
        self._check_snapshot()
        with self._held(offset, end):
            runs = list(self._status(context, offset, end))
        self._check_snapshot()
        return iter(runs)

    def _status(self, context: str, offset: int, end: int) -> Iterator[tuple[int, int]]:
        for is_untouched, start, stop in self._runs(offset, end, UNTOUCHED):
            child = self.file if is_untouched else self.target
            for run, flags in child.status(context, start, stop - start):
                run = min(run, stop - start)
                yield run, flags
                start += run
                if start == stop:
                    break
            if start < stop:
                return  # The child has stopped early, and so do we.

    def _check_snapshot(self) -> None:
        if self._failure is not None:
            raise RequestError(errno.EACCES, f"the snapshot is lost: copying old data failed: {self._failure}")

    # -- copying -----------------------------------------------------------------------------------------------------

    def _make_writable(self, request: Request) -> None:
        """Bring the request's clusters to WRITABLE, a piece at a time. Raises what copying raises."""
        if request.flags & Flag.WRITE_UNCHANGED:
            return
        step = max(COPY_MAX // self._cluster_size, 1)
        last = self._stop(request.end)
        for first in range(request.offset // self._cluster_size, last, step):
            stop = min(first + step, last)
            if not self._are(WRITABLE, first, stop):
                self._make_piece_writable(first, stop)

    def _make_piece_writable(self, first: int, stop: int) -> None:
        if self._failure is None:
            try:
                self._within_time(self._move_on, first, stop)
                return
            except (OSError, RequestError, ImageError) as error:
                if self.on_cbw_error == "break-guest-write":
                    raise
                self._failure = str(error)
                self.changed(0, self._size)
        # The snapshot is lost. Who reads it all the same is waited for, or finds out at the end (`read_snapshot`).
        self._release(first, stop)

    def _move_on(self, first: int, stop: int) -> None:
        """Bring the clusters [first, stop) to WRITABLE, from whatever state each is in."""
        with self._clusters.exclusive(first, stop - first):
            if self._are(WRITABLE, first, stop):
                return
            start, end = self._bytes(first, stop)
            for is_untouched, begin, until in self._runs(start, end, UNTOUCHED):
                if is_untouched:
                    self._copy(begin, until)
                    self._enter(COPIED, begin // self._cluster_size, self._stop(until))
            self._release(first, stop)

    def _copy(self, start: int, end: int) -> None:
        """Copy the bytes [start, end) from the file to the target. Nobody may write them meanwhile."""
        if self._reads_as_zeroes(start, end):
            finish(self.target.zero(Request.zero(start, end - start, Flag.MAY_UNMAP)))
            return
        vector = self.allocate(end - start)
        finish(self.file.read(Request.read(start, vector)))
        finish(self.target.write(Request.write(start, vector)))

    def _reads_as_zeroes(self, start: int, end: int) -> bool:
        for run, flags in self.file.status(BASE_ALLOCATION, start, end - start):
            if not flags & STATE_ZERO:
                return False
            start += run
            if start >= end:
                return True
        return False

    def _release(self, first: int, stop: int) -> None:
        """Have nobody read the clusters [first, stop) in the file for the snapshot any more; then they are WRITABLE.

        May be called with the clusters held: what is waited for is I/O that runs, and that waits for no lock. What
        moves the file's data meanwhile (it cannot be a guest) waits for the readers of the old place itself.
        """
        start, end = self._bytes(first, stop)
        self.changed(start, end - start)
        self.file.wait_unused(start, end - start)
        self._enter(WRITABLE, first, stop)

    def _within_time(self, call: Callable[[int, int], None], first: int, stop: int) -> None:
        """``call(first, stop)``, for at most ``cbw_timeout`` seconds: then it goes on, but nobody waits for it."""
        if self._copiers is None:
            call(first, stop)
            return
        future = self._copiers.submit(call, first, stop)
        if not concurrent.futures.wait([future], self.cbw_timeout).done:
            future.cancel()
            raise RequestError(errno.ETIMEDOUT, f"copying old data took longer than {self.cbw_timeout} s")
        future.result()

    # -- clusters ----------------------------------------------------------------------------------------------------

    def _runs(self, start: int, end: int, state: bytes) -> Iterator[tuple[bool, int, int]]:
        """The bytes [start, end) in runs (is in ``state``, start, end) of whole clusters as far as they go."""
        others = STATES.replace(state, b"")
        while start < end:
            cluster = start // self._cluster_size
            # A copy: what it says was so at one instant.
            states = self._states[cluster : min(self._stop(end), cluster + RUN_COUNT_MAX)]
            is_state = states.startswith(state)
            count = len(states) - len(states.lstrip(state if is_state else others))
            stop = min((cluster + count) * self._cluster_size, end)
            yield is_state, start, stop
            start = stop

    def _are(self, state: bytes, first: int, stop: int) -> bool:
        return not self._states[first:stop].strip(state)

    def _enter(self, state: bytes, first: int, stop: int) -> None:
        self._states[first:stop] = state * (stop - first)

    def _stop(self, end: int) -> int:
        """The first cluster that begins at or after byte ``end``."""
        return -(-end // self._cluster_size)

    def _bytes(self, first: int, stop: int) -> tuple[int, int]:
        return first * self._cluster_size, min(stop * self._cluster_size, self._size)

    def _held(self, start: int, end: int) -> contextlib.AbstractContextManager[None]:
        """Keep the clusters of the bytes [start, end) in the state they are in, with others who do."""
        first = start // self._cluster_size
        return self._clusters.shared(first, self._stop(end) - first)
