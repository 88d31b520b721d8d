"""Requests and vectors: above all that REGISTERED_BUF is true whatever is done to a request."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nbdserver.request import NO_VECTOR, Flag, Memory, Operation, Registration, Request, Segment, Vector


class Slot:
    """A pool's slot, as the engine has them: registered until it is let go of."""

    def __init__(self, length: int) -> None:
        self.view = memoryview(bytearray(length))
        self.registration: Registration | None = Registration(0, id(self), 1)


def is_registered(vector: Vector) -> bool:
    """The law, said another way: by looking each segment's memory up."""
    live = [isinstance(segment.buffer, Slot) and segment.buffer.registration is not None for segment in vector.segments]
    return len(live) > 0 and False not in live


class Requests(RuleBasedStateMachine):
    """Any sequence of derivations, with slots dying in between, keeps the flag what the vector earns."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = [Slot(64), Slot(64)]
        vector = Vector([Segment(self.slots[0], 0, 64), Segment(self.slots[1], 8, 40)])
        self.requests = [Request.read(100, vector)]

    @rule(start=st.integers(0, 104), length=st.integers(0, 104))
    def slice(self, start: int, length: int) -> None:
        last = self.requests[-1]
        start = min(start, last.length)
        self.requests.append(last.slice(start, min(length, last.length - start)))

    @rule(offset=st.integers(0, 1 << 62))
    def move(self, offset: int) -> None:
        self.requests.append(self.requests[-1].moved(offset))

    @rule(flags=st.integers(0, 0xFFF))
    def ask_for_flags(self, flags: int) -> None:
        self.requests.append(self.requests[-1].with_flags(Flag(flags)))

    @rule(in_slot=st.booleans())
    def replace_the_vector(self, in_slot: bool) -> None:
        length = self.requests[-1].length
        if in_slot:
            self.slots.append(Slot(length))
            vector = Vector([Segment(self.slots[-1], 0, length)])
        else:
            vector = Vector.of(length)
        self.requests.append(self.requests[-1].with_vector(vector))

    @rule(index=st.integers(0, 100), data=st.booleans())
    def pad(self, index: int, data: bool) -> None:
        slot = self.slots[index % len(self.slots)]
        padding = Vector.of(4) if data else Vector([Segment(slot, 0, min(4, len(slot.view)))])
        self.requests.append(Request.write(0, self.requests[-1].vector + padding))

    @rule(index=st.integers(0, 100))
    def lose_a_slot(self, index: int) -> None:
        self.slots[index % len(self.slots)].registration = None

    @invariant()
    def flags_tell_the_truth(self) -> None:
        for request in self.requests:
            assert bool(request.flags & Flag.REGISTERED_BUF) == is_registered(request.vector)
            assert request.flags & ~Flag.REGISTERED_BUF == request.asked_flags


TestRequests = Requests.TestCase


def test_the_flag_has_no_setter() -> None:
    request = Request.read(0, Vector.of(4))
    with pytest.raises((AttributeError, TypeError)):  # TypeError: Python 3.11, of frozen classes with slots
        request.flags = Flag.REGISTERED_BUF  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.asked_flags = Flag.REGISTERED_BUF  # type: ignore[misc]
    with pytest.raises(AttributeError):
        request.vector.registered = True  # type: ignore[misc]


def test_the_flag_cannot_be_forged() -> None:
    with pytest.raises(AssertionError):
        Request.read(0, Vector.of(4), Flag.REGISTERED_BUF)
    assert not Request.read(0, Vector.of(4)).with_flags(Flag.REGISTERED_BUF).flags


def test_a_slot_that_is_lost_takes_the_flag_with_it() -> None:
    slot = Slot(8)
    request = Request.read(0, Vector([Segment(slot, 0, 8)])).slice(2, 4).moved(7)
    assert Flag.REGISTERED_BUF in request.flags
    slot.registration = None
    assert Flag.REGISTERED_BUF not in request.flags


def test_requests_without_memory_are_not_registered() -> None:
    assert Request.zero(0, 10).flags == Flag.NONE
    assert not NO_VECTOR.registered


@given(st.lists(st.binary(max_size=9), max_size=8), st.data())
def test_slices_of_vectors_are_slices_of_bytes(parts: list[bytes], data: st.DataObject) -> None:
    content = b"".join(parts)
    vector = Vector(Segment(Memory(part), 0, len(part)) for part in parts)
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, len(content) - start))
    assert vector.slice(start, length).tobytes() == content[start : start + length]
    assert vector.slice(start, length).length == length


def test_slices_are_the_same_memory() -> None:
    target = bytearray(10)
    Vector.of(target).slice(2, 6).slice(1, 3).fill(b"abc")
    assert target == b"\0\0\0abc\0\0\0\0"


@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(1, 200))
def test_the_difference_of_vectors_is_the_first_byte_that_differs(one: bytes, other: bytes, cut: int) -> None:
    length = min(len(one), len(other))
    here, there = Vector.of(one).slice(0, length), Vector.of(other[:cut][:length]) + Vector.of(other[:length][cut:])
    differing = [at for at in range(length) if one[at] != other[at]]
    assert here.difference(there) == (differing[0] if differing else None)
    assert here.difference(Vector.of(one[:length])) is None


@pytest.mark.parametrize("at", [0, 65_535, 65_536, 199_999])
def test_differences_and_zeroes_in_long_vectors(at: int) -> None:
    data = bytearray(200_000)
    zeroes, vector = Vector.of(200_000), Vector.of(data).slice(0, 70_000) + Vector.of(memoryview(data)[70_000:])
    assert vector.is_zero() and zeroes.difference(vector) is None
    data[at] = 1
    assert not vector.is_zero() and zeroes.difference(vector) == at


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 25])
def test_pieces_of_a_request(length: int) -> None:
    request = Request.write(100, Vector.of(bytes(range(length))))
    pieces = list(request.pieces(10))
    assert [piece.length for piece in pieces] == [10] * (length // 10) + [length % 10] * (length % 10 > 0)
    assert b"".join(piece.vector.tobytes() for piece in pieces) == bytes(range(length))
    assert [piece.offset for piece in pieces] == list(range(100, 100 + length, 10))


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 5), (5, 0), (0, -1)])
def test_slices_out_of_bounds_are_our_bugs(start: int, length: int) -> None:
    with pytest.raises(AssertionError):
        Vector.of(4).slice(start, length)


def test_a_vector_must_be_as_long_as_its_request() -> None:
    with pytest.raises(AssertionError):
        Request(Operation.READ, 0, 5, Vector.of(4))
    with pytest.raises(AssertionError):
        Request.read(0, Vector.of(4)).with_vector(Vector.of(5))
    with pytest.raises(AssertionError):
        Request(Operation.ZERO, 0, 4, Vector.of(4))


def test_a_slice_of_a_request() -> None:
    part = Request.write(100, Vector.of(b"abcdef"), Flag.FUA).slice(2, 3)
    assert (part.operation, part.offset, part.end, part.asked_flags) == (Operation.WRITE, 102, 105, Flag.FUA)
    assert part.vector.tobytes() == b"cde"
    assert Request.zero(100, 10).slice(2, 3) == Request.zero(102, 3)
