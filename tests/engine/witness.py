"""Others who see what a server's I/O is: the kernel's trace of what rings are given, and strace."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.serving import run

#: Seconds for strace to come and to go.
STRACE_TIMEOUT = 30.0

#: The system calls that transfer a file's data otherwise than through a ring.
DATA_CALLS = "read,readv,pread64,preadv,preadv2,write,writev,pwrite64,pwritev,pwritev2"

_EVENT = re.compile(r"io_uring_submit_req: .*opcode (\w+),")
_CALL = re.compile(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\((\d+)<([^>]*)>| resumed)")
_RESULT = re.compile(r"= (-?\d+)[^=]*$")


def _threads(pid: int) -> str:
    return "\n".join(os.listdir(f"/proc/{pid}/task"))


@contextlib.contextmanager
def kernel_trace(directory: Path, pid: int) -> Iterator[Counter[str]]:
    """What the threads of a process submit to their rings in the meantime, by operation, once the block has been left.

    Needs root, and tracefs; has an instance of its own, so that others trace undisturbed.
    """
    tracing = directory / "tracing"
    tracing.mkdir()
    run("mount", "-t", "tracefs", "tracefs", tracing)
    instance = tracing / "instances" / f"nbdserver-{os.getpid()}"
    submitted: Counter[str] = Counter()
    try:
        instance.mkdir()
        (instance / "buffer_size_kb").write_text("4096")
        (instance / "set_event_pid").write_text(_threads(pid))
        event = instance / "events" / "io_uring" / "io_uring_submit_req" / "enable"
        event.write_text("1")
        yield submitted
        event.write_text("0")
        submitted.update(match[1] for match in _EVENT.finditer((instance / "trace").read_text()))
    finally:
        if instance.exists():
            instance.rmdir()
        run("umount", tracing)


def _can_trace() -> bool:
    return os.geteuid() == 0 and "\ttracefs\n" in Path("/proc/filesystems").read_text()


#: Whether `kernel_trace` can be had.
KERNEL_TRACE = _can_trace()


@contextlib.contextmanager
def strace(directory: Path, pid: int) -> Iterator[Counter[str]]:
    """How often a process transfers data of each file with system calls in the meantime, by the file's path, once the
    block has been left."""
    output = directory / "strace"
    command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={DATA_CALLS}", "-o", str(output), "-p", str(pid)]
    calls: Counter[str] = Counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            _wait_attached(tracer, pid)
            yield calls
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(STRACE_TIMEOUT)
    calls.update(_finished_calls(output.read_text()))


def _wait_attached(tracer: subprocess.Popen[str], pid: int) -> None:
    deadline = time.monotonic() + STRACE_TIMEOUT
    while any(_tracer_of(pid, task) != tracer.pid for task in _threads(pid).split()):
        assert tracer.poll() is None, tracer.stderr.read() if tracer.stderr else ""
        assert time.monotonic() < deadline, "strace does not come"
        time.sleep(0.01)


def _tracer_of(pid: int, task: str) -> int:
    status = Path(f"/proc/{pid}/task/{task}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("TracerPid:"))
    return int(line.split()[1])


def _finished_calls(lines: str) -> Iterator[str]:
    """The paths of the calls that did something: not those that would have blocked, or were interrupted."""
    begun: dict[str, str] = {}
    for line in lines.splitlines():
        thread = line.split(maxsplit=1)[0]
        match = _CALL.match(line)
        if match is None:
            continue
        path = match[3] or begun.get(thread, "")
        if "<unfinished" in line:
            begun[thread] = path
            continue
        result = _RESULT.search(line)
        if path and result is not None and int(result[1]) >= 0:
            yield path
