"""A crash at any instant of making, applying and deleting snapshots: either it has happened or it has not.

The states are those of `test_qcow2_crash`; here, more is asked of them: every snapshot that there must be is there and
is what the disk was; in the middle of applying one, the disk is wholly what it was or wholly what it becomes.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from layers.qcow2 import Qcow2
from nbdserver.reference import Reference, open_stack
from tests.layers.qcow2_check import check, read, snapshots
from tests.layers.qcow2_kit import Drive, Operation, RecordedFile, crash_states, open_recorded
from tests.serving import SEED, amount, create, qemu_io, run
from tests.serving import check as qemu_check

KIB = 1024


@dataclasses.dataclass
class Made:
    """A snapshot: what is in it, and when (positions in the log) it was made and deleted."""

    content: bytes
    began: int
    ended: int
    delete_began: int | None = None
    delete_ended: int | None = None

    def must_be(self, position: int) -> bool:
        return self.ended <= position and (self.delete_began is None or position <= self.delete_began)

    def may_be(self, position: int) -> bool:
        return self.began < position and (self.delete_ended is None or position < self.delete_ended)


@dataclasses.dataclass
class Window:
    """While a point in time passed: what the disk can have been."""

    what: str
    began: int
    ended: int
    disks: tuple[bytes, ...] | None

    def __contains__(self, position: int) -> bool:
        return self.began < position < self.ended


class PointsDrive(Drive):
    """Random requests, and snapshots among them."""

    def __init__(
        self, file: RecordedFile, disk: Reference, layer: Qcow2, initial: bytes, pick: random.Random, cluster: int
    ) -> None:
        super().__init__(file, disk, initial, pick, cluster)
        self.layer = layer
        self.made: dict[str, Made] = {}
        self.windows: list[Window] = []
        self._names = 0

    def point(self) -> None:
        there = [name for name, made in self.made.items() if made.delete_began is None]
        choice = self.pick.random()
        if choice < 0.5 or not there:
            self._create()
        elif choice < 0.75:
            self._apply(self.pick.choice(there))
        else:
            self._delete(self.pick.choice(there))

    def _create(self) -> None:
        self._names += 1
        name = f"s{self._names}"
        began = self.file.mark(f"create {name} begins")
        self.layer.create_snapshot(name)
        ended = self._ended(f"create {name}", began, None)
        self.made[name] = Made(bytes(self.model), began, ended)

    def _apply(self, name: str) -> None:
        is_flushed = self.pick.random() < 0.7
        if is_flushed:
            self.flush()
        old, new = bytes(self.model), self.made[name].content
        began = self.file.mark(f"apply {name} begins")
        self.layer.apply_snapshot(name)
        self.history.changed(0, new, began, self.file.mark("applied"))
        self.model[:] = new
        self._ended(f"apply {name}", began, (old, new) if is_flushed else None)

    def _delete(self, name: str) -> None:
        began = self.made[name].delete_began = self.file.mark(f"delete {name} begins")
        self.layer.delete_snapshot(name)
        self.made[name].delete_ended = self._ended(f"delete {name}", began, None)

    def _ended(self, what: str, began: int, disks: tuple[bytes, ...] | None) -> int:
        ended = self.file.mark(f"{what} ended")
        self.history.flushed(began if disks is None and "apply" not in what else ended, ended)
        self.windows.append(Window(what, began, ended, disks))
        return ended

    def wrong(self, position: int, state: bytes | bytearray, below: bytes) -> list[str]:
        """What a crash at ``position`` cannot have left like that."""
        window = next((window for window in self.windows if position in window), None)
        report = check(state)
        wrong = [error for error in report.errors if window is None or error not in report.flags]
        disk, found = read(state, below), snapshots(state, below)
        wrong += self.history.wrong(position, disk)
        if window is not None and window.disks is not None and disk not in window.disks:
            wrong.append(f"{window.what}: the disk is neither what it was nor what it becomes")
        for name, made in self.made.items():
            if name in found and found[name] != made.content:
                wrong.append(f"{name} is not what the disk was")
            if (name in found and not made.may_be(position)) or (name not in found and made.must_be(position)):
                wrong.append(f"{name} is {'there' if name in found else 'missing'}")
        return [f"{line} (during {window.what})" if window else line for line in wrong]


@dataclasses.dataclass
class Scenario:
    name: str
    cluster: int
    size: int
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    backing: int = 0
    before: tuple[str, ...] = ()
    layer: dict[str, object] = dataclasses.field(default_factory=dict)
    points: int = 12
    states: int = 200


SCENARIOS = [
    Scenario("small clusters", 512, 96 * KIB),
    Scenario("4k clusters", 4096, 200 * KIB),
    Scenario("64k clusters", 65536, 512 * KIB, states=60),
    Scenario("version 2", 512, 64 * KIB, {"compat": "0.10"}),
    Scenario("wide refcounts", 512, 64 * KIB, {"refcount_bits": 64}),
    Scenario("narrow refcounts", 1024, 64 * KIB, {"refcount_bits": 4}),
    Scenario("backing file", 1024, 96 * KIB, backing=70 * KIB + 512),
    Scenario(
        "compressed", 1024, 96 * KIB, before=("write -c -P 1 0 40k", "write -c -P 2 64k 21k", "write -P 3 90k 6k")
    ),
    Scenario("preallocated", 1024, 64 * KIB, {"preallocation": "metadata"}),
    Scenario("little cache", 512, 128 * KIB, layer={"l2_cache_size": 0, "refcount_cache_size": 0}),
    Scenario("extended entries", 16384, 512 * KIB, {"extended_l2": "on"}, states=100),
    Scenario("nothing discarded", 1024, 64 * KIB, layer={"pass_discard_snapshot": False}),
    Scenario("subclusters", 16 * KIB, 160 * KIB, {"extended_l2": "on"}, backing=99 * KIB + 512),
]


def _make(scenario: Scenario, directory: Path, pick: random.Random) -> tuple[bytes, bytes]:
    """The image file, and the content of its backing file."""
    backing, below = None, b""
    if scenario.backing:
        backing, below = directory / "backing.raw", pick.randbytes(scenario.backing)
        backing.write_bytes(below)
    path = create(
        directory / "image", scenario.size, backing=backing, backing_format="raw",
        cluster_size=scenario.cluster, **scenario.options,
    )  # fmt: skip
    if scenario.before:
        qemu_io(path, *scenario.before)
    return path.read_bytes(), below


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_snapshots_happen_or_do_not(scenario: Scenario, tmp_path: Path) -> None:
    pick = random.Random(f"{SEED} {scenario.name}")
    initial, below = _make(scenario, tmp_path, pick)
    backing: object = open_recorded(below)[0] if below else False
    file, layer = open_recorded(initial, backing=backing, **scenario.layer)
    with open_stack(layer) as disk:
        drive = PointsDrive(file, disk, layer, read(initial, below), pick, scenario.cluster)
        for _ in range(scenario.points):
            for _ in range(pick.randint(1, 6)):
                drive.step()
            drive.point()
    assert not check(file.data).errors and not check(file.data).leaks, "after closing"
    assert not drive.wrong(len(file.log), file.data, below)

    states = amount(scenario.states, 20 * scenario.states)
    for number, (position, state) in enumerate(crash_states(initial, file.log, pick, states)):
        wrong = drive.wrong(position, state, below)
        assert not wrong, f"crash {number} before {position}: {wrong[:5]}, after {_shown(file.log[:position])}"
        if number % (states // 4) == 0:
            _qemu_repairs(state, tmp_path / "state")
            _opens(state, below)


def _shown(log: list[Operation]) -> list[str]:
    return [f"{operation.name} {operation.offset:#x}+{operation.length:#x}" for operation in log[-8:]]


def _qemu_repairs(state: bytearray, path: Path) -> None:
    """Leaks and COPIED flags are all that is wrong."""
    path.write_bytes(state)
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    qemu_check(path)


def _opens(state: bytearray, below: bytes) -> None:
    """It can be written, and snapshots can be made."""
    file, layer = open_recorded(state, backing=open_recorded(below)[0] if below else False)
    with open_stack(layer) as disk:
        disk.write(512, b"again" * 100)
        layer.create_snapshot("again")
    assert not [error for error in check(file.data).errors if error not in check(file.data).flags]
