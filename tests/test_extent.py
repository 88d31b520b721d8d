"""Extents: the law, and cutting."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.memory import Memory
from nbdserver.extent import CODE, ZERO, Extent, ExtentLawError, clip, lawful

CHILD = Memory(1000)


def check(*extents: Extent, offset: int = 10, length: int = 20, size: int = 100) -> list[Extent]:
    return list(lawful(extents, offset, length, size, "test"))


def test_a_lawful_answer_is_passed_on_as_it_is() -> None:
    answer = [Extent(5, ZERO), Extent(15, CHILD, 7, True), Extent(70, CODE)]
    assert check(*answer) == answer


@pytest.mark.parametrize("length", [0, -1])
def test_an_extent_has_a_length(length: int) -> None:
    with pytest.raises(ExtentLawError, match=f"test: extent of length {length} at 0xa"):
        check(Extent(length, ZERO), Extent(20, ZERO))


def test_an_extent_ends_within_the_disk() -> None:
    with pytest.raises(ExtentLawError, match="ends at 0x65, past the size 0x64"):
        check(Extent(91, ZERO))


def test_an_extent_aims_at_no_negative_offset() -> None:
    with pytest.raises(ExtentLawError, match="has offset -1"):
        check(Extent(20, CHILD, -1))


@pytest.mark.parametrize("answer", [(), (Extent(19, ZERO),)])
def test_an_answer_is_as_long_as_was_asked(answer: tuple[Extent, ...]) -> None:
    with pytest.raises(ExtentLawError, match="asked up to 0x1e"):
        check(*answer)


def test_an_answer_to_nothing_may_be_empty() -> None:
    assert check(length=0) == []


def test_what_is_not_consumed_is_not_checked() -> None:
    endless = (Extent(1, ZERO) for _ in itertools.count())
    assert len(list(itertools.islice(lawful(endless, 0, 5, 100, "test"), 5))) == 5


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from([ZERO, CODE, CHILD])), min_size=1), st.data())
def test_clip_keeps_the_first_bytes_and_nothing_else(parts: list[tuple[int, Memory]], data: st.DataObject) -> None:
    starts = itertools.accumulate((length for length, _ in parts), initial=0)
    answer = [
        Extent(length, target, start if target is CHILD else 0)
        for (length, target), start in zip(parts, starts, strict=False)
    ]
    total = sum(length for length, _ in parts)
    length = data.draw(st.integers(1, total))
    clipped = list(clip(answer, length))
    assert sum(extent.length for extent in clipped) == length
    assert clipped[:-1] == answer[: len(clipped) - 1]
    last = answer[len(clipped) - 1]
    assert clipped[-1] == last.cut(0, clipped[-1].length)


def test_cutting_moves_a_place_and_no_other() -> None:
    assert Extent(10, CHILD, 100, True).cut(3, 4) == Extent(4, CHILD, 103, True)
    assert Extent(10, ZERO).cut(3, 4) == Extent(4, ZERO)
    assert Extent(10, CODE).cut(3, 4) == Extent(4, CODE)
