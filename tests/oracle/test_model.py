"""The model itself: what it allows and what it forbids, rule by rule."""

from __future__ import annotations

import pytest

from tests.oracle.model import ZERO_TAG, Kind, Mismatch, Model, Operation

GRAIN = 32


def make(grains: int = 4, initial: bytes | None = None) -> Model:
    return Model(grains * GRAIN, grain=GRAIN, initial=initial, crashes=True)


def start(model: Model, kind: Kind, *, fua: bool = False, grain: int = 0) -> Operation:
    return model.submit(kind, grain * GRAIN, 0 if kind is Kind.FLUSH else GRAIN, fua=fua)


def done(model: Model, kind: Kind, *, fua: bool = False, grain: int = 0) -> Operation:
    operation = start(model, kind, fua=fua, grain=grain)
    model.complete(operation)
    return operation


def reads(model: Model, operation: Operation, tag: int, grain: int = 0) -> None:
    """``operation``, a read, returns the content ``tag`` would have left."""
    model.complete(operation, model.content(tag, grain))


def may_read(model: Model, *tags: int) -> set[int]:
    """Which of ``tags`` a grain that is at rest may hold."""
    return {tag for tag in tags if tag in {value.tag for value in model._possible[0]}}


def test_unwritten_is_initial() -> None:
    model = make(1, initial=b"x" * GRAIN)
    model.complete(start(model, Kind.READ), b"x" * GRAIN)
    with pytest.raises(Mismatch):
        model.complete(start(model, Kind.READ), bytes(GRAIN))


def test_a_completed_write_is_read() -> None:
    model = make()
    write = done(model, Kind.WRITE)
    reads(model, start(model, Kind.READ), write.tag)
    with pytest.raises(Mismatch, match="reads zeroes"):
        reads(model, start(model, Kind.READ), ZERO_TAG)


def test_data_of_another_place_is_found_out() -> None:
    model = make()
    write = done(model, Kind.WRITE, grain=1)
    with pytest.raises(Mismatch, match="of grain 1"):
        model.complete(start(model, Kind.READ), model.content(write.tag, 1))


def test_a_read_during_a_write_sees_either_or_a_mixture() -> None:
    model = make()
    old = done(model, Kind.WRITE)
    early = [start(model, Kind.READ) for _ in range(3)]
    write = start(model, Kind.WRITE)
    late = start(model, Kind.READ)
    model.complete(write)
    reads(model, early[0], old.tag)
    reads(model, early[1], write.tag)
    half = GRAIN // 2
    model.complete(early[2], model.content(old.tag, 0)[:half] + model.content(write.tag, 0)[half:])
    reads(model, late, old.tag)
    with pytest.raises(Mismatch):
        reads(model, start(model, Kind.READ), old.tag)


def test_overlapping_writes_leave_either() -> None:
    model = make()
    first, second = start(model, Kind.WRITE), start(model, Kind.WRITE)
    model.complete(second)
    model.complete(first)
    assert may_read(model, first.tag, second.tag, ZERO_TAG) == {first.tag, second.tag}


def test_a_later_write_wins() -> None:
    model = make()
    first = done(model, Kind.WRITE)
    second = done(model, Kind.WRITE)
    assert may_read(model, first.tag, second.tag) == {second.tag}


def test_what_a_quiet_read_saw_is_there_to_stay() -> None:
    model = make()
    first, second = start(model, Kind.WRITE), start(model, Kind.WRITE)
    model.complete(first)
    model.complete(second)
    reads(model, start(model, Kind.READ), first.tag)
    with pytest.raises(Mismatch):
        reads(model, start(model, Kind.READ), second.tag)


def test_a_trim_leaves_old_or_zero() -> None:
    model = make()
    write = done(model, Kind.WRITE)
    done(model, Kind.TRIM)
    assert may_read(model, write.tag, ZERO_TAG) == {write.tag, ZERO_TAG}


def test_a_failed_write_may_have_happened() -> None:
    model = make()
    old = done(model, Kind.WRITE)
    failed = start(model, Kind.WRITE)
    model.fail(failed)
    assert may_read(model, old.tag, failed.tag) == {old.tag, failed.tag}


def test_status_may_not_call_data_zero() -> None:
    model = make()
    done(model, Kind.WRITE, grain=1)
    status = model.submit(Kind.STATUS, 0, 2 * GRAIN)
    model.complete_status(status, [(GRAIN, True), (GRAIN, False)])
    status = model.submit(Kind.STATUS, 0, 2 * GRAIN)
    with pytest.raises(Mismatch, match="said to be zero"):
        model.complete_status(status, [(2 * GRAIN, True)])


def test_status_during_a_zero_may_say_either() -> None:
    model = make()
    done(model, Kind.WRITE)
    status = start(model, Kind.STATUS)
    zero = start(model, Kind.ZERO)
    model.complete_status(status, [(GRAIN, True)])
    model.complete(zero)


def test_a_crash_loses_what_was_not_flushed() -> None:
    model = make()
    write = done(model, Kind.WRITE)
    assert model.allowed_after_crash(0) == {ZERO_TAG, write.tag}


def test_a_crash_keeps_what_was_flushed() -> None:
    model = make()
    write = done(model, Kind.WRITE)
    done(model, Kind.FLUSH)
    assert model.allowed_after_crash(0) == {write.tag}
    later = done(model, Kind.WRITE)
    assert model.allowed_after_crash(0) == {write.tag, later.tag}


def test_a_flush_covers_only_what_had_completed() -> None:
    model = make()
    write = start(model, Kind.WRITE)
    flush = start(model, Kind.FLUSH)
    model.complete(write)
    model.complete(flush)
    assert model.allowed_after_crash(0) == {ZERO_TAG, write.tag}


def test_an_unanswered_flush_covers_nothing() -> None:
    model = make()
    write = done(model, Kind.WRITE)
    start(model, Kind.FLUSH)
    assert model.allowed_after_crash(0) == {ZERO_TAG, write.tag}


def test_fua_is_durable_by_itself() -> None:
    model = make()
    old = done(model, Kind.WRITE)
    write = done(model, Kind.WRITE, fua=True)
    assert model.allowed_after_crash(0) == {write.tag}
    assert old.tag not in model.allowed_after_crash(0)


def test_a_crash_in_the_past_knows_only_what_was_acknowledged_then() -> None:
    model = make()
    first = done(model, Kind.WRITE)
    before = model.now
    done(model, Kind.FLUSH)
    second = done(model, Kind.WRITE, fua=True)
    assert model.allowed_after_crash(0, before) == {ZERO_TAG, first.tag, second.tag}
    assert model.allowed_after_crash(0) == {second.tag}


def test_after_a_crash_the_disk_is_what_it_is() -> None:
    model = make(1)
    write = done(model, Kind.WRITE)
    start(model, Kind.WRITE)
    model.recover(model.content(write.tag, 0))
    assert model.quiescent
    assert model.allowed_after_crash(0) == {write.tag}
    with pytest.raises(Mismatch):
        model.recover(bytes(GRAIN))
