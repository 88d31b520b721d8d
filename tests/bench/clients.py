"""The clients that measure: fio, nbdcopy and qemu-img, each against one URI.

fio does no TLS that is checked against certificates of our own: there nbdcopy takes its place.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

#: Seconds that a client may take for what it was told to do, beyond the time it was told to take.
CLIENT_MAX = 120
#: Clients of TLS offer this cipher alone, so that it is the one that every server takes.
CIPHER = "aes-256-gcm"
_CIPHERS_OTHER = ("aes-128-gcm", "aes-128-ccm", "aes-256-ccm", "chacha20-poly1305", "aes-128-cbc", "aes-256-cbc")


@dataclass(frozen=True)
class Done:
    """What a client had done: requests and in how many seconds."""

    requests: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


class Work(Protocol):
    """What a client does with a disk."""

    def run(self, uri: str, directory: Path) -> Done: ...


@dataclass(frozen=True)
class Fio:
    """Requests of ``block`` bytes, ``depth`` of them at once on each of ``jobs`` connections."""

    pattern: str  # randread, randwrite, read, write
    block: int
    depth: int
    #: Bytes of the disk that are used.
    size: int
    jobs: int = 1
    seconds: float = 0.5
    #: Bytes to transfer in all, instead of ``seconds``.
    amount: int = 0
    #: Use only this many bytes at the beginning of every ``stride`` bytes.
    piece: int = 0
    stride: int = 0

    def run(self, uri: str, directory: Path) -> Done:
        words = [f"--rw={self.pattern}", f"--bs={self.block}", f"--iodepth={self.depth}", f"--numjobs={self.jobs}"]
        words += [f"--size={self.size}", "--randrepeat=0", "--thread", "--group_reporting", "--norandommap"]
        if self.amount:
            words += [f"--io_size={self.amount}"]
        else:
            words += ["--time_based", f"--runtime={round(self.seconds * 1000)}ms"]
        if self.jobs > 1 and not self.pattern.startswith("rand"):
            words += [f"--offset_increment={self.size // self.jobs}"]
        if self.stride:
            words += ["--zonemode=strided", f"--zonerange={self.piece}", f"--zonesize={self.piece}"]
            words += [f"--zoneskip={self.stride - self.piece}"]
        command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", *words, "--output-format=json"]
        return fio_result(_run(command, directory, self.seconds + CLIENT_MAX), "read" in self.pattern)


def fio_result(output: str, read: bool) -> Done:
    """What fio's JSON says, whatever lines of its own come first. Raises RuntimeError for what fio calls an error."""
    job = json.loads(output[output.index("{") :])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio: error {job['error']}")
    side = job["read" if read else "write"]
    if not side["total_ios"]:
        raise RuntimeError("fio did nothing")
    return Done(side["total_ios"], side["total_ios"] / side["iops"])


#: What counts as one request of a copy where the client does as it likes.
COPY_UNIT = 256 << 10


@dataclass(frozen=True)
class Copy:
    """The whole disk, read by nbdcopy or by qemu-img convert, to nowhere."""

    tool: str
    size: int
    #: Of nbdcopy: requests of so many bytes, so many at once, on one connection. Else it does as it likes.
    block: int = 0
    depth: int = 0

    def run(self, uri: str, directory: Path) -> Done:
        if self.block:
            how = [f"--request-size={self.block}", f"--requests={self.depth}", "--connections=1", "--threads=1"]
            command = ["nbdcopy", *how, uri, "null:"]
        elif self.tool == "nbdcopy":
            command = ["nbdcopy", uri, "null:"]
        else:
            target = f"driver=null-co,size={self.size}"
            command = ["qemu-img", "convert", "-n", "-f", "raw", uri, "--target-image-opts", target]
        began = time.monotonic()
        _run(command, directory, CLIENT_MAX)
        return Done(self.size / (self.block or COPY_UNIT), time.monotonic() - began)


def _run(command: list[str], directory: Path, timeout: float) -> str:
    with tempfile.TemporaryFile("w+", dir=directory) as errors:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "GNUTLS_SYSTEM_PRIORITY_FILE": str(_priorities(directory))},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {errors.read()}{done.stdout[-2000:]}")
    return done.stdout


def _priorities(directory: Path) -> Path:
    """The settings of GnuTLS, which all these clients use, that leave it `CIPHER` alone."""
    path = directory / "gnutls"
    if not path.exists():
        path.write_text("[overrides]\n" + "".join(f"tls-disabled-cipher = {name}\n" for name in _CIPHERS_OTHER))
    return path
