"""The images that are served, made by QEMU's tools on first use."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.bench.servers import ROOT, SERVERS, Disk, running

MIB = 1 << 20
CLUSTER = 64 << 10
#: How many pieces of 1 MiB the data of a disk of any size is scattered over it in.
SCATTERED_PIECES = 256
_SEED = 1


class Images:
    """Images of ``size`` bytes in ``directory``. What is read only is made once, and shared."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self.size = size

    @functools.cache  # noqa: B019  # one object, as long as the program
    def raw(self) -> Path:
        """All of it written, with what no file system takes for zeroes."""
        path = self.directory / "disk.raw"
        block = random.Random(_SEED).randbytes(MIB)
        with path.open("wb") as file:
            for _ in range(self.size // MIB):
                file.write(block)
        return path

    @functools.cache  # noqa: B019
    def chain(self, depth: int) -> Path:
        """A chain of so many qcow2 images: all of the base is written, and of each overlay its share in many pieces."""
        path = self.directory / f"chain-{depth}-0.qcow2"
        _tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.raw(), path)
        pick = random.Random(_SEED)
        for level in range(1, depth):
            overlay = self.directory / f"chain-{depth}-{level}.qcow2"
            _tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", overlay)
            count = self.size // MIB // max(3, depth - 1)
            _write(overlay, [(pick.randrange(self.size // MIB) * MIB, CLUSTER) for _ in range(count)])
            path = overlay
        return path

    @functools.cache  # noqa: B019
    def luks(self) -> tuple[Path, Path]:
        """A LUKS image (AES-256-XTS), and its passphrase."""
        key = self.directory / "key"
        key.write_text("correct horse")
        path = self.directory / "disk.luks"
        secret = ["--object", f"secret,id=key,file={key}"]
        options = "key-secret=key,iter-time=10,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64"
        source = ["--image-opts", f"driver=raw,file.driver=file,file.filename={self.raw()}"]
        _tool("qemu-img", "convert", *secret, *source, "-O", "luks", "-o", options, path)
        return path, key

    @functools.cache  # noqa: B019
    def certificates(self) -> Path:
        path = self.directory / "pki"
        _tool(sys.executable, "-m", "nbdserver", "tls", "init", path, "--host", "localhost", "--host", "127.0.0.1")
        return path

    def empty(self, name: str, size: int) -> Path:
        """A new, empty qcow2 image, in place of the last one of that name."""
        path = self.directory / f"empty-{name}.qcow2"
        path.unlink(missing_ok=True)
        _tool("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
        return path

    @functools.cache  # noqa: B019
    def scattered(self, size: int) -> Path:
        """A qcow2 image of ``size`` bytes with `SCATTERED_PIECES` of 1 MiB of data, evenly over all of it."""
        path = self.directory / f"scattered-{size}.qcow2"
        _tool("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
        stride = size // SCATTERED_PIECES
        _write(path, [(piece * stride, MIB) for piece in range(SCATTERED_PIECES)])
        return path

    @functools.cache  # noqa: B019
    def fragmented(self, size: int, cluster: int, *, apart: bool) -> Path:
        """A qcow2 image whose clusters lie in the file in the disk's order, or each ``apart`` from its neighbours."""
        path = self.directory / f"fragmented-{size}-{cluster}-{apart}.qcow2"
        _tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, str(size))
        qemu_nbd = next(server for server in SERVERS if server.tool == "qemu-nbd")
        with running(qemu_nbd, Disk(path, "qcow2", read_only=False), self.directory / "filler") as server:
            # Each block once, in random order, is each cluster apart: QEMU allocates in the order of the writes.
            pattern = ["--rw=randwrite" if apart else "--rw=write", "--randseed=1"]
            work = [f"--bs={cluster}", f"--size={size}", "--iodepth=1"]
            _tool("fio", "--name=fill", "--ioengine=nbd", f"--uri={server.uri}", *pattern, *work, cwd=self.directory)
        return path


def drop_cache(path: Path) -> None:
    """Have nothing of the file in the page cache."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    """Have all of the file in the page cache."""
    with path.open("rb") as file:
        while file.read(MIB):
            pass


def _write(path: Path, pieces: list[tuple[int, int]]) -> None:
    words = [word for at, length in pieces for word in ("-c", f"write -q -P {1 + at // MIB % 255} {at} {length}")]
    for start in range(0, len(words), 2000):
        _tool("qemu-io", "-f", "qcow2", "-t", "unsafe", *words[start : start + 2000], path)


def _tool(*command: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run([os.fspath(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:6]}: status {done.returncode}: {done.stderr}{done.stdout[-2000:]}")
