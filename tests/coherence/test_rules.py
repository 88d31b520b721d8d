"""The eleven rules of coherence (nbdserver/README.md), each with a test that fails without it.

No test here depends on luck: threads are held where the rule is about to be broken, and let go when it would be.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.raw import Raw
from nbdserver import _engine
from nbdserver.extent import NO_LIMITS, DirtyBitmap
from nbdserver.request import Request
from nbdserver.server import Export
from nbdserver.testing import NbdServers
from tests.coherence.pages import LITTLE, PAGE, SOON, Background, Pages, stopped_at
from tests.interop.wire import FLUSH, READ, REQUEST, REQUEST_MAGIC, WRITE, Wire

PAGES = 16


def letter(page: int) -> bytes:
    """What is in page ``page`` of the file to begin with."""
    return bytes([ord("A") + page]) * PAGE


class Dirty:
    """A bitmap that a test looks at."""

    def __init__(self, bitmap: DirtyBitmap) -> None:
        self.bitmap = bitmap

    def take(self) -> list[tuple[int, int]]:
        """The dirty (offset, length) runs, which are clean from now on."""
        at, found = 0, []
        for length, dirty in self.bitmap.runs(0, self.bitmap.size, 1000):
            if dirty:
                found.append((at, length))
            at += length
        self.bitmap.clear()
        return found


class Stage:
    """A server, an export of `Pages`, and a client."""

    def __init__(self, nbd_server: NbdServers, tmp_path: Path, **options: Any) -> None:
        self.path = tmp_path / "disk.raw"
        self.path.write_bytes(b"".join(letter(page) for page in range(PAGES)))
        self.pages = Pages(file=File(path=str(self.path)), pages=PAGES)
        self.server, self.uri = nbd_server.start(self.pages, **options)
        self.client = self.connect()

    def connect(self) -> Wire:
        client = Wire(self.uri)
        client.go()
        return client

    @property
    def export(self) -> Export:
        return self.server._exports[""]

    @property
    def file(self) -> _engine.File:
        """The open file of the engine's."""
        layer = self.pages.file.layer  # type: ignore[attr-defined]
        file = layer.open_file
        assert isinstance(file, _engine.File)
        return file

    def read(self, page: int, client: Wire | None = None) -> bytes:
        client = client or self.client
        client.request(READ, page * PAGE, PAGE)
        return self.answer(client)

    def answer(self, client: Wire | None = None) -> bytes:
        """The data of a read that was asked for."""
        client = client or self.client
        assert client.reply()[1] == 0
        return client.receive(PAGE)

    def write(self, page: int, data: bytes) -> None:
        self.client.request(WRITE, page * PAGE, PAGE, data=data)
        assert self.client.reply()[1] == 0

    def remap(self, page: int, place: int) -> None:
        """Change a mapping as a layer does: the table, then ``changed``."""
        self.pages.table[page] = place
        self.pages.changed(page * PAGE, PAGE)

    def track(self, granularity: int = PAGE) -> Dirty:
        """Have writes marked from now on."""
        opener = self.pages._opener
        assert opener is not None
        bitmap, log = opener.dirty_bitmap(self.pages.size, granularity), opener.dirty_log()
        log.set([bitmap])
        self.pages.dirty_log = log
        self.pages.changed(0, self.pages.size)
        return Dirty(bitmap)

    def on_disk(self, place: int) -> bytes:
        return self.path.read_bytes()[place * PAGE : (place + 1) * PAGE]


@pytest.fixture
def stage(nbd_server: NbdServers, tmp_path: Path) -> Stage:
    return Stage(nbd_server, tmp_path)


# -- 1. fill against shoot-down --------------------------------------------------------------------------------------


def test_a_stale_answer_for_the_range_that_was_asked_is_thrown_away(stage: Stage) -> None:
    stage.pages.resolved.close()
    stage.client.request(READ, 0, PAGE)
    stage.pages.resolved.wait_reached()  # the answer says: page 0 is in place 0
    stage.remap(0, 5)
    stage.pages.resolved.open()
    assert stage.answer() == letter(5)


def test_a_stale_part_of_what_an_answer_brings_besides_is_cut_out(stage: Stage) -> None:
    stage.pages.resolved.close()
    stage.client.request(READ, 0, PAGE)
    stage.pages.resolved.wait_reached()
    stage.remap(3, 7)
    stage.pages.resolved.open()
    assert stage.answer() == letter(0)
    assert stage.read(3) == letter(7)
    calls = len(stage.pages.resolve_calls)
    assert stage.read(2) == letter(2)
    assert len(stage.pages.resolve_calls) == calls, "what had not changed was to be kept"


# -- 2. users of a place ---------------------------------------------------------------------------------------------


def test_whoever_frees_a_place_waits_for_a_read_that_found_it(stage: Stage) -> None:
    stage.read(0)
    with stopped_at("worker.read") as stop:
        stage.client.request(READ, 0, PAGE)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        stage.remap(0, 5)
        freeing = Background(stage.file.wait_unused, 0, PAGE)
        assert not freeing.is_done(), "the place is being read"
        Background(stage.file.wait_unused, PAGE, PAGE).finish()  # nobody uses that one
    freeing.finish()
    assert stage.answer() == letter(0), "found before the change, read before the place was reused"
    assert stage.read(0) == letter(5)


def test_looking_a_place_up_and_becoming_its_user_is_one_step(stage: Stage) -> None:
    stage.read(0)
    with stopped_at("export.readable") as stop:
        stage.client.request(READ, 0, PAGE)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        # The place has been looked up and nobody is its user yet: a change has to come before or after both.
        change = Background(stage.remap, 0, 5)
        assert not change.is_done()
    change.finish()
    stage.file.wait_unused(0, PAGE)
    assert stage.answer() in (letter(0), letter(5))


def test_a_request_in_layer_code_uses_no_place(stage: Stage) -> None:
    stage.pages.code.add(0)
    stage.pages.reading.close()
    stage.client.request(READ, 0, 2 * PAGE)
    stage.pages.reading.wait_reached()
    Background(stage.file.wait_unused, 0, PAGES * PAGE).finish()
    stage.pages.reading.open()
    assert stage.client.reply()[1] == 0
    assert stage.client.receive(2 * PAGE) == letter(0) + letter(1)


def test_a_use_by_python_is_waited_for_too(stage: Stage) -> None:
    with stage.file.use(0, PAGE):
        freeing = Background(stage.file.wait_unused, 0, PAGE)
        assert not freeing.is_done()
    freeing.finish()


def test_uses_that_begin_after_the_call_are_not_waited_for(stage: Stage) -> None:
    first = stage.file.use(0, PAGE)
    first.__enter__()
    freeing = Background(stage.file.wait_unused, 0, PAGE)
    assert not freeing.is_done()
    with stage.file.use(0, PAGE):
        first.__exit__()
        freeing.finish()


# -- 3. the order of a change ----------------------------------------------------------------------------------------


def test_parents_translate_a_changed_range_upwards(nbd_server: NbdServers, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(letter(page) for page in range(PAGES)))
    pages = Pages(file=File(path=str(path)), pages=PAGES)
    server, uri = nbd_server.start(Raw(file=pages, offset=2 * PAGE))
    client = Wire(uri)
    client.go()
    for page in range(4):
        client.request(READ, page * PAGE, PAGE)
        assert client.reply()[1] == 0
        assert client.receive(PAGE) == letter(page + 2)
    calls = server.stats()["exports"][""]["resolve_calls"]
    pages.table[3] = 9
    pages.changed(3 * PAGE, PAGE)
    client.request(READ, 0, 3 * PAGE)
    assert client.reply()[1] == 0
    assert client.receive(3 * PAGE) == letter(2) + letter(9) + letter(4)
    assert server.stats()["exports"][""]["resolve_calls"] == calls + 1


def test_changed_never_waits(stage: Stage) -> None:
    stage.read(0)
    with stopped_at("worker.read") as stop:
        stage.client.request(READ, 0, PAGE)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        Background(stage.remap, 0, 5).finish()
    stage.answer()


# -- 4. write permission is a promise --------------------------------------------------------------------------------


def test_whoever_takes_write_permission_away_waits_for_a_write_that_had_it(stage: Stage) -> None:
    stage.write(0, letter(10))
    assert not stage.pages.write_calls, "writable in place: no Python"
    with stopped_at("worker.write") as stop:
        stage.client.request(WRITE, 0, PAGE, data=letter(11))
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        stage.pages.writable.discard(0)
        stage.pages.changed(0, PAGE)
        relying = Background(stage.file.wait_unused, 0, PAGE)
        assert not relying.is_done(), "a write in place is still running"
    relying.finish()
    assert stage.client.reply()[1] == 0
    assert stage.on_disk(0) == letter(11)
    stage.write(0, letter(12))
    assert stage.pages.write_calls == [0], "without permission a write goes to the layer"


# -- 5. mutations of one cluster queue up: tests/layers, with the format that has clusters ---------------------------


# -- 6. points in time -----------------------------------------------------------------------------------------------


def test_a_drained_section_waits_for_running_requests_and_holds_new_ones_up(stage: Stage) -> None:
    stage.pages.code.add(0)
    stage.pages.reading.close()
    stage.client.request(READ, 0, PAGE)
    stage.pages.reading.wait_reached()
    entered, leave = threading.Event(), threading.Event()

    def change() -> None:
        with stage.export.drained():
            entered.set()
            assert leave.wait(SOON)

    section = Background(change)
    assert not entered.wait(LITTLE), "a request is running"
    other = stage.connect()
    other.request(READ, PAGE, PAGE)
    stage.pages.reading.open()
    assert entered.wait(SOON)
    stage.answer()
    other.socket.settimeout(LITTLE)
    with pytest.raises(TimeoutError):
        other.reply()
    stage.remap(1, 8)
    leave.set()
    section.finish()
    other.socket.settimeout(SOON)
    assert stage.answer(other) == letter(8)


def test_drained_sections_nest(stage: Stage) -> None:
    with stage.export.drained():
        with stage.export.drained():
            stage.client.request(READ, 0, PAGE)
        stage.client.socket.settimeout(LITTLE)
        with pytest.raises(TimeoutError):
            stage.client.reply()
    stage.client.socket.settimeout(SOON)
    assert stage.answer() == letter(0)


def test_a_drained_section_gives_up_in_time_and_lets_all_go_on(stage: Stage) -> None:
    stage.pages.code.add(0)
    stage.pages.reading.close()
    stage.client.request(READ, 0, PAGE)
    stage.pages.reading.wait_reached()
    other = stage.connect()
    with pytest.raises(TimeoutError), stage.export.drained(timeout=LITTLE):
        pass
    assert stage.read(1, other) == letter(1)
    stage.pages.reading.open()
    stage.answer()


def test_a_write_that_waits_for_a_drained_section_is_done_after_it(stage: Stage) -> None:
    with stage.export.drained():
        stage.client.request(WRITE, 0, PAGE, data=letter(10))
        stage.client.request(WRITE, PAGE, PAGE, cookie=1, data=letter(11))
        stage.client.socket.settimeout(LITTLE)
        with pytest.raises(TimeoutError):
            stage.client.reply()
        assert stage.on_disk(0) == letter(0)
    stage.client.socket.settimeout(SOON)
    assert [error for _, error in (stage.client.reply(), stage.client.reply())] == [0, 0]
    assert stage.on_disk(0) == letter(10)
    assert stage.on_disk(1) == letter(11)


# -- 7. dirty bits ---------------------------------------------------------------------------------------------------


def test_a_write_is_marked_dirty_when_it_has_completed_and_before_it_is_answered(stage: Stage) -> None:
    dirty = stage.track()
    stage.write(0, letter(1))
    assert dirty.take() == [(0, PAGE)]
    with stopped_at("worker.write") as stop:
        stage.client.request(WRITE, 2 * PAGE, PAGE, data=letter(10))
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        assert dirty.take() == [], "a copy made now would miss the write and be called clean"
    assert stage.client.reply()[1] == 0
    assert dirty.take() == [(2 * PAGE, PAGE)]
    with stopped_at("log.mark") as stop:
        stage.client.request(WRITE, 4 * PAGE, PAGE, data=letter(10))
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        stage.client.socket.settimeout(LITTLE)
        with pytest.raises(TimeoutError):
            stage.client.reply()
        stage.client.socket.settimeout(SOON)
    assert stage.client.reply()[1] == 0
    assert dirty.take() == [(4 * PAGE, PAGE)]


def test_a_write_through_python_is_marked_too(stage: Stage) -> None:
    stage.pages.code.add(4)
    stage.pages.writable.discard(4)
    dirty = stage.track(2 * PAGE)
    stage.pages.writing.close()
    stage.client.request(WRITE, 4 * PAGE, PAGE, data=letter(10))
    stage.pages.writing.wait_reached()
    assert dirty.take() == []
    stage.pages.writing.open()
    assert stage.client.reply()[1] == 0
    assert dirty.take() == [(4 * PAGE, 2 * PAGE)]


def test_a_write_that_failed_half_way_is_marked_for_what_it_did(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Request) -> None:
        raise OSError(errno.EIO, "the storage fails")

    monkeypatch.setattr(stage.pages, "write", fail)
    stage.pages.writable.discard(1)
    dirty = stage.track()
    stage.client.request(WRITE, 0, 2 * PAGE, data=letter(10) * 2)
    assert stage.client.reply()[1] == errno.EIO
    assert stage.on_disk(0) == letter(10), "the first page was written in place"
    assert dirty.take()[0] == (0, 2 * PAGE), "or a mirror would keep the old page"


# -- 8. replies ------------------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_its_replies_holds_up_nobody(stage: Stage) -> None:
    stage.read(0)
    rude = stage.connect()
    whole = PAGES * PAGE
    # 12 MiB of replies, more than any socket buffers. In one piece: the server may not want to know of all of them.
    rude.send(b"".join(REQUEST.pack(REQUEST_MAGIC, 0, READ, cookie, 0, whole) for cookie in range(200)))
    assert stage.read(1) == letter(1)
    stage.remap(0, 5)
    Background(stage.file.wait_unused, 0, whole).finish()
    with stage.export.drained(timeout=SOON):
        pass
    assert stage.read(0) == letter(5)
    rude.close()


# -- 9. flush --------------------------------------------------------------------------------------------------------


def test_a_sync_that_comes_while_one_runs_is_not_answered_by_that_one(stage: Stage) -> None:
    syncs = stage.file.counters()["syncs"]
    with stopped_at("file.sync") as stop:
        first = Background(stage.file.sync)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        stage.write(0, letter(1))  # may be too late for the sync that is running
        others = [Background(stage.file.sync) for _ in range(4)]
        assert not any(other.is_done(LITTLE / 4) for other in others)
    first.finish()
    for other in others:
        other.finish()
    assert stage.file.counters()["syncs"] in (syncs + 2, syncs + 3), "those who waited share one"


def test_a_flush_covers_writes_of_other_connections(stage: Stage) -> None:
    stage.write(0, letter(1))
    other = stage.connect()
    with stopped_at("file.sync") as stop:
        other.request(FLUSH)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        other.socket.settimeout(LITTLE)
        with pytest.raises(TimeoutError):
            other.reply()
    other.socket.settimeout(SOON)
    assert other.reply()[1] == 0


def test_a_failed_sync_is_never_followed_by_a_success(nbd_server: NbdServers, tmp_path: Path) -> None:
    server, _ = nbd_server.start(Pages(file=File(path=str(_image(tmp_path))), pages=1))
    reader, writer = os.pipe()
    os.close(reader)
    file = server._engine.open_file(writer, "a file whose storage fails", False, NO_LIMITS)
    with pytest.raises(OSError, match="Invalid argument"):
        file.sync()  # fdatasync of a pipe
    good = os.open(tmp_path / "image", os.O_RDWR)
    os.dup2(good, writer, inheritable=False)  # the storage has recovered: the same descriptor can be synced now
    os.close(good)
    os.fdatasync(writer)
    with pytest.raises(OSError, match="Invalid argument"):
        file.sync()
    file.close()


def _image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGE))
    return path


# -- 10. reuse on disk: tests/layers, with the format that reuses ----------------------------------------------------


# -- 11. no waiting in circles ---------------------------------------------------------------------------------------


@pytest.fixture
def held_sync(stage: Stage) -> Iterator[Stage]:
    """A Python thread is waiting in the engine for the disk."""
    with stopped_at("file.sync") as stop:
        sync = Background(stage.file.sync)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        yield stage
    sync.finish()


def test_python_does_not_hold_the_gil_while_it_waits_for_io(held_sync: Stage) -> None:
    # That this runs at all is half of the proof; a fault, which needs the GIL on another thread, is the other.
    held_sync.pages.code.add(0)
    assert held_sync.read(0) == letter(0)


def test_python_does_not_hold_the_gil_while_it_waits_for_a_place(stage: Stage) -> None:
    stage.pages.code.add(1)
    with stage.file.use(0, PAGE):
        waiting = Background(stage.file.wait_unused, 0, PAGE)
        assert not waiting.is_done()
        assert stage.read(1) == letter(1)
    waiting.finish()


def test_a_worker_does_not_wait_for_python(stage: Stage) -> None:
    stage.read(2)
    stage.pages.code.add(0)
    stage.pages.reading.close()
    stage.pages.changed(0, PAGE)
    stage.client.request(READ, 0, PAGE)
    stage.pages.reading.wait_reached()
    stage.client.request(READ, 2 * PAGE, PAGE, cookie=2)
    assert stage.client.reply() == (2, 0), "the mapped read overtakes the one that is in Python"
    assert stage.client.receive(PAGE) == letter(2)
    stage.pages.reading.open()
    assert stage.client.reply() == (0, 0)


def test_an_export_that_hangs_leaves_fault_threads_to_others(nbd_server: NbdServers, tmp_path: Path) -> None:
    stage = Stage(nbd_server, tmp_path, fault_threads=4)
    path = tmp_path / "other.raw"
    path.write_bytes(letter(0))
    other = Pages(file=File(path=str(path)), pages=1)
    other.code.add(0)
    stage.server.export("other", other)
    stage.pages.code.update(range(PAGES))
    stage.pages.reading.close()
    for page in range(PAGES):
        stage.client.request(READ, page * PAGE, PAGE, cookie=page)
    stage.pages.reading.wait_reached()
    client = Wire(stage.uri.replace("///", "///other", 1))
    client.go()
    assert stage.read(0, client) == letter(0)
    stage.pages.reading.open()
    for _ in range(PAGES):
        cookie, error = stage.client.reply()
        assert error == 0
        assert stage.client.receive(PAGE) == letter(cookie)
