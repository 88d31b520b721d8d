"""A crash at any instant of making, applying and deleting snapshots, and of resizing: it has happened or it has not.

The states are those of `test_qcow2_crash`; here, more is asked of them: every snapshot that there must be is there and
is what the disk was; in the middle of applying one, or of resizing, the disk is wholly what it was or wholly what it
becomes.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from layers.qcow2 import Qcow2
from nbdserver.reference import Reference, open_stack
from tests.layers.qcow2_check import check, read, snapshots
from tests.layers.qcow2_kit import SECTOR, Drive, Operation, RecordedFile, crash_states, open_recorded
from tests.oracle.points import Made
from tests.serving import SEED, amount, create, qemu_io, run
from tests.serving import check as qemu_check

KIB = 1024


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
    """Random requests, and points in time among them."""

    def __init__(
        self, file: RecordedFile, disk: Reference, layer: Qcow2, initial: bytes, pick: random.Random, cluster: int
    ) -> None:
        super().__init__(file, disk, initial, pick, cluster)
        self.layer = layer
        self.made: dict[str, Made] = {}
        self.windows: list[Window] = []
        #: (began, ended, size): how large the disk has been.
        self.sizes = [(-1, 0, len(initial))]
        self._size_max = 3 * len(initial)
        self._names = 0

    def point(self) -> None:
        there = [name for name, made in self.made.items() if made.is_there]
        choice = self.pick.random()
        if choice < 0.4 and (self.layer.reader.geometry.has_zero or not there):
            self._resize()
        elif choice < 0.7 or not there:
            self._create()
        elif choice < 0.85:
            self._apply(self.pick.choice(there))
        else:
            self._delete(self.pick.choice(there))

    def _create(self) -> None:
        self._names += 1
        name = f"s{self._names}"
        began = self.file.mark(f"create {name} begins")
        self.layer.create_snapshot(name)
        ended = self._ended(f"create {name}", began)
        self.made[name] = Made(bytes(self.model), began, ended)

    def _delete(self, name: str) -> None:
        began = self.made[name].delete_began = self.file.mark(f"delete {name} begins")
        self.layer.delete_snapshot(name)
        self.made[name].delete_ended = self._ended(f"delete {name}", began)

    def _apply(self, name: str) -> None:
        new = self.made[name].content
        self._become(f"apply {name}", lambda: self.layer.apply_snapshot(name), new, 0)

    def _resize(self) -> None:
        size = self.pick.randint(1, self._size_max // SECTOR) * SECTOR
        if self.pick.random() < 0.6:  # by little, so that what it loses and regains is in use
            size = max(len(self.model) + self.pick.randint(-4 * self.cluster, 3 * self.cluster), SECTOR)
            size -= size % SECTOR
        new = bytes(self.model[:size]).ljust(size, b"\0")
        self._become(f"resize {size:#x}", lambda: self.layer.resize(size), new, len(self.model))

    def _become(self, what: str, act: Callable[[], None], new: bytes, changed_from: int) -> None:
        """The disk becomes another, at once; it is as it was below ``changed_from``."""
        is_flushed = self.pick.random() < 0.7
        if is_flushed:
            self.flush()
        old = bytes(self.model)
        began = self.file.mark(f"{what} begins")
        act()
        done = self.file.mark("done")
        self.history.changed(changed_from, new[changed_from:], began, done)
        self.model[:] = new
        ended = self.file.mark(f"{what} ended")
        self.history.flushed(done, ended)
        self.sizes.append((began, done, len(new)))
        self.windows.append(Window(what, began, ended, (old, new) if is_flushed else None))

    def _ended(self, what: str, began: int) -> int:
        ended = self.file.mark(f"{what} ended")
        self.history.flushed(began, ended)
        self.windows.append(Window(what, began, ended, None))
        return ended

    def wrong(self, position: int, state: bytes | bytearray, below: bytes) -> list[str]:
        """What a crash at ``position`` cannot have left like that."""
        window = next((window for window in self.windows if position in window), None)
        report = check(state)
        wrong = [error for error in report.errors if window is None or error not in report.flags]
        disk, found = read(state, below), snapshots(state, below)
        wrong += self.history.wrong(position, disk)
        if len(disk) not in self._sizes(position):
            wrong.append(f"the disk has {len(disk)} bytes, not {self._sizes(position)}")
        if window is not None and window.disks is not None and disk not in window.disks:
            wrong.append(f"{window.what}: the disk is neither what it was nor what it becomes")
        for name, made in self.made.items():
            if name in found and found[name] != made.content:
                wrong.append(f"{name} is not what the disk was")
            if (name in found and not made.may_be(position)) or (name not in found and made.must_be(position)):
                wrong.append(f"{name} is {'there' if name in found else 'missing'}")
        return [f"{line} (during {window.what})" if window else line for line in wrong]

    def _sizes(self, position: int) -> list[int]:
        last = max(number for number, (_, ended, _) in enumerate(self.sizes) if ended <= position)
        return [size for began, _, size in self.sizes[last:] if began < position]


@dataclasses.dataclass
class Scenario:
    name: str
    cluster: int
    size: int
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    backing: int = 0
    before: tuple[str, ...] = ()
    layer: dict[str, object] = dataclasses.field(default_factory=dict)
    points: int = 15
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
    Scenario("longer backing file", 1024, 32 * KIB, backing=90 * KIB),
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
def test_points_in_time_happen_or_do_not(scenario: Scenario, tmp_path: Path) -> None:
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
        disk.write(0, b"again" * 100)
        layer.create_snapshot("again")
    assert not [error for error in check(file.data).errors if error not in check(file.data).flags]
