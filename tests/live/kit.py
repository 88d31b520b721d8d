"""A disk of several images, served by this process, and the control commands that change them."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdserver.commands import Commands
from nbdserver.config import load
from nbdserver.control import _bind
from nbdserver.jobs import Job
from nbdserver.live import chain
from nbdserver.server import Export
from nbdserver.service import Service
from nbdserver.testing import NbdServers
from nbdserver.uri import NbdUri
from tests.interop.wire import FLUSH, READ, WRITE, WRITE_ZEROES, Wire
from tests.serving import create, qemu_io

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
SOON = 120.0


#: Images that have been made: to make them anew takes longer than most tests.
_made: dict[tuple[str, int], bytes] = {}


class Live:
    """The service, and clients of its export "vm"."""

    def __init__(self, nbd_server: NbdServers, directory: Path, backend: str) -> None:
        self.directory, self.engine = directory, backend
        self.address: NbdUri = nbd_server.socket()
        self.log: list[str] = []
        self._service: Service | None = None
        self._commands: dict[str, Any] = {}

    # -- serving ---------------------------------------------------------------------------------------------------

    def chain(self, count: int = 3, *, size: int = SIZE, **options: Any) -> list[Path]:
        """Images 0.qcow2, 1.qcow2 on it, and so on, each with a letter of its own in places of its own."""
        paths: list[Path] = []
        key = f"{size}-{sorted(options.items())}"
        for number in range(count):
            path = self.directory / f"{number}.qcow2"
            if (key, number) not in _made:
                create(path, size, backing=paths[-1] if paths else None, **options)
                letter = ord("a") + number
                qemu_io(path, f"write -q -P {letter} {number * 512}k 1M", f"write -q -P {letter} {4 + number}M 64k")
                _made[key, number] = path.read_bytes()
            path.write_bytes(_made[key, number])
            paths.append(path)
        return paths

    def serve(self, path: Path, *, more: str = "", head: str = "", engine: str = "") -> Live:
        self.configure(path, more=more, head=head, engine=engine)
        return self.start()

    def start(self) -> Live:
        """Serve what the configuration says."""
        config = str(self.directory / "exports.toml")
        self._service = Service(load(config), reread=lambda: load(config), log=self.log.append)
        self._service.start()
        self._commands = dict(Commands(self._service, str(self.directory)).table())
        return self

    def configure(self, path: Path, *, more: str = "", head: str = "", engine: str = "") -> None:
        (self.directory / "exports.toml").write_text(
            f'listen = ["{self.address}"]\n{head}\n[engine]\nbackend = "{self.engine}"\n{engine}\n'
            f'[exports.vm]\nimage = "{path}"\nformat = "{path.suffix[1:]}"\n{more}'
        )

    def stop(self) -> None:
        service, self._service = self._service, None
        if service is not None:
            service.stop()

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    @property
    def export(self) -> Export:
        return self.service.server.exports["vm"]

    def uri(self, export: str = "vm") -> str:
        return str(self.address.with_export(export))

    @property
    def files(self) -> list[str]:
        """The chain under the export, topmost first."""
        return [Path(str(image.filename)).name for image in chain.images(self.export.root)]

    @property
    def types(self) -> list[str]:
        """The filters above it."""
        layer, types = self.export.root, []
        while layer.is_filter:
            types.append(layer.type)
            layer = layer.file.layer  # type: ignore[attr-defined]
        return types

    @contextlib.contextmanager
    def reader(self, path: Path) -> Iterator[None]:
        """Another program that has an image open."""
        command = ["qemu-io", "-r", "-f", "qcow2", str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
            assert program.stdin is not None and program.stdout is not None
            program.stdin.write(b"length\n")
            program.stdin.flush()
            assert b"MiB" in program.stdout.readline()
            yield
            program.stdin.close()

    @property
    def modes(self) -> set[str]:
        """How the files of all images are cached."""
        return {chain.mode_of(image).cache for image in chain.images(self.export.root)}

    # -- commands --------------------------------------------------------------------------------------------------

    def execute(self, command: str, **arguments: Any) -> Any:
        """A control command, as the control socket carries it out; without ``export`` for "vm"."""
        if command.startswith(("block", "query-snapshots")) and "id" not in arguments:
            arguments.setdefault("export", "vm")
        function = self._commands[command]
        return function(**_bind(command, function, arguments))

    def job(self, id: str) -> Job:
        return self.service.server.jobs.get(id)

    def run(self, command: str, **arguments: Any) -> Job:
        """Begin a job, and let it come to its end."""
        return self.end(self.execute(command, **arguments)["id"])

    def end(self, id: str) -> Job:
        """Let a job come to its end, completing it if it wants that."""
        job = self.job(id)
        deadline = time.monotonic() + SOON
        while not job.wait(0.005):
            assert time.monotonic() < deadline, job.describe()
            if job.status.value == "ready":
                job.complete()
        return job

    def ready(self, id: str) -> Job:
        """Wait until a job is ready."""
        job, deadline = self.job(id), time.monotonic() + SOON
        while job.status.value != "ready":
            assert job.status.value == "running" and time.monotonic() < deadline, job.describe()
            time.sleep(0.005)
        return job

    # -- a client --------------------------------------------------------------------------------------------------

    def connect(self, export: str = "vm") -> Client:
        return Client(self.uri(export))


class Client:
    """One connection, a request at a time."""

    def __init__(self, uri: str) -> None:
        self.wire = Wire(uri)
        self.wire.go()

    def read(self, offset: int = 0, length: int = SIZE) -> bytes:
        self.wire.request(READ, offset, length)
        assert self.wire.reply() == (0, 0)
        return self.wire.receive(length)

    def write(self, offset: int, data: bytes) -> None:
        self.wire.request(WRITE, offset, len(data), data=data)
        assert self.wire.reply() == (0, 0)

    def zero(self, offset: int, length: int) -> None:
        self.wire.request(WRITE_ZEROES, offset, length)
        assert self.wire.reply() == (0, 0)

    def flush(self) -> None:
        self.wire.request(FLUSH, 0, 0)
        assert self.wire.reply() == (0, 0)

    def close(self) -> None:
        self.wire.close()


class Writer:
    """A client that writes all the time, on a thread, until it is told to stop."""

    def __init__(self, client: Client, content: bytes) -> None:
        self._client, self.content = client, bytearray(content)
        self._over = threading.Event()
        self.count = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                offset = self.count * 37 * KIB % (len(self.content) - 4 * KIB)
                data = self.count.to_bytes(8, "big") * 512
                self._client.write(offset, data)
                self.content[offset : offset + len(data)] = data
                self.count += 1
        except BaseException as error:
            self._error = error

    def stop(self) -> bytes:
        """The content that the disk has now."""
        self._over.set()
        self._thread.join(SOON)
        if self._error is not None:
            raise self._error
        return bytes(self.content)
