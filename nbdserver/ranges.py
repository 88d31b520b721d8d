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


class RangeLock:
    """Locks on half-open byte ranges. Not reentrant: a thread that asks twice for what conflicts waits for itself."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        #: Everybody who holds or awaits a range, in order of arrival.
        self._claims: list[_Claim] = []

    @contextlib.contextmanager
    def shared(self, offset: int, length: int) -> Iterator[None]:
        """Hold ``length`` bytes from ``offset`` together with other sharers. Waits as long as it takes."""
        with self._held(_Claim(offset, offset + length, False)):
            yield

    @contextlib.contextmanager
    def exclusive(self, offset: int, length: int) -> Iterator[None]:
        """Hold ``length`` bytes from ``offset`` alone. Waits as long as it takes."""
        with self._held(_Claim(offset, offset + length, True)):
            yield

    @contextlib.contextmanager
    def attempt(self, offset: int, length: int) -> Iterator[bool]:
        """Hold ``length`` bytes from ``offset`` alone if that needs no waiting; whether it is so."""
        claim = _Claim(offset, offset + length, True)
        with self._mutex:
            is_free = not any(earlier.conflicts(claim) for earlier in self._claims)
            if is_free:
                self._claims.append(claim)
        try:
            yield is_free
        finally:
            if is_free:
                self._leave(claim)

    @contextlib.contextmanager
    def _held(self, claim: _Claim) -> Iterator[None]:
        with self._mutex:
            claim.blockers = sum(earlier.conflicts(claim) for earlier in self._claims)
            self._claims.append(claim)
        try:
            if claim.blockers:
                claim.granted.wait()
            yield
        finally:
            self._leave(claim)

    def _leave(self, claim: _Claim) -> None:
        with self._mutex:
            place = self._claims.index(claim)
            del self._claims[place]
            for later in self._claims[place:]:
                if claim.conflicts(later):
                    later.blockers -= 1
                    if later.blockers == 0:
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


class _Claim:
    """One holder or waiter; compared by identity."""

    __slots__ = ("blockers", "end", "exclusive", "granted", "start")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start, self.end, self.exclusive = start, end, exclusive
        #: How many earlier claims it waits for.
        self.blockers = 0
        self.granted = threading.Event()

    def conflicts(self, other: _Claim) -> bool:
        return (self.exclusive or other.exclusive) and self.start < other.end and other.start < self.end
