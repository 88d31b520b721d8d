"""A small virtual machine: Debian's cloud kernel, the tools a test wants, and a script instead of a system.

QEMU's system emulator, the kernel and busybox are unpacked by scripts/test (``NBDSERVER_VM`` names where). The machine
reaches the servers of a test at 10.0.2.2, which is QEMU's name for the host's loopback.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

#: Where the host's loopback is, seen from within.
HOST = "10.0.2.2"

#: What the init script runs first: file systems of the kernel's own, modules, the network.
_BEGIN = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mkdir -p /proc /sys /dev /run /tmp /mnt /etc
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec </dev/null >/dev/ttyS0 2>&1
for module in $(cat /modules/order); do insmod /modules/$module || echo "no module $module"; done
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
say() { echo "== $*"; }
die() { say "FAILED: $*"; dmesg | tail -n 30; sync; poweroff -f; }
# wait_for SECONDS COMMAND...: until the command succeeds
wait_for() {
    local left=$1
    shift
    while ! "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || die "waited for: $*"
        sleep 1
    done
}
"""

_END = """
say done
poweroff -f
"""


def directory() -> Path:
    """Where QEMU, the kernel and busybox are unpacked."""
    root = os.environ.get("NBDSERVER_VM")
    if root is None or not Path(root).is_dir():
        pytest.skip("no virtual machine: scripts/test unpacks one and names it in NBDSERVER_VM")
    return Path(root)


class Machine:
    """One run: from the kernel's start to the end of the script. A context manager."""

    def __init__(
        self,
        place: Path,
        script: str,
        *,
        tools: Iterable[str] = (),
        modules: Iterable[str] = (),
        files: Mapping[str, Path] | None = None,
        arguments: Iterable[str] = (),
    ) -> None:
        """``place``: a directory for its own. ``tools``: programs of this system; ``modules``: of the kernel, by name;
        ``files``: others, by where they shall be; ``arguments``: more for QEMU."""
        root = directory()
        archive = _Archive()
        archive.program("/bin/busybox", root / "bin/busybox")
        for tool in tools:
            found = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
            assert found is not None, f"no {tool} on this system"
            archive.program(f"/sbin/{tool}", Path(found))
        [kernel] = sorted((root / "boot").glob("vmlinuz-*"))
        order = list(
            _modules(
                root / "lib/modules" / kernel.name.removeprefix("vmlinuz-"), ["virtio_pci", "virtio_net", *modules]
            )
        )
        for module in order:
            archive.file(f"/modules/{module.name}", module.read_bytes())
        archive.file("/modules/order", " ".join(module.name for module in order).encode())
        for name, path in (files or {}).items():
            archive.file(name, path.read_bytes(), 0o600)
        archive.file("/init", (_BEGIN + script + _END).encode(), 0o755)
        (place / "initramfs").write_bytes(archive.end())
        self._log = place / "console"
        self._log.touch()
        library = root / "usr/lib/x86_64-linux-gnu"
        self._environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "QEMU_MODULE_DIR": str(library / "qemu")}
        self._command = [
            str(root / "usr/bin/qemu-system-x86_64"),
            *("-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios"), "-L", "/usr/share/seabios"),
            *("-M", "q35", "-m", "512", "-smp", "2", "-display", "none", "-no-reboot", "-nodefaults"),
            # Emulated, whatever the processor can do: where it is virtual itself, KVM may be there and fail.
            *("-cpu", "max", "-accel", "tcg,thread=multi"),
            *("-kernel", str(kernel), "-initrd", str(place / "initramfs")),
            # The timer is not tried: an emulated one does not tick in time on a host that is busy.
            *("-append", "console=ttyS0 quiet panic=-1 loglevel=4 no_timer_check"),
            *(
                "-serial",
                f"file:{self._log}",
                "-netdev",
                "user,id=net",
                "-device",
                "virtio-net-pci,netdev=net,romfile=",
            ),
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        errors = self._log.with_suffix(".qemu")
        with errors.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def console(self) -> str:
        """All that has been printed."""
        return self._log.read_text(errors="replace") + self._log.with_suffix(".qemu").read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 240) -> None:
        """Wait until the script has said that. Fails, with the console, when it ends or fails before."""
        assert self._process is not None
        deadline = time.monotonic() + timeout
        while f"== {text}" not in self.console:
            ended = self._process.poll() is not None
            assert "== FAILED" not in self.console and not ended, self.console
            assert time.monotonic() < deadline, f"not within {timeout} s: {text}\n{self.console}"
            time.sleep(0.05)

    def wait_for_end(self, timeout: float = 60) -> None:
        """Wait until the machine has switched itself off."""
        assert self._process is not None
        assert self._process.wait(timeout) == 0, self.console


def _modules(root: Path, names: Iterable[str]) -> Iterator[Path]:
    """The modules, each after those it depends on; what the kernel has built in is left out."""
    files = {path.stem.replace("-", "_"): path for path in root.rglob("*.ko")}
    seen: set[str] = set()

    def visit(name: str) -> Iterator[Path]:
        if name in seen or name not in files:
            return
        seen.add(name)
        data = files[name].read_bytes()
        for field in ("depends", "softdep"):
            for value in re.findall(rb"\0" + field.encode() + rb"=([^\0]*)", data):
                for needed in re.split(r"[ ,]+", value.decode().replace("pre:", "")):
                    yield from visit(needed.replace("-", "_"))
        yield files[name]

    for name in names:
        yield from visit(name)


class _Archive:
    """An initramfs: a cpio archive, "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._names: set[str] = set()

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._directories(name)
        self._entry(name, stat.S_IFREG | mode, data)

    def program(self, name: str, path: Path) -> None:
        """A program and the libraries it is linked with."""
        self.file(name, path.read_bytes(), 0o755)
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"(/\S+) \(0x", listed):
            if library not in self._names:
                self.file(library, Path(library).read_bytes(), 0o755)

    def end(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return bytes(self._data)

    def _directories(self, name: str) -> None:
        for parent in reversed(Path(name).parents):
            if str(parent) != "/" and str(parent) not in self._names:
                self._entry(str(parent), stat.S_IFDIR | 0o755, b"")

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        self._names.add(name)
        path = name.lstrip("/").encode() + b"\0"
        fields = (len(self._names), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        self._data += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        self._data += bytes(-len(self._data) % 4) + data
        self._data += bytes(-len(self._data) % 4)
