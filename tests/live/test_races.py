"""What would go wrong between a job and its guest, with threads held where it would."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest

from nbdserver.layer import Layer
from nbdserver.live import copying, filters
from nbdserver.request import Flag, Request, Vector
from nbdserver.server import Export
from tests.coherence.pages import Background, Gate, stopped_at
from tests.live.kit import KIB, MIB, SOON, Live
from tests.serving import BACKENDS, check, content, create, qemu_io

#: What is held in the engine, is held in either.
BOTH = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def backend() -> str:
    return "auto"


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Between the reading of what a job copies and its writing."""
    gate = Gate()

    class Gated(Request):
        @classmethod
        def write(cls, offset: int, vector: Vector, flags: Flag = Flag.NONE) -> Request:
            gate.pass_through()
            return Request.write(offset, vector, flags)

    for module in (copying, filters):
        monkeypatch.setattr(module, "Request", Gated)
    return gate


@pytest.fixture
def served(live: Live) -> Live:
    """An empty image on one that has 'a' in its first MiB, and 'b' near its end."""
    base = create(live.directory / "base.qcow2", 4 * MIB, cluster_size=4096)
    qemu_io(base, "write -q -P 97 0 1M", "write -q -P 98 3584k 64k")
    return live.serve(create(live.directory / "top.qcow2", 4 * MIB, backing=base, cluster_size=65536))


def held_in(live: Live, copied: Gate, command: str, **arguments: Any) -> str:
    """A job that has read what it is about to write; its id."""
    copied.close()
    found: str = live.execute(command, **arguments)["id"]
    copied.wait_reached()
    return found


# -- stream --------------------------------------------------------------------------------------------------------


def test_a_copy_does_not_go_over_a_write_that_came_while_it_was_made(served: Live, copied: Gate) -> None:
    client = served.connect()
    id = held_in(served, copied, "block-stream")
    writing = Background(client.write, 4096, b"new" * 1000)
    assert not writing.is_done(), "it must wait for the copy"
    copied.open()
    writing.finish()
    assert served.end(id).error is None
    assert client.read(4096, 3001) == b"new" * 1000 + b"a"
    served.stop()
    assert content(served.directory / "top.qcow2")[4096:7097] == b"new" * 1000 + b"a"


def test_nor_if_another_write_has_made_room_for_it_meanwhile(live: Live, copied: Gate) -> None:
    """A cluster is allocated around a range that is being copied, so that the range could be written in place."""
    base = create(live.directory / "base.qcow2", 4 * MIB, cluster_size=4096)
    qemu_io(base, "write -q -P 97 0 4k")
    live.serve(create(live.directory / "top.qcow2", 4 * MIB, backing=base, cluster_size=65536))
    beside, client = live.connect(), live.connect()
    id = held_in(live, copied, "block-stream")
    beside.write(8192, b"beside")
    writing = Background(client.write, 0, b"new" * 1000)
    assert not writing.is_done(), "it must wait for the copy"
    copied.open()
    writing.finish()
    assert live.end(id).error is None
    assert client.read(0, 3001) == b"new" * 1000 + b"a"
    assert client.read(8192, 7) == b"beside\0"


def test_zeroes_and_trims_wait_for_a_copy_too(served: Live, copied: Gate) -> None:
    client = served.connect()
    id = held_in(served, copied, "block-stream")
    zeroing = Background(client.zero, 128 * KIB, 128 * KIB)
    assert not zeroing.is_done(), "it must wait for the copy"
    copied.open()
    zeroing.finish()
    assert served.end(id).error is None
    assert client.read(128 * KIB, 128 * KIB + 1) == bytes(128 * KIB) + b"a"


def test_what_is_not_being_copied_is_read_and_written_meanwhile(served: Live, copied: Gate) -> None:
    client = served.connect()
    id = held_in(served, copied, "block-stream")
    assert client.read(0, MIB) == b"a" * MIB
    client.write(2 * MIB, b"elsewhere")
    copied.open()
    assert served.end(id).error is None
    assert client.read(2 * MIB, 9) == b"elsewhere"


# -- commit --------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(served: Live) -> Live:
    client = served.connect()
    client.write(0, b"old" * 50000)
    client.close()
    return served


def base_has(live: Live, offset: int, data: bytes) -> bool:
    """Whether the committed disk has it, by both names."""
    live.stop()
    for name in ("base.qcow2", "top.qcow2"):
        check(live.directory / name)
        if content(live.directory / name)[offset : offset + len(data)] != data:
            return False
    return True


def test_what_is_written_over_a_range_that_is_being_copied_is_copied_again(written: Live, copied: Gate) -> None:
    client = written.connect()
    id = held_in(written, copied, "block-commit")
    client.write(0, b"new" * 1000)
    copied.open()
    assert written.end(id).error is None
    assert base_has(written, 0, b"new" * 1000 + b"old")


def test_what_is_written_when_the_job_is_ready_is_committed_too(written: Live, copied: Gate) -> None:
    client = written.connect()
    job = written.ready(written.execute("block-commit")["id"])
    client.write(3 * MIB, b"late")
    job.complete()
    assert job.wait(20) and job.error is None
    assert base_has(written, 3 * MIB, b"late")


@BOTH
def test_the_end_waits_for_a_write_that_is_done_and_not_marked(written: Live) -> None:
    """A write is on the disk, and the job has looked what has been written, before it is marked."""
    client = written.connect()
    client.write(0, b"mapped")
    job = written.ready(written.execute("block-commit")["id"])
    with stopped_at("log.mark") as stop:
        writing = Background(client.write, 0, b"in flight")
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        job.complete()
        assert not job.wait(0.5), "it must wait for the write"
        stop.release()  # type: ignore[attr-defined]
        writing.finish()
    assert job.wait(20) and job.error is None
    assert base_has(written, 0, b"in flight")


def test_zeroes_over_data_that_is_being_copied_are_committed(written: Live, copied: Gate) -> None:
    client = written.connect()
    id = held_in(written, copied, "block-commit")
    client.zero(0, 64 * KIB)
    copied.open()
    assert written.end(id).error is None
    assert base_has(written, 0, bytes(64 * KIB))


# -- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["block-commit", "block-stream"])
def test_a_job_that_is_cancelled_half_way_leaves_everything_as_it_was(
    written: Live, copied: Gate, command: str
) -> None:
    client = written.connect()
    before = client.read(0, 4 * MIB)
    id = held_in(written, copied, command)
    written.job(id).cancel()
    copied.open()
    assert written.end(id).error == "the job has been cancelled"
    assert (written.files, written.types) == (["top.qcow2", "base.qcow2"], [])
    client.write(MIB, b"after")
    expected = before[:MIB] + b"after" + before[MIB + 5 :]
    assert client.read(0, 4 * MIB) == expected
    # And the base is a backing file like any other again.
    assert content(written.directory / "base.qcow2")[200 * KIB : MIB] == b"a" * (MIB - 200 * KIB)
    written.stop()
    assert content(written.directory / "top.qcow2") == expected


def test_a_job_that_is_ready_is_cancelled(written: Live) -> None:
    job = written.ready(written.execute("block-commit")["id"])
    client = written.connect()
    client.write(0, b"kept")
    job.cancel()
    assert job.wait(20)
    assert (written.files, written.types) == (["top.qcow2", "base.qcow2"], [])
    assert client.read(0, 7) == b"keptldo"


# -- snapshots -----------------------------------------------------------------------------------------------------


@BOTH
def test_a_write_that_runs_when_a_snapshot_is_made_is_in_the_old_image(served: Live) -> None:
    client = served.connect()
    with stopped_at("file.write") as stop:
        writing = Background(client.write, 0, b"under way")
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        snapshot = Background(lambda: served.execute("blockdev-snapshot-sync", snapshot_file="snap.qcow2"))
        assert not snapshot.is_done(), "it must wait for the write"
        stop.release()  # type: ignore[attr-defined]
        writing.finish()
        snapshot.finish()
    client.write(MIB, b"afterwards")
    served.stop()
    old = content(served.directory / "top.qcow2")
    assert (old[:9], old[MIB : MIB + 10]) == (b"under way", bytes(10))


def test_requests_that_do_not_end_do_not_keep_a_job_from_being_undone(
    written: Live, copied: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drained section that cannot be had is asked for again: nothing of a job stays behind."""
    server = written.service.server
    drained, refusals = server.drained, [TimeoutError("requests have not ended")] * 2

    def refusing(layer: Layer, timeout: float = 60) -> AbstractContextManager[list[Export]]:
        if refusals:
            raise refusals.pop()
        return drained(layer, timeout)

    id = held_in(written, copied, "block-stream")
    monkeypatch.setattr(server, "drained", refusing)
    written.job(id).cancel()
    copied.open()
    assert written.end(id).error == "the job has been cancelled"
    assert (written.types, refusals) == ([], [])
