"""The layer ``quorum``."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.quorum import Quorum
from nbdserver import config
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


def quorum(count: int, vote_threshold: int, **keys: Any) -> tuple[list[Spy], Quorum]:
    spies = [Spy(Memory(4 * MIB)) for _ in range(count)]
    return spies, Quorum(list(spies), vote_threshold, **keys)


def corrupt(spy: Spy, offset: int, data: bytes = b"x") -> None:
    Reference(spy.file).write(offset, data)


# -- voting --------------------------------------------------------------------------------------------------------


def test_what_changes_goes_to_all() -> None:
    spies, layer = quorum(3, 2)
    with open_stack(layer) as export:
        export.write(10, b"data" * 1000)
        export.zero(100, 50, Flag.MAY_UNMAP)
        export.trim(200, 10)
        export.flush()
        assert spies[0].seen == spies[1].seen == spies[2].seen
        assert [hop.operation for hop in spies[0].seen] == [Operation.WRITE, Operation.ZERO, Operation.ZERO]
        assert [spy.flushes for spy in spies] == [1, 1, 1]


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("at", [0, BOUNCE_MAX - 1, BOUNCE_MAX, 3 * MIB - 1])
def test_the_majority_wins(bad: int, at: int, caplog: pytest.LogCaptureFixture) -> None:
    spies, layer = quorum(3, 2)
    with open_stack(layer) as export:
        export.write(0, b"d" * 4 * MIB)
        corrupt(spies[bad], 512 + at)
        assert export.read(512, 3 * MIB) == b"d" * 3 * MIB
        (message,) = caplog.messages
        assert message.endswith(f"agree, others differ: children.{bad} first at {512 + at:#x}")
        assert Reference(spies[bad].file).read(512 + at, 1) == b"x"


def test_below_the_threshold_says_where_and_who() -> None:
    spies, layer = quorum(3, 3)
    with open_stack(layer) as export:
        corrupt(spies[1], 700)
        with pytest.raises(RequestError) as caught:
            export.read(512, 512)
        assert caught.value.errno == errno.EIO
        assert str(caught.value) == (
            "quorum: read of 512 bytes at 0x200: children.0, children.2 agree, others differ: children.1 first at "
            "0x2bc; 3 votes are needed"
        )


def test_all_different() -> None:
    spies, layer = quorum(3, 2)
    with open_stack(layer) as export:
        corrupt(spies[1], 1, b"1")
        corrupt(spies[2], 2, b"2")
        with pytest.raises(RequestError, match=r"children.0 agree.*children.1 first at 0x1; children.2 first at 0x2"):
            export.read(0, 512)
        assert export.read(3, 509) == bytes(509)


def test_a_threshold_of_one_takes_the_most_frequent() -> None:
    spies, layer = quorum(4, 1)
    with open_stack(layer) as export:
        for spy, data in zip(spies, b"abcb", strict=True):
            corrupt(spy, 0, bytes([data]))
        assert export.read(0, 1) == b"b"


def test_children_that_fail_do_not_vote() -> None:
    spies, layer = quorum(3, 2)
    with open_stack(layer) as export:
        export.write(0, b"good")
        spies[0].fails[Operation.READ] = errno.EIO
        assert export.read(0, 4) == b"good"
        corrupt(spies[1], 3)
        with pytest.raises(RequestError) as caught:
            export.read(0, 4)
        assert caught.value.errno == errno.EIO


def test_too_many_failures_are_the_most_frequent_error() -> None:
    spies, layer = quorum(4, 2)
    for spy, number in zip(spies[1:], (errno.EIO, errno.ENOMEM, errno.ENOMEM), strict=True):
        spy.fails[Operation.READ] = number
    with open_stack(layer) as export, pytest.raises(RequestError, match=r"children.1: the spy refuses") as caught:
        export.read(0, 4)
    assert caught.value.errno == errno.ENOMEM


# -- rewriting, fifo -----------------------------------------------------------------------------------------------


def test_what_is_corrupt_is_rewritten() -> None:
    spies, layer = quorum(3, 2, rewrite_corrupted=True)
    with open_registered(layer) as export:
        export.write(0, b"d" * 4 * MIB)
        corrupt(spies[0], 1000, b"x" * 10)
        for spy in spies:
            spy.take()
        export.execute(Request.read(0, registered(4 * MIB)))
        (rewrite,) = spies[0].take(Operation.WRITE)
        assert rewrite == (Operation.WRITE, 0, BOUNCE_MAX, Flag.REGISTERED_BUF)
        assert not spies[1].take(Operation.WRITE) and not spies[2].take(Operation.WRITE)
        assert Reference(spies[0].file).read(0, 4 * MIB) == b"d" * 4 * MIB


def test_a_child_that_cannot_be_rewritten_is_only_reported(caplog: pytest.LogCaptureFixture) -> None:
    spies, layer = quorum(3, 2, rewrite_corrupted=True)
    spies[2].fails[Operation.WRITE] = errno.EIO
    with open_stack(layer) as export:
        corrupt(spies[2], 0)
        assert export.read(0, 1) == b"\0"
    assert caplog.messages[-1] == "quorum: read of 1 bytes at 0x0: rewritten in children.2: the spy refuses"


def test_nothing_is_rewritten_without_a_winner() -> None:
    spies, layer = quorum(2, 2, rewrite_corrupted=True)
    with open_stack(layer) as export:
        corrupt(spies[0], 0)
        with pytest.raises(RequestError):
            export.read(0, 1)
        assert not [hop for spy in spies for hop in spy.take(Operation.WRITE)]


def test_fifo_reads_the_first_that_succeeds() -> None:
    spies, layer = quorum(3, 2, read_pattern="fifo")
    with open_registered(layer) as export:
        for index, spy in enumerate(spies):
            corrupt(spy, 0, b"%d" % index)
        assert export.read(0, 1) == b"0"
        spies[0].fails[Operation.READ] = errno.EIO
        for spy in spies:
            spy.take()
        vector = registered(1)
        export.execute(Request.read(0, vector))
        assert vector.tobytes() == b"1"
        assert [[hop.is_registered for hop in spy.take()] for spy in spies] == [[True], [True], []]


def test_fifo_fails_when_all_do() -> None:
    spies, layer = quorum(2, 1, read_pattern="fifo")
    for spy in spies:
        spy.fails[Operation.READ] = errno.EIO
    with open_stack(layer) as export, pytest.raises(RequestError, match=r"failed at children.0: .*; children.1: "):
        export.read(0, 1)


# -- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refusing", "fine"), [(1, True), (2, False)])
def test_writes_and_flushes_need_the_threshold(refusing: int, fine: bool) -> None:
    spies, layer = quorum(3, 2)
    with open_stack(layer) as export:
        for spy in spies[:refusing]:
            spy.fails = {Operation.WRITE: errno.ENOSPC, Operation.ZERO: errno.ENOSPC, "flush": errno.ENOSPC}
        changes: list[Callable[[], None]] = [lambda: export.write(0, b"d"), lambda: export.zero(0, 1), export.flush]
        for change in changes:
            if fine:
                change()
            else:
                with pytest.raises(RequestError) as caught:
                    change()
                assert caught.value.errno == errno.ENOSPC
        for spy in spies:  # all are tried, whoever fails
            assert (len(spy.seen), spy.flushes) == (2, 1)
        for spy in spies:
            spy.fails.clear()


def test_a_fast_zero_is_refused_before_any_is_changed() -> None:
    spies, layer = quorum(2, 1)
    with open_stack(layer) as export, pytest.raises(RequestError) as caught:
        export.zero(0, 512, Flag.NO_FALLBACK)
    assert caught.value.errno == errno.ENOTSUP
    assert not spies[0].seen and not spies[1].seen


# -- the flag ------------------------------------------------------------------------------------------------------


def test_the_flag_is_kept_at_every_child() -> None:
    spies, layer = quorum(3, 2)
    with open_registered(above := Spy(layer)) as export:
        export.execute(Request.write(100, registered(b"d" * 3 * MIB)))
        corrupt(spies[0], 2 * MIB)
        vector = registered(3 * MIB)
        export.execute(Request.read(100, vector))
        assert vector.tobytes() == b"d" * 3 * MIB
        for spy in (above, *spies):
            hops = spy.take()
            assert {hop.operation for hop in hops} == {Operation.READ, Operation.WRITE}
            assert all(hop.is_registered for hop in hops)


# -- block status, configuration -----------------------------------------------------------------------------------


def test_zeroes_are_where_all_children_have_them() -> None:
    spies, layer = quorum(2, 1)
    with open_stack(layer) as export:
        assert export.status(0, 4 * MIB) == [(4 * MIB, 3)]
        corrupt(spies[0], 0, b"x" * 4096)
        corrupt(spies[1], MIB, b"x" * 4096)
        assert export.status(0, 4 * MIB) == [
            (4096, 0),
            (MIB - 4096, 3),
            (4096, 0),
            (3 * MIB - 4096, 3),
        ]


@pytest.mark.parametrize(
    ("sizes", "keys", "message"),
    [
        ([], {"vote_threshold": 1}, "children: found none"),
        ([1, 2], {"vote_threshold": 1}, r"children: found sizes of \[1, 2\] bytes"),
        ([1, 1], {"vote_threshold": 3}, "vote-threshold: found 3, allowed is 1 to 2"),
        ([1, 1], {"vote_threshold": 0}, "vote-threshold: found 0, allowed is 1 to 2"),
        ([1, 1, 1], {"vote_threshold": 2, "blkverify": True}, "blkverify: goes with exactly two"),
        ([1, 1], {"vote_threshold": 1, "blkverify": True}, "blkverify: goes with exactly two"),
        ([1, 1], {"vote_threshold": 2, "blkverify": True, "rewrite_corrupted": True}, "rewrite-corrupted: needs"),
        ([1, 1], {"vote_threshold": 2, "read_pattern": "fifo", "rewrite_corrupted": True}, "rewrite-corrupted: needs"),
    ],
)
def test_what_makes_no_quorum(sizes: list[int], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message), open_stack(Quorum([Memory(size) for size in sizes], **keys)):
        pass


def test_blkverify_mode_fails_at_the_first_difference() -> None:
    spies, layer = quorum(2, 2, blkverify=True)
    with open_stack(layer) as export:
        assert export.read(0, 4 * MIB) == bytes(4 * MIB)
        corrupt(spies[1], 2 * MIB + 5)
        with pytest.raises(RequestError, match=r"children.1 first at 0x200005"):
            export.read(0, 4 * MIB)


def test_its_keys_are_those_of_qemu() -> None:
    one, other = Memory(1), Memory(1)
    layer = build("quorum", {"children": [one, other], "vote-threshold": 2, "read-pattern": "fifo"})
    assert isinstance(layer, Quorum)
    assert (layer.children_, layer.vote_threshold, layer.read_pattern) == ([one, other], 2, "fifo")
    with pytest.raises(ConfigError, match=r"children: missing"):
        build("quorum", {"vote-threshold": 2})


@pytest.mark.parametrize(
    "layers",
    [
        '[{type="quorum", vote-threshold=2, children=[[{type="memory", size="1M"}], [{type="memory", size="1M"}]]}]',
        '[{type="quorum", vote-threshold=2}, [{type="memory", size="1M"}], [{type="memory", size="1M"}]]',
    ],
)
def test_in_a_configuration(layers: str, tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text(f"[exports.disk]\nlayers = {layers}\n")
    (export,) = config.load(str(tmp_path / "exports.toml")).exports
    root, _ = export.build()
    assert isinstance(root, Quorum)
    with open_stack(root) as disk:
        disk.write(5, b"hello")
        assert disk.read(5, 5) == Reference(root.children_[1]).read(5, 5) == b"hello"


# -- through the engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewrite", [False, True])
def test_storm(nbd_server: NbdServers, tmp_path: Path, backend: str, rewrite: bool) -> None:
    """Many at once and overlapping: no vote is ever needed, and all children have the same at the end."""
    image, raw = create(tmp_path / "a.qcow2", 4 * MIB, cluster_size=4096), tmp_path / "b.raw"
    raw.write_bytes(bytes(4 * MIB))
    root = Quorum([Qcow2(File(str(image))), memory := Memory(4 * MIB), File(str(raw))], 3, rewrite_corrupted=rewrite)
    server, uri = nbd_server.start(root, backend=backend)
    with Storm(uri, Model(4 * MIB), seed=SEED) as storm:
        storm.run(seconds=amount(2, 20))
        data = storm.verify()
    assert Reference(memory).read(0, 4 * MIB) == data
    server.stop()
    assert raw.read_bytes() == content(image) == data
    check(image)
