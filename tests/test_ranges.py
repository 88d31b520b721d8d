"""The range lock: who waits for whom."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from nbdserver.ranges import RangeLock


class Holder:
    """A thread that asks for a range and keeps it until it is told to let go."""

    def __init__(self, claim: AbstractContextManager[None]) -> None:
        self._claim = claim
        self.holds = threading.Event()
        self._may_go = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._claim:
            self.holds.set()
            self._may_go.wait(10)

    def waits(self) -> bool:
        return not self.holds.wait(0.05)

    def let_go(self) -> None:
        self._may_go.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_exclusive_ranges_that_overlap_wait() -> None:
    lock = RangeLock()
    first = Holder(lock.exclusive(0, 10))
    second = Holder(lock.exclusive(9, 1))
    assert first.holds.wait(1) and second.waits()
    first.let_go()
    assert second.holds.wait(1)
    second.let_go()


def test_ranges_that_only_touch_do_not_wait() -> None:
    lock = RangeLock()
    holders = [Holder(lock.exclusive(offset, 10)) for offset in (0, 10, 20)]
    assert all(holder.holds.wait(1) for holder in holders)
    for holder in holders:
        holder.let_go()


def test_sharers_share_and_keep_writers_out() -> None:
    lock = RangeLock()
    one, two = Holder(lock.shared(0, 10)), Holder(lock.shared(5, 10))
    assert one.holds.wait(1) and two.holds.wait(1)
    writer = Holder(lock.exclusive(5, 1))
    assert writer.waits()
    one.let_go()
    assert writer.waits()
    two.let_go()
    assert writer.holds.wait(1)
    writer.let_go()


def test_first_come_first_served() -> None:
    """A sharer that comes after a waiting writer waits for it, or sharers could keep writers out for ever."""
    lock = RangeLock()
    reader = Holder(lock.shared(0, 10))
    assert reader.holds.wait(1)
    writer = Holder(lock.exclusive(0, 10))
    assert writer.waits()
    late = Holder(lock.shared(0, 10))
    assert late.waits()
    elsewhere = Holder(lock.shared(10, 10))
    assert elsewhere.holds.wait(1)
    reader.let_go()
    assert writer.holds.wait(1) and late.waits()
    writer.let_go()
    assert late.holds.wait(1)
    late.let_go()
    elsewhere.let_go()


def test_an_error_lets_go() -> None:
    lock = RangeLock()
    try:
        with lock.exclusive(0, 10):
            raise ValueError
    except ValueError:
        pass
    with lock.exclusive(0, 10):
        pass


def test_many_threads_never_overlap() -> None:
    lock, guard = RangeLock(), threading.Lock()
    users = [0] * 64  # how many hold each byte: -1 for one alone
    wrong: list[str] = []

    def change(offset: int, length: int, update: Callable[[int], int], allowed: Callable[[int], bool]) -> None:
        with guard:
            for byte in range(offset, offset + length):
                if not allowed(users[byte]):
                    wrong.append(f"{byte}: {users[byte]}")
                users[byte] = update(users[byte])

    def work(seed: int) -> None:
        pick = random.Random(seed)
        for _ in range(200):
            offset = pick.randrange(60)
            length = pick.randint(1, 64 - offset)
            if pick.random() < 0.5:
                with lock.exclusive(offset, length):
                    change(offset, length, lambda count: -1, lambda count: count == 0)
                    change(offset, length, lambda count: 0, lambda count: count == -1)
            else:
                with lock.shared(offset, length):
                    change(offset, length, lambda count: count + 1, lambda count: count >= 0)
                    change(offset, length, lambda count: count - 1, lambda count: count > 0)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and users == [0] * 64


def test_an_attempt_holds_the_range_or_does_nothing() -> None:
    lock = RangeLock()
    with lock.shared(0, 8), lock.attempt(4, 8) as one, lock.attempt(8, 8) as two, lock.attempt(15, 1) as three:
        assert (one, two, three) == (False, True, False)
    with lock.attempt(0, 100) as is_free:
        assert is_free
