"""What the tests of ``nbdserver image`` have in common: the command itself, and images made by QEMU."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner, Result

from nbdserver.cli import main
from tests.serving import SEED, create, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20


def image(*arguments: object, status: int = 0) -> Result:
    """Run ``nbdserver image`` here, and hold it to its exit status."""
    words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in arguments]
    result = CliRunner().invoke(main, ["image", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, f"{words}: status {result.exit_code}\n{result.output}"
    return result


def image_json(*arguments: object, status: int = 0) -> Any:
    """Run ``nbdserver image`` with --json, and parse what it prints on stdout."""
    return json.loads(image(*arguments, "--json", status=status).stdout)


class Output(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def qemu_img(*arguments: object) -> Output:
    """Run qemu-img, whatever comes of it."""
    words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in arguments]
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False, timeout=60)
    return Output(done.returncode, done.stdout, done.stderr)


class Sample(NamedTuple):
    """An image."""

    path: Path
    format: str


def make_zoo(directory: Path) -> dict[str, Sample]:
    """Images of many kinds, by name; and what they stand on."""
    zoo = {
        "raw": _raw(directory / "disk.raw", 6 * MIB),
        "raw, empty": _raw(directory / "empty.raw", 0),
        "raw, odd size": _raw(directory / "odd.raw", MIB + 1000),
    }
    for name, options in {
        "qcow2": {},
        "version 2": {"compat": "0.10"},
        "small clusters": {"cluster_size": 512},
        "large clusters": {"cluster_size": 2 * MIB, "lazy_refcounts": "on"},
        "narrow refcounts": {"refcount_bits": 1, "cluster_size": 4096},
        "zstd": {"compression_type": "zstd"},
        "metadata": {"preallocation": "metadata"},
        "falloc": {"preallocation": "falloc"},
        "full": {"preallocation": "full", "cluster_size": 4096},
        "odd size": {"cluster_size": 4096},
        "subclusters": {"extended_l2": "on", "cluster_size": 65536},
        "data file": {"data_file": directory / "data"},
        "raw data file": {"data_file": directory / "raw data", "data_file_raw": "on"},
    }.items():
        path = directory / f"{name}.qcow2"
        create(path, 8 * MIB + (512 if name == "odd size" else 0), **options)
        _fill(path, compress=options.keys().isdisjoint({"preallocation", "data_file"}))
        zoo[name] = Sample(path, "qcow2")
    return zoo | _chains(directory, zoo["raw"].path)


def _chains(directory: Path, raw: Path) -> dict[str, Sample]:
    short = _raw(directory / "short.raw", 2 * MIB + 1024).path
    middle = create(directory / "middle.qcow2", 5 * MIB, backing=short, backing_format="raw")
    qemu_io(middle, "write -P 7 1M 100k", "write -z 1500k 64k", "write -P 8 4M 3k")
    top = create(directory / "top.qcow2", 8 * MIB, backing=middle, cluster_size=4096)
    qemu_io(top, "write -P 9 1M 5000", "write -z 3M 300k", "write -P 10 7M 4k", "discard 4M 4k")
    old = create(directory / "old.qcow2", 6 * MIB, backing=raw, backing_format="raw", compat="0.10")
    qemu_io(old, "write -P 11 100k 70k")
    return {
        "chain": Sample(top, "qcow2"),
        "short backing": Sample(middle, "qcow2"),
        "old overlay": Sample(old, "qcow2"),
    }


def _raw(path: Path, size: int) -> Sample:
    """Random data, zeroes and holes."""
    pick = random.Random(f"{SEED} {path.name}")
    with path.open("wb") as file:
        for offset in range(0, size, MIB):
            file.seek(offset)
            file.write(pick.randbytes(150 * KIB) + bytes(40 * KIB) + pick.randbytes(1000))
        file.truncate(size)
    return Sample(path, "raw")


def _fill(path: Path, *, compress: bool) -> None:
    """Data, zeroes, discarded and compressed clusters."""
    qemu_io(path, "write -P 1 0 100k", "write -P 2 1M 3k", "write -z 2M 256k", "write -P 3 3M 512k", "discard 3M 128k")
    size = json.loads(run("qemu-img", "info", "--output=json", path))["cluster-size"]
    for number in range(2 * compress):
        qemu_io(path, f"write -c -P 4 {4 * MIB + number * size} {size}")
