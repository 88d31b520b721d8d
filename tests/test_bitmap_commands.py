"""Dirty bitmaps of a disk that is being served, changed through the control socket: an incremental backup from end to
end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nbdserver.cli import main
from nbdserver.testing import NbdServers
from tests.interop.wire import WRITE, Wire
from tests.layers.bitmap_kit import qemu_dirty, qemu_flags
from tests.serving import check, create, run, run_json

KIB, MIB = 1 << 10, 1 << 20


class Served:
    """A qcow2 disk, on a base with a bitmap, served by a process with a control socket; and one with no bitmaps."""

    def __init__(self, nbd_server: NbdServers, directory: Path) -> None:
        base = create(directory / "base.qcow2", MIB)
        run("qemu-img", "bitmap", "--add", "-g", "4k", base, "deep")
        run("qemu-io", "-c", "write 512k 4k", base)
        self.path = create(directory / "vm.qcow2", MIB, backing=base)
        (directory / "disk.raw").write_bytes(bytes(MIB))
        self._socket = str(Path(str(nbd_server.socket().socket)).parent / "ctl")
        config = directory / "exports.toml"
        config.write_text(
            f'control = "{self._socket}"\n[exports.vm]\nimage = "vm.qcow2"\ndefault = true\n'
            '[exports.raw]\nimage = "disk.raw"\nformat = "raw"\n'
        )
        self.server = nbd_server.process(config)
        self.client = Wire(self.server.uri("vm"))
        self.client.go()

    def write(self, offset: int, length: int = 512) -> None:
        self.client.request(WRITE, offset, length, data=b"x" * length)
        assert self.client.reply() == (0, 0)

    def ctl(self, *words: object) -> Result:
        return CliRunner().invoke(main, ["ctl", "--socket", self._socket, "bitmap", *map(str, words)])

    def told(self, *words: object) -> Any:
        done = self.ctl(*words, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def refused(self, *words: object) -> str:
        done = self.ctl(*words)
        assert done.exit_code == 1, done.output
        return str(done.stderr)

    def dirty(self, name: str) -> list[tuple[int, int]]:
        """What a client is told of a bitmap that is offered."""
        context = f"qemu:dirty-bitmap:{name}"
        extents = run_json("nbdinfo", f"--map={context}", "--json", self.server.uri("vm"))
        return [(extent["offset"], extent["length"]) for extent in extents if extent["type"]]


@pytest.fixture
def served(nbd_server: NbdServers, tmp_path: Path) -> Served:
    return Served(nbd_server, tmp_path)


def test_an_incremental_backup_without_disconnecting_anybody(served: Served) -> None:
    served.write(0)
    served.told("add", "vm", "since", "-g", "4K")
    served.write(100 * KIB, 5000)
    assert served.told("list", "vm") == [
        {
            "name": "since",
            "granularity": 4096,
            "recording": True,
            "inconsistent": False,
            "persistent": True,
            "count": 8192,
        }
    ]
    # A bitmap that no longer changes, and one that goes on.
    served.told("add", "vm", "next", "-g", "4K")
    served.told("disable", "vm", "since")
    served.write(900 * KIB)
    assert served.told("offer", "vm", "since", "next")["contexts"] == [
        "base:allocation",
        "qemu:dirty-bitmap:since",
        "qemu:dirty-bitmap:next",
    ]
    assert served.dirty("since") == [(100 * KIB, 8192)] and served.dirty("next") == [(900 * KIB, 4096)]
    for verb in ("remove", "clear", "enable"):
        assert "bitmap 'since' is being exported" in served.refused(verb, "vm", "since")
    served.told("offer", "vm")
    # The backup failed: what it should have copied comes with the next one.
    served.told("merge", "", "next", "since")
    served.told("remove", "vm", "since")
    assert served.ctl("list", "vm").stdout.split() == [
        *("NAME", "GRANULARITY", "STATE", "DIRTY"),
        *("next", "4096", "recording", str(12 * KIB)),
    ]
    assert served.server.terminate() == 0
    assert qemu_flags(served.path) == {"next": (4096, {"auto"})}
    assert qemu_dirty(served.path, "next") == [(100 * KIB, 8192), (900 * KIB, 4096)]
    check(served.path)


def test_bitmaps_of_what_lies_below_are_merged_and_offered(served: Served) -> None:
    served.told("add", "vm", "all", "-g", "4K", "--disabled")
    served.told("merge", "vm", "all", "deep")
    assert served.told("offer", "vm", "--all")["contexts"][1:] == ["qemu:dirty-bitmap:all", "qemu:dirty-bitmap:deep"]
    assert served.dirty("all") == served.dirty("deep") == [(512 * KIB, 4096)]
    served.told("offer", "vm", "deep")
    served.told("clear", "vm", "all")
    served.told("enable", "vm", "all")
    served.write(0)
    assert served.told("list", "vm")[0]["count"] == 4096


def test_a_client_that_had_a_bitmap_gets_errors_and_not_clean(served: Served) -> None:
    nbd = pytest.importorskip("nbd")
    served.told("add", "vm", "b0")
    served.told("offer", "vm", "b0")
    client = nbd.NBD()
    client.add_meta_context("qemu:dirty-bitmap:b0")
    client.connect_uri(served.server.uri("vm"))
    found: list[int] = []
    client.block_status(MIB, 0, lambda context, offset, entries, error: found.extend(entries))
    assert found == [MIB, 0]
    served.told("offer", "vm")
    with pytest.raises(nbd.Error):
        client.block_status(MIB, 0, lambda context, offset, entries, error: found.extend(entries))
    client.pread(512, 0)
    client.shutdown()


def test_what_cannot_be_is_refused(served: Served) -> None:
    assert "there is no bitmap 'b0'; there are: 'deep'" in served.refused("remove", "vm", "b0")
    assert "raw cannot keep bitmaps; there are: none" in served.refused("add", "raw", "b0")
    assert "there is no export 'none'" in served.refused("list", "none")
    assert "granularity" in served.refused("add", "vm", "b0", "-g", "1000")
    assert "there is no bitmap 'b0'; there are: 'deep'" in served.refused("offer", "vm", "b0")
    served.told("add", "vm", "b0")
    assert "has a bitmap 'b0' already" in served.refused("add", "vm", "b0")
    assert "read-only" in served.refused("clear", "vm", "deep")
