"""Live snapshots: overlays put in above images that are being written, and what becomes of those."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdserver.errors import ConfigError, ImageError
from tests.layers.luks_kit import make_qcow2, secret
from tests.live.kit import MIB, SIZE, Live
from tests.serving import check, content, create, run, run_json


@pytest.fixture
def backend() -> str:
    """The engine's is of no matter here."""
    return "auto"


def overlay(live: Live, name: str = "snap.qcow2", export: str = "vm") -> Path:
    live.execute("blockdev-snapshot-sync", snapshot_file=name, export=export)
    return live.directory / name


def test_the_old_image_stays_what_it_was_and_the_overlay_has_what_comes(live: Live) -> None:
    path = live.chain(2)[-1]
    before = content(path)
    client = live.serve(path).connect()
    client.write(100, b"x" * 5000)
    assert live.execute("blockdev-snapshot-sync", **{"snapshot-file": "snap.qcow2"}) == {
        "file": str(live.directory / "snap.qcow2"),
        "backing": str(path),
    }
    assert live.files == ["snap.qcow2", "1.qcow2", "0.qcow2"]
    client.write(3000, b"y" * 70000)
    now = client.read()
    live.stop()
    old = before[:100] + b"x" * 5000 + before[5100:]
    assert content(path) == old
    assert now == old[:3000] + b"y" * 70000 + old[73000:]
    assert content(live.directory / "snap.qcow2") == now
    check(path)
    check(live.directory / "snap.qcow2")
    info = run_json("qemu-img", "info", "--output=json", live.directory / "snap.qcow2")
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(path), "qcow2")


def test_a_raw_disk_gets_an_overlay_and_is_committed_into(live: Live) -> None:
    path = live.directory / "disk.raw"
    path.write_bytes(b"r" * SIZE)
    client = live.serve(path).connect()
    overlay(live)
    client.write(0, b"new")
    assert path.read_bytes()[:4] == b"rrrr"
    assert live.run("block-commit").error is None
    assert live.files == ["disk.raw"]
    client.write(10, b"more")
    live.stop()
    assert path.read_bytes()[:16] == b"newrrrrrrrmorerr"


def test_the_old_image_is_open_for_others_to_read(live: Live) -> None:
    """Its lock is a reader's, its dirty bitmaps are stored: a backup may be made of it."""
    path = live.chain(1)[0]
    run("qemu-img", "bitmap", "--add", path, "since")
    client = live.serve(path).connect()
    client.write(MIB, b"x")
    overlay(live)
    info = run_json("qemu-img", "info", "--output=json", path)  # no -U: it would be refused while somebody writes
    (bitmap,) = info["format-specific"]["data"]["bitmaps"]
    assert bitmap["flags"] == ["auto"], "it is not in use"
    run("qemu-img", "convert", "-O", "raw", path, live.directory / "copy.raw")
    client.write(0, b"goes on")


def test_all_exports_of_a_disk_get_the_overlay(live: Live) -> None:
    path = live.chain(1)[0]
    (live.directory / "exports.toml").write_text(
        f'listen = ["{live.address}"]\n'
        f'[nodes.disk]\nlayers = [{{type = "qcow2"}}, {{type = "file", path = "{path}"}}]\n'
        '[exports.vm]\nlayers = [{node = "disk"}]\n[exports.same]\nlayers = [{type = "throttle"}, {node = "disk"}]\n'
    )
    live.start()
    client, other = live.connect(), live.connect("same")
    before = client.read()
    overlay(live)
    other.write(0, b"through the other")
    assert client.read(0, 17) == b"through the other"
    # What is added from now on stands on the overlay, too.
    more = (live.directory / "exports.toml").read_text() + '[exports.third]\nlayers = [{node = "disk"}]\n'
    (live.directory / "exports.toml").write_text(more)
    report = live.service.reload()
    assert (report.added, report.unchanged) == (["third"], ["vm", "same"])
    assert live.connect("third").read(0, 17) == b"through the other"
    live.stop()
    assert content(path) == before


def test_filters_stay_above_the_overlay(live: Live) -> None:
    live.serve(live.chain(1)[0])
    live.service.add_filter("vm", {"type": "throttle", "iops_total": 100000}, "")
    client = live.connect()
    overlay(live)
    client.write(0, b"x")
    assert (live.types, live.files) == (["throttle"], ["snap.qcow2", "0.qcow2"])
    live.service.remove_filter("vm")
    assert client.read(0, 1) == b"x"


def test_bitmaps_of_the_old_image_are_offered_on(live: Live) -> None:
    path = live.chain(1)[0]
    run("qemu-img", "bitmap", "--add", path, "since")
    live.serve(path, more='bitmaps = ["since"]\n')
    before = live.export.info.contexts
    overlay(live)
    assert live.export.info.contexts == before
    live.connect().write(0, b"x")


# -- the configuration ---------------------------------------------------------------------------------------------


def test_a_reload_leaves_a_disk_with_a_snapshot_alone(live: Live) -> None:
    path = live.chain(1)[0]
    client = live.serve(path).connect()
    snap = overlay(live)
    client.write(0, b"kept")
    assert live.service.reload().unchanged == ["vm"], "the table is what it was"
    live.configure(snap)
    assert live.service.reload().unchanged == ["vm"], "it names what is served"
    assert live.service.reload().unchanged == ["vm"]
    assert live.connect().read(0, 4) == b"kept"
    live.configure(snap, more='description = "d"\n')
    assert live.service.reload().unchanged == ["vm"]
    live.configure(snap, more='discard = "ignore"\n')
    assert live.service.reload().changed == ["vm"], "something else is different"


def test_the_base_may_be_named_after_a_commit(live: Live) -> None:
    paths = live.chain(2)
    live.serve(paths[1])
    assert live.run("block-commit").error is None
    live.configure(paths[0])
    assert live.service.reload().unchanged == ["vm"]
    live.configure(paths[1])
    assert live.service.reload().changed == ["vm"], "that would be another stack now"


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_left_alone(live: Live) -> None:
    live.serve(live.chain(1)[0])
    there = live.directory / "there"
    there.write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"there is something at .*/there already"):
        overlay(live, "there")
    assert there.read_bytes() == b"precious"


def test_overlays_are_made_in_the_directory_of_the_image_or_in_roots(live: Live) -> None:
    inside = live.directory / "vm"
    elsewhere = live.directory / "elsewhere"
    for directory in (inside, elsewhere):
        directory.mkdir()
    path = create(inside / "0.qcow2", SIZE)
    live.serve(path)
    with pytest.raises(ImageError, match=r"outside the roots"):
        overlay(live, str(elsewhere / "snap.qcow2"))
    assert os.listdir(elsewhere) == []
    assert live.files == ["0.qcow2"]
    live.stop()
    live.serve(path, head=f'roots = ["{live.directory}"]')
    overlay(live, str(elsewhere / "snap.qcow2"))
    assert live.files == ["snap.qcow2", "0.qcow2"]


def test_a_directory_that_is_not_there_is_refused(live: Live) -> None:
    live.serve(live.chain(1)[0])
    with pytest.raises(ConfigError, match=r"there is no directory .*/none"):
        overlay(live, "none/snap.qcow2")


def test_read_only_exports_and_unknown_ones_are_refused(live: Live) -> None:
    live.serve(live.chain(1)[0], more="read_only = true\n")
    with pytest.raises(ConfigError, match="export 'vm' is read-only"):
        overlay(live)
    with pytest.raises(ConfigError, match="there is no export 'none'"):
        overlay(live, export="none")


def test_an_overlay_that_cannot_be_opened_is_not_left_behind(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    path = live.chain(1)[0]
    client = live.serve(path).connect()

    def fail(*_: object) -> None:
        raise OSError(5, "cannot")

    monkeypatch.setattr(live.service.server, "replace", fail)
    with pytest.raises(OSError, match="cannot"):
        overlay(live)
    assert not (live.directory / "snap.qcow2").exists()
    client.write(0, b"goes on")
    assert live.files == ["0.qcow2"]


def test_a_disk_of_a_name_pattern_cannot_have_an_overlay(live: Live) -> None:
    path = live.chain(1)[0]
    (live.directory / "exports.toml").write_text(
        f'listen = ["{live.address}"]\n[exports."box-*"]\ntemplate = {{image = "{path}", directory = "boxes"}}\n'
    )
    live.start()
    client = live.connect("box-1")
    with pytest.raises(ConfigError, match="is made anew, of the same file"):
        overlay(live, export="box-1")
    with pytest.raises(ConfigError, match="is made anew, of the same file"):
        live.execute("block-commit", export="box-1")
    # But it can do without its template.
    assert live.run("block-stream", export="box-1").error is None
    client.write(0, b"own")
    info = run_json("qemu-img", "info", "-U", "--output=json", live.directory / "boxes" / "box-1.qcow2")
    assert "backing-filename" not in info


def test_an_encrypted_image_gets_no_overlay_in_plaintext(live: Live) -> None:
    path = make_qcow2(live.directory / "disk.qcow2", MIB)
    live.serve(path, more=f'key_file = "{secret(live.directory)}"')
    with pytest.raises(ConfigError, match="is encrypted, and an overlay that is made here is not"):
        live.execute("blockdev-snapshot-sync", **{"snapshot-file": "snap.qcow2"})
    assert not (live.directory / "snap.qcow2").exists()
    live.execute("blockdev-snapshot-internal-sync", name="now")
