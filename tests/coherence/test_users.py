"""Rules 2, 4 and 7, path by path: whoever does I/O on a place is its user until the I/O has ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.extent import NO_LIMITS
from nbdserver.request import Vector
from nbdserver.testing import NbdServers
from tests.coherence.pages import LITTLE, PAGE, SOON, Background, stopped_at
from tests.coherence.test_rules import Stage, letter
from tests.interop.wire import REQUEST, REQUEST_MAGIC, WRITE
from tests.serving import BACKENDS

FUA = 1 << 0
TRIM, WRITE_ZEROES = 4, 6


@pytest.fixture
def stage(nbd_server: NbdServers, tmp_path: Path) -> Stage:
    return Stage(nbd_server, tmp_path)


def _is_used_while_held(stage: Stage, point: str, call: Callable[[], object]) -> None:
    """Whoever ``call`` makes pass ``point`` is a user of place 0 there, and not of its neighbour."""
    with stopped_at(point) as stop:
        running = Background(call)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        freeing = Background(stage.file.wait_unused, 0, PAGE)
        assert not freeing.is_done(), "its I/O is running"
        Background(stage.file.wait_unused, PAGE, PAGE).finish()
    running.finish()
    freeing.finish()


def test_a_read_by_a_worker_is_waited_for(stage: Stage) -> None:
    stage.read(0)
    _is_used_while_held(stage, "file.read_nowait", lambda: stage.read(0))


def test_a_write_by_a_worker_is_waited_for(stage: Stage) -> None:
    stage.write(0, letter(1))
    _is_used_while_held(stage, "file.write", lambda: stage.write(0, letter(2)))


#: Where a request is while its I/O, which would have blocked a worker, runs elsewhere.
ELSEWHERE = {"io_uring": "ring.completed", "threads": "threads.run"}


def _cold(nbd_server: NbdServers, tmp_path: Path, backend: str) -> Stage:
    """A stage on which page 0 is mapped and not in the page cache."""
    stage = Stage(nbd_server, tmp_path, backend=backend)
    stage.read(0)
    fd = os.open(stage.path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return stage


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_read_that_blocks_is_waited_for(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    stage = _cold(nbd_server, tmp_path, backend)
    _is_used_while_held(stage, ELSEWHERE[backend], lambda: stage.read(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_drained_section_waits_for_a_read_that_blocks(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    stage = _cold(nbd_server, tmp_path, backend)

    def drain() -> None:
        with stage.export.drained():
            pass

    with stopped_at(ELSEWHERE[backend]) as stop:
        reading = Background(stage.read, 0)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        draining = Background(drain)
        assert not draining.is_done()
    draining.finish()
    reading.finish()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_that_blocks_is_marked_dirty(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    stage = Stage(nbd_server, tmp_path, backend=backend)
    dirty = stage.track()
    stage.write(0, letter(1))
    dirty.take()
    # After writes that were slow the next ones are not made on a worker, for a while that is short: try again.
    for _ in range(20):
        for _ in range(2):  # after one of them it is seen what they wait for
            with stopped_at("file.write") as slow:
                stage.client.request(WRITE, 0, PAGE, data=letter(2))
                assert slow.wait_reached(SOON)  # type: ignore[attr-defined]
                time.sleep(0.01)
            assert stage.client.reply()[1] == 0
        dirty.take()
        with stopped_at(ELSEWHERE[backend]) as stop:
            stage.client.request(WRITE, PAGE, PAGE, data=letter(3))
            went_elsewhere = stop.wait_reached(LITTLE)  # type: ignore[attr-defined]
            if went_elsewhere:
                assert dirty.take() == []
        assert stage.client.reply()[1] == 0
        assert dirty.take() == [(PAGE, PAGE)]
        if went_elsewhere:
            return
    pytest.fail("no write was made elsewhere")


@pytest.mark.parametrize("operation", ["read", "write", "zero", "discard"])
def test_what_python_does_with_a_place_is_waited_for(stage: Stage, operation: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: stage.file.read(0, Vector.of(PAGE)),
        "write": lambda: stage.file.write(0, Vector.of(letter(3))),
        "zero": lambda: stage.file.zero(0, PAGE, may_unmap=False, no_fallback=False),
        "discard": lambda: stage.file.discard(0, PAGE),
    }
    _is_used_while_held(stage, f"file.{operation}", calls[operation])


def test_looking_up_a_writable_place_and_becoming_its_user_is_one_step(stage: Stage) -> None:
    stage.write(0, letter(1))
    with stopped_at("export.writable") as stop:
        stage.client.request(WRITE, 0, PAGE, data=letter(2))
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        stage.pages.writable.discard(0)
        change = Background(stage.pages.changed, 0, PAGE)
        assert not change.is_done(), "found writable and not used yet: the change has to come before or after both"
    change.finish()
    assert stage.client.reply()[1] == 0


def test_a_place_counts_as_used_until_the_write_to_it_is_marked_dirty(stage: Stage) -> None:
    dirty = stage.track()
    stage.write(0, letter(1))
    dirty.take()
    with stopped_at("log.mark") as stop:
        stage.client.request(WRITE, 0, PAGE, data=letter(2))
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        relying = Background(stage.file.wait_unused, 0, PAGE)
        assert not relying.is_done(), "who has waited reads the log, and would miss this write"
    relying.finish()
    assert dirty.take() == [(0, PAGE)]
    assert stage.client.reply()[1] == 0


def test_a_file_is_closed_after_its_last_io(stage: Stage) -> None:
    descriptor = os.open(stage.path, os.O_RDWR)
    other = stage.server._engine.open_file(descriptor, "another", False, NO_LIMITS)
    with stopped_at("file.read") as stop:
        reading = Background(other.read, 0, Vector.of(PAGE))
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        closing = Background(other.close)
        assert not closing.is_done(LITTLE), "a read is running"
    reading.finish()
    closing.finish()


@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES, TRIM])
@pytest.mark.parametrize("path", ["worker", "fault"])
def test_a_request_with_fua_is_answered_after_a_sync(stage: Stage, command: int, path: str) -> None:
    stage.write(0, letter(1))
    if path == "fault":
        stage.pages.code.add(0)
        stage.pages.changed(0, PAGE)
    payload = letter(2) if command == WRITE else b""
    with stopped_at("file.sync") as stop:
        stage.client.send(REQUEST.pack(REQUEST_MAGIC, FUA, command, 0, 0, PAGE) + payload)
        assert stop.wait_reached(SOON), "nothing is synced"  # type: ignore[attr-defined]
        stage.client.socket.settimeout(LITTLE)
        with pytest.raises(TimeoutError):
            stage.client.reply()
    stage.client.socket.settimeout(SOON)
    assert stage.client.reply()[1] == 0
