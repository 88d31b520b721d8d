"""A lock over byte ranges: shared or exclusive, first come first served among those that overlap.

Two requests *conflict* when their ranges overlap and at least one is exclusive. A request is granted when nothing
that came before it, granted or still waiting, conflicts with it; so nobody starves, and ranges that do not overlap
never wait for each other::

    arrival order   [0, 8) shared   [4, 12) exclusive   [6, 10) shared   [20, 24) exclusive
    granted?        yes             waits for 1         waits for 2      yes

And `Uses`: which ranges are in use, for those who wait until one no longer is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType


class RangeLock:
    """Locks on half-open byte ranges. Not reentrant: a thread that asks twice for what conflicts waits for itself."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        #: Everybody who holds or awaits a range, in order of arrival.
        self._claims: list[Claim] = []

    def shared(self, offset: int, length: int) -> Claim:
        """Hold ``length`` bytes from ``offset`` together with other sharers, for a ``with`` block. Waits as long as it
        takes."""
        return Claim(self, offset, offset + length, exclusive=False)

    def exclusive(self, offset: int, length: int) -> Claim:
        """Hold ``length`` bytes from ``offset`` alone, for a ``with`` block. Waits as long as it takes."""
        return Claim(self, offset, offset + length, exclusive=True)

    def attempt(self, offset: int, length: int) -> Attempt:
        """Hold ``length`` bytes from ``offset`` alone, for a ``with`` block, if that needs no waiting; which is told
        whether it is so."""
        return Attempt(self, offset, offset + length, exclusive=True)

    def _enter(self, claim: Claim) -> None:
        with self._mutex:
            for earlier in self._claims:
                if earlier.conflicts(claim):
                    claim.blockers += 1
            if claim.blockers:
                claim.granted = threading.Event()
            self._claims.append(claim)

    def _attempt(self, claim: Claim) -> bool:
        with self._mutex:
            for earlier in self._claims:
                if earlier.conflicts(claim):
                    return False
            self._claims.append(claim)
            return True

    def _leave(self, claim: Claim) -> None:
        with self._mutex:
            place = self._claims.index(claim)
            del self._claims[place]
            for later in self._claims[place:]:
                if claim.conflicts(later):
                    later.blockers -= 1
                    if later.blockers == 0:
                        assert later.granted is not None, "it waits"
                        later.granted.set()


class Uses:
    """The byte ranges that are in use now: hazard pointers. Who uses a range announces that, looks again whether it
    still is what was resolved, and only then touches it; so whoever changes the mapping first, and waits then, is safe.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: set[_Use] = set()

    @contextlib.contextmanager
    def use(self, offset: int, length: int) -> Iterator[None]:
        """Use ``length`` bytes from ``offset`` for the time of the block."""
        use = _Use(offset, offset + length)
        with self._condition:
            self._running.add(use)
        try:
            yield
        finally:
            with self._condition:
                self._running.discard(use)
                self._condition.notify_all()

    def wait_unused(self, offset: int, length: int) -> None:
        """Return when no use of the range that began before this call is still running."""
        with self._condition:
            waited_for = {use for use in self._running if use.start < offset + length and offset < use.end}
            self._condition.wait_for(lambda: self._running.isdisjoint(waited_for))


class _Use:
    """One use; compared by identity."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end


class Claim:
    """One holder or waiter, while a ``with`` block runs; compared by identity. (Plain methods: every allocating write
    comes by here.)"""

    __slots__ = ("blockers", "end", "exclusive", "granted", "lock", "start")

    def __init__(self, lock: RangeLock, start: int, end: int, *, exclusive: bool) -> None:
        self.lock, self.start, self.end, self.exclusive = lock, start, end, exclusive
        #: How many earlier claims it waits for.
        self.blockers = 0
        #: Set when it has no more to wait for; None if it never had.
        self.granted: threading.Event | None = None

    def conflicts(self, other: Claim) -> bool:
        return (self.exclusive or other.exclusive) and self.start < other.end and other.start < self.end

    def __enter__(self) -> None:
        self.lock._enter(self)
        if self.granted is not None:
            try:
                self.granted.wait()
            except BaseException:
                self.lock._leave(self)
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.lock._leave(self)


class Attempt(Claim):
    """A claim that is given up at once if it would have to wait."""

    __slots__ = ("is_free",)

    def __enter__(self) -> bool:  # type: ignore[override]
        self.is_free = self.lock._attempt(self)
        return self.is_free

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_free:
            self.lock._leave(self)
