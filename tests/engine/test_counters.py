"""The counters of files are exact: the rings' own, the kernel's trace and strace have seen the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdserver.testing import NbdServers, ServerProcess
from tests.engine.witness import KERNEL_TRACE, kernel_trace, strace
from tests.serving import SEED, create, run

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB

#: Who is asked besides the counters themselves.
WITNESSES = ("rings", "strace", *(["kernel"] if KERNEL_TRACE else []))


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A chain of two: the first half of the disk is in the top image, the other in the one below."""
    base = create(tmp_path / "base.qcow2", SIZE)
    run("qemu-io", "-c", f"write -P 7 0 {SIZE}", base)
    top = create(tmp_path / "top.qcow2", SIZE, backing=base)
    run("qemu-io", "-c", f"write -P 9 0 {SIZE // 2}", top)
    return top


def serve(nbd_server: NbdServers, image: Path, backend: str, cache: str = "none") -> ServerProcess:
    config = image.with_name("exports.toml")
    file = f'{{ type = "file", path = "{image}", cache = "{cache}" }}'
    layers = f'[{{ type = "qcow2" }}, {file}]'
    config.write_text(f"[exports.disk]\nlayers = {layers}\ndefault = true\n")
    return nbd_server.process(config, "--backend", backend)


def connect(server: ServerProcess) -> nbd.NBD:
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(server.uri())
    return handle


def counted(stats: dict[str, Any], what: str) -> int:
    """A counter, of all files together."""
    return sum(int(counters[what]) for counters in stats["exports"]["disk"]["files"].values())


Workload = Callable[[nbd.NBD], int]


class Seen:
    """What has happened while a workload ran, by all accounts. ``requests``: reads and writes of the client."""

    def __init__(self, before: dict[str, Any], after: dict[str, Any], requests: int) -> None:
        self.requests = requests
        self.fixed, self.plain, self.bounce_bytes = (
            counted(after, what) - counted(before, what) for what in ("fixed", "plain", "bounce_bytes")
        )
        self.ring = Counter({kind: after["ring"][kind] - before["ring"][kind] for kind in after["ring"]})
        self.calls: Counter[str] | None = None
        self.kernel: Counter[str] | None = None


def watch(server: ServerProcess, tmp_path: Path, witness: str, workload: Workload) -> Seen:
    handle = connect(server)
    before = server.stats()
    calls = kernel = None
    if witness == "strace":
        with strace(tmp_path, server.pid) as calls:
            requests = workload(handle)
    elif witness == "kernel":
        with kernel_trace(tmp_path, server.pid) as kernel:
            requests = workload(handle)
    else:
        requests = workload(handle)
    seen = Seen(before, server.stats(), requests)
    seen.calls, seen.kernel = calls, kernel
    handle.shutdown()
    return seen


def aligned(handle: nbd.NBD) -> int:
    """4 KiB and 256 KiB: reads of both images, writes of the top one. Returns how many requests."""
    dice = random.Random(SEED)
    requests = 0
    for length in (4 * KIB, 256 * KIB):
        for _ in range(40):
            offset = dice.randrange((SIZE - length) // length) * length
            handle.pread(length, offset)
            handle.pwrite(dice.randbytes(length), dice.randrange(SIZE // 2 // length) * length)
            requests += 2
    return requests


def warm(handle: nbd.NBD) -> None:
    """Have everything mapped, writable where it can be."""
    for offset in range(0, SIZE, MIB):
        data = handle.pread(MIB, offset)
        if offset < SIZE // 2:
            handle.pwrite(data, offset)


@pytest.mark.parametrize("witness", WITNESSES)
def test_the_hot_path_of_a_chain_is_fixed_buffer_io_throughout(
    nbd_server: NbdServers, tmp_path: Path, chain: Path, witness: str
) -> None:
    with serve(nbd_server, chain, "io_uring") as server:
        handle = connect(server)
        warm(handle)
        handle.shutdown()
        hits = server.stats()["exports"]["disk"]["hits"]
        seen = watch(server, tmp_path, witness, aligned)
        assert server.stats()["exports"]["disk"]["hits"] - hits == seen.requests == 160
    # A read of 256 KiB is four clusters, which lie in a row.
    assert (seen.fixed, seen.plain, seen.bounce_bytes) == (seen.requests, 0, 0)
    assert seen.ring == {"read": 0, "write": 0, "read_fixed": 80, "write_fixed": 80}
    if seen.calls is not None:
        assert not {path for path in seen.calls if path.endswith(".qcow2")}
    if seen.kernel is not None:
        assert seen.kernel == {"READ_FIXED": 80, "WRITE_FIXED": 80}


def anything(handle: nbd.NBD) -> int:
    """Cold and warm, of any alignment, on both halves: padding, metadata and copies of clusters are in it."""
    dice = random.Random(SEED)
    for _ in range(150):
        length = min(SIZE, max(1, int((2 * MIB) ** dice.random())))
        offset = dice.randrange(SIZE - length + 1)
        if dice.random() < 0.5:
            handle.pread(length, offset)
        else:
            handle.pwrite(dice.randbytes(length), offset)
    handle.zero(100_000, 3 * MIB + 1)
    handle.flush()
    return 150


@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("witness", WITNESSES)
def test_every_operation_is_counted_once(
    nbd_server: NbdServers, tmp_path: Path, chain: Path, backend: str, witness: str, cache: str
) -> None:
    """Whichever way it goes: what Python reads and writes of the metadata too."""
    with serve(nbd_server, chain, backend, cache) as server:
        seen = watch(server, tmp_path, witness, anything)
    ring = seen.ring
    assert seen.fixed == ring["read_fixed"] + ring["write_fixed"]
    by_calls = seen.plain - ring["read"] - ring["write"]
    assert seen.fixed + seen.plain > 150 and by_calls >= 0
    if backend == "threads":
        assert not ring.total() and by_calls > 150
    elif cache == "none":
        assert seen.fixed > 150
    if cache == "none":
        assert seen.bounce_bytes > 0
    if seen.calls is not None:
        assert sum(count for path, count in seen.calls.items() if path.endswith(".qcow2")) == by_calls
    if seen.kernel is not None:
        names = {"read": "READ", "write": "WRITE", "read_fixed": "READ_FIXED", "write_fixed": "WRITE_FIXED"}
        assert seen.kernel == +Counter({names[kind]: count for kind, count in ring.items()})
