"""The layer ``detect-zeroes``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from layers.detect_zeroes import DetectZeroes
from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from nbdserver.extent import CODE, Intent
from nbdserver.graph import flatten
from nbdserver.registry import build
from nbdserver.request import Flag, Operation, Request
from nbdserver.testing import NbdServers
from tests.oracle.model import Model
from tests.oracle.storm import Storm, Weather
from tests.registered import Spy, open_registered, registered
from tests.serving import SEED, amount, backend, check, create

__all__ = ["backend"]

Mode = Literal["off", "on", "unmap"]
MIB = 1 << 20


@pytest.mark.parametrize(("mode", "unmap"), [("on", Flag.NONE), ("unmap", Flag.MAY_UNMAP)])
def test_a_write_of_zeroes_becomes_a_zero_request(mode: Mode, unmap: Flag) -> None:
    spy = Spy(Memory(MIB))
    with open_registered(DetectZeroes(spy, mode)) as export:
        export.write(0, b"d" * MIB)
        export.execute(Request.write(4096, registered(70_000), Flag.WRITE_UNCHANGED))
        (hop,) = spy.take(Operation.ZERO)
        assert hop == (Operation.ZERO, 4096, 70_000, unmap | Flag.WRITE_UNCHANGED)  # no memory: not registered
        assert export.read(0, MIB) == b"d" * 4096 + bytes(70_000) + b"d" * (MIB - 74_096)


@pytest.mark.parametrize("at", [0, 1, 65_535, 65_536, 99_998, 99_999])
def test_one_byte_makes_it_data_in_the_same_memory(at: int) -> None:
    above = Spy(DetectZeroes(below := Spy(Memory(MIB))))
    data = bytearray(100_000)
    data[at] = 1
    with open_registered(above) as export:
        export.execute(Request.write(7, registered(bytes(data))))
        (here,), (there,) = above.take(), below.take()
        assert here == there == (Operation.WRITE, 7, 100_000, Flag.REGISTERED_BUF)
        assert export.read(7, 100_000) == data


def test_off_passes_everything_through_mapped() -> None:
    with open_registered(DetectZeroes(memory := Memory(MIB), "off")) as export:
        for intent in Intent:
            (leaf,) = flatten(export.root, 0, MIB, intent)
            assert leaf.target is memory._memory and leaf.writable
        export.write(5, bytes(5))
        assert export.status(0, 4096) == [(4096, 0)]


@pytest.mark.parametrize("mode", ["on", "unmap"])
def test_only_writes_come_to_code(mode: Mode) -> None:
    with open_registered(DetectZeroes(memory := Memory(MIB), mode)) as export:
        assert [leaf.target for leaf in flatten(export.root, 0, MIB, Intent.WRITE)] == [CODE]
        for intent in (Intent.READ, Intent.ZERO):
            assert [leaf.target for leaf in flatten(export.root, 0, MIB, intent)] == [memory._memory]
        assert not next(iter(flatten(export.root, 0, MIB, Intent.READ))).writable


def test_fua_stays_with_the_zero_request() -> None:
    with open_registered(DetectZeroes(spy := Spy(Memory(MIB)))) as export:
        export.write(0, bytes(512), Flag.FUA)
        assert [hop.operation for hop in spy.take()] == [Operation.ZERO]
        assert spy.flushes == 1


def test_its_keys() -> None:
    layer = build("detect-zeroes", {"file": Memory(1), "detect-zeroes": "unmap"})
    assert isinstance(layer, DetectZeroes) and layer.detect_zeroes == "unmap"


def test_zeroes_take_no_clusters(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 4 * MIB)
    with open_registered(DetectZeroes(Qcow2(File(str(path)), allocation_ahead=0))) as export:
        export.write(0, bytes(2 * MIB))
        export.write(3 * MIB, b"d")
    assert path.stat().st_size < MIB
    check(path)


def test_storm(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    """Through the engine, many at once and overlapping. The model's payloads are not zero, its zero requests are."""
    path = create(tmp_path / "disk.qcow2", 8 * MIB)
    server, uri = nbd_server.start(DetectZeroes(Qcow2(File(str(path))), "unmap"), backend=backend)
    with Storm(uri, Model(8 * MIB), seed=SEED, weather=Weather()) as storm:
        storm.run(seconds=amount(2, 20))
        storm.verify()
    server.stop()
    check(path)
