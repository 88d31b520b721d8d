"""What tests that serve have in common: how much to do, on which backends, and the tools they run."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

#: Whether this run does all that is claimed (scripts/test --full) or a shorter version of the same.
FULL = bool(os.environ.get("NBDSERVER_FULL"))
SEED = int(os.environ.get("NBDSERVER_SEED") or "1")

_SYS_IO_URING_SETUP = 425


def amount(short: int, full: int) -> int:
    """How much of something to do: seconds, rounds, states."""
    return full if FULL else short


def _io_uring_is_there() -> bool:
    """Whether the kernel lets us have rings: containers, and kernel.io_uring_disabled, may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    # No parameters to read (EFAULT) is how a ring that may be had refuses this call.
    libc.syscall(_SYS_IO_URING_SETUP, 1, None)
    return ctypes.get_errno() not in (1, 38)  # EPERM, ENOSYS


#: The backends that can run here. Where io_uring is forbidden, the suite shows what it shows on threads.
BACKENDS = ("io_uring", "threads") if _io_uring_is_there() else ("threads",)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn: what holds on one holds on the other."""
    return str(request.param)


@pytest.fixture(params=["unix", "tcp"])
def tcp(request: pytest.FixtureRequest) -> bool:
    """Over a Unix socket, then over TCP."""
    return bool(request.param == "tcp")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, for what is written and synced a thousand times."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="nbdserver-", dir=place) as directory:
        yield Path(directory)


def run(*command: str | os.PathLike[str], status: int = 0, timeout: float = 120, **options: Any) -> str:
    """Run a tool, hold it to its exit status, and return what it printed (both streams)."""
    arguments = [os.fspath(word) for word in command]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False, **options
    )
    output: str = done.stdout.decode(errors="replace")
    assert done.returncode == status, f"{' '.join(arguments)}: status {done.returncode}\n{output}"
    return output


def memlock(limit: int, hard: int | None = None) -> list[str]:
    """A command that runs another with this RLIMIT_MEMLOCK, and without the right to ignore it."""
    command = ["prlimit", f"--memlock={limit}:{hard or limit}"]
    if os.geteuid() == 0:
        user = 1_000_000 + os.getpid()
        keep = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        command += ["setpriv", f"--reuid={user}", "--clear-groups", *keep]
    return command


def run_json(*command: str | os.PathLike[str]) -> Any:
    """Run a tool and parse what it prints to standard output."""
    return json.loads(subprocess.run([os.fspath(word) for word in command], capture_output=True, check=True).stdout)


def create(
    path: Path, size: int | str, *, backing: Path | None = None, backing_format: str = "qcow2", **o: Any
) -> Path:
    """A new qcow2 image; further keywords are its creation options. The backing file is named relative to it.

    ``data_file="beside"`` is `data_beside`.
    """
    if o.get("data_file") == "beside":
        o["data_file"] = data_beside(path)
    options = ",".join(f"{key}={value}" for key, value in o.items())
    chain = ["-b", os.path.relpath(backing, path.parent), "-F", backing_format] if backing else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), *chain, path, str(size))
    return path


@contextlib.contextmanager
def loop_device(path: Path, *, sector_size: int = 4096) -> Iterator[str]:
    """A block device on a file; past the page cache of the file where its file system can."""
    sectors = ["--sector-size", str(sector_size)]
    device = run("losetup", "--find", "--show", *sectors, path).strip()
    try:
        # A file system with longer blocks refuses.
        subprocess.run(["losetup", "--direct-io=on", device], capture_output=True, check=False)
        yield device
    finally:
        run("losetup", "--detach", device)


def data_beside(path: Path) -> Path:
    """An external data file beside the image."""
    return path.with_name(path.name + ".data")


def qemu_io(path: Path, *commands: str) -> None:
    """Run qemu-io commands on an image. qemu-io exits 0 whatever happens, so its output is looked at."""
    output = run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    assert "failed" not in output and "rror" not in output, output


def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is so that happens by itself."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def check(path: Path, *, leaks_allowed: bool = False) -> None:
    """`qemu-img check` finds nothing wrong with the image."""
    done = subprocess.run(["qemu-img", "check", "--output=json", path], capture_output=True, check=False)
    report = json.loads(done.stdout or b"{}")
    wrong = {key: report[key] for key in ("corruptions", "check-errors") if report.get(key)}
    assert done.returncode in ((0, 3) if leaks_allowed else (0,)) and not wrong, (done.returncode, report, done.stderr)


def content(path: Path, *, format: str = "qcow2") -> bytes:
    """What QEMU says is in the image, chain and all."""
    raw = path.with_name(path.name + ".content")
    run("qemu-img", "convert", "-U", "-f", format, "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data
