"""Dirty bitmaps: kept true while the image is open, and changed on demand (`nbdserver.format.HasBitmaps`).

================ ============================= ============================ =========================================
a bitmap is      in the file                   in memory                    so after a crash
================ ============================= ============================ =========================================
enabled (auto)   in use, from before the       the bits; writes are marked  inconsistent: it can only be removed
                 first write until it is       by the layer's dirty log
                 stored when the image closes
disabled         what it is                    only if somebody looks       what it was
inconsistent     in use, as it was found       nothing                      what it was
================ ============================= ============================ =========================================

So a bitmap that the file calls valid is valid, at every instant. What is done to a disabled one, or makes it an
enabled one, is durable before it is answered; what is done to an enabled one is stored with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from layers.qcow2 import bitmap_store
from layers.qcow2.bitmap_directory import Entry, excess, read_directory, table_count
from layers.qcow2.bitmap_store import BitmapStore, Change
from layers.qcow2.header import Header
from layers.qcow2.limits import (
    BITMAP_GRANULARITY_BITS_MAX,
    BITMAP_GRANULARITY_BITS_MIN,
    BITMAP_GRANULARITY_DEFAULT_MAX,
    BITMAP_GRANULARITY_DEFAULT_MIN,
    BITMAP_MAX,
    BITMAP_NAME_MAX,
    BITMAPS_COUNT_MAX,
)
from layers.qcow2.storage import Storage
from nbdserver.errors import ImageError, RequestError
from nbdserver.extent import DirtyBitmap
from nbdserver.format import Bitmap


class _State:
    """One bitmap."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        #: In use when it was found, so that nobody knows what it should say.
        self.is_inconsistent = entry.is_in_use
        self.bits: DirtyBitmap | None = None
        #: How many bits are set in what the file has of it; None: something else has changed than that writes set more.
        self.stored_count: int | None = None
        #: Those who show it to others, and rely on its staying there.
        self.users = 0

    @property
    def is_recording(self) -> bool:
        return self.entry.is_auto and not self.is_inconsistent

    @property
    def is_stored(self) -> bool:
        """Whether the table in the file says what the bits in memory do."""
        return self.bits is None or self.bits.count() == self.stored_count


class Bitmaps:
    """The bitmaps of an open image. ``make(size, granularity)`` makes one in memory, ``size()`` is the disk's size, and
    ``track(bitmaps)`` has writes marked in these and no others from now on.

    What changes them is called in a drained section of whoever uses the disk. Methods raise RequestError, ImageError,
    OSError.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        *,
        size: Callable[[], int],
        make: Callable[[int, int], DirtyBitmap],
        track: Callable[[Sequence[DirtyBitmap]], None],
    ) -> None:
        self._storage, self._header = storage, header
        self._size, self._make, self._track = size, make, track
        self._states: dict[str, _State] | None = None
        #: None: the image is not open for writing.
        self._store: BitmapStore | None = None
        self._lock = threading.RLock()

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self, store: BitmapStore) -> None:
        """Record writes, durably promised, from now on. Raises ImageError, OSError."""
        with self._lock:
            self._states = {entry.name: _State(entry) for entry in store.directory.entries}
            recording = [state for state in self._states.values() if state.is_recording]
            for state in recording:
                self._bits(state)
            if recording:
                store.mark_in_use({state.entry.name for state in recording})
            self._store = store
            for state, entry in zip(self._states.values(), store.directory.entries, strict=True):
                state.entry = entry
            self._follow()

    def stop(self) -> None:
        """Store all that have recorded writes."""
        with self._lock:
            store, self._store = self._store, None
            states = list((self._states or {}).values())
            if store is None or not any(state.is_recording for state in states):
                return
            try:
                with store.change() as change:
                    change.commit([self._final(change, state) for state in states])
            except OSError as error:
                what = f"its bitmaps could not be stored, and are inconsistent now: {error}"
                raise OSError(error.errno, what, self._storage.file.filename) from error

    def _final(self, change: Change, state: _State) -> Entry:
        """The entry of a bitmap that is stored."""
        if not state.is_recording:
            return state.entry
        return self._stored(change, state).flagged(auto=True, in_use=False)

    def _stored(self, change: Change, state: _State) -> Entry:
        """The entry of a bitmap whose table says what its bits in memory do."""
        if state.is_stored:
            return state.entry
        change.drop(state.entry)
        return change.store(state.entry, self._bits(state))

    # -- looking ----------------------------------------------------------------------------------------------------

    def described(self) -> list[Bitmap]:
        """Every bitmap there is."""
        with self._lock:
            return [self._described(state) for state in self._all().values()]

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._all()

    def runs(self, name: str, offset: int, length: int, count_max: int) -> list[tuple[int, bool]]:
        """`DirtyBitmap.runs` of one bitmap. ENOENT, EINVAL if it is inconsistent."""
        with self._lock:
            bits = self._bits(self._usable(name))
        return bits.runs(offset, length, count_max)

    @contextlib.contextmanager
    def used(self, name: str) -> Iterator[Bitmap]:
        """Keep a bitmap there, and as it is but for the writes that it records, for the time of the block."""
        with self._lock:
            state = self._usable(name)
            self._bits(state)
            state.users += 1
        try:
            yield self._described(state)
        finally:
            with self._lock:
                state.users -= 1

    def _described(self, state: _State) -> Bitmap:
        entry, bits = state.entry, state.bits
        count = None
        if bits is not None:
            # The last bit may stand for less.
            _, is_last_set = bits.runs(bits.size - 1, 1, 1)[0]
            count = bits.count() * entry.granularity - (-bits.size % entry.granularity) * is_last_set
        return Bitmap(entry.name, entry.granularity, entry.is_auto, state.is_inconsistent, count)

    # -- changing ---------------------------------------------------------------------------------------------------

    def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """`format.HasBitmaps.add_bitmap`."""
        with self._changing() as (store, change):
            if granularity is None:
                least, most = BITMAP_GRANULARITY_DEFAULT_MIN, BITMAP_GRANULARITY_DEFAULT_MAX
                granularity = min(max(self._storage.cluster_size, least), most)
            self._check_new(name, granularity)
            entry = Entry(name, 0, 0, 0, granularity.bit_length() - 1).flagged(auto=enabled, in_use=enabled)
            self._check_all([*store.directory.entries, entry], self._size())
            state = _State(change.store(entry, self._make(self._size(), granularity)))
            change.commit([*store.directory.entries, state.entry])
            state.is_inconsistent = False
            state.bits, state.stored_count = self._make(self._size(), granularity), 0
            self._all()[name] = state
            self._follow()

    def remove(self, name: str) -> None:
        """`format.HasBitmaps.remove_bitmap`; also an inconsistent one."""
        with self._changing() as (store, change):
            state = self._idle(name)
            with contextlib.suppress(ImageError):  # where its table is broken, its clusters leak
                change.drop(state.entry)
            change.commit([entry for entry in store.directory.entries if entry.name != name])
            del self._all()[name]
            self._follow()

    def enable(self, name: str) -> None:
        with self._changing() as (_, change):
            state = self._usable(name, idle=True)
            if not state.entry.is_auto:
                self._bits(state)
                self._commit(change, state, state.entry.flagged(auto=True, in_use=True))

    def disable(self, name: str) -> None:
        with self._changing() as (_, change):
            state = self._usable(name, idle=True)
            if state.entry.is_auto:
                self._commit(change, state, self._stored(change, state).flagged(auto=False, in_use=False))

    def clear(self, name: str) -> None:
        with self._changing() as (_, change):
            self._alter(change, self._usable(name, idle=True), lambda bits: bits.clear())

    def merge(self, name: str, source: DirtyBitmap) -> None:
        """Mark all that is marked in ``source``, which is of the same make and size."""
        with self._changing() as (_, change):
            state = self._usable(name, idle=True)
            if source.size != self._size():
                raise RequestError(
                    errno.EINVAL,
                    f"bitmap {name!r} is of a disk of {self._size()} bytes, the other of one of {source.size}",
                )
            self._alter(change, state, lambda bits: bits.merge(source))

    def bits(self, name: str) -> DirtyBitmap:
        """What a bitmap says, to be read only. ENOENT, EINVAL if it is inconsistent."""
        with self._lock:
            return self._bits(self._usable(name))

    @contextlib.contextmanager
    def resizing(self, size: int) -> Iterator[None]:
        """The disk is given another size, durably, in the block. Bits of what it grows by are clear.

        Raises RequestError, with nothing changed, if there is a bitmap that cannot be resized (ENOTSUP), or would
        become too large (EINVAL).
        """
        with self._lock:
            resized: list[_State] = []
            if self._store is not None and size != self._size():
                resized = [state for state in self._all().values() if not state.is_inconsistent]
                self._prepare(self._store, resized, size)
            try:
                yield
            finally:
                if self._size() == size:
                    for state in resized:
                        self._bits(state).resize(size)
                        state.stored_count = None
                if self._store is not None:
                    self._store_disabled(self._store, resized)

    def _prepare(self, store: BitmapStore, states: Sequence[_State], size: int) -> None:
        """Have bitmaps in memory, and in use, that will be of a disk of another size."""
        for state in states:
            if not state.entry.is_usable:
                raise RequestError(errno.ENOTSUP, f"bitmap {state.entry.name!r} has extra data, so has one size only")
            self._check_size(state.entry.name, size, state.entry.granularity)
            self._bits(state)
        self._check_all(store.directory.entries, size)
        if states:
            store.mark_in_use({state.entry.name for state in states})
            by_name = {entry.name: entry for entry in store.directory.entries}
            for state in states:
                state.entry = by_name[state.entry.name]

    def _store_disabled(self, store: BitmapStore, states: Sequence[_State]) -> None:
        """Bring the disabled ones among ``states``, which are in use, into the file."""
        disabled = {state.entry.name: state for state in states if not state.entry.is_auto}
        if not disabled:
            return
        with store.change() as change:
            stored = {
                name: self._stored(change, state).flagged(auto=False, in_use=False) for name, state in disabled.items()
            }
            change.commit([stored.get(entry.name, entry) for entry in store.directory.entries])
        for name, state in disabled.items():
            state.entry, state.stored_count = stored[name], self._bits(state).count()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[BitmapStore, Change]]:
        with self._lock:
            if self._store is None:
                raise RequestError(errno.EROFS, f"{self._storage.file.filename}: is open read-only")
            self._all()
            with self._store.change() as change:
                yield self._store, change

    def _alter(self, change: Change, state: _State, alter: Callable[[DirtyBitmap], None]) -> None:
        bits = self._bits(state)
        state.stored_count = None
        if state.entry.is_auto:
            alter(bits)
            return
        try:
            alter(bits)
            self._commit(change, state, self._stored(change, state))
        except BaseException:
            state.bits = None  # what the file has is what it is
            raise

    def _commit(self, change: Change, state: _State, entry: Entry) -> None:
        """Give a bitmap another entry, whose table says what its bits do."""
        assert self._store is not None
        entries = self._store.directory.entries
        change.commit([entry if each.name == entry.name else each for each in entries])
        state.entry = entry
        state.stored_count = self._bits(state).count()
        self._follow()

    def _follow(self) -> None:
        self._track([self._bits(state) for state in self._recording()])

    # -- finding ----------------------------------------------------------------------------------------------------

    def _all(self) -> dict[str, _State]:
        if self._states is None:  # nobody has asked before, of an image that is open read-only
            directory = read_directory(self._storage, self._header)
            self._states = {entry.name: _State(entry) for entry in directory.entries}
        return self._states

    def _recording(self) -> list[_State]:
        return [state for state in self._all().values() if state.is_recording]

    def _find(self, name: str) -> _State:
        state = self._all().get(name)
        if state is None:
            raise RequestError(errno.ENOENT, f"{self._storage.file.filename}: has no bitmap {name!r}")
        return state

    def _idle(self, name: str) -> _State:
        state = self._find(name)
        if state.users:
            raise RequestError(errno.EBUSY, f"bitmap {name!r} is being exported")
        return state

    def _usable(self, name: str, *, idle: bool = False) -> _State:
        state = self._idle(name) if idle else self._find(name)
        if state.is_inconsistent:
            raise RequestError(
                errno.EINVAL,
                f"bitmap {name!r} is inconsistent: who used it last went away without storing it; it can be removed",
            )
        if not state.entry.is_usable:
            raise RequestError(errno.ENOTSUP, f"bitmap {name!r} has extra data that is not understood")
        return state

    def _bits(self, state: _State) -> DirtyBitmap:
        if state.bits is None:
            bits = self._make(self._size(), state.entry.granularity)
            bitmap_store.load(self._storage, state.entry, bits)
            state.bits, state.stored_count = bits, bits.count()
        return state.bits

    # -- checks -----------------------------------------------------------------------------------------------------

    def _check_new(self, name: str, granularity: int) -> None:
        if self._header.version < 3:
            raise RequestError(errno.ENOTSUP, "images of version 2 cannot have bitmaps")
        length = len(os.fsencode(name))
        if not 1 <= length <= BITMAP_NAME_MAX or "\0" in name:
            wanted = f"1 to {BITMAP_NAME_MAX} bytes, none of them NUL"
            raise RequestError(errno.EINVAL, f"found a bitmap name of {length} bytes, allowed is {wanted}")
        if name in self._all():
            raise RequestError(errno.EEXIST, f"{self._storage.file.filename}: has a bitmap {name!r} already")
        if len(self._all()) >= BITMAPS_COUNT_MAX:
            raise RequestError(errno.EINVAL, f"an image has at most {BITMAPS_COUNT_MAX} bitmaps")
        least, most = 1 << BITMAP_GRANULARITY_BITS_MIN, 1 << BITMAP_GRANULARITY_BITS_MAX
        if not least <= granularity <= most or granularity & granularity - 1:
            wanted = f"a power of two from {least} to {most}"
            raise RequestError(errno.EINVAL, f"found a granularity of {granularity}, allowed is {wanted}")
        self._check_size(name, self._size(), granularity)

    def _check_size(self, name: str, size: int, granularity: int) -> None:
        """Hold one bitmap to what QEMU can open."""
        if not size:
            raise RequestError(errno.EINVAL, f"bitmap {name!r} cannot be: the disk has no bytes")
        if table_count(size, granularity, 1) > BITMAP_MAX:
            wanted = f"{BITMAP_MAX} bytes of bits; use a larger granularity than {granularity}"
            raise RequestError(errno.EINVAL, f"bitmap {name!r} would have more than {wanted}")

    def _check_all(self, entries: Sequence[Entry], size: int) -> None:
        wrong = excess(entries, size)
        if wrong is not None:
            raise RequestError(errno.EINVAL, wrong)
