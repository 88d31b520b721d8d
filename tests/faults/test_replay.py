"""The replayer itself: which states it calls possible."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.faults.replay import MAGIC, Action, Event, Replay, load

FILE = "disk"


class Recording:
    """Writes a recording as the engine does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sequence = 0
        self._record(Event.FILE, payload=FILE.encode())

    def begin(self, action: Action, offset: int = 0, length: int = 0, payload: bytes = b"") -> int:
        self._sequence += 1
        self._record(Event.BEGIN, action=action, sequence=self._sequence, offset=offset, length=length, payload=payload)
        return self._sequence

    def end(self, sequence: int, errno: int = 0) -> int:
        """The position after the record."""
        self._record(Event.END, sequence=sequence, value=errno)
        return self.path.stat().st_size

    def write(self, offset: int, payload: bytes) -> int:
        return self.end(self.begin(Action.WRITE, offset, payload=payload))

    def sync(self) -> int:
        return self.end(self.begin(Action.SYNC))

    def _record(
        self,
        event: int,
        *,
        action: int = 0,
        value: int = 0,
        sequence: int = 0,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
    ) -> None:
        head = (MAGIC, event, action, 0, 7, value, sequence, offset, length or len(payload))
        with self.path.open("ab") as file:
            file.write(struct.pack("<IBBHIIQQQ", *head) + payload)

    def replay(self, initial: bytes = bytes(8)) -> Replay:
        return Replay(load(self.path), FILE, initial)

    def states(self, position: int, initial: bytes = bytes(8)) -> set[bytes]:
        """Every state that many random choices find."""
        replay = self.replay(initial)
        return {bytes(replay.reordered(position, random.Random(seed))) for seed in range(200)}


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "record.bin")


def test_prefix_holds_what_had_begun(recording: Recording) -> None:
    first = recording.write(0, b"aa")
    second = recording.write(2, b"bb")
    assert recording.replay().prefix(first) == b"aa\0\0\0\0\0\0"
    assert recording.replay().prefix(second) == b"aabb\0\0\0\0"


def test_what_is_not_synced_may_be_lost_in_any_combination(recording: Recording) -> None:
    recording.write(0, b"a")
    end = recording.write(1, b"b")
    assert {state[:2] for state in recording.states(end)} == {b"\0\0", b"a\0", b"\0b", b"ab"}


def test_what_is_synced_is_there(recording: Recording) -> None:
    recording.write(0, b"a")
    end = recording.sync()
    assert {state[:1] for state in recording.states(end)} == {b"a"}


def test_a_sync_that_has_not_ended_promises_nothing(recording: Recording) -> None:
    recording.write(0, b"a")
    end = recording.sync()
    assert {state[:1] for state in recording.states(end - 1)} == {b"a", b"\0"}


def test_a_failed_sync_promises_nothing(recording: Recording) -> None:
    recording.write(0, b"a")
    end = recording.end(recording.begin(Action.SYNC), errno=5)
    assert {state[:1] for state in recording.states(end)} == {b"a", b"\0"}


def test_a_sync_does_not_cover_what_was_still_running(recording: Recording) -> None:
    write = recording.begin(Action.WRITE, 0, payload=b"a")
    sync = recording.begin(Action.SYNC)
    recording.end(write)
    end = recording.end(sync)
    assert {state[:1] for state in recording.states(end)} == {b"a", b"\0"}


def test_a_later_shorter_sync_counts(recording: Recording) -> None:
    long = recording.begin(Action.SYNC)
    recording.write(0, b"a")
    end = recording.sync()
    recording.end(long)
    assert {state[:1] for state in recording.states(end)} == {b"a"}


def test_writes_in_sequence_keep_their_order(recording: Recording) -> None:
    recording.write(0, b"a")
    end = recording.write(0, b"b")
    recording.sync()
    assert {state[:1] for state in recording.states(end)} == {b"\0", b"a", b"b"}
    assert {state[:1] for state in recording.states(recording.path.stat().st_size)} == {b"b"}


def test_writes_at_once_have_either_order(recording: Recording) -> None:
    first, second = recording.begin(Action.WRITE, 0, payload=b"a"), recording.begin(Action.WRITE, 0, payload=b"b")
    recording.end(first)
    recording.end(second)
    end = recording.sync()
    assert {state[:1] for state in recording.states(end)} == {b"a", b"b"}


def test_a_long_write_may_be_torn_between_sectors(recording: Recording) -> None:
    end = recording.write(256, b"x" * 1024)
    states = recording.states(end, bytes(2048))
    counts = {state.count(b"x") for state in states}
    assert counts >= {0, 256, 768, 1024}
    assert counts <= {0, 256, 512, 768, 1024}


def test_a_write_past_the_end_grows_the_file(recording: Recording) -> None:
    end = recording.write(10, b"z")
    assert recording.replay().prefix(end) == bytes(10) + b"z"


def test_zero_discard_and_resize(recording: Recording) -> None:
    zero = recording.end(recording.begin(Action.ZERO, 1, 2))
    discard = recording.end(recording.begin(Action.DISCARD, 6, 100))
    resize = recording.end(recording.begin(Action.RESIZE, 4))
    replay = recording.replay(b"12345678")
    assert replay.prefix(zero) == b"1\0\x0045678"
    assert replay.prefix(discard) == b"1\0\x00456\0\0"
    assert replay.prefix(resize) == b"1\0\x004"


def test_a_cut_off_record_is_left_out(recording: Recording) -> None:
    end = recording.write(0, b"a")
    recording.begin(Action.WRITE, 1, payload=b"bbbb")
    with recording.path.open("r+b") as file:
        file.truncate(recording.path.stat().st_size - 1)
    assert max(recording.replay().positions()) == end


def test_a_whole_recording_is_the_file(recording: Recording) -> None:
    recording.write(0, b"abcd")
    recording.write(2, b"ef")
    replay = recording.replay()
    assert replay.is_all(b"abef\0\0\0\0")
    assert not replay.is_all(b"abcd\0\0\0\0")
    assert not replay.is_all(b"abef\0\0\0\0\0")


def test_of_what_ran_at_the_same_time_either_may_be_the_last(recording: Recording) -> None:
    first = recording.begin(Action.WRITE, 0, payload=b"abcd")
    second = recording.begin(Action.WRITE, 2, payload=b"efgh")
    recording.end(second)
    recording.end(first)
    replay = recording.replay()
    assert replay.is_all(b"abefgh\0\0") and replay.is_all(b"abcdgh\0\0")
    assert not replay.is_all(b"xbefgh\0\0") and not replay.is_all(b"abefgx\0\0")
