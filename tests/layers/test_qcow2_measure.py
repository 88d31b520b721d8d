"""How large an image would be: the answers are qemu-img's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from layers.qcow2 import Qcow2
from layers.qcow2.create import Options
from nbdserver.errors import ConfigError
from tests.serving import create, qemu_io, run_json

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))

SIZES = (0, 1, 512, 64 * KIB, 10 * MIB + 511, 5 * GIB, 3 * TIB + 12345)
CLUSTERS = (512, 4096, 64 * KIB, 2 * MIB)


def _measured(*words: object, **options: Any) -> tuple[int, int]:
    """(required, fully allocated), as qemu-img says."""
    text = ",".join(f"{key}={'on' if value is True else value}" for key, value in options.items())
    report = run_json("qemu-img", "measure", "--output=json", "-O", "qcow2", *(("-o", text) if text else ()), *words)
    return report["required"], report["fully-allocated"]


def _ours(size: int, allocated: list[tuple[int, int]], **options: Any) -> tuple[int, int]:
    measured = Qcow2.measure(size, Options(**options), allocated)
    return measured.required, measured.fully_allocated


@pytest.mark.parametrize("cluster_size", CLUSTERS)
def test_sizes(cluster_size: int) -> None:
    for size, refcount_bits in itertools.product(SIZES, (1, 16, 64)):
        options = {"cluster_size": cluster_size, "refcount_bits": refcount_bits}
        if size < 1000 * GIB or cluster_size > 512:
            assert _ours(size, [], **options) == _measured("--size", str(size), **options), (size, options)


@pytest.mark.parametrize(
    "options",
    [
        {"compat": "0.10"},
        {"extended_l2": True},
        {"extended_l2": True, "cluster_size": 16384},
        {"preallocation": "metadata"},
        {"preallocation": "falloc"},
        {"preallocation": "full", "cluster_size": 4096},
        {"lazy_refcounts": True},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    for size in (MIB, 7 * GIB + 512):
        assert _ours(size, [], **options) == _measured("--size", str(size), **options)


@pytest.mark.parametrize("cluster_size", CLUSTERS)
def test_data(tmp_path: Path, cluster_size: int) -> None:
    path = create(tmp_path / "image", 40 * MIB, cluster_size=4096)
    qemu_io(path, "write 0 1k", "write 12k 4k", "write -z 20k 8k", "write 1M 100k", "write 5M 1M", "write 40956k 4k")
    mapped = run_json("qemu-img", "map", "--output=json", path)
    allocated = [(entry["start"], entry["length"]) for entry in mapped if entry["data"] and not entry["zero"]]
    for more in ({}, {"preallocation": "full"}, {"backing_file": "base"}):
        options = {"cluster_size": cluster_size, **more}
        assert _ours(40 * MIB, allocated, **options) == _measured("-f", "qcow2", str(path), **options)


def test_the_same_cluster_counts_once() -> None:
    once = Qcow2.measure(MIB, Options(), [(0, 1)])
    assert Qcow2.measure(MIB, Options(), [(0, 1), (0, 5), (100, 1), (200, 0), (65535, 1)]) == once
    assert Qcow2.measure(MIB, Options(), [(65535, 2)]).required == once.required + 65536


@pytest.mark.parametrize("size", [-1, 128 * GIB + 1])
def test_a_disk_too_large_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"size: found {size}"):
        Qcow2.measure(size, Options(cluster_size=512), [])
