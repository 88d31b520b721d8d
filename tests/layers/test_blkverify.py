"""The layer ``blkverify``."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from layers.blkverify import Blkverify
from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from nbdserver.errors import ConfigError, RequestError
from nbdserver.limits import BOUNCE_MAX
from nbdserver.reference import Reference, open_stack
from nbdserver.registry import build
from nbdserver.request import Flag, Operation, Request
from nbdserver.testing import NbdServers
from tests.oracle.model import Model
from tests.oracle.storm import Storm
from tests.registered import Spy, open_registered, registered
from tests.serving import SEED, amount, backend, check, content, create

__all__ = ["backend"]

MIB = 1 << 20


def two(size: int = 4 * MIB) -> tuple[Spy, Spy, Blkverify]:
    test, raw = Spy(Memory(size)), Spy(Memory(size))
    return test, raw, Blkverify(test, raw)


def test_what_changes_goes_to_both() -> None:
    test, raw, layer = two()
    with open_stack(layer) as export:
        export.write(10, b"data" * 1000)
        export.zero(100, 50, Flag.MAY_UNMAP)
        export.trim(200, 10)
        export.flush()
        assert test.seen == raw.seen
        assert [hop.operation for hop in test.take()] == [Operation.WRITE, Operation.ZERO, Operation.ZERO]
        assert (test.flushes, raw.flushes) == (1, 1)
        assert export.read(0, 4 * MIB) == Reference(test).read(0, 4 * MIB) == Reference(raw).read(0, 4 * MIB)


def test_trimmed_bytes_are_zeroes_in_both() -> None:
    """Undefined they might be, but each child would have its own."""
    test, raw, layer = two()
    with open_stack(layer) as export:
        export.write(0, b"d" * 9000)
        export.trim(1, 8998)
        assert test.take()[-1] == raw.take()[-1] == (Operation.ZERO, 1, 8998, Flag.MAY_UNMAP)
        assert export.read(0, 9000) == b"d" + bytes(8998) + b"d"


@pytest.mark.parametrize("at", [0, 1, 65_536, BOUNCE_MAX - 1, BOUNCE_MAX, 3 * MIB - 1])
def test_the_first_difference_is_named_with_its_offset(at: int, caplog: pytest.LogCaptureFixture) -> None:
    _, raw, layer = two()
    with open_stack(layer) as export:
        export.write(0, b"d" * 4 * MIB)
        Reference(raw).write(512 + at, b"x")
        Reference(raw).write(4 * MIB - 512, b"y")
        with pytest.raises(RequestError) as caught:
            export.read(512, 4 * MIB - 512)
        assert caught.value.errno == errno.EIO
        assert str(caught.value).startswith("blkverify: read of ")
        assert str(caught.value).endswith(f": the first byte that differs, at {512 + at:#x}, is 64, raw has 78")
        assert caplog.messages == [str(caught.value)]


def test_what_is_alike_around_a_difference_can_be_read() -> None:
    _, raw, layer = two()
    with open_stack(layer) as export:
        Reference(raw).write(512, b"x")
        assert export.read(0, 512) == bytes(512)
        assert export.read(513, MIB) == bytes(MIB)


@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE, Operation.ZERO])
@pytest.mark.parametrize("index", [0, 1])
def test_one_failing_alone_is_a_difference(operation: Operation, index: int, caplog: pytest.LogCaptureFixture) -> None:
    test, raw, layer = two()
    (test, raw)[index].fails[operation] = errno.ENOSPC
    with open_stack(layer) as export, pytest.raises(RequestError, match="the spy refuses") as caught:
        run(export, operation)
    assert caught.value.errno == errno.EIO
    assert (f"test: {'success' if index else 'the spy refuses'}" in caplog.text) and caplog.records
    assert [hop.operation for hop in test.take()] == [hop.operation for hop in raw.take()] == [operation]


def test_both_failing_alike_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    test, raw, layer = two()
    test.fails[Operation.WRITE] = raw.fails[Operation.WRITE] = errno.ENOSPC
    with open_stack(layer) as export, pytest.raises(RequestError) as caught:
        export.write(0, b"d")
    assert caught.value.errno == errno.ENOSPC
    assert not caplog.records


def test_a_flush_that_one_refuses_fails() -> None:
    _, raw, layer = two()
    with open_stack(layer) as export:
        raw.fails["flush"] = errno.EIO
        with pytest.raises(RequestError):
            export.flush()


def test_a_fast_zero_is_refused_before_either_is_changed() -> None:
    test, raw, layer = two()
    with open_stack(layer) as export, pytest.raises(RequestError) as caught:
        export.zero(0, 512, Flag.NO_FALLBACK)
    assert caught.value.errno == errno.ENOTSUP
    assert not test.seen and not raw.seen


def test_the_flag_is_kept_at_both() -> None:
    """The client's memory at test, bounce memory from the pool at raw."""
    test, raw, layer = two()
    with open_registered(above := Spy(layer)) as export:
        export.execute(Request.write(100, registered(b"d" * 3 * MIB)))
        export.execute(Request.read(100, registered(3 * MIB)))
        for spy in (above, test, raw):
            hops = spy.take()
            assert {hop.operation for hop in hops} == {Operation.READ, Operation.WRITE}
            assert all(hop.is_registered for hop in hops)


def test_other_memory_has_no_flag_at_test_and_the_bounce_has_its_own_at_raw() -> None:
    test, raw, layer = two()
    with open_registered(layer) as export:
        export.read(0, 512)
        assert [hop.is_registered for hop in test.take() + raw.take()] == [False, True]


def test_a_raw_that_is_too_short_is_refused() -> None:
    refused = pytest.raises(ConfigError, match="raw: found a disk of 99 bytes, but test has 100")
    with refused, open_stack(Blkverify(Memory(100), Memory(99))):
        pass


def test_it_is_as_large_as_test() -> None:
    with open_stack(Blkverify(Memory(100), Memory(512))) as export:
        assert export.size == 100
        assert export.read(0, 100) == bytes(100)


def test_its_keys() -> None:
    test, raw = Memory(1), Memory(1)
    layer = build("blkverify", {"raw": raw, "test": test})
    assert isinstance(layer, Blkverify) and (layer.test, layer.raw) == (test, raw)


def test_storm(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    """Through the engine, many at once and overlapping: both children have the same at the end."""
    path, raw = create(tmp_path / "test.qcow2", 4 * MIB, cluster_size=4096), tmp_path / "raw"
    raw.write_bytes(bytes(4 * MIB))
    root = Blkverify(Qcow2(File(str(path))), File(str(raw)))
    server, uri = nbd_server.start(root, backend=backend)
    with Storm(uri, Model(4 * MIB), seed=SEED) as storm:
        storm.run(seconds=amount(2, 20))
        data = storm.verify()
    server.stop()
    assert raw.read_bytes() == content(path) == data
    check(path)


def run(export: Reference, operation: Operation) -> None:
    """An operation on the first sector."""
    if operation is Operation.READ:
        export.read(0, 512)
    elif operation is Operation.WRITE:
        export.write(0, b"d" * 512)
    else:
        export.zero(0, 512)
