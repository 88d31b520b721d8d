"""The pool's pages: huge ones where they can be had, and no memory taken that nobody has asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from nbdserver.testing import NbdServers, ServerProcess
from tests.huge_pages import spare_pages
from tests.serving import memlock

pytestmark = pytest.mark.alone

MIB = 1 << 20
POOL = 32 * MIB
HUGE = 2 * MIB

SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@pytest.fixture(autouse=True)
def none_to_spare() -> Iterator[None]:
    with spare_pages(0):
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(8 * MIB))
    path.with_name("other.raw").write_bytes(bytes(8 * MIB))
    return path


def serve(nbd_server: NbdServers, disk: Path, backend: str, command: list[str] | None = None) -> ServerProcess:
    options = ["--format", "raw", "--pool", "32M", "--backend", backend]
    return nbd_server.process(disk, *options, command=command or [])


def use(server: ServerProcess) -> None:
    handle = nbd.NBD()
    handle.connect_uri(server.uri())
    data = os.urandom(8 * MIB)
    handle.pwrite(data, 0)
    assert handle.pread(8 * MIB, 0) == data
    handle.shutdown()


def mapped(server: ServerProcess, what: str) -> int:
    """Bytes of the pool that the kernel counts as this, in the mappings of the server."""
    lines = Path(f"/proc/{server.pid}/smaps").read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if "memfd:nbdserver-pool" in line)
    (line,) = [line for line in lines[start : start + 30] if line.startswith(f"{what}:")][:1]
    return int(line.split()[1]) << 10


def test_pages_that_were_set_aside_are_used(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    with spare_pages(POOL // HUGE), serve(nbd_server, disk, backend) as server:
        pool = server.stats()["pool"]
        assert (pool["pages"], pool["huge"], pool["size"]) == ("hugetlb", POOL, POOL)
        assert "buffer pool: 32 MiB on hugetlb pages" in server.log
        assert mapped(server, "MMUPageSize") == HUGE
        use(server)
        # There are none left for another, which does without.
        with serve(nbd_server, disk.with_name("other.raw"), backend) as other:
            assert other.stats()["pool"]["pages"] != "hugetlb"
            use(other)


def test_else_the_kernel_is_asked_for_transparent_ones(nbd_server: NbdServers, disk: Path) -> None:
    with serve(nbd_server, disk, "io_uring") as server:
        pool = server.stats()["pool"]
        use(server)
        assert pool["huge"] == mapped(server, "ShmemPmdMapped")
        assert pool["pages"] == ("transparent" if pool["huge"] else "normal")
        assert f"on {pool['pages']} " in server.log
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release >= (6, 1) and SHMEM.exists() and "[deny]" not in SHMEM.read_text():
        assert pool["huge"] > 0, "MADV_COLLAPSE is there"


def test_memory_that_is_not_registered_is_not_taken_beforehand(nbd_server: NbdServers, disk: Path) -> None:
    with serve(nbd_server, disk, "threads") as server:
        assert mapped(server, "Rss") == 0
    with serve(nbd_server, disk, "io_uring", memlock(4 * MIB)) as server:
        registered = server.stats()["pool"]["registered"]
        assert mapped(server, "Rss") == registered
