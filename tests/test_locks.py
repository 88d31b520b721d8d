"""Image locks: QEMU keeps out of our images, and we out of QEMU's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.errors import ImageError
from nbdserver.files import Files
from tests.conftest import Run


@pytest.fixture
def image(run: Run, tmp_path: Path) -> Path:
    """A qcow2 image of 1 MiB."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    return path


@contextlib.contextmanager
def held_by_us(files: Files, path: Path, *, read_only: bool) -> Iterator[None]:
    file = files.open(str(path), read_only=read_only)
    try:
        yield
    finally:
        files.close(file)


def wait_for_greeting(server: subprocess.Popen[bytes], address: Path) -> None:
    """Until the server speaks: it listens before it opens the image."""
    for _ in range(3000):
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(str(address))
            client.settimeout(30)
            assert client.recv(8) == b"NBDMAGIC"
            return
        assert server.poll() is None
        time.sleep(0.01)
    raise AssertionError("qemu-nbd does not start")


@contextlib.contextmanager
def held_by_qemu(path: Path, *options: str) -> Iterator[None]:
    if shutil.which("qemu-nbd") is None:
        pytest.skip("qemu-nbd is not installed")
    address = path.with_name("socket")
    server = subprocess.Popen(["qemu-nbd", "--persistent", "-k", address, *options, path])
    try:
        wait_for_greeting(server, address)
        yield
    finally:
        server.kill()
        server.wait(30)


def test_qemu_img_info_is_refused_while_we_write(run: Run, files: Files, image: Path) -> None:
    with held_by_us(files, image, read_only=False):
        done = run("qemu-img", "info", image, check=False)
        assert done.returncode != 0
        assert 'Failed to get shared "write" lock' in done.stderr
    run("qemu-img", "info", image)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_qemu_cannot_write_while_we_write(run: Run, files: Files, image: Path, format: str) -> None:
    with held_by_us(files, image, read_only=False):
        done = run("qemu-io", "-f", format, "-c", "write 0 512", image, check=False)
        assert done.returncode != 0
        assert 'Failed to get "write" lock' in done.stderr


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_qemu_cannot_write_while_we_read(run: Run, files: Files, image: Path, format: str) -> None:
    with held_by_us(files, image, read_only=True):
        done = run("qemu-io", "-f", format, "-c", "write 0 512", image, check=False)
        assert done.returncode != 0
        assert 'Failed to get "write" lock' in done.stderr


def test_qemu_can_read_while_we_read(run: Run, files: Files, image: Path) -> None:
    with held_by_us(files, image, read_only=True):
        run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", image)
        run("qemu-img", "info", image)


def test_qemu_can_read_while_we_write_if_told_that_we_do(run: Run, files: Files, image: Path) -> None:
    with held_by_us(files, image, read_only=False):
        run("qemu-img", "info", "--force-share", image)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("read_only", [False, True])
def test_we_are_refused_while_qemu_writes(files: Files, image: Path, format: str, read_only: bool) -> None:
    with held_by_qemu(image, "-f", format):
        with pytest.raises(ImageError) as caught:
            files.open(str(image), read_only=read_only)
        assert str(caught.value) == (
            f"{image}: cannot be opened for {'reading' if read_only else 'writing'}: it is held by another process "
            'with the "write" lock (QEMU or another server)'
        )
    files.close(files.open(str(image), read_only=read_only))


def test_we_cannot_write_while_qemu_reads(files: Files, image: Path) -> None:
    refused = pytest.raises(ImageError, match='does not share the "write" lock')
    with held_by_qemu(image, "-f", "qcow2", "--read-only"), refused:
        files.open(str(image), read_only=False)


def test_we_can_read_while_qemu_reads(files: Files, image: Path) -> None:
    with held_by_qemu(image, "-f", "qcow2", "--read-only"), held_by_us(files, image, read_only=True):
        pass


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_two_servers_exclude_each_other(image: Path, first: bool, second: bool) -> None:
    with held_by_us(Files(), image, read_only=first), pytest.raises(ImageError, match="another process"):
        Files().open(str(image), read_only=second)


def test_two_reading_servers_coexist(image: Path) -> None:
    with held_by_us(Files(), image, read_only=True), held_by_us(Files(), image, read_only=True):
        pass


def test_a_lock_that_is_not_qemus_is_named_as_such(files: Files, image: Path) -> None:
    with image.open("r+b") as other:
        whole = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, whole)
        with pytest.raises(ImageError, match="with a write lock, so not by QEMU"):
            files.open(str(image), read_only=True)


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def test_a_file_system_without_locks_is_served_with_a_warning(
    files: Files, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_locks(monkeypatch, errno.ENOLCK)
    with caplog.at_level(logging.WARNING), held_by_us(files, image, read_only=False):
        assert f"{image}: served without an image lock: No locks available" in caplog.text


def test_a_lock_that_fails_is_an_error(files: Files, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(ImageError, match="cannot be locked: Input/output error"):
        files.open(str(image), read_only=True)
