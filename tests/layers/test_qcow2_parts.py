"""The parts of the qcow2 layer that can be held to a simple model by themselves."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.ondisk.qcow2 import ALLOCATED_ALL, COMPRESSED, COPIED, ZERO, ZERO_ALL
from layers.qcow2 import freespace
from layers.qcow2.cache import Cache, Table
from layers.qcow2.clusters import BadEntry, Geometry, Kind
from layers.qcow2.freespace import FreeRuns
from layers.qcow2.intervals import common, counted, joined, without
from layers.qcow2.occupied import Occupied
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

    assert clusters(list(joined(some))) == clusters(some)
    assert clusters(list(common(joined(some), joined(others)))) == clusters(some) & clusters(others)
    assert clusters(list(without(joined(some), joined(others)))) == clusters(some) - clusters(others)
    found = {cluster: times for start, stop, times in counted(some) for cluster in range(start, stop)}
    assert found == {c: sum(start <= c < stop for start, stop in some) for c in clusters(some)}


@given(st.integers(0, (1 << 64) - 1), st.integers(9, 21), st.booleans(), st.booleans())
def test_every_entry_is_something_or_refused(
    entry: int, cluster_bits: int, has_zero: bool, has_data_file: bool
) -> None:
    geometry = Geometry(cluster_bits, 4, has_zero=has_zero, has_data_file=has_data_file)
    try:
        (run,) = geometry.runs(array("Q", [entry]), 5, True)
    except BadEntry:
        return
    assert (run.start, run.end) == (5 << cluster_bits, 6 << cluster_bits)
    assert (run.kind is Kind.COMPRESSED) == bool(entry & COMPRESSED)
    if run.kind is Kind.COMPRESSED:
        offset, length = geometry.compressed(entry)
        assert 0 < length <= 2 * geometry.cluster_size and offset < 1 << 56
    else:
        assert (run.kind is Kind.ZERO) == bool(entry & ZERO)
        assert run.place is None or not has_data_file or run.place == run.start


def _starts(geometry: Geometry, words: list[int], cluster: int = 0) -> list[int]:
    runs = list(geometry.runs(array("Q", words), cluster, True))
    assert all(before.end == after.start for before, after in pairwise(runs))
    assert runs[-1].end == (cluster + len(words) // geometry.entry_words) * geometry.cluster_size
    return [run.start // geometry.subcluster_size for run in runs]


def test_runs_of_entries() -> None:
    geometry = Geometry(12, 4, has_zero=True)
    entries = [0, 0, ZERO, COPIED | 0x5000, COPIED | 0x6000, 0x7000, COPIED | 0x9000, COMPRESSED, COMPRESSED]
    assert _starts(geometry, entries) == [0, 2, 3, 5, 6, 7, 8]


def test_runs_of_extended_entries() -> None:
    geometry = Geometry(14, 4, has_zero=True, extended=True)
    words = [
        *(0, 0), *(0, 0), *(0, ZERO_ALL), *(COMPRESSED, 0),
        *(COPIED | 0x4000, ALLOCATED_ALL), *(COPIED | 0x8000, ALLOCATED_ALL), *(COPIED | 0xC000, 0b110 | 1 << 35),
        *(COPIED | 0x10000, ZERO_ALL), *(COPIED | 0x14000, ZERO_ALL), *(COPIED | 0x1C000, ZERO_ALL),
    ]  # fmt: skip
    mixed = 6 * 32
    assert _starts(geometry, words) == [0, 64, 96, 128, mixed, mixed + 1, mixed + 3, mixed + 4, 224, 288]


def test_the_first_cluster_of_a_data_file_is_at_0() -> None:
    geometry = Geometry(16, 4, has_zero=True, has_data_file=True)
    assert _starts(geometry, [COPIED, COPIED | 0x10000, COPIED | 0x20000, 0]) == [0, 3]
    run, *_ = geometry.runs(array("Q", [COPIED]), 0, True)
    assert (run.kind, run.place, run.copied) == (Kind.NORMAL, 0, True)
    with pytest.raises(BadEntry, match="external data file"):
        list(geometry.runs(array("Q", [COPIED]), 1, True))


STATES = st.lists(st.sampled_from(["unallocated", "zero", "normal"]), min_size=64, max_size=64)


def _extended(states: list[str], places: list[int]) -> array[int]:
    words = []
    for index, place in enumerate(places):
        part = states[index * 32 : (index + 1) * 32]
        allocated = sum(1 << at for at, state in enumerate(part) if state == "normal")
        zero = sum(1 << 32 + at for at, state in enumerate(part) if state == "zero")
        words += [COPIED | place if place else 0, allocated | zero if place else zero]
    return array("Q", words)


def _states(geometry: Geometry, words: array[int]) -> list[str]:
    return [
        run.kind.value
        for run in geometry.runs(words, 0, True)
        for _ in range((run.end - run.start) // geometry.subcluster_size)
    ]


@given(STATES, st.sampled_from([(0, 0), (0x4000, 0x8000), (0x4000, 0)]), st.integers(0, 63), st.integers(1, 64))
def test_subclusters_that_are_linked_and_zeroed(states: list[str], places: tuple[int, int], at: int, to: int) -> None:
    """Against lists of words for each subcluster."""
    geometry = Geometry(14, 4, has_zero=True, extended=True)
    at = min(at, to - 1)
    words = _extended(states, list(places))
    states = [
        state if places[index // 32] or state != "normal" else "unallocated" for index, state in enumerate(states)
    ]
    assert _states(geometry, words) == states
    touched = slice(at // 32 * 2, -(-to // 32) * 2)

    def changed(part: array[int]) -> array[int]:
        return words[: touched.start] + part + words[touched.stop :]

    start, end = at * 512, to * 512
    zeroed = changed(geometry.zeroed(words[touched], start, end, unmap=False))
    assert _states(geometry, zeroed) == states[:at] + ["zero"] * (to - at) + states[to:]
    assert list(zeroed[::2]) == list(words[::2])
    freed = changed(geometry.zeroed(words[touched], start, end, unmap=True))
    assert _states(geometry, freed) == _states(geometry, zeroed)
    for index in range(2):
        is_whole = at <= index * 32 and to >= (index + 1) * 32
        assert freed[2 * index] == (0 if is_whole else words[2 * index])
    if places != (0x4000, 0):  # kept, or new: both clusters continue each other
        place = (places[0] or 0x4000) + start
        linked = changed(geometry.linked(words[touched], start, end, place))
        assert _states(geometry, linked) == states[:at] + ["normal"] * (to - at) + states[to:]


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


@pytest.mark.parametrize("entry", [0, 1, 3])
def test_runs_of_equal_entries_are_counted(entry: int) -> None:
    geometry = Geometry(16, 4, has_zero=True)
    for length in (*range(1, 70), 100, 1023, 1024, 8000):
        same = array("Q", [entry]) * length
        for behind in ([], [9], [9, entry], [entry ^ 1] + [entry] * 100):
            assert geometry.run_length(array("Q", [5]) + same + array("Q", behind), 1) == length
