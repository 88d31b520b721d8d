"""The command line: what is asked of the server, what is printed, and how it ends.

``serve`` runs with a server that only takes notes here; the real one is tested end to end elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nbdserver import client
from nbdserver.bounds import DEFAULTS
from nbdserver.cli import main
from nbdserver.errors import ConfigError, ProtocolError
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Graph
from nbdserver.handshake import REPLY_MAGIC, Begin, End, ExportInfo, Handshake
from nbdserver.layer import Layer
from nbdserver.limits import MIB
from nbdserver.listening import ListenConfig, Listener
from nbdserver.tls import NO_TLS
from nbdserver.uri import NbdUri, parse


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a directory of its own, with a raw image in it."""
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(4096))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


# -- serve ---------------------------------------------------------------------------------------------------------


class Notes:
    """A server that serves nothing: it opens layers as the real one does, and notes what it was told."""

    made: Notes

    def __init__(self, **settings: Any) -> None:
        Notes.made = self
        self.settings = settings
        self.exports: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.listeners: list[Listener] = []
        self.graph = Graph()
        self.over = threading.Event()

    def export(self, name: str, layer: Layer, **options: Any) -> None:
        self.calls.append("export")
        self.graph.open(layer, FileOpener(self.graph, Files(), read_only=options["read_only"]))
        self.exports[name] = {"layer": layer, **options}

    def use_makers(self, makers: Sequence[Any]) -> None:
        assert not makers

    def start(self) -> None:
        self.calls.append("start")
        places = [ListenConfig.of(place) for place in self.settings["listen"]]
        real = [parse(str(place.address).replace(":0", ":4711")) for place in places]
        self.listeners = [Listener(place, address, []) for place, address in zip(places, real, strict=True)]

    def wait(self) -> None:
        self.on_ready()
        self.over.wait(10)

    def on_ready(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def stop(self) -> None:
        self.calls.append("stop")
        for export in self.exports.values():
            self.graph.close(export["layer"])
        self.over.set()

    def stats(self) -> dict[str, Any]:
        return {"requests": 5}


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Notes]]:
    module = types.ModuleType("nbdserver.server")
    module.Server = Notes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nbdserver.server", module)
    before = signal.getsignal(signal.SIGTERM)
    yield Notes
    assert signal.getsignal(signal.SIGTERM) is before, "signal handlers are put back"


@pytest.mark.usefixtures("notes")
def test_serve_an_image() -> None:
    done = run("serve", "disk.img", "--format", "raw")
    assert (done.exit_code, done.stdout) == (0, "nbd://127.0.0.1:10809/disk.img\nnbd://127.0.0.1:10809\nready\n")
    server = Notes.made
    assert server.calls == ["export", "start", "stop"]
    assert server.settings["listen"] == ("nbd://127.0.0.1:10809",)
    export = server.exports["disk.img"]
    assert (export["layer"].type, export["read_only"], export["default"]) == ("raw", False, True)


@pytest.mark.usefixtures("notes")
def test_serve_a_probed_raw_image_read_only_and_say_so() -> None:
    done = run("serve", "disk.img")
    assert Notes.made.exports["disk.img"]["read_only"]
    assert done.stderr == (
        "nbdserver: disk.img was probed as raw and is served read-only; if it is a raw disk, say so: format raw\n"
    )


@pytest.mark.usefixtures("notes")
def test_serve_several_images_with_no_default() -> None:
    Path("b c.img").write_bytes(bytes(512))
    done = run("serve", "-f", "raw", "disk.img", "b c.img", "-l", "nbd://[::1]:0", "-l", "nbd+unix:///?socket=s")
    assert done.stdout.splitlines() == [
        "nbd://[::1]:4711/disk.img",
        "nbd+unix:///disk.img?socket=s",
        "nbd://[::1]:4711/b%20c.img",
        "nbd+unix:///b%20c.img?socket=s",
        "ready",
    ]
    assert not any(export["default"] for export in Notes.made.exports.values())


CONFIG = """
listen = ["nbd://127.0.0.1:0"]
roots = ["images"]
[engine]
backend = "threads"
workers = 3
[exports.disk]
image = "disk.img"
format = "raw"
description = "a disk"
[exports.memory]
layers = [{type = "memory", size = "1M"}]
"""


@pytest.mark.usefixtures("notes")
@pytest.mark.parametrize("arguments", [(), ("exports.toml",)])
def test_serve_a_configuration(arguments: tuple[str, ...]) -> None:
    Path("exports.toml").write_text(CONFIG)
    done = run("serve", *arguments)
    assert done.stdout == "nbd://127.0.0.1:4711/disk\nnbd://127.0.0.1:4711/memory\nready\n"
    settings = dict(Notes.made.settings)
    settings.pop("log")
    assert settings == {
        "listen": ("nbd://127.0.0.1:0",),
        "backend": "threads",
        "workers": 3,
        "pool": 128 * MIB,
        "fault_threads": 8,
        "roots": ("images",),
        "record": None,
        "tls": NO_TLS,
        "ready": [],
        "bounds": DEFAULTS,
    }
    assert Notes.made.exports["disk"]["description"] == "a disk"
    assert not Notes.made.exports["memory"]["read_only"]


@pytest.mark.usefixtures("notes")
def test_options_go_before_the_configuration() -> None:
    Path("exports.toml").write_text(CONFIG)
    options = "--backend io_uring --workers 1 --pool 64M --record rec --root /r --read-only -l nbd://h".split()  # noqa: SIM905
    assert run("serve", "exports.toml", *options).exit_code == 0
    settings = Notes.made.settings
    assert (settings["backend"], settings["workers"], settings["pool"]) == ("io_uring", 1, 64 * MIB)
    assert (settings["record"], settings["roots"]) == ("rec", ("images", "/r"))
    assert settings["listen"] == ("nbd://h:10809",)
    assert all(export["read_only"] for export in Notes.made.exports.values())


@pytest.mark.usefixtures("notes")
def test_how_images_are_used() -> None:
    """The options have the names and values of qemu-nbd's."""
    options = "--cache none --aio threads --discard ignore --detect-zeroes on"
    assert run("serve", "disk.img", "-f", "raw", *options.split()).exit_code == 0
    (export,) = Notes.made.exports.values()
    assert not export["discard"]
    layer = export["layer"]
    assert (layer.type, layer.detect_zeroes) == ("detect-zeroes", "on")
    file = layer.file.layer.file.layer
    assert (file.type, file.cache, file.aio) == ("file", "none", "threads")


@pytest.mark.usefixtures("notes")
def test_serve_json() -> None:
    [line] = run("serve", "-f", "raw", "disk.img", "--json").stdout.splitlines()
    assert json.loads(line) == {
        "pid": os.getpid(),
        "exports": [
            {
                "name": "disk.img",
                "size": 4096,
                "format": "raw",
                "read_only": False,
                "description": "",
                "default": True,
                "tls": False,
                "uris": ["nbd://127.0.0.1:10809/disk.img", "nbd://127.0.0.1:10809"],
            }
        ],
    }


def test_verbose_logs_exports_and_counters(notes: type[Notes]) -> None:
    done = run("serve", "-f", "raw", "-v", "disk.img")
    assert done.stderr == (
        "nbdserver: export 'disk.img': raw, 4096 bytes, writable, the default export\n" + '{"requests": 5}\n'
    )


def test_server_logs_to_stderr(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "start", lambda self: self.settings["log"]("hello"))
    assert run("serve", "-f", "raw", "disk.img").stderr == "nbdserver: hello\n"


def test_quiet_logs_nothing(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "start", lambda self: self.settings["log"]("hello"))
    done = run("serve", "-q", "disk.img")
    assert (done.stderr, done.stdout) == ("", "ready\n")


def test_sigusr1_prints_counters(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    def on_ready(self: Notes) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def stats(self: Notes) -> dict[str, Any]:
        self.over.set()
        return {"requests": 7}

    monkeypatch.setattr(notes, "on_ready", on_ready)
    monkeypatch.setattr(notes, "stats", stats)
    assert run("serve", "-f", "raw", "disk.img").stderr == '{"requests": 7}\n'


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_stop(notes: type[Notes], monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(notes, "on_ready", lambda self: os.kill(os.getpid(), number))
    done = run("serve", "disk.img")
    assert (done.exit_code, Notes.made.calls) == (0, ["export", "start", "stop"])


def test_second_signal_ends_at_once(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def stop(self: Notes) -> None:
        if not ended:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.5)  # The main thread takes the signal meanwhile.
        self.over.set()

    monkeypatch.setattr(notes, "stop", stop)
    monkeypatch.setattr(os, "_exit", ended.append)
    run("serve", "disk.img")
    assert ended == [128 + signal.SIGINT]


def test_server_that_stops_by_itself_ends_it(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "on_ready", lambda self: self.over.set())
    assert run("serve", "disk.img").exit_code == 0


def test_pid_file_is_there_while_connections_are_accepted(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def on_ready(self: Notes) -> None:
        seen.append(Path("pid").read_text())
        self.over.set()

    monkeypatch.setattr(notes, "on_ready", on_ready)
    assert run("serve", "disk.img", "--pid-file", "pid").exit_code == 0
    assert seen == [f"{os.getpid()}\n"]
    assert sorted(os.listdir()) == ["disk.img"]


def failing(cause: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise cause

    return fail


def test_failure_to_start_stops_the_server(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "start", failing(ConfigError("cannot listen")))
    done = run("serve", "disk.img", "-q")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "nbdserver: cannot listen\n")
    assert Notes.made.calls == ["export", "stop"]


def test_failure_to_stop_is_told(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "stop", failing(OSError(28, "No space left on device")))
    done = run("serve", "disk.img", "-q")
    assert (done.exit_code, done.stderr) == (1, "nbdserver: [Errno 28] No space left on device\n")


@pytest.mark.usefixtures("notes")
def test_error_of_a_layer_is_told_where_it_is() -> None:
    Path("exports.toml").write_text(
        '[exports.x]\nlayers = [{type = "raw", offset = "1M"}, {type = "file", path = "disk.img"}]'
    )
    done = run("serve", "exports.toml")
    assert (done.exit_code, done.stderr) == (
        1,
        "nbdserver: exports.toml: [exports.x]: offset: found 1048576, but the file has 4096 bytes\n",
    )


@pytest.mark.usefixtures("notes")
def test_missing_image() -> None:
    done = run("serve", "nosuch.img")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "nbdserver: nosuch.img: cannot be opened for reading: No such file or directory\n"


@pytest.mark.usefixtures("notes")
def test_missing_configuration() -> None:
    done = run("serve", "nosuch.toml")
    assert (done.exit_code, done.stderr) == (1, "nbdserver: nosuch.toml: cannot be read: No such file or directory\n")


@pytest.mark.usefixtures("notes")
def test_images_of_one_name() -> None:
    done = run("serve", "disk.img", "./disk.img")
    assert done.exit_code == 1
    assert done.stderr.startswith("nbdserver: disk.img and ./disk.img are both called disk.img: ")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ((), "name a configuration or images (there is no exports.toml here)"),
        (("a.toml", "b.toml"), "name one configuration, or images: not several, not both"),
        (("a.toml", "disk.img"), "name one configuration, or images: not several, not both"),
        (("a.toml", "--format", "raw"), "--format is for images; a configuration says each export's format itself"),
        (("a.toml", "--cache", "none"), "--cache is for images; a configuration says each export's cache itself"),
        (("a.toml", "--detect-zeroes", "on"), "--detect-zeroes is for images; a configuration says each export's"),
        (("disk.img", "--cache", "directsync"), "'directsync' is not one of 'writeback', 'writethrough', 'none', 'uns"),
        (("disk.img", "--aio", "native"), "'native' is not one of 'io_uring', 'threads'"),
        (("disk.img", "--aio", "io_uring", "--backend", "threads"), '--aio: found "io_uring", but the engine'),
        (("disk.img", "--detect-zeroes", "unmap", "--discard", "ignore"), "--detect-zeroes: found"),
        (("disk.img", "-v", "-q"), "--verbose and --quiet contradict each other"),
        (("disk.img", "--fd", "0", "-l", "nbd://h"), "--fd and --listen contradict each other"),
        (("disk.img", "--fd", "-1"), "-1 is not in the range"),
        (("disk.img", "--listen", "nbds://h"), "'nbds://h' asks for TLS, which is begun on any address"),
        (("disk.img", "--listen", "nbd://h/x"), "'nbd://h/x' names the export 'x'"),
        (("disk.img", "--format", "rwa"), "there is no layer 'rwa'; did you mean 'raw'?"),
        (("disk.img", "--format", "memory"), "the layer 'memory' is no image format"),
        (("disk.img", "--pool", "1K"), "found '1K', allowed is a size from 32M to 1T"),
        (("disk.img", "--pool", "x"), "found 'x', allowed is a size in bytes"),
        (("disk.img", "--pool", "9" * 5000), "allowed is a size in bytes"),
        (("disk.img", "--workers", "0"), "0 is not in the range 1<=x<=256"),
        (("disk.img", "--backend", "fast"), "'fast' is not one of 'auto', 'io_uring', 'threads'"),
        (("--nosuch",), "No such option"),
    ],
)
@pytest.mark.usefixtures("notes")
def test_wrong_usage(arguments: tuple[str, ...], cause: str) -> None:
    done = run("serve", *arguments)
    assert done.exit_code == 2
    assert cause in done.stderr
    assert "Usage: " in done.stderr


# -- check-config --------------------------------------------------------------------------------------------------


def test_check_config_opens_nothing() -> None:
    Path("c.toml").write_text('[exports.a]\nimage = "nosuch.img"\n[exports.b]\nimage = "nosuch"\nformat = "raw"')
    done = run("check-config", "c.toml")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "c.toml: 2 exports, no errors\n", "")


def test_check_config_refuses() -> None:
    Path("c.toml").write_text("[exports.a]\nimage = 1")
    done = run("check-config", "c.toml")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "nbdserver: c.toml: [exports.a]: image: found 1, allowed is a string\n"


def test_check_config_open_opens_what_is_there() -> None:
    Path("c.toml").write_text('[exports.a]\nimage = "disk.img"')
    assert run("check-config", "--open", "c.toml").stdout == "c.toml: 1 export, no errors\n"


def test_check_config_open_tells_everything_that_is_wrong() -> None:
    Path("c.toml").write_text('[exports.a]\nimage = "x"\n[exports.b]\nimage = "disk.img"\n[exports.c]\nimage = "y"')
    done = run("check-config", "--open", "c.toml")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        "nbdserver: 'a': x: cannot be opened for reading: No such file or directory\n"
        "nbdserver: 'c': y: cannot be opened for reading: No such file or directory\n"
    )


# -- list ----------------------------------------------------------------------------------------------------------


def test_list_a_configuration() -> None:
    Path("exports.toml").write_text(CONFIG + 'default = true\n[exports.probed]\nimage = "disk.img"')
    done = run("list")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "'disk': raw, 4096 bytes, writable: a disk",
        "'memory': memory, 1048576 bytes, writable, the default export",
        "'probed': raw, 4096 bytes, read-only",
    ]


def test_list_json() -> None:
    Path("c.toml").write_text('[exports.a]\nimage = "x"\n[exports.b]\nimage = "disk.img"\ndescription = "d"')
    done = run("list", "--json", "c.toml")
    assert done.exit_code == 1
    missing, found = json.loads(done.stdout)["exports"]
    assert missing == {
        "name": "a",
        "description": "",
        "default": False,
        "error": "x: cannot be opened for reading: No such file or directory",
    }
    assert found == {
        "name": "b",
        "description": "d",
        "default": False,
        "size": 4096,
        "format": "raw",
        "read_only": True,
    }


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def shake_hands(connection: socket.socket, exports: dict[str, ExportInfo]) -> None:
    """The server's side of the handshake, with `Handshake` to decide."""
    handshake = Handshake(lambda: exports, peer="test")
    connection.sendall(b"NBDMAGICIHAVEOPT\0\3")
    assert handshake.client_flags(int.from_bytes(receive(connection, 4))) is None
    while True:
        _, option, length = struct.unpack(">8sII", receive(connection, 16))
        action = handshake.option(option, receive(connection, length))
        connection.sendall(action.data)
        if isinstance(action, End | Begin):
            return


@pytest.fixture
def peer() -> Iterator[Callable[[Callable[[socket.socket], None]], NbdUri]]:
    """Starts a server on a Unix socket that does one thing with its one connection."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("peer.sock")
        listening.listen()
        threads: list[threading.Thread] = []

        def start(serve: Callable[[socket.socket], None]) -> NbdUri:
            def accept() -> None:
                connection, _ = listening.accept()
                # A client that is refused, or has seen enough, leaves without a word.
                with connection, contextlib.suppress(EOFError, ConnectionError):
                    serve(connection)

            threads.append(threading.Thread(target=accept))
            threads[0].start()
            return NbdUri(socket="peer.sock")

        yield start
        for thread in threads:
            thread.join()


EXPORTS = {"b": ExportInfo("b", 512, "second"), "a b": ExportInfo("a b", 1 << 62, read_only=True)}

Peer = Callable[[Callable[[socket.socket], None]], NbdUri]


def test_list_a_server(peer: Peer) -> None:
    address = peer(lambda connection: shake_hands(connection, EXPORTS))
    done = run("list", str(address))
    assert done.stdout == "'a b': 4611686018427387904 bytes, read-only\n'b': 512 bytes, writable: second\n"


def test_list_one_export_of_a_server_as_json(peer: Peer) -> None:
    address = peer(lambda connection: shake_hands(connection, EXPORTS))
    done = run("list", "--json", str(address.with_export("b")))
    assert json.loads(done.stdout) == {
        "exports": [{"name": "b", "size": 512, "read_only": False, "description": "second"}]
    }


def test_list_an_export_that_is_not_there(peer: Peer) -> None:
    address = peer(lambda connection: shake_hands(connection, EXPORTS)).with_export("c")
    done = run("list", str(address))
    assert (done.exit_code, done.stderr) == (
        1,
        f"nbdserver: {address}: the server refused option 6: no export is named 'c'\n",
    )


def test_list_where_nobody_listens() -> None:
    done = run("list", "nbd+unix:///?socket=nosuch")
    assert (done.exit_code, done.stderr) == (
        1,
        "nbdserver: nbd+unix:///?socket=nosuch: No such file or directory\n",
    )


@pytest.mark.parametrize(
    ("sent", "cause"),
    [
        (b"", "the server closed the connection"),
        (b"HTTP/1.0 400 Bad request", "this is no NBD server: its greeting is another"),
        (b"NBDMAGIC" + bytes(10), "the server does not speak the fixed newstyle handshake"),
        (b"NBDMAGICIHAVEOPT\0\2", "the server does not speak the fixed newstyle handshake"),
        (b"NBDMAGICIHAVEOPT\0\3" + bytes(20), "the server answered option 3 with something that is no reply to it"),
        (
            b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIII", REPLY_MAGIC, 3, 2, 1 << 31),
            "the server answered option 3 with something that is no reply to it",
        ),
        (
            b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIIII", REPLY_MAGIC, 3, 2, 4, 1),
            "the server listed a name that is longer than the reply",
        ),
        (
            b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIIIIB", REPLY_MAGIC, 3, 2, 5, 1, 255),
            "the server sent a string that is not UTF-8",
        ),
        (
            b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIII", REPLY_MAGIC, 3, 1, 0)[:-1],
            "the server closed the connection",
        ),
        (
            b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIII", REPLY_MAGIC, 3, (1 << 31) + 2, 0),
            "the server refused option 3: 0x80000002",
        ),
    ],
)
def test_server_that_is_none(peer: Peer, sent: bytes, cause: str) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass

    with pytest.raises(ProtocolError) as caught:
        client.list_exports(peer(serve))
    assert str(caught.value).startswith(f"nbd+unix:///?socket=peer.sock: {cause}")


# -- layers, help --------------------------------------------------------------------------------------------------


def test_layers_describes_types_and_keys() -> None:
    done = run("layers")
    assert done.exit_code == 0
    assert "file: a regular file or block device" in done.stdout
    assert "    offset: Where in it the disk begins. (default: 0)\n" in done.stdout


@pytest.mark.parametrize("command", [(), ("serve",), ("check-config",), ("list",), ("layers",)])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(command: tuple[str, ...], option: str) -> None:
    done = run(*command, option)
    assert done.exit_code == 0
    assert done.stdout.startswith("Usage: ")


def test_version() -> None:
    assert run("--version").stdout.startswith("nbdserver, version ")


def test_importing_loads_nothing_more() -> None:
    code = "import sys, nbdserver; print([m for m in sys.modules if m.startswith(('nbdserver.', 'click'))])"
    import subprocess

    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"
