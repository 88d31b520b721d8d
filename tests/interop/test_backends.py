"""Which backend serves: the one that is asked for, or threads, by itself, where io_uring is forbidden."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.interop import forbid_io_uring
from tests.serving import BACKENDS, SEED, check, content, create, run

SIZE = 16 << 20
FORBID = (sys.executable, str(Path(forbid_io_uring.__file__)))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2", SIZE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(random.Random(SEED).randbytes(SIZE))
    return path


def lines_about_the_backend(log: str) -> list[str]:
    return [line for line in log.splitlines() if "backend" in line]


def test_the_one_asked_for_is_used_and_said_once(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    with nbd_server.process(disk, "--format", "qcow2", "--backend", backend) as server:
        run("nbdinfo", server.uri())
        (line,) = lines_about_the_backend(server.log)
        assert backend in line


def test_io_uring_is_the_first_choice(nbd_server: NbdServers, disk: Path) -> None:
    with nbd_server.process(disk, "--format", "qcow2") as server:
        (line,) = lines_about_the_backend(server.log)
        assert BACKENDS[0] in line


def test_threads_where_io_uring_is_forbidden(nbd_server: NbdServers, disk: Path, data: Path) -> None:
    with nbd_server.process(disk, "--format", "qcow2", command=FORBID) as server:
        run("nbdcopy", data, server.uri())
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", data, server.uri())
        (line,) = lines_about_the_backend(server.log)
    assert "threads" in line
    assert "io_uring" in line, "it says why"
    check(disk)
    assert content(disk) == data.read_bytes()


def test_the_launcher_does_forbid(tmp_path: Path) -> None:
    probe = "import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(425, 1, None), ctypes.get_errno())"
    assert run(*FORBID, sys.executable, "-c", probe) == "-1 1\n"
