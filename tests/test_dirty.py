"""Dirty bitmaps and logs, the engine's and those in plain Python: held to one model, a list of bools."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from nbdserver import _engine, dirty
from nbdserver.extent import DirtyBitmap, DirtyLog
from nbdserver.server import Server, Supplies
from tests.serving import SEED, amount

MAKERS: dict[str, Callable[[int, int], DirtyBitmap]] = {"engine": _engine.DirtyBitmap, "python": dirty.Bitmap}

make = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

Maker = Callable[[int, int], DirtyBitmap]


def bits(bitmap: DirtyBitmap) -> list[bool]:
    """Every bit, as `DirtyBitmap.data` has it."""
    count = -(-bitmap.size // bitmap.granularity)
    data = bitmap.data(0, -(-count // 64) * 8)
    found = [bool(data[bit // 8] >> bit % 8 & 1) for bit in range(len(data) * 8)]
    assert not any(found[count:]), "there are zeroes behind the last bit"
    return found[:count]


def check_runs(bitmap: DirtyBitmap, model: list[bool], pick: random.Random) -> None:
    offset, length = pick.randrange(bitmap.size + 100), pick.randrange(1, bitmap.size)
    count_max = pick.choice((1, 2, 3, 1000))
    runs = bitmap.runs(offset, length, count_max)
    at = offset
    for run, is_dirty in runs:
        assert run > 0
        for byte in {at, at + run - 1, *range(at, at + run, bitmap.granularity)}:
            assert is_dirty == (byte < bitmap.size and model[byte // bitmap.granularity])
        at += run
    assert at == offset + length or (len(runs) == count_max and at < offset + length)
    assert all(one[1] != other[1] for one, other in itertools.pairwise(runs))


@make
@pytest.mark.parametrize("seed", range(4))
def test_a_bitmap_is_a_list_of_bits(make: Maker, seed: int) -> None:
    pick = random.Random(f"{SEED} {seed}")
    granularity = pick.choice((1, 8, 512))
    size = pick.randrange(1, 80_000) * granularity // 2 + 1
    bitmap, model = make(size, granularity), [False] * -(-size // granularity)
    for _ in range(amount(25, 200)):
        offset, length = pick.randrange(size), pick.choice((1, granularity, pick.randrange(1, size + 1)))
        choice = pick.random()
        if choice < 0.5:
            bitmap.mark(offset, length)
            first, last = offset // granularity, (offset + length - 1) // granularity
            model[first : last + 1] = [True] * (min(last + 1, len(model)) - first)
        elif choice < 0.6:
            size = pick.randrange(1, 80_000) * granularity // 2 + 1
            bitmap.resize(size)
            count = -(-size // granularity)
            model = model[:count] + [False] * (count - len(model))
        elif choice < 0.65:
            bitmap.clear()
            model = [False] * len(model)
        elif choice < 0.8:
            start, data = pick.randrange(len(model)) // 64 * 8, pick.randbytes(pick.randrange(1, 100) * 8)
            bitmap.load(start, data)
            for index in range(start * 8, min(start * 8 + len(data) * 8, len(model))):
                model[index] = model[index] or bool(data[index // 8 - start] >> index % 8 & 1)
        else:
            other = make(size, granularity * pick.choice((1, 2, 64)))
            other.mark(offset, pick.randrange(1, 20 * granularity))
            for at in range(0, size, granularity):
                if any(is_dirty for _, is_dirty in other.runs(at, granularity, 2)):
                    model[at // granularity] = True
            bitmap.merge(other)
        assert bitmap.size == size
        assert bitmap.count() == sum(model)
        assert bits(bitmap) == model
        check_runs(bitmap, model, pick)


@make
def test_a_finer_bitmap_merges_into_a_coarser_one_and_the_other_way_round(make: Maker) -> None:
    fine, coarse = make(1 << 20, 512), make(1 << 20, 65536)
    fine.mark(65536 * 3 + 512, 1)
    coarse.merge(fine)
    assert coarse.runs(0, 1 << 20, 9) == [(65536 * 3, False), (65536, True), (65536 * 12, False)]
    other = make(1 << 20, 512)
    other.merge(coarse)
    assert other.runs(0, 1 << 20, 9) == coarse.runs(0, 1 << 20, 9)
    other.merge(other)
    assert other.count() == 128


@make
def test_the_whole_of_a_large_disk_is_marked_at_once(make: Maker) -> None:
    bitmap = make(64 << 40, 65536)
    bitmap.mark(0, 64 << 40)
    assert bitmap.count() == 1 << 30
    assert bitmap.runs(4096, 1 << 50, 9) == [((64 << 40) - 4096, True), ((1 << 50) - (64 << 40) + 4096, False)]
    assert bitmap.data(1 << 20, 64) == b"\xff" * 64


def test_logs_mark_in_the_bitmaps_that_they_are_given() -> None:
    logs: list[tuple[Maker, DirtyLog]] = [(dirty.Bitmap, dirty.Log())]
    logs.append((_engine.DirtyBitmap, Supplies(Server(workers=1, pool=32 << 20)._engine).dirty_log()))
    for make, log in logs:
        one, other = make(1 << 20, 512), make(1 << 20, 4096)
        log.mark(0, 1)
        log.set([one, other])
        log.mark(8191, 2)
        log.set([other])
        log.mark(0, 1)
        assert one.runs(0, 1 << 20, 2) == [(7680, False), (1024, True)]
        assert other.runs(0, 1 << 20, 9)[:2] == [(12288, True), ((1 << 20) - 12288, False)]


def test_a_granularity_is_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        _engine.DirtyBitmap(1 << 20, 3000)
    with pytest.raises(ValueError, match="multiple of 8"):
        _engine.DirtyBitmap(1 << 20, 512).data(4, 8)
