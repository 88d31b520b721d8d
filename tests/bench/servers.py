"""The servers that are compared: how each is told to serve a disk, as fast as it can, and what it cannot serve."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdserver.uri import NbdUri
from tests.bench.processes import cpu_seconds, resident

ROOT = Path(__file__).resolve().parents[2]
OURS = "nbdserver"
#: Seconds that a server may take to begin and to end.
START_MAX, STOP_MAX = 60, 20


@dataclass(frozen=True)
class Disk:
    """An image, and how it is served."""

    path: Path
    #: raw, qcow2; luks, whose passphrase is in ``key``; or toml, which is a configuration of our own.
    format: str = "raw"
    key: Path | None = None
    read_only: bool = True
    #: Past the page cache.
    direct: bool = False
    tcp: bool = False
    #: A directory of certificates: with TLS.
    tls: Path | None = None


@dataclass(frozen=True)
class Address:
    """Where a server is to listen: a Unix socket in a directory of its own, or a port of 127.0.0.1."""

    directory: Path
    port: int

    @property
    def socket(self) -> Path:
        return self.directory / "socket"


@dataclass(frozen=True)
class Server:
    """A server program with settings of its own. ``command`` is None for what it cannot serve."""

    name: str
    tool: str
    command: Callable[[Disk, Address], list[str] | None]
    #: The export's name there.
    export: str = ""
    #: It goes to the background and leaves its process id in the file "pid" of its directory.
    forks: bool = False

    def is_installed(self) -> bool:
        return shutil.which(self.tool) is not None

    def serves(self, disk: Disk) -> bool:
        return self.is_installed() and self.command(disk, Address(Path("/nowhere"), 1)) is not None


@dataclass
class Running:
    """A server that runs: its process, and where clients find it."""

    pid: int
    uri: str
    #: Seconds from its start until it took a connection.
    opening: float
    address: Address

    def cpu(self) -> float:
        return cpu_seconds(self.pid)

    def resident(self) -> int:
        return resident(self.pid)


@contextlib.contextmanager
def running(server: Server, disk: Disk, directory: Path) -> Iterator[Running]:
    """Start a server on a disk; stop it at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    address = Address(directory, _free_port())
    address.socket.unlink(missing_ok=True)
    command = server.command(disk, address)
    assert command is not None, f"{server.name} does not serve {disk}"
    with (directory / "log").open("wb") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    pid = process.pid
    try:
        _await(process, disk, address, server)
        opening = time.monotonic() - began
        if server.forks:
            pid = int((directory / "pid").read_text())
        yield Running(pid, _uri(server, disk, address), opening, address)
    finally:
        _stop(pid, process)


def _await(process: subprocess.Popen[bytes], disk: Disk, address: Address, server: Server) -> None:
    deadline = time.monotonic() + START_MAX
    while not _answers(disk, address):
        log = (address.directory / "log").read_text(errors="replace")
        if process.poll() not in ((None, 0) if server.forks else (None,)):
            raise RuntimeError(f"{server.name} ended: {process.args!r}: {log}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{server.name} did not begin in {START_MAX} s: {process.args!r}: {log}")
        time.sleep(0.005)


def _answers(disk: Disk, address: Address) -> bool:
    try:
        with connect(disk, address) as client:
            return client.recv(8) == b"NBDMAGIC"
    except OSError:
        return False


def connect(disk: Disk, address: Address) -> socket.socket:
    """A plain connection, with nothing said on it."""
    client = socket.socket(socket.AF_INET if disk.tcp else socket.AF_UNIX)
    client.settimeout(START_MAX)
    try:
        client.connect(("127.0.0.1", address.port) if disk.tcp else str(address.socket))
    except OSError:
        client.close()
        raise
    return client


def _stop(pid: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STOP_MAX
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while process.poll() is None if pid == process.pid else Path(f"/proc/{pid}").exists():
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _uri(server: Server, disk: Disk, address: Address) -> str:
    if disk.tcp:
        # By name: it is what the certificates are made out to.
        uri = NbdUri(host="localhost" if disk.tls else "127.0.0.1", port=address.port, export=server.export)
    else:
        uri = NbdUri(socket=str(address.socket), export=server.export)
    if not disk.tls:
        return str(uri)
    return f"{str(uri).replace('nbd', 'nbds', 1)}?tls-certificates={disk.tls}"


def _ours(disk: Disk, address: Address) -> list[str]:
    listen = f"nbd://127.0.0.1:{address.port}" if disk.tcp else f"nbd+unix:///?socket={address.socket}"
    command = [sys.executable, "-m", "nbdserver", "serve", "--quiet", "--listen", listen]
    if disk.tls:
        command += ["--tls-certificates", str(disk.tls), "--no-tls-verify"]
    if disk.format == "toml":
        return [*command, str(disk.path)]
    if disk.format == "luks":
        return [*command, str(_luks_configuration(disk, address))]
    command += ["--cache", "none"] if disk.direct else []
    command += ["--read-only"] if disk.read_only else []
    return [*command, "--format", disk.format, str(disk.path)]


def _luks_configuration(disk: Disk, address: Address) -> Path:
    path = address.directory / "exports.toml"
    layers = f'{{type="luks", key-file="{disk.key}"}}, {{type="file", path="{disk.path}"}}'
    text = f"[exports.disk]\ndefault = true\nread_only = {json.dumps(disk.read_only)}\nlayers = [{layers}]\n"
    if address.directory.is_dir():
        path.write_text(text)
    return path


def _qemu_nbd(aio: str) -> Callable[[Disk, Address], list[str] | None]:
    def command(disk: Disk, address: Address) -> list[str] | None:
        if disk.format == "toml" or (aio == "native" and not disk.direct):
            return None  # native: QEMU has it for direct I/O only
        words = ["qemu-nbd", "--persistent", "--shared=1100", f"--aio={aio}", "--discard=unmap"]
        words += ["--cache=none" if disk.direct else "--cache=writeback"]
        words += ["--bind=127.0.0.1", f"--port={address.port}"] if disk.tcp else [f"--socket={address.socket}"]
        words += ["--read-only"] if disk.read_only else []
        if disk.tls:
            creds = f"tls-creds-x509,id=tls,dir={disk.tls},endpoint=server,verify-peer=off"
            words += ["--object", creds, "--tls-creds", "tls"]
        # Unlocked, so that all can serve the same file. It costs nothing on the way of a request.
        options = f"driver={disk.format},file.driver=file,file.locking=off,file.filename={disk.path}"
        if disk.key:
            words += ["--object", f"secret,id=key,file={disk.key}"]
            options += ",key-secret=key"
        return [*words, "--image-opts", options]

    return command


def _nbdkit(disk: Disk, address: Address) -> list[str] | None:
    if disk.direct or disk.format not in ("raw", "luks"):
        return None
    words = ["nbdkit", "--foreground"]
    words += [f"--port={address.port}", "--ipaddr=127.0.0.1"] if disk.tcp else [f"--unix={address.socket}"]
    words += ["--readonly"] if disk.read_only else []
    words += ["--tls=require", f"--tls-certificates={disk.tls}"] if disk.tls else []
    words += ["--filter=luks"] if disk.format == "luks" else []
    words += ["file", str(disk.path)]
    return [*words, f"passphrase=+{disk.key}"] if disk.format == "luks" else words


def _nbd_server(disk: Disk, address: Address) -> list[str] | None:
    if disk.direct or disk.format != "raw" or disk.tls:
        return None
    lines = ["[generic]", "listenaddr = 127.0.0.1", f"port = {address.port}"]
    lines += [] if disk.tcp else [f"unixsock = {address.socket}"]
    lines += ["[disk]", f"exportname = {disk.path}", f"readonly = {json.dumps(disk.read_only)}"]
    configuration = address.directory / "config"
    if address.directory.is_dir():
        configuration.write_text("\n".join(lines) + "\n")
    return ["nbd-server", "-C", str(configuration), "-p", str(address.directory / "pid")]


#: Ours first. A program that can be set up in several ways is there once for each.
SERVERS = (
    Server(OURS, sys.executable, _ours),
    Server("qemu-nbd threads", "qemu-nbd", _qemu_nbd("threads")),
    Server("qemu-nbd io_uring", "qemu-nbd", _qemu_nbd("io_uring")),
    Server("qemu-nbd native", "qemu-nbd", _qemu_nbd("native")),
    Server("nbdkit", "nbdkit", _nbdkit),
    Server("nbd-server", "nbd-server", _nbd_server, export="disk", forks=True),
)
