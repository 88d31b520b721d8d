"""Reload: what a changed configuration changes, what it leaves alone, and that a bad one changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.config import load
from nbdserver.errors import ConfigError, NbdserverError
from nbdserver.files import Files
from nbdserver.graph import walk
from nbdserver.offers import Removal
from nbdserver.service import Reload, Service
from nbdserver.testing import NbdServers
from nbdserver.uri import parse
from tests.interop.wire import FLUSH, OPT_GO, READ, REP_ACK, WRITE, Wire
from tests.oracle.model import Model
from tests.oracle.storm import Storm
from tests.serving import SEED, amount, check, content, create, eventually

MIB = 1 << 20
PAGE = 4096


class Deployment:
    """A service in this process, and the configuration that it serves."""

    def __init__(self, directory: Path, sockets: Path) -> None:
        self.directory = directory
        self.config = directory / "exports.toml"
        self.log: list[str] = []
        self.listen = f"nbd+unix:///?socket={sockets / 'main'}"
        self.sockets = sockets
        self._service: Service | None = None

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    def write(self, exports: str, *, listen: str | None = None, head: str = "") -> None:
        addresses = listen or f'["{self.listen}"]'
        self.config.write_text(f"listen = {addresses}\n{head}\n{exports}")

    def start(self, exports: str, **options: str) -> Deployment:
        self.write(exports, **options)
        self._service = Service(load(str(self.config)), reread=lambda: load(str(self.config)), log=self.log.append)
        self._service.start()
        return self

    def stop(self) -> None:
        if self._service is not None:
            self._service.stop()

    def reload(self, exports: str, mode: Removal = Removal.DRAIN, **options: str) -> Reload:
        self.write(exports, **options)
        return self.service.reload(mode)

    def image(self, name: str, letter: bytes, size: int = MIB) -> None:
        """A raw image full of one letter."""
        (self.directory / name).write_bytes(letter * size)

    def connect(self, export: str) -> Wire:
        client = Wire(str(parse(self.listen).with_export(export)))
        client.go()
        return client

    def answer(self, export: str) -> int:
        """What GO is answered with."""
        client = Wire(str(parse(self.listen).with_export(export)))
        client.greet()
        name = export.encode()
        client.option(OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        while (kind := client.option_reply()[0]) == 3:
            pass
        client.close()
        return kind

    def is_served(self, export: str) -> bool:
        return self.answer(export) == REP_ACK

    def state(self) -> dict[str, object]:
        """All that a reload which fails must leave as it is, by identity where there is one."""
        server = self.service.server
        return {
            "exports": dict(server.exports),
            "layers": {name: list(walk(export.root)) for name, export in server.exports.items()},
            "opened": server.opened,
            "files": {file: open.users for kind in server._files._open.values() for file, open in kind.items()},
            "default": server.default,
            "listening": list(server.listening),
            "rows": [{key: row[key] for key in ("name", "state")} for row in self.service.rows()],
        }


@pytest.fixture
def deployment(nbd_server: NbdServers, tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path, Path(str(nbd_server.socket().socket)).parent)
    for letter in "abcd":
        deployment.image(f"{letter}.raw", letter.encode())
    yield deployment
    deployment.stop()


def read(client: Wire, offset: int = 0, length: int = 1) -> bytes:
    client.request(READ, offset, length)
    assert client.reply() == (0, 0)
    return client.receive(length)


def write(client: Wire, offset: int, data: bytes) -> None:
    client.request(WRITE, offset, len(data), data=data)
    assert client.reply() == (0, 0)


def export(name: str, image: str | None = None, more: str = "") -> str:
    return f'[exports.{name}]\nimage = "{image or name}.raw"\nformat = "raw"\n{more}\n'


A, B, C = export("a"), export("b"), export("c")


# -- what changes, and what does not -----------------------------------------------------------------------------------


def test_new_exports_appear_removed_ones_go_and_unchanged_ones_are_not_touched(deployment: Deployment) -> None:
    server = deployment.start(A + B).service.server
    client = deployment.connect("a")
    assert read(client) == b"a"
    before = list(walk(server.exports["a"].root))
    calls = server.exports["a"].engine_export.counters()["resolve_calls"]
    report = deployment.reload(A + C)
    assert (report.added, report.removed, report.unchanged) == (["c"], ["b"], ["a"])
    assert not report.changed and not report.leaving and not report.waiting
    assert list(walk(server.exports["a"].root)) == before
    assert read(client) == b"a"
    assert server.exports["a"].engine_export.counters()["resolve_calls"] == calls, "its extents were kept"
    assert read(deployment.connect("c")) == b"c"
    assert not deployment.is_served("b")
    with contextlib.closing(_OpenFile(deployment.directory / "b.raw")):
        pass  # it has been let go


class _OpenFile:
    """A file of this process's, open for writing with its lock."""

    def __init__(self, path: Path) -> None:
        self._files = Files()
        self._file = self._files.open(str(path), read_only=False)

    def close(self) -> None:
        self._files.close(self._file)


def test_a_reload_of_the_same_changes_nothing(deployment: Deployment) -> None:
    deployment.start(A + B)
    before = deployment.state()
    report = deployment.reload(A + B)
    assert report == Reload(unchanged=["a", "b"])
    assert deployment.state() == before
    assert deployment.log[-1] == "reloaded: unchanged: 2"


def test_a_removed_export_ends_after_its_last_client(deployment: Deployment) -> None:
    deployment.start(A + B)
    client = deployment.connect("b")
    assert deployment.reload(A).leaving == ["b"]
    assert not deployment.is_served("b")
    write(client, 0, b"still here")
    assert [row["state"] for row in deployment.service.rows()] == ["served", "leaving"]
    client.close()
    eventually(lambda: [row["name"] for row in deployment.service.rows()] == ["a"])
    assert (deployment.directory / "b.raw").read_bytes().startswith(b"still here")
    eventually(lambda: "export 'b' has ended" in deployment.log)


def test_a_hard_reload_disconnects_clients_of_what_is_removed_only(deployment: Deployment) -> None:
    deployment.start(A + B)
    kept, gone = deployment.connect("a"), deployment.connect("b")
    assert deployment.reload(A, Removal.HARD).leaving == []
    assert gone.rest() == b""
    assert read(kept) == b"a"


def test_a_hard_reload_ends_what_an_earlier_one_has_left(deployment: Deployment) -> None:
    deployment.start(A + B)
    client = deployment.connect("b")
    assert deployment.reload(A).leaving == ["b"]
    assert deployment.reload(A, Removal.HARD).leaving == []
    assert client.rest() == b""


def test_what_an_export_is_called_besides_is_taken_up_without_touching_it(deployment: Deployment) -> None:
    server = deployment.start(A + B).service.server
    before = dict(server.exports)
    client = deployment.connect("a")
    report = deployment.reload(export("a", more='description = "new"') + export("b", more="default = true"))
    assert report.unchanged == ["a", "b"]
    assert dict(server.exports) == before
    assert server.exports["a"].info.description == "new"
    assert read(deployment.connect("")) == b"b"
    assert read(client) == b"a"
    deployment.reload(export("a", more="default = true") + B)
    assert read(deployment.connect("")) == b"a"
    assert server.exports["a"].info.description == ""
    deployment.reload(A + B)
    assert not deployment.is_served("")


# -- what is replaced ----------------------------------------------------------------------------------------------


def test_a_changed_export_is_replaced_for_new_clients_and_kept_for_old_ones(deployment: Deployment) -> None:
    deployment.start(export("x", "a"))
    old = deployment.connect("x")
    report = deployment.reload(export("x", "b"))
    assert (report.changed, report.leaving, report.waiting) == (["x"], ["x"], {})
    new = deployment.connect("x")
    assert (read(old), read(new)) == (b"a", b"b")
    old.close()
    eventually(lambda: len(deployment.service.rows()) == 1)
    assert read(new) == b"b"


def test_a_changed_export_with_no_clients_is_replaced_at_once_although_it_needs_the_same_file(
    deployment: Deployment,
) -> None:
    deployment.start(A)
    window = '[exports.a]\nlayers = [{type = "raw", offset = "4K"}, {type = "file", path = "a.raw"}]\n'
    report = deployment.reload(window)
    assert (report.changed, report.leaving, report.waiting, report.failed) == (["a"], [], {}, {})
    assert deployment.service.server.exports["a"].info.size == MIB - PAGE


def test_a_changed_export_that_needs_the_same_file_waits_for_old_clients(deployment: Deployment) -> None:
    deployment.start(A)
    old = deployment.connect("a")
    report = deployment.reload(export("a", more="read_only = true"))
    assert (report.changed, report.leaving) == (["a"], ["a"])
    assert report.waiting["a"].endswith("a.raw: export 'a' writes it, but has it open already, not to be written")
    assert not deployment.is_served("a")
    assert {row["state"] for row in deployment.service.rows()} == {"waiting", "leaving"}
    write(old, 0, b"last words")
    old.close()
    eventually(lambda: deployment.is_served("a"))
    assert read(deployment.connect("a"), 0, 10) == b"last words"
    assert deployment.service.server.exports["a"].info.read_only
    assert "export 'a' is served" in deployment.log


def test_a_hard_reload_replaces_at_once(deployment: Deployment) -> None:
    deployment.start(A)
    old = deployment.connect("a")
    write(old, 0, b"last words")
    report = deployment.reload(export("a", more="read_only = true"), Removal.HARD)
    assert (report.changed, report.leaving, report.waiting) == (["a"], [], {})
    assert old.rest() == b""
    assert read(deployment.connect("a"), 0, 10) == b"last words"


def test_a_renamed_export_waits_for_clients_of_the_old_name(deployment: Deployment) -> None:
    deployment.start(A)
    old = deployment.connect("a")
    report = deployment.reload(export("renamed", "a", "default = true"))
    assert (report.added, report.removed, list(report.waiting)) == (["renamed"], ["a"], ["renamed"])
    assert not deployment.is_served("")
    old.close()
    eventually(lambda: deployment.is_served("renamed"))
    assert deployment.is_served(""), "the default export, now that it is there"


def test_two_exports_exchange_their_images(deployment: Deployment) -> None:
    deployment.start(A + B)
    old = deployment.connect("a")
    report = deployment.reload(export("a", "b") + export("b", "a"))
    assert set(report.waiting) == {"b"}, "a could have its image as soon as the idle b had ended"
    assert read(deployment.connect("a")) == b"b"
    assert read(old) == b"a"
    old.close()
    eventually(lambda: deployment.is_served("b"))
    assert read(deployment.connect("b")) == b"a"


def test_what_waits_and_cannot_be_opened_then_is_said_and_tried_again_at_the_next_reload(
    deployment: Deployment,
) -> None:
    deployment.start(A)
    old = deployment.connect("a")
    changed = export("a", more="read_only = true")
    deployment.reload(changed)
    os.rename(deployment.directory / "a.raw", deployment.directory / "elsewhere")
    old.close()
    eventually(lambda: [row["state"] for row in deployment.service.rows()] == ["failed"])
    assert any("export 'a' cannot be served" in line and "No such file" in line for line in deployment.log)
    with pytest.raises(ConfigError, match="No such file"):
        deployment.reload(changed)
    os.rename(deployment.directory / "elsewhere", deployment.directory / "a.raw")
    assert deployment.reload(changed).changed == ["a"]
    assert read(deployment.connect("a")) == b"a"


def test_a_reload_takes_back_one_that_waits(deployment: Deployment) -> None:
    deployment.start(A)
    old = deployment.connect("a")
    deployment.reload(export("a", more="read_only = true"))
    report = deployment.reload(A)
    assert list(report.waiting) == ["a"], "the old one takes no clients any more; it comes back when it has ended"
    old.close()
    eventually(lambda: deployment.is_served("a"))
    assert not deployment.service.server.exports["a"].info.read_only


# -- what is wrong -------------------------------------------------------------------------------------------------

WINDOW = '[exports.a]\nlayers = [{type = "raw", offset = "2M"}, {type = "file", path = "a.raw"}]\n'


@pytest.mark.parametrize(
    ("exports", "told"),
    [
        ("[exports.a", "exports.toml: is not TOML: "),
        ("", "exports.toml: exports nothing"),
        (A + B + export("c", more="sise = 5"), "exports.toml: [exports.c]: sise: unknown key"),
        (A + B + export("c", more='read_only = "yes"'), 'exports.toml: [exports.c]: read_only: found "yes"'),
        (A + B + export("c", "missing"), "exports.toml: [exports.c]: {}/missing.raw: cannot be opened"),
        (A + '[exports.b]\nimage = "b.raw"\nformat = "qcow2"\n', "exports.toml: [exports.b]: {}/b.raw: "),
        (A + B + export("c", "a"), "exports.toml: [exports.c]: {}/a.raw: export 'c' writes it, which export 'a' does"),
        (
            A + B + C + export("d", "c"),
            "exports.toml: [exports.d]: {}/c.raw: export 'd' writes it, which export 'c' does",
        ),
        (WINDOW + B, "exports.toml: [exports.a]: offset: found 2097152, but the file has 1048576 bytes"),
        ('[exports.a]\nlayers = [{type = "luks", key = "x"}]\n', "exports.toml: [exports.a.layers[0]]: key: the layer"),
    ],
)
def test_an_invalid_configuration_changes_nothing_and_says_why(deployment: Deployment, exports: str, told: str) -> None:
    deployment.start(A + B)
    client = deployment.connect("a")
    before = deployment.state()
    with pytest.raises(NbdserverError) as caught:
        deployment.reload(exports)
    assert str(caught.value).startswith(f"{deployment.directory}/{told.format(deployment.directory)}")
    assert deployment.state() == before
    assert read(client) == b"a"
    assert read(deployment.connect("b")) == b"b"
    assert deployment.reload(A + B) == Reload(unchanged=["a", "b"])


def test_a_changed_export_that_its_own_predecessor_locks_is_tried_with_nothing_written(
    deployment: Deployment,
) -> None:
    path = create(deployment.directory / "v.qcow2", MIB)
    deployment.start('[exports.v]\nimage = "v.qcow2"\nformat = "qcow2"\n')
    client = deployment.connect("v")
    write(client, 0, b"x" * MIB)
    client.request(FLUSH)
    assert client.reply() == (0, 0)
    before, digest = deployment.state(), hashlib.sha256(path.read_bytes()).digest()
    too_far = (
        '[exports.v]\nlayers = [{type = "raw", offset = "2M"}, {type = "qcow2"}, {type = "file", path = "v.qcow2"}]\n'
    )
    with pytest.raises(ConfigError, match="offset: found 2097152"):
        deployment.reload(too_far)
    assert deployment.state() == before
    assert hashlib.sha256(path.read_bytes()).digest() == digest
    write(client, 0, b"y" * MIB)
    client.close()
    eventually(lambda: not deployment.service.server.clients)
    deployment.stop()
    check(path)
    assert content(path) == b"y" * MIB


def test_an_address_that_is_taken_changes_nothing(deployment: Deployment) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"nbd://127.0.0.1:{other.getsockname()[1]}"
        deployment.start(A)
        before = deployment.state()
        free = f"nbd+unix:///?socket={deployment.sockets / 'other'}"
        with pytest.raises(ConfigError, match=f"listen: cannot listen on {taken}: Address already in use"):
            deployment.reload(A + B, listen=f'["{deployment.listen}", "{free}", "{taken}"]')
        assert deployment.state() == before
        assert not (deployment.sockets / "other").exists()


def test_a_file_that_cannot_be_read_changes_nothing(deployment: Deployment) -> None:
    deployment.start(A)
    before = deployment.state()
    deployment.config.unlink()
    with pytest.raises(ConfigError, match=r"exports.toml: cannot be read: No such file or directory"):
        deployment.service.reload()
    assert deployment.state() == before


# -- addresses, nodes, what was added ------------------------------------------------------------------------------


def test_addresses_come_and_go_and_connections_stay(deployment: Deployment) -> None:
    deployment.start(A)
    client = deployment.connect("a")
    other = f"nbd+unix:///?socket={deployment.sockets / 'other'}"
    report = deployment.reload(A, listen=f'["{other}", "nbd://127.0.0.1:0"]')
    assert (len(report.listening), len(report.refusing)) == (2, 1)
    assert not (deployment.sockets / "main").exists()
    assert read(client) == b"a"
    for address in deployment.service.server.listening:
        Wire(address).greet()
    again = deployment.reload(A, listen=f'["{other}", "nbd://127.0.0.1:0"]')
    assert not again.listening and not again.refusing, "the same port 0 is the same address"


NODE = '[nodes.n]\nlayers = [{type = "raw", offset = "OFFSET"}, {type = "file", path = "a.raw"}]\n'


def node(name: str, more: str = "") -> str:
    return f'[exports.{name}]\nlayers = [{{node = "n"}}]\n{more}\n'


def test_a_new_export_shares_a_node_that_is_there(deployment: Deployment) -> None:
    nodes = NODE.replace("OFFSET", "0")
    server = deployment.start(nodes + node("x")).service.server
    client = deployment.connect("x")
    report = deployment.reload(nodes + node("x") + node("y"))
    assert (report.added, report.unchanged) == (["y"], ["x"])
    assert server.exports["y"].root is server.exports["x"].root
    write(client, 0, b"seen")
    assert read(deployment.connect("y"), 0, 4) == b"seen"


def test_a_changed_node_changes_all_who_name_it(deployment: Deployment) -> None:
    server = deployment.start(NODE.replace("OFFSET", "0") + node("x") + node("y") + B).service.server
    report = deployment.reload(NODE.replace("OFFSET", "4K") + node("x") + node("y") + B)
    assert (report.changed, report.unchanged, report.waiting) == (["x", "y"], ["b"], {})
    assert server.exports["x"].root is server.exports["y"].root
    assert server.exports["x"].info.size == MIB - PAGE


def test_a_node_that_is_to_be_written_from_now_on_is_opened_again(deployment: Deployment) -> None:
    nodes = NODE.replace("OFFSET", "0")
    server = deployment.start(nodes + node("x", "read_only = true")).service.server
    report = deployment.reload(nodes + node("x", "read_only = true") + node("y"))
    assert (report.added, report.changed, report.waiting) == (["y"], ["x"], {})
    assert server.exports["y"].root is server.exports["x"].root
    assert not server.exports["y"].info.read_only


def test_who_needs_a_node_for_itself_waits_for_those_who_write_it(deployment: Deployment) -> None:
    """As with files; and an export that stays is a reason to refuse."""
    nodes = NODE.replace("OFFSET", "0")
    alone = '[exports.y]\nlayers = [{type = "copy-before-write", file = [{node = "n"}], TARGET}]\n'
    alone = alone.replace("TARGET", 'target = [{type = "memory", size = "1M"}]')
    deployment.start(nodes + node("x"))
    client = deployment.connect("x")
    refused = "export 'x' writes .*a.raw, which export 'y' .file of copy-before-write. does not allow"
    with pytest.raises(ConfigError, match=r"\[exports.y\]: " + refused):
        deployment.reload(nodes + node("x") + alone)
    report = deployment.reload(nodes + alone)
    assert re.search(refused, report.waiting["y"])
    write(client, 0, b"last words")
    client.close()
    eventually(lambda: deployment.is_served("y"))
    assert read(deployment.connect("y"), 0, 10) == b"last words"


def test_a_new_node_that_could_not_be_opened_leaves_nothing_behind(deployment: Deployment) -> None:
    deployment.start(A)
    new = '[nodes.m]\nlayers = [{type = "raw"}, {type = "file", path = "b.raw"}]\n'
    users = '[exports.y]\nlayers = [{node = "m"}]\n' + export("z", "missing")
    before = deployment.state()
    with pytest.raises(ConfigError, match=r"missing\.raw"):
        deployment.reload(new + A + users)
    assert deployment.state() == before
    report = deployment.reload(new + A + '[exports.y]\nlayers = [{node = "m"}]\n')
    assert report.added == ["y"]
    assert read(deployment.connect("y")) == b"b"


def test_what_was_added_while_running_is_left_alone(deployment: Deployment) -> None:
    deployment.start(A)
    added = deployment.service.add("b", {"image": "b.raw", "format": "raw"}, str(deployment.directory))
    deployment.reload(A + C)
    assert deployment.service.server.exports["b"] is added
    with pytest.raises(ConfigError, match=r"\[exports.b\]: there is an export 'b' already, which was added"):
        deployment.reload(A + B)
    with pytest.raises(ConfigError, match="'a' in the configuration"):
        deployment.service.add("a", {"image": "d.raw", "format": "raw"}, str(deployment.directory))


def test_what_was_removed_while_running_comes_back(deployment: Deployment) -> None:
    deployment.start(A + B)
    assert deployment.service.remove("b", Removal.SAFE)
    assert not deployment.is_served("b")
    assert deployment.reload(A + B).changed == ["b"]
    assert deployment.is_served("b")


def test_what_counts_from_the_next_start_on_is_said(deployment: Deployment) -> None:
    deployment.start(A)
    report = deployment.reload(A + '[engine]\npool = "64M"\nfault_threads = 3\n', head='control = "other"')
    assert report.restart == ["engine.pool", "engine.fault_threads", "control"]


# -- a process, and a load -----------------------------------------------------------------------------------------


def test_sighup_takes_up_the_configuration(nbd_server: NbdServers, tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.raw").write_bytes(letter.encode() * MIB)
    path = tmp_path / "exports.toml"
    path.write_text(A)
    # Whoever runs the tests may have had SIGHUP ignored, which servers respect.
    server = nbd_server.process(path, command=["env", "--default-signal=HUP"])
    path.write_text(A + B)
    os.kill(server.pid, signal.SIGHUP)
    eventually(lambda: "nbdserver: reloaded: added: b; unchanged: 1\n" in server.log)
    client = Wire(server.uri("b"))
    client.go()
    assert read(client) == b"b"
    path.write_text("exports = 5")
    os.kill(server.pid, signal.SIGHUP)
    wrong = f"nbdserver: not reloaded, nothing has changed: {path}: [exports]: found 5, allowed is a table\n"
    eventually(lambda: wrong in server.log)
    assert read(client) == b"b"
    assert server.terminate() == 0


def test_unchanged_exports_under_a_storm_do_not_notice_reloads(deployment: Deployment) -> None:
    """Valid reloads, and invalid ones of every kind, one after the other, while four clients write and check."""
    path = create(deployment.directory / "vm.qcow2", 16 * MIB, cluster_size=4096)
    fixed = '[exports.vm]\nimage = "vm.qcow2"\nformat = "qcow2"\n'
    variants = (
        A,
        A + B,
        export("a", "b"),
        export("a", more="read_only = true"),
        "nonsense",
        export("c", "missing"),
        export("other", "vm").replace("vm.raw", "vm.qcow2"),
        '[exports.w]\nlayers = [{type = "raw", offset = "1G"}, {type = "file", path = "c.raw"}]\n',
    )
    server = deployment.start(fixed).service.server
    before = list(walk(server.exports["vm"].root))
    over, outcomes = threading.Event(), {True: 0, False: 0}

    def reloads() -> None:
        number = 0
        while not over.is_set():
            try:
                deployment.reload(fixed + variants[number % len(variants)])
                outcomes[True] += 1
            except NbdserverError:
                outcomes[False] += 1
            number += 1
            time.sleep(0.01)

    model = Model(16 * MIB)
    thread = threading.Thread(target=reloads)
    with Storm(str(parse(deployment.listen).with_export("vm")), model, seed=SEED) as storm:
        thread.start()
        storm.run(seconds=amount(4, 60))
        over.set()
        thread.join()
        final = storm.verify()
    assert list(walk(server.exports["vm"].root)) == before
    assert min(outcomes.values()) > 10, outcomes
    deployment.stop()
    check(path)
    assert content(path) == final
