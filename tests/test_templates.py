"""Name patterns: an overlay for every name that is asked for, one golden image below all, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdserver import client as nbd_client
from nbdserver.config import load
from nbdserver.errors import ConfigError, NbdserverError
from nbdserver.limits import TEMPLATE_NAME_MAX
from nbdserver.offers import Removal
from nbdserver.service import Service
from nbdserver.templates import EPHEMERAL_SUFFIX
from nbdserver.testing import NbdServers
from nbdserver.uri import NbdUri
from tests.interop.wire import OPT_EXPORT_NAME, OPT_GO, READ, REP_ACK, REP_ERR_UNKNOWN, WRITE, Wire
from tests.serving import amount, check, content, create, eventually, qemu_io, run_json

MIB = 1 << 20
PAGE = 4096
OPT_INFO = 6


class Sandboxes:
    """A service with a pattern, in this process."""

    def __init__(self, directory: Path, address: NbdUri) -> None:
        self.directory, self.address = directory, address
        self.golden = create(directory / "golden.qcow2", MIB)
        qemu_io(self.golden, f"write -P 103 0 {MIB}")  # 'g'
        self.overlays = directory / "sandboxes"
        self.config = directory / "exports.toml"
        self.log: list[str] = []
        self._services: list[Service] = []

    def write(self, template: str = "", more: str = "") -> None:
        self.config.write_text(
            f"""listen = ["{self.address}"]
[exports."sandbox-*".template]
image = "golden.qcow2"
format = "qcow2"
directory = "sandboxes"
{template.replace(", ", chr(10))}
{more}
"""
        )

    def start(self, template: str = "", more: str = "") -> Sandboxes:
        self.write(template, more)
        service = Service(load(str(self.config)), reread=lambda: load(str(self.config)), log=self.log.append)
        self._services.append(service)
        service.start()
        return self

    @property
    def service(self) -> Service:
        return self._services[-1]

    def stop(self) -> None:
        for service in self._services:
            service.stop()
        self._services.clear()

    def connect(self, name: str) -> Wire:
        client = Wire(str(self.address.with_export(name)))
        client.go()
        return client

    def answer(self, name: str, option: int = OPT_GO) -> int:
        """What GO or INFO is answered with at the end."""
        client = Wire(str(self.address))
        client.greet()
        data = name.encode(errors="surrogateescape")
        client.option(option, struct.pack(">I", len(data)) + data + struct.pack(">H", 0))
        while (kind := client.option_reply()[0]) == 3:
            pass
        client.close()
        return kind

    @property
    def files(self) -> set[str]:
        return set(os.listdir(self.overlays))

    def gone(self) -> None:
        """Wait until no instance is open any more."""
        eventually(lambda: not self.service.server.exports and not self.service.server.leaving)


@pytest.fixture
def sandboxes(nbd_server: NbdServers, tmp_path: Path) -> Iterator[Sandboxes]:
    sandboxes = Sandboxes(tmp_path, nbd_server.socket())
    yield sandboxes
    sandboxes.stop()


def read(client: Wire, offset: int = 0) -> bytes:
    client.request(READ, offset, 1)
    assert client.reply() == (0, 0)
    return client.receive(1)


def write(client: Wire, letter: bytes, offset: int = 0) -> None:
    client.request(WRITE, offset, PAGE, data=letter * PAGE)
    assert client.reply() == (0, 0)


# -- overlays ------------------------------------------------------------------------------------------------------


def test_the_first_connection_makes_an_overlay(sandboxes: Sandboxes) -> None:
    sandboxes.start()
    before = sandboxes.golden.read_bytes()
    assert sandboxes.files == set()
    one, other = sandboxes.connect("sandbox-1"), sandboxes.connect("sandbox-b.2_x")
    assert sandboxes.files == {"sandbox-1.qcow2", "sandbox-b.2_x.qcow2"}
    assert (read(one), read(other)) == (b"g", b"g")
    write(one, b"1")
    write(other, b"2")
    assert (read(one), read(other)) == (b"1", b"2")
    assert read(sandboxes.connect("sandbox-1")) == b"1", "a second client of the same name has the same disk"
    sandboxes.stop()
    assert sandboxes.golden.read_bytes() == before
    about = run_json("qemu-img", "info", "--output=json", sandboxes.overlays / "sandbox-1.qcow2")
    assert about["backing-filename"] == str(sandboxes.golden)
    assert about["backing-filename-format"] == "qcow2"
    check(sandboxes.overlays / "sandbox-1.qcow2")
    assert content(sandboxes.overlays / "sandbox-1.qcow2") == b"1" * PAGE + b"g" * (MIB - PAGE)


def test_an_overlay_stays_and_is_closed_while_nobody_uses_it(sandboxes: Sandboxes) -> None:
    sandboxes.start()
    client = sandboxes.connect("sandbox-1")
    write(client, b"1")
    client.close()
    sandboxes.gone()
    check(sandboxes.overlays / "sandbox-1.qcow2")  # QEMU gets its lock
    assert read(sandboxes.connect("sandbox-1")) == b"1"
    sandboxes.stop()
    sandboxes.start()
    assert read(sandboxes.connect("sandbox-1")) == b"1"


def test_an_ephemeral_overlay_goes_after_the_last_client(sandboxes: Sandboxes) -> None:
    sandboxes.start("ephemeral = true")
    first, second = sandboxes.connect("sandbox-1"), sandboxes.connect("sandbox-1")
    write(first, b"1")
    assert sandboxes.files == {f"sandbox-1{EPHEMERAL_SUFFIX}"}
    first.close()
    eventually(lambda: len(sandboxes.service.server.clients) == 1)
    assert read(second) == b"1"
    second.close()
    eventually(lambda: sandboxes.files == set())
    assert read(sandboxes.connect("sandbox-1")) == b"g", "a new one"


def test_ephemeral_overlays_go_when_the_server_stops(sandboxes: Sandboxes) -> None:
    sandboxes.start("ephemeral = true")
    client = sandboxes.connect("sandbox-1")
    write(client, b"1")
    sandboxes.stop()
    assert sandboxes.files == set()


def test_what_a_killed_server_left_is_deleted_and_nothing_else(nbd_server: NbdServers, sandboxes: Sandboxes) -> None:
    sandboxes.write("ephemeral = true")
    process = nbd_server.process(sandboxes.config)
    client = Wire(process.uri("sandbox-1"))
    client.go()
    process.kill()
    assert sandboxes.files == {f"sandbox-1{EPHEMERAL_SUFFIX}"}
    others = {"sandbox-1.qcow2", "mine.qcow2", f"other-1{EPHEMERAL_SUFFIX}", "notes"}
    for name in others:
        (sandboxes.overlays / name).write_text("not a server's")
    sandboxes.start("ephemeral = true")
    assert sandboxes.files == others
    assert any("left by a server that was killed, and deleted" in line for line in sandboxes.log)
    client = sandboxes.connect("sandbox-1")
    assert read(client) == b"g"
    client.close()
    eventually(lambda: sandboxes.files == others)


def test_what_another_server_uses_is_left_alone(nbd_server: NbdServers, sandboxes: Sandboxes) -> None:
    sandboxes.write("ephemeral = true")
    process = nbd_server.process(sandboxes.config)
    theirs = Wire(process.uri("sandbox-1"))
    theirs.go()
    sandboxes.start("ephemeral = true")
    assert sandboxes.answer("sandbox-1") == REP_ERR_UNKNOWN
    assert sandboxes.files == {f"sandbox-1{EPHEMERAL_SUFFIX}"}
    assert read(theirs) == b"g"
    assert read(sandboxes.connect("sandbox-2")) == b"g"


def test_the_golden_image_is_open_once_for_all(sandboxes: Sandboxes) -> None:
    sandboxes.start("ephemeral = true")

    def descriptors() -> int:
        count = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                count += os.readlink(f"/proc/self/fd/{fd}") == str(sandboxes.golden)
        return count

    before = descriptors()
    clients = [sandboxes.connect(f"sandbox-{number}") for number in range(amount(150, 1000))]
    assert all(read(client) == b"g" for client in clients)
    exports = sandboxes.service.server.exports.values()
    assert len({export.root.backing.layer for export in exports}) == 1  # type: ignore[attr-defined]
    assert descriptors() == before == 2, "its file, and its lock"


def test_overlays_have_a_size_of_their_own(sandboxes: Sandboxes) -> None:
    sandboxes.start('size = "3M"')
    assert nbd_client.list_exports(sandboxes.address) == []
    client = sandboxes.connect("sandbox-1")
    assert (read(client, MIB - 1), read(client, 3 * MIB - 1)) == (b"g", b"\0")
    (listed,) = nbd_client.list_exports(sandboxes.address)
    assert (listed.name, listed.size) == ("sandbox-1", 3 * MIB)


def test_a_golden_image_of_any_format_that_is_probed_and_has_a_chain(sandboxes: Sandboxes) -> None:
    raw = sandboxes.directory / "base.raw"
    raw.write_bytes(b"r" * (MIB + 100))
    top = create(sandboxes.directory / "top.qcow2", MIB, backing=raw, backing_format="raw")
    more = f"""
[exports."raw-*"]
template = {{ image = "{raw}", directory = "sandboxes" }}
[exports."top-*"]
template = {{ image = "{top}", directory = "x/y" }}
"""
    sandboxes.start(more=more)
    assert read(sandboxes.connect("raw-1")) == read(sandboxes.connect("top-1")) == b"r"
    about = run_json("qemu-img", "info", "-U", "--output=json", sandboxes.overlays / "raw-1.qcow2")
    assert (about["backing-filename-format"], about["virtual-size"]) == ("raw", MIB + 512)


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "sandbox-",
        "sandbox",
        "xsandbox-1",
        "sandbox-a/b",
        "sandbox-/../../golden",
        "../sandbox-1",
        "sandbox-1\n",
        "sandbox-a b",
        "sandbox-*",
        "sandbox-1@ephemeral",
        "sandbox-é",
        "sandbox-" + "x" * (TEMPLATE_NAME_MAX - 7),
        "",
    ],
)
def test_names_that_make_no_file_name_are_not_there(sandboxes: Sandboxes, name: str) -> None:
    sandboxes.start()
    for option in (OPT_GO, OPT_INFO):
        assert sandboxes.answer(name, option) == REP_ERR_UNKNOWN
    assert sandboxes.files == set()
    assert sandboxes.answer("sandbox-" + "x" * (TEMPLATE_NAME_MAX - 8)) == REP_ACK


def test_who_asks_about_a_name_is_told_and_nothing_is_made(sandboxes: Sandboxes) -> None:
    sandboxes.start()
    assert sandboxes.answer("sandbox-1", OPT_INFO) == REP_ACK
    assert sandboxes.files == set()
    assert nbd_client.list_exports(sandboxes.address) == []
    client = sandboxes.connect("sandbox-1")
    assert [export.name for export in nbd_client.list_exports(sandboxes.address)] == ["sandbox-1"]
    client.close()
    sandboxes.gone()
    assert nbd_client.list_exports(sandboxes.address) == []


def test_a_client_that_knows_export_name_alone(sandboxes: Sandboxes) -> None:
    sandboxes.start()
    client = Wire(str(sandboxes.address))
    client.greet()
    client.option(OPT_EXPORT_NAME, b"sandbox-1")
    assert struct.unpack(">Q", client.receive(10)[:8]) == (MIB,)
    assert read(client) == b"g"


def test_an_export_of_the_configuration_goes_before_a_pattern(sandboxes: Sandboxes) -> None:
    (sandboxes.directory / "fixed.raw").write_bytes(b"f" * MIB)
    sandboxes.start(more='[exports.sandbox-fixed]\nimage = "fixed.raw"\nformat = "raw"\n')
    assert read(sandboxes.connect("sandbox-fixed")) == b"f"
    assert sandboxes.files == set()


def test_there_are_so_many_and_no_more(sandboxes: Sandboxes) -> None:
    sandboxes.start("ephemeral = true, count_max = 2")
    clients = [sandboxes.connect(f"sandbox-{number}") for number in range(2)]
    assert sandboxes.answer("sandbox-3") == REP_ERR_UNKNOWN
    assert "export 'sandbox-3' cannot be made: count_max: there are 2 already, allowed are 2" in sandboxes.log
    assert sandboxes.answer("sandbox-1") == REP_ACK, "it is there"
    clients[0].close()
    eventually(lambda: sandboxes.answer("sandbox-3") == REP_ACK)


def test_overlays_that_stay_count_too(sandboxes: Sandboxes) -> None:
    sandboxes.start("count_max = 2")
    for number in range(2):
        sandboxes.connect(f"sandbox-{number}").close()
    sandboxes.gone()
    assert sandboxes.answer("sandbox-3") == REP_ERR_UNKNOWN
    assert sandboxes.answer("sandbox-0") == REP_ACK
    assert len(sandboxes.files) == 2


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('[exports."a-*"]\nimage = "golden.qcow2"', "a name with a * is a pattern, and needs a template"),
        ('[exports.a]\ntemplate = {image = "x", directory = "y"}', "template: goes with a name that has a * in it"),
        (
            '[exports."../*"]\ntemplate = {image = "x", directory = "y"}',
            "template: goes with a name that has a * in it",
        ),
        ('[exports."a-*"]\ntemplate = {image = "x"}', '[exports."a-*".template]: directory: missing'),
        ('[exports."a-*"]\ntemplate = {directory = "x"}', '[exports."a-*".template]: image: missing'),
        ('[exports."a-*"]\ntemplate = 5', "found 5, allowed is a table"),
        (
            '[exports."a-*"]\ntemplate = {image = "x", directory = "y", sise = 5}',
            "sise: unknown key; did you mean",
        ),
        ('[exports."a-*"]\ndefault = true\ntemplate = {image = "x", directory = "y"}', "default: is not for a pattern"),
        ('[exports."a-*"]\ntemplate = {image = "x", directory = "y", count_max = 0}', "count_max: found 0, allowed is"),
        ('[exports."a-*"]\ntemplate = {image = "x", directory = "y", format = "z"}', 'format: found "z"'),
    ],
)
def test_what_is_wrong_with_a_template_is_said(sandboxes: Sandboxes, table: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sandboxes.start(more=table)
    assert told in str(caught.value)


def test_a_golden_image_that_is_not_there_is_said_at_the_start(sandboxes: Sandboxes) -> None:
    sandboxes.golden.unlink()
    with pytest.raises(NbdserverError, match=r"golden\.qcow2: cannot be opened"):
        sandboxes.start()


def test_a_directory_that_cannot_be_is_said_at_the_start(sandboxes: Sandboxes) -> None:
    sandboxes.overlays.write_text("a file")
    with pytest.raises(ConfigError, match=r"exports\.toml: \[.*\]: template: .*sandboxes: File exists"):
        sandboxes.start()


def test_an_overlay_that_cannot_be_opened_is_refused_and_left(sandboxes: Sandboxes) -> None:
    sandboxes.start()
    (sandboxes.overlays / "sandbox-1.qcow2").write_bytes(b"no image" * 100)
    assert sandboxes.answer("sandbox-1") == REP_ERR_UNKNOWN
    assert any("export 'sandbox-1' cannot be made" in line for line in sandboxes.log)
    assert (sandboxes.overlays / "sandbox-1.qcow2").read_bytes() == b"no image" * 100
    assert read(sandboxes.connect("sandbox-2")) == b"g"


def test_an_overlay_half_made_by_a_killed_server_is_made_again(sandboxes: Sandboxes) -> None:
    sandboxes.start()
    (sandboxes.overlays / "sandbox-1.qcow2.new").write_bytes(b"\0" * 1000)
    assert read(sandboxes.connect("sandbox-1")) == b"g"
    assert sandboxes.files == {"sandbox-1.qcow2"}


def test_a_full_disk_leaves_nothing_behind(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    sandboxes.start("ephemeral = true")

    def link(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        assert sandboxes.answer("sandbox-1") == REP_ERR_UNKNOWN
    assert sandboxes.service.server.exports == {}
    assert read(sandboxes.connect("sandbox-1")) == b"g"


def test_a_client_that_goes_while_its_disk_is_made_leaves_none(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandboxes.start("ephemeral = true")
    entered, released = threading.Event(), threading.Event()
    server = sandboxes.service.server
    real = server.open

    def open(*args: Any, **options: Any) -> Any:
        entered.set()
        assert released.wait(20)
        return real(*args, **options)

    monkeypatch.setattr(server, "open", open)
    client = Wire(str(sandboxes.address))
    client.greet()
    client.option(OPT_GO, struct.pack(">I", 9) + b"sandbox-1" + struct.pack(">H", 0))
    assert entered.wait(20)
    other = sandboxes.answer("sandbox-x/y", OPT_INFO)
    assert other == REP_ERR_UNKNOWN, "other clients are answered meanwhile"
    client.close()
    eventually(lambda: not server.clients)
    released.set()
    eventually(lambda: sandboxes.files == set())
    sandboxes.gone()


# -- while running -------------------------------------------------------------------------------------------------


def test_a_template_that_is_removed_makes_no_more(sandboxes: Sandboxes) -> None:
    other = '[exports.golden]\nimage = "golden.qcow2"\nformat = "qcow2"\nread_only = true\n'
    sandboxes.start("ephemeral = true", other)
    client = sandboxes.connect("sandbox-1")
    text = sandboxes.config.read_text()
    sandboxes.config.write_text(text[: text.index("[exports")] + other)
    report = sandboxes.service.reload()
    assert (report.removed, report.unchanged) == (["sandbox-*"], ["golden"])
    assert sandboxes.answer("sandbox-2") == REP_ERR_UNKNOWN
    assert read(client) == b"g"
    client.close()
    eventually(lambda: sandboxes.files == set())


def test_an_unchanged_template_is_not_touched_and_a_changed_one_counts_for_new_names(sandboxes: Sandboxes) -> None:
    sandboxes.start("ephemeral = true")
    client = sandboxes.connect("sandbox-1")
    assert sandboxes.service.reload().unchanged == ["sandbox-*"]
    assert sandboxes.service.server.exports["sandbox-1"].root.size == MIB
    sandboxes.write('ephemeral = true, size = "2M"')
    assert sandboxes.service.reload().changed == ["sandbox-*"]
    assert read(client) == b"g"
    assert sandboxes.service.server.exports["sandbox-1"].info.size == MIB
    other = sandboxes.connect("sandbox-2")
    assert sandboxes.service.server.exports["sandbox-2"].info.size == 2 * MIB
    assert read(other) == b"g"
    rows = {row["name"]: row for row in sandboxes.service.rows()}
    assert rows["sandbox-*"] == {"name": "sandbox-*", "state": "template", "instances": 1}
    assert rows["sandbox-1"]["template"] == rows["sandbox-2"]["template"] == "sandbox-*"


def test_a_reload_that_fails_leaves_the_template(sandboxes: Sandboxes) -> None:
    sandboxes.start("ephemeral = true")
    client = sandboxes.connect("sandbox-1")
    sandboxes.write('ephemeral = true, size = "2M"', '[exports.x]\nimage = "missing"\n')
    with pytest.raises(ConfigError, match="missing"):
        sandboxes.service.reload()
    sandboxes.write(
        "ephemeral = true", '[exports.sandbox-1]\nimage = "golden.qcow2"\nformat = "qcow2"\nread_only = true'
    )
    with pytest.raises(ConfigError, match="there is an export 'sandbox-1' already"):
        sandboxes.service.reload()
    assert read(client) == b"g"
    other = sandboxes.connect("sandbox-2")
    assert sandboxes.service.server.exports["sandbox-2"].info.size == MIB
    assert read(other) == b"g"


def test_an_instance_is_removed_by_hand(sandboxes: Sandboxes) -> None:
    sandboxes.start("ephemeral = true")
    client = sandboxes.connect("sandbox-1")
    write(client, b"1")
    assert sandboxes.service.remove("sandbox-1", Removal.HARD)
    assert client.rest() == b""
    assert sandboxes.files == set()
    assert read(sandboxes.connect("sandbox-1")) == b"g"


def test_clients_that_come_and_go_by_the_thousand(sandboxes: Sandboxes) -> None:
    """Few names, many clients: each finds a disk of its own kind, whole, and at the end nothing is left."""
    sandboxes.start("ephemeral = true")
    over = time.monotonic() + amount(3, 60)
    failures: list[BaseException] = []
    counts: list[int] = []

    def clients(letter: bytes) -> None:
        count = 0
        try:
            while time.monotonic() < over:
                client = sandboxes.connect(f"sandbox-{count % 3}")
                assert read(client) in (b"g", b"a", b"b", b"c", b"d")
                write(client, letter)
                assert read(client, PAGE) == b"g"
                client.close()
                count += 1
        except BaseException as error:
            failures.append(error)
        counts.append(count)

    threads = [threading.Thread(target=clients, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert min(counts) > 5, counts
    sandboxes.gone()
    assert sandboxes.files == set()


def test_qemu_gets_a_sandbox(sandboxes: Sandboxes) -> None:
    sandboxes.start()
    about = run_json("nbdinfo", "--json", str(sandboxes.address.with_export("sandbox-1")))
    assert about["exports"][0]["export-size"] == MIB
    target = str(sandboxes.address.with_export("sandbox-2"))
    assert json.dumps(run_json("qemu-img", "info", "--output=json", target))
    assert run_json("qemu-img", "map", "--output=json", target)[0]["data"]
