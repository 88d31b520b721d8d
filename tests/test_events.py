"""Events: none is missed, whenever it comes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from nbdserver.events import Events

SIGNAL = signal.SIGUSR2


@pytest.fixture
def events() -> Iterator[Events]:
    events = Events()
    before = signal.signal(SIGNAL, lambda number, frame: events.put("signal"))
    try:
        with events:
            yield events
    finally:
        signal.signal(SIGNAL, before)


def test_events_come_in_order(events: Events) -> None:
    for name in ("one", "two", "three"):
        events.put(name)
    assert [events.get() for _ in range(3)] == ["one", "two", "three"]


def test_what_another_thread_puts_wakes_who_waits(events: Events) -> None:
    timer = threading.Timer(0.05, events.put, ["late"])
    timer.start()
    assert events.get() == "late"
    timer.join()


def test_a_signal_that_another_thread_takes_wakes_who_waits(events: Events) -> None:
    """As if it had come between the last look at signals and the wait: the wait itself is not interrupted."""

    def send() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])
        signal.pthread_kill(threading.get_ident(), SIGNAL)

    timer = threading.Timer(0.05, send)
    timer.start()
    assert events.get() == "signal"
    timer.join()


def test_more_events_than_a_pipe_holds(events: Events) -> None:
    for _ in range(70_000):
        events.put("many")
    assert all(events.get() == "many" for _ in range(70_000))
    os.kill(os.getpid(), SIGNAL)
    assert events.get() == "signal"


def test_what_comes_too_late_is_harmless() -> None:
    events = Events()
    with events:
        pass
    events.put("late")
    assert events.get() == "late"
