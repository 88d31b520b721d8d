"""A crash at any instant, with any order and loss of what was not synced: no bitmap is valid that is not right.

What the file may say of the bitmaps is known exactly at every instant: what the last change that was answered made of
them, or, while one is being made, what it will. Enabled ones are in use as long as the image is open.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from layers.qcow2 import Qcow2
from nbdserver.reference import Reference, open_stack
from tests.layers.bitmap_history import BitmapHistory, Said, found_in, marked, said, said_when_closed
from tests.layers.bitmap_kit import AUTO, IN_USE, stored
from tests.layers.qcow2_check import check, read
from tests.layers.qcow2_kit import SECTOR, Drive, RecordedFile, crash_states
from tests.serving import SEED, amount, create, run
from tests.serving import check as qemu_check

KIB = 1024


@dataclass
class Scenario:
    name: str
    cluster: int
    size: int
    options: dict[str, object] = field(default_factory=dict)
    granularities: tuple[int, ...] = (512, 4096)
    backing: bool = False
    steps: int = 16
    states: int = 60


SCENARIOS = [
    Scenario("small clusters", 512, 128 * KIB),
    Scenario("many refcount blocks", 512, 256 * KIB, {"refcount_bits": 64}),
    Scenario("tables of several clusters", 512, 2048 * KIB, granularities=(512,), states=20),
    Scenario("4k clusters", 4096, 256 * KIB),
    Scenario("64k clusters", 65536, 1024 * KIB, granularities=(512, 65536), states=30),
    Scenario("backing file", 4096, 256 * KIB, backing=True),
]


class Story:
    """What has been done to an image, session after session, and what the file may say at each instant."""

    def __init__(self, scenario: Scenario, file: RecordedFile, pick: random.Random, below: bytes) -> None:
        self.scenario, self.file, self.pick = scenario, file, pick
        self._below = below
        self.bitmaps = BitmapHistory()
        self.drive: Drive | None = None
        #: What the disk was when an enabled bitmap was last clear.
        self._bases: dict[str, bytes] = {}

    def session(self) -> None:
        """Open the image, do this and that, and close it."""
        began = self.file.mark("opening")
        layer = Qcow2(self.file, backing=RecordedFile(bytearray(self._below)) if self._below else False)
        with open_stack(layer) as disk:
            self.bitmaps.changed(began, self.file.mark("open"), said(layer))
            if self.drive is None:
                content = read(self.file.data, self._below)
                self.drive = Drive(self.file, disk, content, self.pick, self.scenario.cluster)
            self.drive.disk = disk
            for _ in range(self.scenario.steps):
                self._step(layer)
            final = said_when_closed(layer)
            self._check(final, disk)
            closing = self.file.mark("closing")
        self.bitmaps.changed(closing, self.file.mark("closed"), final)

    def _step(self, layer: Qcow2) -> None:
        assert self.drive is not None
        if self.pick.random() < 0.6:
            self.drive.step(longest=4)
            return
        began = self.file.mark("change begins")
        self._change(layer)
        self.bitmaps.changed(began, self.file.mark("change ended"), said(layer))

    def _change(self, layer: Qcow2) -> None:
        assert self.drive is not None
        names = [bitmap.name for bitmap in layer.bitmaps()]
        name = self.pick.choice([*names, ""])
        what = self.pick.choice(("add", "remove", "enable", "disable", "clear", "merge"))
        if what == "add" or not name:
            name, enabled = f"b{self.pick.randrange(1 << 30)}", self.pick.random() < 0.7
            if len(names) < 5:
                layer.add_bitmap(name, granularity=self.pick.choice(self.scenario.granularities), enabled=enabled)
                if enabled:
                    self._bases[name] = bytes(self.drive.model)
        elif what == "merge":
            layer.merge_bitmap(name, layer, self.pick.choice(names))
        else:
            {
                "remove": layer.remove_bitmap,
                "enable": layer.enable_bitmap,
                "disable": layer.disable_bitmap,
                "clear": layer.clear_bitmap,
            }[what](name)
            self._bases.pop(name, None)
            if what == "clear" and layer.bitmap_list._find(name).entry.is_auto:
                self._bases[name] = bytes(self.drive.model)

    def _check(self, final: Said, disk: Reference) -> None:
        """What has changed since a bitmap was clear is marked in it."""
        assert self.drive is not None
        assert disk.read(0, disk.size) == self.drive.model
        for name, base in self._bases.items():
            granules = final[name][1]
            assert granules is not None
            granularity = self._granularity(disk, name)
            for at in range(0, disk.size, SECTOR):
                if base[at : at + SECTOR] != self.drive.model[at : at + SECTOR]:
                    assert at // granularity in granules, (name, at)

    def _granularity(self, disk: Reference, name: str) -> int:
        assert isinstance(disk.root, Qcow2)
        return next(bitmap.granularity for bitmap in disk.root.bitmaps() if bitmap.name == name)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_crash_leaves_a_bitmap_that_is_valid_and_wrong(scenario: Scenario, tmp_path: Path) -> None:
    pick = random.Random(f"{SEED} {scenario.name}")
    below = b""
    if scenario.backing:
        (tmp_path / "base").write_bytes(below := pick.randbytes(scenario.size))
    path = create(
        tmp_path / "image", scenario.size, backing=tmp_path / "base" if below else None, backing_format="raw",
        cluster_size=scenario.cluster, **scenario.options,
    )  # fmt: skip
    initial = path.read_bytes()
    file = RecordedFile(bytearray(initial))
    story = Story(scenario, file, pick, below)
    for _ in range(amount(3, 6)):
        story.session()
    report = check(file.data)
    assert not report.errors and not report.leaks
    assert found_in(file.data) == story.bitmaps.last

    assert story.drive is not None
    states = amount(scenario.states, 40 * scenario.states)
    for number, (position, state) in enumerate(crash_states(initial, file.log, pick, states)):
        where = f"crash {number} before {position}: {[str(o) for o in file.log[max(position - 8, 0) : position]]}"
        assert not check(state).errors, where
        assert found_in(state) in story.bitmaps.allowed(position), where
        assert not story.drive.history.wrong(position, read(state, below)), where
        if number % (states // 4) == 0:
            _qemu_agrees(state, tmp_path / "state")


def _qemu_agrees(state: bytearray, path: Path) -> None:
    path.write_bytes(state)
    qemu_check(path, leaks_allowed=True)
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    qemu_check(path)


@pytest.mark.parametrize("sizes", [(96, 700, 30), (700, 64)])
def test_a_disk_that_is_resized_has_no_valid_bitmap_of_another_size(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """`stored` holds every valid one to the size that the header says."""
    pick, size = random.Random(f"{SEED} {sizes}"), 200 * KIB
    initial = create(tmp_path / "image", size, cluster_size=512).read_bytes()
    file = RecordedFile(bytearray(initial))
    #: (position in the log, the disk's size, what the disabled bitmap says there).
    history: list[tuple[int, int, frozenset[int]]] = []
    layer = Qcow2(file)
    with open_stack(layer) as disk:
        layer.add_bitmap("on", granularity=512)
        layer.add_bitmap("off", granularity=512)
        for new in sizes:
            disk.write(disk.size - 5 * KIB, b"x" * 5 * KIB)
            layer.disable_bitmap("off")
            history.append((file.mark("disabled"), disk.size, marked(layer, "off")))
            layer.resize(new * KIB)
            history.append((file.mark("resized"), disk.size, marked(layer, "off")))
            layer.enable_bitmap("off")
        closing = file.mark("closing")
    seen = set()
    for position, state in crash_states(initial, file.log, pick, amount(150, 3000)):
        assert not check(state).errors, position
        found, there = stored(state), int.from_bytes(state[24:32], "big")
        if history[0][0] < position <= closing:
            assert found["on"].flags == AUTO | IN_USE, position
            if not found["off"].flags & IN_USE:
                assert any(there == size and found["off"].dirty == dirty for _, size, dirty in history), position
                seen.add(there)
        for at, size, dirty in history:
            if position == at:
                assert (found["off"].flags, found["off"].dirty, there) == (0, dirty, size)
    assert len(seen) > 1
