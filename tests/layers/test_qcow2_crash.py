"""A crash at any instant, with any order and loss of what was not synced: the image is sound, flushed data is there.

Every state goes through the checker and reader in `qcow2_check`, a sample of them through ``qemu-img check`` too.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from layers.compress import Compress
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Flag
from tests.layers.qcow2_check import check, read
from tests.layers.qcow2_kit import SECTOR, Drive, History, crash_states, crash_states_of, open_recorded, stamp
from tests.serving import SEED, amount, create, qemu_io, run
from tests.serving import check as qemu_check

KIB = 1024

#: Where the header names the refcount table.
REFCOUNT_TABLE_AT = 48


@dataclass
class Scenario:
    name: str
    cluster: int
    size: int
    options: dict[str, object] = field(default_factory=dict)
    #: qemu-io commands that come first, and whether a snapshot is taken then, and a backing file of this size.
    before: tuple[str, ...] = ()
    snapshot: bool = False
    backing: int = 0
    #: Compress the content of ``before``.
    compress: bool = False
    #: Whether there is an external data file; "raw": that is to be a raw image.
    data_file: bool | str = False
    layer: dict[str, object] = field(default_factory=dict)
    steps: int = 60
    states: int = 200
    longest: int = 8
    #: Whether the refcount table is relocated.
    grows: bool = False
    #: Whether half of the writes are compressed.
    compresses: bool = False


EXTENDED: dict[str, object] = {"extended_l2": "on"}
BEFORE = ("write -P 1 0 40k", "write -P 2 64k 33k")

SCENARIOS = [
    Scenario("small clusters", 512, 128 * KIB),
    Scenario("4k clusters", 4096, 256 * KIB),
    Scenario("64k clusters", 65536, 1024 * KIB, states=100, longest=3),
    Scenario("version 2", 512, 128 * KIB, {"compat": "0.10"}),
    Scenario("narrow refcounts", 1024, 128 * KIB, {"refcount_bits": 1}),
    Scenario("many refcount blocks", 512, 256 * KIB, {"refcount_bits": 64}),
    Scenario(
        "growing refcount table", 512, 3584 * KIB, {"refcount_bits": 64}, ("write -P 1 0 1960k",),
        steps=30, states=60, longest=400, grows=True,
    ),
    Scenario("snapshot", 512, 128 * KIB, before=("write -P 1 0 40k", "write -P 2 64k 33k"), snapshot=True),
    Scenario("snapshot, 4k", 4096, 256 * KIB, before=("write -P 1 0 200k",), snapshot=True),
    Scenario("backing file", 1024, 128 * KIB, backing=99 * KIB + 512),
    Scenario("compressed", 1024, 128 * KIB, before=("write -P 1 0 40k", "write -P 2 64k 33k"), compress=True),
    Scenario("compressing", 1024, 128 * KIB, compresses=True, longest=3),
    Scenario("compressing, 4k", 4096, 256 * KIB, before=BEFORE, compress=True, compresses=True, longest=3),
    Scenario("compressing, snapshot", 1024, 128 * KIB, before=BEFORE, snapshot=True, compresses=True),
    Scenario(
        "compressing, zstd, subclusters", 16 * KIB, 256 * KIB, {**EXTENDED, "compression_type": "zstd"},
        compresses=True, longest=3, states=100,
    ),
    Scenario(
        "compressing, narrow refcounts", 2048, 128 * KIB, {"refcount_bits": 2}, compresses=True,
        layer={"pass_discard_other": True, "l2_cache_size": 0},
    ),
    Scenario("preallocated", 1024, 128 * KIB, {"preallocation": "metadata"}),
    Scenario("little cache", 512, 256 * KIB, layer={"l2_cache_size": 0, "refcount_cache_size": 0}),
    Scenario("all discarded", 1024, 128 * KIB, layer={"pass_discard_other": True}),
    Scenario("subclusters", 16 * KIB, 400 * KIB, EXTENDED, longest=3, states=100),
    Scenario("subclusters, backing", 16 * KIB, 400 * KIB, EXTENDED, backing=299 * KIB + 512, longest=3, states=100),
    Scenario("subclusters, snapshot", 16 * KIB, 256 * KIB, EXTENDED, BEFORE, snapshot=True, longest=3, states=100),
    Scenario("subclusters, compressed", 16 * KIB, 256 * KIB, EXTENDED, BEFORE, compress=True, longest=3, states=100),
    Scenario("data file", 1024, 128 * KIB, before=BEFORE, data_file=True),
    Scenario("data file, backing file", 4096, 256 * KIB, backing=99 * KIB + 512, data_file=True),
    Scenario("data file, subclusters", 16 * KIB, 256 * KIB, EXTENDED, BEFORE, data_file=True, longest=3, states=100),
    Scenario("raw data file", 1024, 128 * KIB, before=(*BEFORE, "write -z 5k 20k"), data_file="raw"),
]  # fmt: skip


def _make(scenario: Scenario, directory: Path, pick: random.Random) -> tuple[bytes, bytes, bytes | None]:
    """The image file, the content of its backing file, and its external data file."""
    backing, below = None, b""
    if scenario.backing:
        backing, below = directory / "backing.raw", pick.randbytes(scenario.backing)
        backing.write_bytes(below)
    options = {"cluster_size": scenario.cluster, **scenario.options}
    if scenario.data_file:
        options |= {"data_file": directory / "data", "data_file_raw": "on" if scenario.data_file == "raw" else "off"}
    path = create(directory / "image", scenario.size, backing=backing, backing_format="raw", **options)
    if scenario.before:
        qemu_io(path, *scenario.before)
    if scenario.compress:
        small, path = path, directory / "small"
        words = ",".join(f"{key}={value}" for key, value in options.items())
        run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", words, small, path)
    if scenario.snapshot:
        run("qemu-img", "snapshot", "-c", "before", path)
    return path.read_bytes(), below, (directory / "data").read_bytes() if scenario.data_file else None


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_crash_states_are_sound_and_hold_what_was_flushed(scenario: Scenario, tmp_path: Path) -> None:
    pick = random.Random(f"{SEED} {scenario.name}")
    initial, below, data_file = _make(scenario, tmp_path, pick)
    content = read(initial, below, data_file)
    file, layer = open_recorded(initial, data_file, backing=_backing(below), **scenario.layer)
    initials = [initial] if data_file is None else [initial, data_file]
    with open_stack(Compress(layer) if scenario.compresses else layer) as disk:
        ends = [file.data] if data_file is None else [file.data, layer.data_file.layer.data]  # type: ignore[union-attr]
        drive = Drive(file, disk, content, pick, scenario.cluster)
        for _ in range(scenario.steps):
            if scenario.compresses:
                drive.disk = pick.choice((disk, Reference(layer)))
            drive.step(longest=scenario.longest)
    assert not check(file.data).errors and not check(file.data).leaks, "after closing"
    assert read(ends[0], below, *ends[1:]) == drive.model
    if scenario.data_file == "raw":
        assert ends[1] == drive.model
    assert scenario.grows == any(o.name == "write" and (o.file, o.offset) == (0, REFCOUNT_TABLE_AT) for o in file.log)

    states = amount(scenario.states, 20 * scenario.states)
    for number, (position, state) in enumerate(crash_states_of(initials, file.log, pick, states)):
        where = f"crash {number} before {position}: {[str(o) for o in file.log[max(position - 8, 0) : position]]}"
        assert not check(state[0]).errors, (check(state[0]).errors[:5], where)
        assert not drive.history.wrong(position, read(state[0], below, *state[1:])), where
        if number % (states // 4) == 0:
            if data_file is not None:
                (tmp_path / "data").write_bytes(state[1])
            _qemu_agrees(state[0], tmp_path / "state")


def test_crashes_under_several_threads(tmp_path: Path) -> None:
    """Each thread has sectors of its own, in clusters that they share."""
    scenario = Scenario("threads", 2048, 192 * KIB, {"refcount_bits": 64})
    pick = random.Random(SEED)
    initial, *_ = _make(scenario, tmp_path, pick)
    file, layer = open_recorded(initial)
    history = History(read(initial))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        pick = random.Random(f"{SEED} {number}")
        try:
            for turn in range(40):
                sector = pick.randrange(scenario.size // SECTOR // 9) * 9 + 3 * number
                length = pick.randint(1, 3) * SECTOR
                choice = pick.random()
                began = file.mark(f"thread {number}, turn {turn} begins")
                if choice < 0.15:
                    disk.flush()
                    history.flushed(began, file.mark("flush ended"))
                    continue
                data = bytes(length) if choice < 0.3 else stamp(sector, number * 1000 + turn, length)
                if choice < 0.3:
                    disk.zero(sector * SECTOR, length, Flag.MAY_UNMAP)
                else:
                    disk.write(sector * SECTOR, data)
                history.changed(sector * SECTOR, data, began, file.mark("ended"))
        except BaseException as error:
            errors.append(error)

    with open_stack(layer) as disk:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for number, (position, state) in enumerate(crash_states(initial, file.log, pick, amount(200, 10_000))):
        assert not check(state).errors, number
        assert not history.wrong(position, read(state)), number


def _backing(below: bytes) -> object:
    """A layer with these bytes; what the image itself names is not opened."""
    return open_recorded(below)[0] if below else False


def _qemu_agrees(state: bytearray, path: Path) -> None:
    path.write_bytes(state)
    qemu_check(path, leaks_allowed=True)
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    qemu_check(path)


def test_snapshots_survive_crashes(tmp_path: Path) -> None:
    scenario = Scenario("s", 512, 96 * KIB, before=("write -P 1 0 96k",), snapshot=True)
    pick = random.Random(SEED)
    initial, *_ = _make(scenario, tmp_path, pick)
    file, layer = open_recorded(initial)
    with open_stack(layer) as disk:
        drive = Drive(file, disk, read(initial), pick, 512)
        for _ in range(40):
            drive.step()
    for position, state in crash_states(initial, file.log, pick, 8):
        path = tmp_path / "state"
        path.write_bytes(state)
        run("qemu-img", "snapshot", "-a", "before", path)
        assert read(path.read_bytes()) == b"\1" * scenario.size, position
