"""The parts of the qcow2 layer that can be held to a simple model by themselves."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.ondisk.qcow2 import COMPRESSED, COPIED, ZERO
from layers.qcow2 import freespace
from layers.qcow2.cache import Cache, Table
from layers.qcow2.clusters import BadEntry, Geometry, Kind
from layers.qcow2.freespace import FreeRuns
from layers.qcow2.occupied import Occupied
from layers.qcow2.order import _common, _joined, counted
from layers.qcow2.refcounts import _Width
from tests.serving import SEED


def test_free_runs_are_a_set_that_gives_its_lowest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freespace, "FREE_RUNS_COUNT_MAX", 20)
    pick, runs, model = random.Random(SEED), FreeRuns(), set[int]()
    for _ in range(5000):
        if pick.random() < 0.6:
            start, count = pick.randrange(400), pick.randint(1, 4)
            if model.isdisjoint(range(start, start + count)):
                model.update(range(start, start + count))
                forgotten = runs.add(start, count)
                if forgotten is not None:
                    model = {cluster for cluster in model if cluster < forgotten}
        elif pick.random() < 0.2:
            wanted = pick.randint(1, 6)
            first = runs.take_whole(wanted)
            rows = (start for start in sorted(model) if model.issuperset(range(start, start + wanted)))
            assert first == next(rows, None)
            if first is not None:
                model.difference_update(range(first, first + wanted))
        else:
            wanted = pick.randint(1, 6)
            taken = runs.take(wanted)
            if taken is None:
                assert not model
                continue
            start, count = taken
            assert start == min(model) and 1 <= count <= wanted
            assert count == wanted or start + count not in model
            model.difference_update(range(start, start + count))


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_every_width(order: int) -> None:
    pick, geometry = random.Random(SEED), Geometry(9, order, has_zero=True)
    width, count, largest = _Width(geometry), geometry.block_entries, (1 << (1 << order)) - 1
    table = Table.parse(0, bytes(512), width.typecode)
    model = [0] * count
    for _ in range(300):
        start = pick.randrange(count)
        length = pick.randint(1, min(count - start, 80))
        value = pick.choice((0, 1, largest))
        first, stop = width.fill(table.entries, start, length, value)
        assert first <= start * len(table.entries) // count and stop * count // len(table.entries) >= start + length
        model[start : start + length] = [value] * length
        at = pick.randrange(count)
        assert width.get(table.entries, at) == model[at]
        assert width.find_free(table.entries, at) == next((i for i in range(at, count) if not model[i]), count)
        limit = pick.randint(1, count - at)
        same = next((i for i in range(at, at + limit) if model[i] != model[at]), at + limit) - at
        assert width.run(table.entries, at, limit) == same
        assert width.count_used(table.entries, at) == sum(map(bool, model[:at]))
        assert width.count_used(table.entries, count) == sum(map(bool, model))
        assert width.used_end(table.entries) == max((i + 1 for i in range(count) if model[i]), default=0)
        part = model[start : start + length]
        assert width.bounds(table.entries, start, length) == (min(part), max(part))
        times = pick.choice((-min(part), largest - max(part), pick.randint(-min(part), largest - max(part))))
        first, stop = width.add(table.entries, start, length, times)
        assert first <= start * len(table.entries) // count and stop * count // len(table.entries) >= start + length
        model[start : start + length] = [value + times for value in part]
        assert [width.get(table.entries, i) for i in range(start, start + length)] == model[start : start + length]
    # As the specification lays them out: big-endian, and within a byte the lowest bits first.
    table.mark(0, len(table.entries))
    (write,) = table.encode(table.changed)
    bits = 1 << order
    if bits >= 8:
        laid_out = b"".join(value.to_bytes(bits // 8, "big") for value in model)
    else:
        laid_out = sum(value << (index * bits) for index, value in enumerate(model)).to_bytes(512, "little")
    assert write.data == laid_out


@given(st.sets(st.integers(0, 300), max_size=60), st.integers(0, 300), st.integers(1, 50))
def test_occupied(clusters: set[int], start: int, count: int) -> None:
    occupied = Occupied()
    assert occupied.fill(list(clusters)) is None
    assert occupied.overlaps(start, count) == (not clusters.isdisjoint(range(start, start + count)))
    occupied.remove(start, count)
    assert not occupied.overlaps(start, count)
    occupied.add(start, count)
    assert all(occupied.overlaps(cluster) for cluster in range(start, start + count))


def test_occupied_finds_what_is_twice() -> None:
    assert Occupied().fill([5, 1, 9, 1]) == 1


RUNS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda run: (run[0], run[0] + run[1])), max_size=8
)


@given(RUNS, RUNS)
def test_arithmetic_of_runs(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    def clusters(runs: list[tuple[int, int]]) -> set[int]:
        return {cluster for start, stop in runs for cluster in range(start, stop)}

    assert clusters(list(_joined(some))) == clusters(some)
    assert clusters(list(_common(_joined(some), _joined(others)))) == clusters(some) & clusters(others)
    found = {cluster: times for start, stop, times in counted(some) for cluster in range(start, stop)}
    assert found == {c: sum(start <= c < stop for start, stop in some) for c in clusters(some)}


@given(st.integers(0, (1 << 64) - 1), st.integers(9, 21), st.booleans())
def test_every_entry_is_something_or_refused(entry: int, cluster_bits: int, has_zero: bool) -> None:
    geometry = Geometry(cluster_bits, 4, has_zero=has_zero)
    try:
        kind = geometry.kind(entry)
    except BadEntry:
        return
    assert (kind is Kind.COMPRESSED) == bool(entry & COMPRESSED)
    if kind is Kind.COMPRESSED:
        offset, length = geometry.compressed(entry)
        assert 0 < length <= 2 * geometry.cluster_size and offset < 1 << 56
    else:
        assert (kind in (Kind.ZERO, Kind.ZERO_ALLOCATED)) == bool(entry & ZERO)


def test_runs_of_entries() -> None:
    geometry = Geometry(12, 4, has_zero=True)
    entries = array(
        "Q", [0, 0, ZERO, COPIED | 0x5000, COPIED | 0x6000, 0x7000, COPIED | 0x9000, COMPRESSED, COMPRESSED]
    )
    starts, at = [], 0
    while at < len(entries):
        starts.append(at)
        at += geometry.run_length(entries, at)
    assert starts == [0, 2, 3, 5, 6, 7, 8]


def test_a_cache_keeps_what_has_changed_and_drops_what_was_used_least() -> None:
    loads: list[int] = []

    def load(number: int) -> Table:
        loads.append(number)
        return Table(number, array("Q", [number]))

    cache = Cache(4)
    for number in (1, 2, 3, 4, 1, 5):
        assert cache.get(number, load).place == number
    cache.get(1, load)
    assert loads == [1, 2, 3, 4, 5]
    cache.get(2, load)
    assert loads[5:] == [2], "the least recently used"
    for number in range(10, 20):
        table = cache.get(number, load)
        table.mark(0)
        cache.change(number, table)
    loads.clear()
    assert cache.crowded and len(list(cache.changed())) == 10
    assert all(cache.get(number, load).place == number for number in range(10, 20)) and not loads
    for table in list(cache.changed()):
        table.changed = set()
    cache.settle()
    assert cache.is_clean and not cache.crowded
    assert [cache.get(number, load).place for number in range(16, 20)] == [16, 17, 18, 19] and not loads


def test_only_changed_sectors_are_written() -> None:
    table = Table(4096, array("Q", range(8192)))
    table.mark(0)
    table.mark(63, 2)  # the first sector and the second
    table.mark(8191)
    writes = list(table.encode(table.changed))
    assert [(write.offset, len(write.data)) for write in writes] == [(4096, 1024), (4096 + 65536 - 512, 512)]
    assert writes[0].data[-8:] == (127).to_bytes(8, "big")
