"""Live snapshots."""

from __future__ import annotations

from tests.live.kit import Live
from tests.serving import check, content, run_json


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
