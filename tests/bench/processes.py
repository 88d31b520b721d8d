"""What a process has used: CPU time and memory, as the kernel counts them."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

#: The kernel's number for "all that the threads of a process ran", in the clock ids that it makes from process ids.
_CPUCLOCK_SCHED = 2
_TICK = 1 / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads, those that have ended too, and of all children.

    The process's own is /proc/PID/stat's utime + stime, read from its clock, to the nanosecond; what children that are
    gone have used comes from /proc/PID/stat, to the tick.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    total = time.clock_gettime((~pid) << 3 | _CPUCLOCK_SCHED) + (int(fields[13]) + int(fields[14])) * _TICK
    for child in _children(pid):
        # One that ends just now is counted with those that are gone.
        with contextlib.suppress(OSError):
            total += cpu_seconds(child)
    return total


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


def resident(pid: int) -> int:
    """Bytes resident beside shared memory: without the buffer pool, which is all the shared memory there is."""
    sizes = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith("Rss"):
            sizes[name] = int(value.split()[0]) << 10
    return sizes["RssAnon"] + sizes["RssFile"]
