"""The pytest fixture ``nbd_server``: a test asks for an image or a stack of layers and gets an NBD URI.

    def test_boots(nbd_server):
        uri = nbd_server("disk.qcow2")
        ...

    def test_partition(nbd_server, tmp_path):
        uri = nbd_server(Raw(file=File(path=str(tmp_path / "disk.img")), offset=1 << 20))
        ...

Needs no root and no configuration: servers listen on Unix sockets in a directory of the test's own and stop when the
test ends. What goes wrong while they stop fails the test.

`nbd_server` runs the server in the test's process; `nbd_server.process` runs ``nbdserver serve`` as one of its own, for
tests that kill it or look at its log.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest

from nbdserver import uri
from nbdserver.config import ExportConfig
from nbdserver.layer import Layer
from nbdserver.limits import PROCESS_START_TIMEOUT, PROCESS_STOP_TIMEOUT
from nbdserver.uri import NbdUri

if TYPE_CHECKING:
    from nbdserver.server import Server


class ServerProcess:
    """``nbdserver serve ARGUMENTS --listen URI`` as a child process. A context manager; serves from `start` on.

    ``command`` runs before ``nbdserver`` (a wrapper such as ``prlimit``); ``log`` is where its output goes.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        listen: NbdUri,
        log: Path,
        command: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> None:
        self.listen = listen
        self._log = log
        self._cwd = cwd
        self._command = [*command, sys.executable, "-m", "nbdserver", "serve", *(os.fspath(word) for word in arguments)]
        self._command += ["--listen", str(listen)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> ServerProcess:
        """Start and wait until it accepts connections. Raises RuntimeError with its output if it does not."""
        assert self._process is None, "already running"
        with self._log.open("ab") as log:
            before = log.tell()
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._cwd)
        deadline = time.monotonic() + PROCESS_START_TIMEOUT
        while not self._is_ready(before):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{' '.join(self._command)} does not serve:\n{self.log}")
            time.sleep(0.01)
        return self

    def uri(self, export: str = "") -> str:
        """The URI of one of its exports."""
        return str(self.listen.with_export(export))

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """All it has printed so far, over all its runs."""
        return self._log.read_text(errors="replace")

    def stats(self) -> dict[str, Any]:
        """Its counters now (`Server.stats`), as it prints them on SIGUSR1."""
        assert self._process is not None, "not running"
        before = self._log.stat().st_size
        self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + PROCESS_START_TIMEOUT
        while time.monotonic() < deadline:
            for line in self._log.read_bytes()[before:].splitlines(keepends=True):
                if line.startswith(b"{") and line.endswith(b"\n"):
                    stats: dict[str, Any] = json.loads(line)
                    return stats
            time.sleep(0.01)
        raise RuntimeError(f"the server tells no counters:\n{self.log}")

    def kill(self) -> None:
        """Stop it without mercy (SIGKILL). It can be started again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def terminate(self) -> int:
        """Ask it to stop (SIGTERM) and return its exit status. It can be started again."""
        assert self._process is not None, "not running"
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait until it has stopped; its exit status. Raises subprocess.TimeoutExpired, having killed it."""
        assert self._process is not None, "not running"
        try:
            return self._process.wait(PROCESS_STOP_TIMEOUT)
        finally:
            self.kill()

    def _is_ready(self, before: int) -> bool:
        """Whether the log says so, past its first ``before`` bytes."""
        return b"\nready\n" in b"\n" + self._log.read_bytes()[before:]

    def __enter__(self) -> ServerProcess:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            status = self.terminate()
            if error is None and status != 0:
                raise RuntimeError(f"the server ended with status {status}:\n{self.log}")


class NbdServers:
    """What the fixture ``nbd_server`` is: call it to serve an image or a stack for the rest of the test."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory, self._stack = directory, stack
        self._numbers = itertools.count()

    def __call__(
        self,
        served: Layer | str | os.PathLike[str],
        *,
        format: str | None = None,
        read_only: bool = False,
        name: str = "",
        tcp: bool = False,
        **options: Any,
    ) -> str:
        """Serve a layer, or the image at a path, and return its URI.

        ``format`` is the image's (None: probed; an image probed as raw is served read-only). ``tcp`` listens on
        loopback rather than on a Unix socket. ``options`` are `nbdserver.Server`'s.
        """
        return self.start(served, format=format, read_only=read_only, name=name, tcp=tcp, **options)[1]

    def start(
        self,
        served: Layer | str | os.PathLike[str],
        *,
        format: str | None = None,
        read_only: bool = False,
        name: str = "",
        tcp: bool = False,
        **options: Any,
    ) -> tuple[Server, str]:
        """The same, but the server too: for its counters, or to export more."""
        from nbdserver.server import Server

        if not isinstance(served, Layer):
            image = ExportConfig(name, image=os.path.abspath(served), format=format, read_only=read_only or None)
            served, read_only = image.build()
        options.setdefault("listen", ["nbd://127.0.0.1:0" if tcp else str(self.socket())])
        server = self._stack.enter_context(Server(**options))
        server.export(name, served, read_only=read_only)
        return server, str(uri.parse(server.listening[0]).with_export(name))

    def process(
        self,
        *arguments: str | os.PathLike[str],
        tcp: bool = False,
        listen: NbdUri | None = None,
        command: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> ServerProcess:
        """A started ``nbdserver serve ARGUMENTS``; see `ServerProcess`. Listens on a Unix socket or TCP port of its
        own, or where told."""
        number = next(self._numbers)
        process = ServerProcess(
            arguments,
            listen=listen or (NbdUri(host="127.0.0.1", port=free_port()) if tcp else self.socket()),
            log=self._directory / f"{number}.log",
            command=command,
            cwd=cwd,
        )
        return self._stack.enter_context(process)

    def socket(self) -> NbdUri:
        """An address on a Unix socket of the test's own."""
        return NbdUri(socket=str(self._directory / f"{next(self._numbers)}.sock"))


def free_port() -> int:
    """A TCP port of loopback that is free now. Another process may take it: only for tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def nbd_server() -> Iterator[NbdServers]:
    """Serves images and stacks for one test: see `nbdserver.testing`."""
    # Not pytest's tmp_path: a socket's path has at most 107 bytes, and that one is long.
    with tempfile.TemporaryDirectory(prefix="nbd-") as directory, contextlib.ExitStack() as stack:
        yield NbdServers(Path(directory), stack)
