"""Internal snapshots of disks that are being served, and all of it from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nbdserver.cli import main
from nbdserver.errors import ConfigError, RequestError
from nbdserver.testing import NbdServers
from tests.live.kit import MIB, SIZE, Client, Live
from tests.serving import check, content, create, run_json


@pytest.fixture
def backend() -> str:
    """The engine's is of no matter here."""
    return "auto"


def test_snapshots_are_made_and_applied_and_deleted(live: Live) -> None:
    path = live.chain(2)[-1]
    client = live.serve(path).connect()
    before = client.read()
    made = live.execute("blockdev-snapshot-internal-sync", name="one")
    assert (made["id"], made["name"], made["vm-state-size"]) == ("1", "one", 0)
    client.write(0, b"later")
    assert live.execute("query-snapshots") == [made]
    assert run_json("qemu-img", "info", "-U", "--output=json", path)["snapshots"][0]["name"] == "one"
    with pytest.raises(ConfigError, match="export 'vm' has clients, under whose hands"):
        live.execute("blockdev-snapshot-apply-internal-sync", name="one")
    assert client.read(0, 5) == b"later"
    assert live.execute("blockdev-snapshot-apply-internal-sync", name="one", force=True) == made
    assert client.read() == before
    assert live.execute("blockdev-snapshot-delete-internal-sync", name="one") == made
    assert live.execute("query-snapshots") == []
    live.stop()
    assert content(path) == before
    check(path)


def test_a_snapshot_of_another_size_is_applied_when_nobody_is_there(live: Live) -> None:
    live.serve(live.chain(1)[0])
    live.execute("blockdev-snapshot-internal-sync", name="small")
    live.execute("block_resize", size=2 * SIZE)
    live.execute("blockdev-snapshot-apply-internal-sync", name="small")
    assert live.export.info.size == SIZE


def test_a_filter_that_must_hear_of_every_write_is_in_the_way(live: Live) -> None:
    live.serve(live.chain(1)[0])
    live.execute("blockdev-snapshot-internal-sync", name="one")
    live.service.add_filter("vm", {"type": "copy-before-write", "target": [{"type": "memory", "size": SIZE}]}, "")
    with pytest.raises(ConfigError, match=r"applying a snapshot writes .*0\.qcow2"):
        live.execute("blockdev-snapshot-apply-internal-sync", name="one")


def test_what_is_refused(live: Live) -> None:
    live.serve(live.chain(1)[0])
    live.execute("blockdev-snapshot-internal-sync", name="one")
    with pytest.raises(RequestError, match="there is a snapshot 'one' already"):
        live.execute("blockdev-snapshot-internal-sync", name="one")
    for command in ("apply", "delete"):
        with pytest.raises(ConfigError, match="there is no snapshot 'two'; there are: 'one'"):
            live.execute(f"blockdev-snapshot-{command}-internal-sync", name="two")
    live.stop()
    (live.directory / "disk.raw").write_bytes(bytes(MIB))
    live.serve(live.directory / "disk.raw")
    with pytest.raises(ConfigError, match="an image of the format raw has no internal snapshots"):
        live.execute("blockdev-snapshot-internal-sync", name="one")
    assert live.execute("query-snapshots") == []


# -- the command line ----------------------------------------------------------------------------------------------


def test_the_command_line(nbd_server: NbdServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot, a commit back, a stream: with a client connected all the while, and the server as its own process."""
    base = create(tmp_path / "base.qcow2", MIB)
    path = create(tmp_path / "vm.qcow2", MIB, backing=base)
    socket = str(Path(str(nbd_server.socket().socket)).parent / "ctl")
    server = nbd_server.process(path, "--format", "qcow2", "--control", socket, cwd=tmp_path)
    client = Client(server.uri())
    monkeypatch.chdir(tmp_path)

    def ctl(*words: str, status: int = 0) -> Result:
        done = CliRunner().invoke(main, ["ctl", "--socket", socket, *words])
        assert done.exit_code == status, done.output
        return done

    client.write(0, b"1")
    assert ctl("snapshot", "overlay", "vm.qcow2", "next.qcow2").stdout == (
        f"'vm.qcow2': writes go to {tmp_path}/next.qcow2 now, and no longer to {path}\n"
        "Name it in the configuration before the server is started again.\n"
    )
    client.write(1, b"2")
    assert "concluded" in ctl("commit", "vm.qcow2", "--base", "vm.qcow2").stdout
    client.write(2, b"3")
    assert ctl("snapshot", "create", "vm.qcow2", "now").stdout == ""
    assert "now" in ctl("snapshot", "list", "vm.qcow2").stdout
    refused = ctl("snapshot", "apply", "vm.qcow2", "now", status=1)
    assert "has clients" in refused.stderr
    ctl("snapshot", "apply", "vm.qcow2", "now", "--force")
    ctl("snapshot", "delete", "vm.qcow2", "now")
    id = ctl("stream", "vm.qcow2", "--background", "--job-id", "mine", "--speed", "1G").stdout.strip()
    assert id == "mine"
    job = json.loads(ctl("job-wait", id, "--json").stdout)
    assert (job["status"], job["type"]) == ("concluded", "stream")
    assert "base.qcow2" not in ctl("list").stdout
    assert client.read(0, 4) == b"123\0"
    assert ctl("stream", "vm.qcow2", status=1).stderr.startswith("nbdserver: there is nothing to stream")
    server.terminate()
    assert content(path)[:4] == b"123\0"
    assert content(tmp_path / "next.qcow2")[:4] == b"123\0"
