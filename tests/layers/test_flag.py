"""The flag cannot lie: a layer that swaps in ordinary memory loses it from there on, and nothing can set it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from layers.memory import Memory
from nbdserver.layer import Layer
from nbdserver.request import Flag, Operation, Registration, Request, Segment, Vector, check_flag
from tests.layers.flag_kit import STACKS, VARIANTS, Invert, Stack, is_payload, run
from tests.registered import Seen, Spy, open_registered, registered

#: Layers whose code passes data on.
FORWARDING = (
    "blkverify",
    "copy-before-write",
    "copy-on-read",
    "detect-zeroes",
    "invert",
    "luks",
    "qcow2",
    "quorum",
    "quorum fifo",
)


def watch(monkeypatch: pytest.MonkeyPatch, stack: Stack, *, is_mutant: bool) -> list[Seen]:
    """What the layer's code will pass on. Of a mutant, the code runs on ordinary memory, and bounces into such; nothing
    else is changed."""
    by_code: list[Seen] = []

    def watched(method: Callable[[Request], None]) -> Callable[[Request], None]:
        def call(request: Request) -> None:
            before = [len(spy.seen) for spy in stack.spies]
            inner = request
            if is_mutant and request.vector.length:
                inner = request.with_vector(Vector.of(bytearray(request.vector.tobytes())))
            method(inner)
            if inner is not request and request.operation is Operation.READ:
                request.vector.fill(inner.vector.tobytes())
            for spy, count in zip(stack.spies, before, strict=True):
                by_code.extend(spy.seen[count:])

        return call

    for operation in (Operation.READ, Operation.WRITE):
        monkeypatch.setattr(stack.layer, operation.value, watched(getattr(stack.layer, operation.value)))
    if is_mutant:
        monkeypatch.setattr(stack.layer, "allocate", Vector.of)
    return by_code


@pytest.mark.parametrize("name", FORWARDING)
def test_ordinary_memory_loses_the_flag_from_there_on_and_changes_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    make = (STACKS | VARIANTS)[name]
    (tmp_path / "honest").mkdir()
    honest = make(tmp_path / "honest")
    shutil.copytree(tmp_path / "honest", tmp_path / "mutant")
    mutant = make(tmp_path / "mutant")
    kept, lost = watch(monkeypatch, honest, is_mutant=False), watch(monkeypatch, mutant, is_mutant=True)
    before, after = run(honest), run(mutant)
    assert after.data == before.data
    for operation in Operation:
        assert [*map(_unflagged, after.seen[operation])] == [*map(_unflagged, before.seen[operation])]
    assert _unflagged(lost) == _unflagged(kept)
    payload = [seen.is_registered for seen in kept if is_payload(seen)]
    assert payload
    assert all(payload)
    assert not any(seen.is_registered for seen in lost)


def _unflagged(seen: Iterable[Seen]) -> list[Seen]:
    return [one._replace(flags=one.flags & ~Flag.REGISTERED_BUF) for one in seen]


def test_the_flag_is_lost_below_the_mutant_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hops: list[Spy] = []
    layer: Layer = Memory(1 << 20)
    inverts = []
    for _ in range(3):
        spy = Spy(layer)
        inverts.append(Invert(spy))
        hops.append(spy)
        layer = inverts[-1]
    root = Spy(layer)
    watch(monkeypatch, Stack(root, inverts[1], []), is_mutant=True)
    # Below the mutant, what bounces into the pool would be registered again: the mutant's children have no pool.
    monkeypatch.setattr(inverts[0], "allocate", Vector.of)
    with open_registered(root) as export:
        export.execute(Request.write(0, registered(4096)))
        export.execute(Request.read(0, registered(4096)))
    flags = [[one.is_registered for one in spy.take()] for spy in (root, *reversed(hops))]
    assert flags == [[True, True], [True, True], [False, False], [False, False]]


def test_no_code_path_sets_the_flag() -> None:
    vector = Vector.of(512)
    for make in (Request.read, Request.write):
        with pytest.raises(AssertionError):
            make(0, vector, Flag.REGISTERED_BUF)
    with pytest.raises(AssertionError):
        Request(Operation.ZERO, 0, 512, asked_flags=Flag.REGISTERED_BUF)
    request = Request.read(0, vector)
    for derived in (
        request.with_flags(Flag.REGISTERED_BUF | Flag.FUA),
        request.with_vector(Vector.of(512)),
        request.moved(512),
        request.slice(0, 100),
        *request.pieces(100),
    ):
        assert not derived.flags & Flag.REGISTERED_BUF
        assert not derived.asked_flags & Flag.REGISTERED_BUF
    with pytest.raises(AttributeError):
        vector.registered = True  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        request.flags = Flag.REGISTERED_BUF  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        request.asked_flags = Flag.REGISTERED_BUF  # type: ignore[misc]
    both = registered(512) + vector
    assert not both.registered
    assert both.slice(0, 512).registered


# -- the debug mode ----------------------------------------------------------------------------------------------------


class Liar:
    """Ordinary memory that says it is registered."""

    view = memoryview(bytearray(4096))
    registration = Registration(0, 0, 1)


def test_a_buffer_that_lies_is_found_at_the_hop_where_it_enters() -> None:
    root = Spy(Memory(1 << 20))
    lie = Vector([Segment(Liar(), 0, 4096)])
    with open_registered(root) as export, pytest.raises(AssertionError, match="of Spy: REGISTERED_BUF is True"):
        export.execute(Request.read(0, lie))


def test_a_registered_buffer_that_denies_it_is_found_too() -> None:
    vector = registered(4096)
    ordinary = Vector.of(vector.segments[0].buffer.view)
    check_flag(vector, "here")
    with pytest.raises(AssertionError, match="here: REGISTERED_BUF is False"):
        check_flag(ordinary, "here")


def test_read_only_and_empty_memory_is_not_registered() -> None:
    check_flag(Vector.of(b"constant"), "here")
    check_flag(Vector(()), "here")


# -- counters ------------------------------------------------------------------------------------------------------


def test_layers_count_what_is_kept_and_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Invert(Memory(1 << 20))
    with open_registered(layer) as export:
        export.execute(Request.write(0, registered(4096)))
        export.execute(Request.read(0, Vector.of(4096)))
        before = {"requests": 2, "registered": 1, "kept": 1, "lost": {}, "bounce_bytes": 4096}
        assert layer.buffer_counters.counts() == before
        monkeypatch.setattr(layer, "allocate", Vector.of)
        export.execute(Request.write(0, registered(4096)))
        export.zero(0, 4096)
        assert layer.file.layer.buffer_counters.counts()["registered"] == 1  # type: ignore[attr-defined]
    counts = layer.buffer_counters.counts()
    lost = {"ordinary memory": 1}
    assert counts == {"requests": 3, "registered": 2, "kept": 1, "lost": lost, "bounce_bytes": 4096}
