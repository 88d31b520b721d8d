"""RLIMIT_MEMLOCK, and what else keeps the pool from being registered: as much as can be is, and the log says why.

Servers run as a user of their own, because the kernel adds up what all processes of a user have locked.
"""

from __future__ import annotations

import os
import random
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdserver.testing import NbdServers, ServerProcess
from tests.huge_pages import spare_pages
from tests.interop import forbid_io_uring
from tests.serving import SEED, memlock, run

pytestmark = pytest.mark.alone

KIB, MIB = 1 << 10, 1 << 20
POOL = 32 * MIB
#: What rings may take of the limit, and what is left to rings that are made later.
MARGIN = MIB

FORBID = (sys.executable, str(Path(forbid_io_uring.__file__)))


@pytest.fixture(autouse=True)
def no_huge_pages() -> Iterator[None]:
    """A pool on pages that were set aside is whole or not at all, and does not count as locked."""
    with spare_pages(0):
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(SEED).randbytes(8 * MIB))
    return path


def serve(nbd_server: NbdServers, disk: Path, command: Sequence[str], layers: str = "") -> ServerProcess:
    config = disk.parent / "exports.toml"
    stack = f'[{layers}{{ type = "file", path = "{disk}", cache = "none" }}]'
    config.write_text(
        f'[engine]\npool = "{POOL // MIB}M"\nworkers = 2\n[exports.disk]\nlayers = {stack}\ndefault = true\n'
    )
    return nbd_server.process(config, command=command)


def lines_about_the_pool(server: ServerProcess) -> list[str]:
    return [line for line in server.log.splitlines() if "buffer pool: " in line]


def use(server: ServerProcess, disk: Path) -> None:
    """Write and read: short and long requests, several at once."""
    expected = bytearray(disk.read_bytes())
    dice = random.Random(SEED)
    handle = nbd.NBD()
    handle.connect_uri(server.uri())
    for length in (4 * KIB, 256 * KIB, 3 * MIB, 8 * MIB):
        data = dice.randbytes(length)
        offset = dice.randrange((8 * MIB - length) // (4 * KIB) + 1) * 4 * KIB
        handle.pwrite(data, offset)
        expected[offset : offset + length] = data
        buffers = [nbd.Buffer(256 * KIB) for _ in range(32)]
        cookies = [handle.aio_pread(buffer, 256 * KIB * n) for n, buffer in enumerate(buffers)]
        for cookie in cookies:
            while not handle.aio_command_completed(cookie):
                handle.poll(-1)
        assert b"".join(bytes(buffer.to_bytearray()) for buffer in buffers) == expected
    handle.shutdown()
    assert disk.read_bytes() == expected


def file_counters(stats: dict[str, Any]) -> dict[str, int]:
    (counters,) = stats["exports"]["disk"]["files"].values()
    return dict(counters)


def test_as_much_as_fits_is_registered_and_the_log_says_what_limits_it(nbd_server: NbdServers, disk: Path) -> None:
    limit = 4 * MIB
    with serve(nbd_server, disk, memlock(limit)) as server:
        use(server, disk)
        stats = server.stats()
        (line,) = lines_about_the_pool(server)
    assert stats["backend"] == "io_uring"
    pool = stats["pool"]
    assert limit - MARGIN <= pool["registered"] <= limit
    assert pool["free"] == pool["size"] == POOL
    for words in ("32 MiB", "RLIMIT_MEMLOCK is 4 MiB", "ulimit -l", "LimitMEMLOCK=", "docker run --ulimit memlock"):
        assert words in line
    assert f"{pool['registered'] * 100 // MIB / 100:g} MiB of 32 MiB registered" in line


def test_the_soft_limit_is_raised_to_the_hard_one(nbd_server: NbdServers, disk: Path) -> None:
    with serve(nbd_server, disk, memlock(64 * KIB, 4 * MIB)) as server:
        assert server.stats()["pool"]["registered"] >= 4 * MIB - MARGIN


def test_the_flag_is_true_slot_by_slot(nbd_server: NbdServers, disk: Path) -> None:
    """What fits in the registered part is fixed-buffer I/O, what does not is not; the server, through a layer in Python
    too, checks each flag against the addresses."""
    with serve(nbd_server, disk, memlock(4 * MIB), '{ type = "detect-zeroes", detect-zeroes = "on" }, ') as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri())
        handle.pread(4 * KIB, 0)
        before = server.stats()
        for offset in range(0, 8 * MIB, 256 * KIB):
            handle.pread(256 * KIB, offset)
            handle.pwrite(b"w" * (256 * KIB), offset)
        after = server.stats()
        counters = {key: value - file_counters(before)[key] for key, value in file_counters(after).items()}
        assert (counters["fixed"], counters["plain"]) == (64, 0)
        top = {key: after["exports"]["disk"]["layers"]["/"][key] for key in ("registered", "kept", "lost")}
        assert top == {"registered": 32, "kept": 32, "lost": {}}
        # Longer than all that is registered: in parts; but what must be answered in one piece is not.
        handle.pread(6 * MIB, 0)
        parts = file_counters(server.stats())
        assert parts["fixed"] >= file_counters(after)["fixed"] + 6
        assert parts["plain"] == file_counters(after)["plain"]
        handle.pread_structured(6 * MIB, 0, lambda *_: 0, nbd.CMD_FLAG_DF)
        last = file_counters(server.stats())
        assert last["plain"] > parts["plain"]
        assert last["fixed"] == parts["fixed"]


def test_where_registrations_cannot_be_cloned_each_ring_has_its_own(nbd_server: NbdServers, disk: Path) -> None:
    """As before Linux 6.12: three rings share the limit."""
    limit = 6 * MIB
    with serve(nbd_server, disk, [*memlock(limit), *FORBID, "--clone"]) as server:
        use(server, disk)
        stats = server.stats()
    assert stats["backend"] == "io_uring"
    assert limit // 3 - MARGIN <= stats["pool"]["registered"] <= limit // 3
    assert file_counters(stats)["fixed"] > 0


def test_where_nothing_can_be_registered_rings_do_without(nbd_server: NbdServers, disk: Path) -> None:
    with serve(nbd_server, disk, [*FORBID, "--buffers"]) as server:
        use(server, disk)
        stats = server.stats()
        (line,) = lines_about_the_pool(server)
    assert (stats["backend"], stats["pool"]["registered"]) == ("io_uring", 0)
    assert "0 MiB of 32 MiB registered: the kernel refuses more (Invalid argument)" in line
    assert file_counters(stats)["fixed"] == 0
    assert stats["ring"]["read"] > 0 and stats["ring"]["read_fixed"] == 0


def test_a_limit_of_nothing_is_no_reason_not_to_serve(nbd_server: NbdServers, disk: Path) -> None:
    with serve(nbd_server, disk, memlock(0)) as server:
        use(server, disk)
        assert server.stats()["pool"]["registered"] == 0
        assert "RLIMIT_MEMLOCK is 0" in server.log


def test_servers_of_one_user_share_its_limit(nbd_server: NbdServers, disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "disk.raw"
    other.parent.mkdir()
    other.write_bytes(disk.read_bytes())
    limit = 4 * MIB
    with serve(nbd_server, disk, memlock(limit)) as first, serve(nbd_server, other, memlock(limit)) as second:
        use(second, other)
        use(first, disk)
        registered = [server.stats()["pool"]["registered"] for server in (first, second)]
    assert registered[0] >= limit - MARGIN
    assert sum(registered) <= limit


def test_without_a_limit_all_of_it_is_registered(nbd_server: NbdServers, disk: Path) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and soft != resource.RLIM_INFINITY and soft < 2 * POOL:
        pytest.skip("needs root, or RLIMIT_MEMLOCK of more than the pool")
    with serve(nbd_server, disk, []) as server:
        use(server, disk)
        stats = server.stats()
        (line,) = lines_about_the_pool(server)
    assert stats["pool"]["registered"] == POOL
    assert line.endswith("pages, registered")


def test_few_descriptors_are_no_reason_to_do_without_rings(nbd_server: NbdServers, disk: Path) -> None:
    """Fewer than files are registered where there are more."""
    with serve(nbd_server, disk, ["prlimit", "--nofile=100"]) as server:
        use(server, disk)
        assert server.stats()["backend"] == "io_uring"


def test_the_launchers_limit(tmp_path: Path) -> None:
    probe = (
        "import resource; print(resource.getrlimit(resource.RLIMIT_MEMLOCK)); print(open('/proc/self/status').read())"
    )
    said = run(*memlock(64 * KIB, MIB), sys.executable, "-c", probe)
    assert f"({64 * KIB}, {MIB})" in said
    (capabilities,) = (line.split()[1] for line in said.splitlines() if line.startswith("CapEff:"))
    assert not int(capabilities, 16) & 1 << 14, "CAP_IPC_LOCK"
