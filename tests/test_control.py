"""The control socket: who may use it, what it bears, and what its commands do to a server."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner, Result

from nbdserver import control
from nbdserver.cli import main
from nbdserver.control import Control, ControlClient, RemoteError
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.limits import CONTROL_CONNECTIONS_COUNT_MAX, CONTROL_LINE_MAX
from nbdserver.testing import NbdServers, ServerProcess
from tests.interop.wire import READ, WRITE, Wire
from tests.serving import create, eventually, run, run_json

KIB, MIB = 1 << 10, 1 << 20
SOON = 20.0


class Commands:
    """Commands that do nothing, or what is wanted of the protocol."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Semaphore(0), threading.Event()

    def table(self) -> dict[str, Any]:
        return {"echo": self.echo, "wait": self.wait, "fail": self.fail, "much": lambda: "x" * (32 * MIB)}

    def echo(self, word: str, count: int = 1, kind: Literal["a", "b"] = "a", items: list | None = None) -> Any:  # type: ignore[type-arg]
        return [word * count, kind, items]

    def wait(self) -> None:
        self.entered.release()
        assert self.released.wait(SOON)

    def fail(self, how: str) -> None:
        errors = {
            "config": ConfigError("is wrong", file="f", table="t", key="k"),
            "image": ImageError("is broken", path="p"),
            "request": RequestError(95, "cannot"),
            "time": TimeoutError("too long"),
            "bug": KeyError("a bug"),
        }
        raise errors[how]


class Wired:
    """A client of the socket, byte by byte."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SOON)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")
        self.greeting = self.receive()

    def send(self, data: bytes | dict[str, Any]) -> None:
        self.socket.sendall(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")

    def receive(self) -> Any:
        """The next message; None: the connection has ended."""
        line = self.file.readline()
        return json.loads(line) if line else None

    def ask(self, data: bytes | dict[str, Any]) -> Any:
        self.send(data)
        return self.receive()


@pytest.fixture
def commands() -> Commands:
    return Commands()


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def path(tmp_path: Path, commands: Commands, log: list[str]) -> Iterator[str]:
    path = str(tmp_path / "ctl")
    with Control(path, commands.table(), log=log.append):
        yield path
        commands.released.set()
    assert not os.path.exists(path)


def error(answer: Any) -> tuple[str, str]:
    return answer["error"]["class"], answer["error"]["desc"]


# -- the protocol --------------------------------------------------------------------------------------------------


def test_a_client_is_greeted_and_answered(path: str) -> None:
    client = Wired(path)
    assert client.greeting == {"nbdserver": {"version": "0.1.0", "protocol": 1}}
    assert client.ask({"execute": "echo", "arguments": {"word": "ab", "count": 2, "kind": "b"}, "id": {"x": [1]}}) == {
        "return": ["abab", "b", None],
        "id": {"x": [1]},
    }
    assert client.ask({"execute": "echo", "arguments": {"word": "é", "items": [{"a": 1}]}}) == {
        "return": ["é", "a", [{"a": 1}]]
    }


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"nonsense\n", ("GenericError", "a line is no JSON: Expecting value: line 1 column 1 (char 0)")),
        (b"\xff\xfe\n", ("GenericError", "a line is no JSON: ")),
        (b"[" * 5000 + b"\n", ("GenericError", "a line is no JSON: ")),
        (b"9" * 5000 + b"\n", ("GenericError", "a line is no JSON: ")),
        (b'{"execute": "echo", "id": NaN}\n', ("GenericError", "a line is no JSON: NaN is no number of JSON's")),
        (b"[]\n", ("GenericError", "a request is an object")),
        (b"{}\n", ("GenericError", "execute is missing: the name of a command")),
        (b'{"execute": 5}\n', ("GenericError", "execute is missing: the name of a command")),
        (b'{"execute": "dance"}\n', ("CommandNotFound", 'there is no command "dance"')),
        (
            b'{"execute": "echo", "argument": 5}\n',
            ("GenericError", 'a request has execute, arguments and id, found "argument"'),
        ),
        (b'{"execute": "echo", "arguments": 5}\n', ("GenericError", "arguments of echo are an object")),
        (b'{"execute": "echo"}\n', ("GenericError", "echo: the argument word is missing")),
        (
            b'{"execute": "echo", "arguments": {"word": 5}}\n',
            ("GenericError", "echo: word: found 5, allowed is a string"),
        ),
        (
            b'{"execute": "echo", "arguments": {"word": "", "kind": "c"}}\n',
            ("GenericError", "echo: kind: found \"c\", allowed is 'a' or 'b'"),
        ),
        (
            b'{"execute": "echo", "arguments": {"wrd": ""}}\n',
            ("GenericError", 'echo has no argument "wrd"; there are: word, count, kind, items'),
        ),
        (b'{"execute": "' + b"x" * 1000 + b'"}\n', ("CommandNotFound", 'there is no command "' + "x" * 63 + "...")),
    ],
)
def test_what_is_no_request_is_refused_and_the_next_is_answered(path: str, sent: bytes, told: tuple[str, str]) -> None:
    client = Wired(path)
    kind, words = error(client.ask(sent))
    assert kind == told[0]
    assert words.startswith(told[1]) if told[1].endswith(": ") else words == told[1]
    assert client.ask({"execute": "echo", "arguments": {"word": "a"}})["return"] == ["a", "a", None]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("config", {"class": "ConfigError", "desc": "f: [t]: k: is wrong", "file": "f", "table": "t", "key": "k"}),
        ("image", {"class": "ImageError", "desc": "p: is broken", "path": "p"}),
        ("request", {"class": "OSError", "desc": "cannot", "errno": 95}),
        ("time", {"class": "OSError", "desc": "too long", "errno": None}),
        ("bug", {"class": "InternalError", "desc": "KeyError: 'a bug'"}),
    ],
)
def test_how_a_command_fails_is_told(path: str, how: str, told: dict[str, Any]) -> None:
    client = Wired(path)
    assert client.ask({"execute": "fail", "arguments": {"how": how}, "id": 1}) == {"error": told, "id": 1}
    assert "return" in client.ask({"execute": "echo", "arguments": {"word": "a"}})


def test_requests_sent_ahead_are_answered_in_order_also_after_the_client_has_said_all(path: str) -> None:
    client = Wired(path)
    client.send(b"".join(b'{"execute": "echo", "arguments": {"word": "%d"}}\n\n  \n' % n for n in range(2000)))
    client.socket.shutdown(socket.SHUT_WR)
    assert [client.receive()["return"][0] for _ in range(2000)] == [str(n) for n in range(2000)]
    assert client.receive() is None


# -- bounds --------------------------------------------------------------------------------------------------------


def test_a_line_too_long_ends_the_connection_before_it_is_whole(path: str) -> None:
    client = Wired(path)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.send(b"x" * (4 * CONTROL_LINE_MAX))
    assert error(client.receive())[1].startswith("a line of more than")
    with contextlib.suppress(ConnectionResetError):
        assert client.receive() is None


def test_a_line_of_the_longest_length_is_taken(path: str) -> None:
    client = Wired(path)
    line = b'{"execute": "echo", "arguments": {"word": ""}}'
    assert "return" in client.ask(line + b" " * (CONTROL_LINE_MAX - len(line)) + b"\n")
    assert error(client.ask(line + b" " * (CONTROL_LINE_MAX - len(line) + 1) + b"\n"))[0] == "GenericError"


def test_one_more_client_takes_the_place_of_the_longest_idle(path: str) -> None:
    clients = [Wired(path) for _ in range(CONTROL_CONNECTIONS_COUNT_MAX)]
    assert "return" in clients[0].ask({"execute": "echo", "arguments": {"word": ""}})
    another = Wired(path)
    assert "return" in another.ask({"execute": "echo", "arguments": {"word": ""}})
    assert clients[1].receive() is None
    assert "return" in clients[0].ask({"execute": "echo", "arguments": {"word": ""}})


def test_clients_that_are_served_are_not_hung_up_on(path: str, commands: Commands) -> None:
    clients = [Wired(path) for _ in range(CONTROL_CONNECTIONS_COUNT_MAX)]
    for client in clients:
        client.send({"execute": "wait"})
        assert commands.entered.acquire(timeout=SOON)
    refused = Wired(path)
    assert error(refused.greeting) == ("GenericError", f"{CONTROL_CONNECTIONS_COUNT_MAX} control connections are busy")
    with pytest.raises(RemoteError, match="are busy"):
        ControlClient(path)
    commands.released.set()
    assert all(client.receive() == {"return": None} for client in clients)


def test_a_client_that_does_not_read_is_hung_up_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CONTROL_SEND_TIMEOUT", 0.2)
    client = Wired(path)
    client.send({"execute": "much"})
    other = Wired(path)
    assert "return" in other.ask({"execute": "echo", "arguments": {"word": ""}})
    time.sleep(0.5)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(100):
            client.send({"execute": "echo"})
            time.sleep(0.01)


def test_clients_gone_at_every_stage_harm_nobody(path: str) -> None:
    line = b'{"execute": "echo", "arguments": {"word": "a"}, "id": 5}\n'
    for length in range(len(line) + 1):
        client = Wired(path)
        client.send(line[:length])
        client.socket.close()
    assert "return" in Wired(path).ask(line)


def test_another_user_is_refused(path: str, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = control._UCRED

    class Foreign:
        size = real.size

        @staticmethod
        def unpack(data: bytes) -> tuple[int, int, int]:
            return (1, 777, 777)

    monkeypatch.setattr(control, "_UCRED", Foreign)
    client = Wired(path)
    assert error(client.greeting) == ("GenericError", "user 777 may not control this server")
    assert client.receive() is None
    assert log == ["control: user 777 has been refused"]


def test_commands_that_run_at_the_end_are_answered(path: str, commands: Commands, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    server = Control(other, commands.table(), log=print)
    server.start()
    client, idle = Wired(other), Wired(other)
    client.send({"execute": "wait"})
    client.send({"execute": "wait", "id": "too late"})
    assert commands.entered.acquire(timeout=SOON)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    assert idle.receive() is None
    commands.released.set()
    assert client.receive() == {"return": None}
    stopping.join(SOON)


def test_the_socket_is_its_owners_alone(path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_path_that_is_taken_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"control: cannot listen on .*: Address already in use"):
        Control(path, {}, log=print).start()


def test_a_path_that_a_dead_server_left_is_taken_over(tmp_path: Path) -> None:
    left = str(tmp_path / "ctl")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(left)
    with Control(left, {}, log=print):
        assert Wired(left).greeting


def test_a_client_says_what_is_wrong_with_its_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no server can be controlled at .*: No such file"):
        ControlClient(str(tmp_path / "none"))
    other = str(tmp_path / "other")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(other)
        listener.listen()
        for said, why in (
            (b"", "no server can be controlled at .*: the server hung up"),
            (b"hello\n", "no server can be controlled at"),
            (b'{"QMP": {}}\n', "does not speak version 1"),
            (b'{"nbdserver": {"protocol": 2}}\n', "does not speak version 1"),
        ):
            answering = threading.Thread(target=_say, args=(listener, said))
            answering.start()
            with pytest.raises(ConfigError, match=why):
                ControlClient(other, timeout=SOON)
            answering.join()


def _say(listener: socket.socket, said: bytes) -> None:
    with listener.accept()[0] as accepted:
        accepted.sendall(said)


# -- a server ------------------------------------------------------------------------------------------------------


class Controlled:
    """A server process with two exports, and its control socket."""

    def __init__(self, nbd_server: NbdServers, directory: Path, sockets: Path) -> None:
        create(directory / "vm.qcow2", MIB)
        (directory / "disk.raw").write_bytes(b"d" * MIB)
        self.config = directory / "exports.toml"
        self.path = str(sockets / "ctl")
        self.config.write_text(
            f"""control = "{self.path}"
[exports.vm]
image = "vm.qcow2"
format = "qcow2"
default = true
[exports.disk]
image = "disk.raw"
format = "raw"
description = "a disk"
"""
        )
        self.server: ServerProcess = nbd_server.process(self.config)

    def run(self, *words: object) -> Result:
        return CliRunner().invoke(main, ["ctl", "--socket", self.path, *map(str, words)])

    def told(self, *words: object) -> Any:
        done = self.run(*words, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def refused(self, *words: object) -> str:
        done = self.run(*words)
        assert (done.exit_code, done.stdout) == (1, "")
        return str(done.stderr)

    def connect(self, export: str) -> Wire:
        client = Wire(self.server.uri(export))
        client.go()
        return client


@pytest.fixture
def controlled(nbd_server: NbdServers, tmp_path: Path) -> Controlled:
    return Controlled(nbd_server, tmp_path, Path(str(nbd_server.socket().socket)).parent)


def test_list_shows_exports_and_clients(controlled: Controlled) -> None:
    client = controlled.connect("disk")
    client.request(READ, 0, 4096)
    assert client.reply() == (0, 0)
    client.request(WRITE, 0, 512, data=bytes(512))
    vm, disk = sorted(controlled.told("list")["exports"], key=lambda row: row["name"], reverse=True)
    assert (vm["name"], vm["size"], vm["default"], vm["clients"]) == ("vm", MIB, True, [])
    assert [(layer["path"], layer["type"]) for layer in vm["layers"]] == [("/", "qcow2"), ("/file", "file")]
    assert disk["description"] == "a disk"
    (there,) = disk["clients"]
    assert (there["export"], there["address"], there["bytes_read"]) == ("disk", "unix", 4096)
    assert abs(there["since"] - time.time()) < 60
    lines = controlled.run("list").stdout.splitlines()
    assert lines[0].split() == ["EXPORT", "SIZE", "ACCESS", "STATE", "CLIENTS", "LAYERS"]
    assert lines[1].startswith("disk") and lines[2].startswith("vm") and "served, default" in lines[2]
    assert lines[4].split() == ["CLIENT", "EXPORT", "ADDRESS", "SINCE", "REQUESTS", "READ", "WRITTEN"]
    assert lines[5].split()[:3] == [str(there["id"]), "disk", "unix"]


def test_stats_has_every_counter(controlled: Controlled) -> None:
    client = controlled.connect("disk")
    client.request(READ, 0, 4096)
    assert client.reply() == (0, 0)
    stats = controlled.told("stats")
    assert stats["exports"]["disk"]["reads"] == 1
    assert [file["reads"] for file in stats["exports"]["disk"]["files"].values()] == [1]
    assert stats["exports"]["disk"]["layers"]["/"]["type"] == "raw"
    assert [there["requests"] for there in stats["clients"]] == [1]
    assert "exports.disk.reads: 1" in controlled.run("stats").stdout.splitlines()


def test_explain_says_what_the_engine_has_cached(controlled: Controlled) -> None:
    def parts(*words: object) -> list[tuple[bool, bool, int]]:
        engine = controlled.told("explain", *words)["engine"]
        return [(part["cached"], part["faults"], part["length"]) for part in engine]

    assert parts("vm", "write", "0+128K") == [(False, True, 128 * KIB)]
    client = controlled.connect("vm")
    client.request(WRITE, 0, 64 * KIB, data=b"x" * (64 * KIB))
    assert client.reply() == (0, 0)
    client.request(WRITE, 0, 4096, data=b"x" * 4096)
    assert client.reply() == (0, 0)
    assert parts("vm", "write", "0+128K") == [(True, False, 128 * KIB)], "room is made beyond what is written"
    assert parts("", "read", "0+4K") == [(True, False, 4 * KIB)]
    assert controlled.run("explain", "vm", "read", "0+4K").stdout.splitlines()[-1].split()[1:4] == [
        "no",
        "fault",
        "yes",
    ]
    assert "there is no export 'none'" in controlled.refused("explain", "none", "read", "0+4K")
    assert "pass the end of the disk" in controlled.refused("explain", "vm", "read", "0+2M")


def test_a_client_is_disconnected(controlled: Controlled) -> None:
    client, other = controlled.connect("vm"), controlled.connect("vm")
    (vm,) = [row for row in controlled.told("list")["exports"] if row["name"] == "vm"]
    controlled.run("disconnect", vm["clients"][0]["id"])
    assert client.rest() == b""
    other.request(READ, 0, 512)
    assert other.reply() == (0, 0)
    assert "there is no client 999" in controlled.refused("disconnect", 999)


def test_an_export_is_resized(controlled: Controlled) -> None:
    assert controlled.run("resize", "disk", "2M").stdout == "'disk': 2097152 bytes\n"
    (disk,) = run_json("nbdinfo", "--json", controlled.server.uri("disk"))["exports"]
    assert disk["export-size"] == 2 * MIB
    assert controlled.run("resize", "disk", "many").exit_code == 2


def test_exports_are_added_and_removed(controlled: Controlled, tmp_path: Path) -> None:
    create(tmp_path / "more.qcow2", 2 * MIB)
    done = controlled.run("add", "more", tmp_path / "more.qcow2", "--read-only", "--description", "one more")
    assert done.stdout == "'more': 2097152 bytes, read-only\n"
    layers = f'[{{type = "raw", offset = "64K"}}, {{type = "file", path = "{tmp_path / "more.qcow2"}"}}]'
    assert "read_only" in controlled.told("add", "part", "--layers", layers, "--read-only")
    assert "there is an export 'more' already" in controlled.refused("add", "more", tmp_path / "more.qcow2", "-r")
    assert "in the configuration" in controlled.refused("add", "vm", tmp_path / "more.qcow2", "-r")
    assert "[exports.x.layers[0]]: type: missing" in controlled.refused("add", "x", "--layers", "[{typ = 5}]")
    assert controlled.run("add", "x", "--layers", "[{").exit_code == 2
    client = controlled.connect("more")
    assert "export 'more' has 1 client" in controlled.refused("remove", "more")
    assert controlled.told("remove", "more", "--drain") == {"ended": False}
    (more,) = [row for row in controlled.told("list")["exports"] if row["name"] == "more"]
    assert (more["state"], more["configured"], len(more["clients"])) == ("leaving", False, 1)
    client.close()
    eventually(lambda: "more" not in {row["name"] for row in controlled.told("list")["exports"]})
    client = controlled.connect("part")
    assert controlled.run("remove", "part", "--hard").stdout == "'part' has ended\n"
    assert client.rest() == b""
    assert "there is no export 'part'" in controlled.refused("remove", "part")


def test_an_export_is_added_for_some(controlled: Controlled, tmp_path: Path) -> None:
    more, uid = create(tmp_path / "more.qcow2", MIB), os.geteuid()
    add = functools.partial(controlled.run, "add")
    for name, user in (("mine", uid), ("others", uid + 1)):
        assert add(name, more, "-r", "--access", f"{{users = [{user}]}}").exit_code == 0
    rows = {row["name"]: row for row in controlled.told("list")["exports"]}
    assert (rows["mine"]["access"], rows["vm"]["access"]) == ({"users": [uid]}, {})
    assert not rows["mine"]["tls_required"]
    assert "read-only, restricted" in controlled.run("list").stdout
    client = controlled.connect("mine")
    (mine,) = [row for row in controlled.told("list")["exports"] if row["name"] == "mine"]
    assert [(there["uid"], there["pid"]) for there in mine["clients"]] == [(uid, os.getpid())]
    client.close()
    with pytest.raises(AssertionError, match="0x80000006"):
        controlled.connect("others")
    refused = controlled.refused("add", "x", more, "-r", "--access", '{subjects = ["*"]}')
    assert "[exports.x]: access: has subjects or identities, but the server does not use TLS" in refused
    refused = controlled.refused("add", "x", more, "-r", "--access", '{user = ["root"]}')
    assert "[exports.x.access]: user: unknown key; did you mean users?" in refused
    assert "but the server does not use TLS" in controlled.refused("add", "x", more, "-r", "--tls-required")


def test_a_filter_is_put_in_and_taken_out_with_a_client_connected(controlled: Controlled) -> None:
    client = controlled.connect("disk")

    def layers() -> list[str]:
        (disk,) = [row for row in controlled.told("list")["exports"] if row["name"] == "disk"]
        return [layer["type"] for layer in disk["layers"]]

    assert controlled.run("filter", "add", "disk", '{type = "throttle", iops_total = 5}').exit_code == 0
    assert layers() == ["throttle", "raw", "file"]
    begin = time.monotonic()
    for _ in range(8):
        client.request(READ, 0, 512)
        assert client.reply() == (0, 0)
        client.receive(512)
    assert time.monotonic() - begin > 1
    assert controlled.run("filter", "remove", "disk").stdout == "removed: throttle\n"
    assert layers() == ["raw", "file"]
    begin = time.monotonic()
    for _ in range(8):
        client.request(READ, 0, 512)
        assert client.reply() == (0, 0)
        client.receive(512)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("add", "none", '{type = "throttle"}'), "there is no export 'none'"),
        (("add", "vm", '{type = "qcow2"}'), "type: the layer 'qcow2' is no filter"),
        (("add", "vm", '{type = "throttle", speed = 5}'), "[layer]: speed: the layer 'throttle' has no such key"),
        (("add", "vm", '{type = "throttle", bps_total_max = 5}'), "bps_total: bps_total_max needs bps_total"),
        (("add", "vm", '{type = "throttle", file = [{type = "memory"}]}'), "[layer]: file: is given by its key and"),
        (("add", "vm", "{}"), "[layer]: type: missing"),
        (("remove", "vm"), "the topmost layer of export 'vm' is qcow2, which is no filter"),
    ],
)
def test_what_is_no_filter_changes_nothing(controlled: Controlled, words: tuple[str, ...], told: str) -> None:
    before = controlled.told("list")
    assert controlled.refused("filter", *words).startswith(f"nbdserver: {told}")
    assert controlled.told("list") == before


def test_a_disk_that_is_written_is_backed_up_as_it_was(controlled: Controlled, tmp_path: Path) -> None:
    client = controlled.connect("disk")
    target = f'target = [{{type = "memory", size = {MIB}}}]'
    controlled.run("filter", "add", "disk", f'{{type = "copy-before-write", {target}}}')
    now = '[{type = "snapshot-access"}, {node = "@disk"}]'
    assert controlled.run("add", "now", "--layers", now).stdout == "'now': 1048576 bytes, read-only\n"
    client.request(WRITE, 4096, 4096, data=b"n" * 4096)
    assert client.reply() == (0, 0)
    run("nbdcopy", controlled.server.uri("now"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"d" * MIB
    assert "export 'now' uses layers of export 'disk', too" in controlled.refused("filter", "remove", "disk")
    assert 'node: found "@none"' in controlled.refused("add", "x", "--layers", '[{node = "@none"}]')
    assert controlled.run("remove", "now").exit_code == 0
    assert controlled.run("filter", "remove", "disk").exit_code == 0
    client.request(READ, 4096, 4096)
    assert client.reply() == (0, 0)
    assert client.receive(4096) == b"n" * 4096


def test_quit_finishes_what_was_accepted(controlled: Controlled) -> None:
    client = controlled.connect("disk")
    client.request(READ, 0, 512)
    assert controlled.run("quit").exit_code == 0
    assert client.reply() == (0, 0)
    assert controlled.server.wait() == 0
    assert not os.path.exists(controlled.path)


def test_the_configuration_here_says_where_the_socket_is(
    controlled: Controlled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run() -> Result:
        return CliRunner().invoke(main, ["ctl", "list"])

    monkeypatch.chdir(tmp_path)
    assert run().exit_code == 0
    (tmp_path / "exports.toml").write_text('[exports.x]\nimage = "x"\n')
    assert "exports.toml: control: is not set" in run().stderr
    (tmp_path / "exports.toml").unlink()
    assert "name the server's control socket by --socket" in run().stderr
    monkeypatch.setenv("NBDSERVER_CONTROL", controlled.path)
    assert run().exit_code == 0


def test_a_server_of_images_can_be_controlled(nbd_server: NbdServers, disk: Path) -> None:
    path = str(nbd_server.socket().socket)
    nbd_server.process(disk, "--format", "raw", "--control", path)
    with ControlClient(path) as client:
        assert [row["name"] for row in client.execute("query-block-exports")] == ["disk.raw"]
        with pytest.raises(RemoteError, match="there is nothing to reload"):
            client.execute("reload")
        names = {command["name"] for command in client.execute("query-commands")}
        assert {"query-commands", "block-export-add", "reload", "quit"} <= names
        assert client.execute("query-listeners")[0].startswith("nbd+unix:///?socket=")


def test_hostile_clients_of_the_socket_do_not_disturb_clients_of_disks(controlled: Controlled) -> None:
    client = controlled.connect("disk")
    stuck = [Wired(controlled.path) for _ in range(2 * CONTROL_CONNECTIONS_COUNT_MAX)]
    for number, other in enumerate(stuck):
        with contextlib.suppress(OSError):
            other.send(b"{" * number * 100)
    for _ in range(100):
        client.request(READ, 0, 512)
        assert client.reply() == (0, 0)
        client.receive(512)
    assert controlled.told("list")["exports"]
