"""Image locks as QEMU takes them, both ways, through the programs people run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.serving import create, run


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2", "8M")


@contextmanager
def qemu_nbd(image: Path, *options: str) -> Iterator[None]:
    """qemu-nbd holding an image open."""
    address = image.with_suffix(".sock")
    process = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", *options, "-k", address, image])
    try:
        deadline = time.monotonic() + 20
        while not address.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait()


def serve_in_vain(*arguments: str | Path) -> str:
    """What `nbdserver serve` says when it refuses to."""
    return run(sys.executable, "-m", "nbdserver", "serve", *arguments, "--listen", "nbd://127.0.0.1:0", status=1)


def test_qemu_img_is_kept_out_while_we_write(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    with nbd_server.process(disk, "--format", "qcow2", "--backend", backend) as server:
        output = run("qemu-img", "info", disk, status=1)
        assert 'Failed to get shared "write" lock' in output
        output = run("qemu-io", "-f", "qcow2", "-c", "read 0 512", disk, status=1)
        assert "lock" in output
        run("qemu-img", "info", "-U", disk)
        assert server.pid
    run("qemu-img", "info", disk)


def test_qemu_may_read_with_us(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    with nbd_server.process(disk, "--read-only", "--backend", backend):
        run("qemu-img", "info", disk)
        run("qemu-img", "convert", "-O", "raw", disk, disk.with_suffix(".raw"))
        output = run("qemu-io", "-f", "qcow2", "-c", "write 0 512", disk, status=1)
        assert 'Failed to get "write" lock' in output


def test_a_backing_file_is_kept_from_writers(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    overlay = create(disk.with_name("overlay.qcow2"), "8M", backing=disk)
    with nbd_server.process(overlay, "--format", "qcow2", "--backend", backend):
        run("qemu-img", "info", disk)
        output = run("qemu-io", "-f", "qcow2", "-c", "write 0 512", disk, status=1)
        assert 'Failed to get "write" lock' in output


@pytest.mark.parametrize("options", [(), ("--read-only",)])
def test_we_refuse_what_qemu_nbd_writes(disk: Path, options: tuple[str, ...]) -> None:
    with qemu_nbd(disk):
        output = serve_in_vain(disk, "--format", "qcow2", *options)
    assert str(disk) in output
    assert "lock" in output
    assert "Traceback" not in output


def test_we_refuse_to_write_what_qemu_nbd_reads(disk: Path) -> None:
    with qemu_nbd(disk, "-r"):
        output = serve_in_vain(disk, "--format", "qcow2")
    assert str(disk) in output
    assert "lock" in output
    assert "Traceback" not in output


def test_we_read_with_qemu_nbd(nbd_server: NbdServers, disk: Path) -> None:
    with qemu_nbd(disk, "-r"), nbd_server.process(disk, "--read-only") as server:
        run("nbdinfo", server.uri())


def test_a_killed_server_leaves_no_lock(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    with nbd_server.process(disk, "--format", "qcow2", "--backend", backend) as server:
        server.kill()
        run("qemu-img", "info", disk)
        server.start()
        run("nbdinfo", server.uri())
