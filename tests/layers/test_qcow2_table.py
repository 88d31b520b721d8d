"""The L2 table, told as it is: what the engine makes of it is what `resolve` says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.extent import ZERO, Intent, Packed
from nbdserver.limits import KIB, MIB
from nbdserver.reference import open_stack
from tests.serving import SEED, create, run

CLUSTER = 4 * KIB  # an L2 table maps 2 MiB


def places(table: Packed) -> list[int | None]:
    """Where each unit is: a place, 0 for zeroes, or None where nothing is said. As the engine is to read it."""
    found: list[int | None] = []
    for word in table.words:
        place = word & table.places
        is_placed = place and not word & table.refused and place % table.unit == 0 and place + table.unit <= table.limit
        is_zero = any(word & mask == value for mask, value in table.zeroes)
        found.append(0 if is_zero else place if is_placed else None)
    return found


def _image(tmp_path: Path, **options: object) -> Path:
    """Clusters of every kind, mixed."""
    path = create(tmp_path / "disk.qcow2", 5 * MIB + 512, cluster_size=CLUSTER, **options)
    pick = random.Random(SEED)
    kinds = ["write -q -P 1", "write -q -P 2", "write -q -z", "write -q -z -u", "write -q -c -P 3"]
    clusters = pick.sample(range(5 * MIB // CLUSTER), 300)
    commands = [f"{pick.choice(kinds)} {cluster * CLUSTER} {CLUSTER}" for cluster in clusters]
    run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    return path


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_it_says_what_resolve_says(tmp_path: Path, compat: str, backed: bool) -> None:
    base = {"backing": create(tmp_path / "base.qcow2", 5 * MIB)} if backed else {}
    layer = Qcow2(File(str(_image(tmp_path, compat=compat, **base))))
    said = 0
    with open_stack(layer):
        for offset in range(0, layer.size, 2 * MIB):
            table = layer.packed(offset + 7)
            assert table is not None and table.offset == offset and table.unit == CLUSTER
            assert table.offset + len(table.words) * CLUSTER <= layer.size
            for index, place in enumerate(places(table)):
                extent = next(iter(layer.resolve(offset + index * CLUSTER, CLUSTER, Intent.READ)))
                if place == 0:
                    assert extent.target is ZERO
                elif place is not None:
                    assert (extent.target, extent.offset) == (layer.file, place)
                    said += 1
    assert said > 50


def test_there_is_none_where_there_is_no_l2_table_and_for_subclusters(tmp_path: Path) -> None:
    with open_stack(layer := Qcow2(File(str(create(tmp_path / "empty.qcow2", MIB))))):
        assert layer.packed(0) is None
    path = create(tmp_path / "extended.qcow2", MIB, extended_l2="on")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", path)
    with open_stack(layer := Qcow2(File(str(path)))):
        assert layer.packed(0) is None
