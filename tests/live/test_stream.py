"""Stream: a backing chain pulled in while the disk is written."""

from __future__ import annotations

import pytest

from nbdserver.errors import ConfigError
from tests.live.kit import KIB, MIB, SIZE, Live, Writer
from tests.serving import check, content, create, qemu_io, run, run_json


@pytest.fixture
def backend() -> str:
    """The engine's is of no matter here."""
    return "auto"


@pytest.mark.parametrize("base", [None, "0.qcow2"])
def test_the_chain_is_pulled_in_while_the_disk_is_written(live: Live, base: str | None) -> None:
    paths = live.chain(3)
    client = live.serve(paths[-1]).connect()
    writer = Writer(client, content(paths[-1]))
    job = live.run("block-stream", **({} if base is None else {"base": base}))
    assert job.error is None
    assert (live.files, live.types) == (["2.qcow2"] if base is None else ["2.qcow2", "0.qcow2"], [])
    expected = writer.stop()
    assert writer.count > 0
    client.write(0, b"after")
    expected = b"after" + expected[5:]
    assert client.read() == expected
    live.stop()
    assert content(paths[2]) == expected
    check(paths[2])
    info = run_json("qemu-img", "info", "--output=json", paths[2])
    assert info.get("backing-filename") == base


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_zeroes_behind_the_end_of_a_shorter_image_stay_zeroes(live: Live, compat: str) -> None:
    """Without it, the base would show there."""
    base = create(live.directory / "base.qcow2", SIZE)
    qemu_io(base, f"write -q -P 97 0 {SIZE}")
    short = create(live.directory / "short.qcow2", MIB + 4096, backing=base)
    qemu_io(short, "write -q -P 98 8k 4k", "write -q -z 64k 64k")
    top = create(live.directory / "top.qcow2", SIZE, backing=short, compat=compat)
    before = content(top)
    assert before[2 * MIB : 3 * MIB] == bytes(MIB)
    live.serve(top)
    assert live.run("block-stream", base="base.qcow2").error is None
    assert live.files == ["top.qcow2", "base.qcow2"]
    assert live.connect().read() == before
    live.stop()
    assert content(top) == before
    check(top)


def test_nothing_is_copied_that_nobody_has_or_that_the_base_has(live: Live) -> None:
    paths = live.chain(3)
    live.serve(paths[2])
    assert live.run("block-stream", base="0.qcow2").error is None
    live.stop()
    held = [entry for entry in run_json("qemu-img", "map", "--output=json", paths[2]) if entry["depth"] == 0]
    assert sum(entry["length"] for entry in held if entry["data"]) == 1536 * KIB + 2 * 64 * KIB
    assert min(entry["start"] for entry in held if entry["data"]) == 512 * KIB


def test_the_images_below_are_let_go(live: Live) -> None:
    paths = live.chain(2)
    live.serve(paths[1])
    assert live.run("block-stream").error is None
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", paths[0])  # which takes a lock that nobody else may have


def test_several_exports_of_a_base_are_streamed_and_each_stays_what_it_is(live: Live) -> None:
    """A golden image may have other users; what they see does not change."""
    base = live.chain(1)[0]
    for name in ("vm", "other"):
        create(live.directory / f"{name}.qcow2", SIZE, backing=base)
    live.serve(live.directory / "vm.qcow2", more='[exports.other]\nimage = "other.qcow2"\n')
    other, before = live.connect("other"), content(base)
    client = live.connect()
    client.write(0, b"x")
    assert live.run("block-stream").error is None
    client.write(10, b"y")
    assert other.read() == before
    assert live.run("block-stream", export="other").error is None
    assert other.read() == before


def test_a_filter_may_come_and_go_while_it_runs(live: Live) -> None:
    paths = live.chain(3)
    before = content(paths[2])
    client = live.serve(paths[2]).connect()
    id = live.execute("block-stream", speed="1M")["id"]
    live.service.add_filter("vm", {"type": "throttle", "iops_total": 100000}, "")
    assert live.types == ["throttle", "stream-top"]
    live.job(id).set_speed(0)
    assert live.end(id).error is None
    assert live.types == ["throttle"]
    assert client.read() == before


def test_bitmaps_do_not_record_what_is_only_copied(live: Live) -> None:
    paths = live.chain(2)
    live.serve(paths[1])
    live.execute("block-dirty-bitmap-add", name="since")
    client = live.connect()
    client.write(3 * MIB, b"x")
    assert live.run("block-stream").error is None
    client.write(4 * MIB, b"x")
    (bitmap,) = live.execute("query-dirty-bitmaps", export="vm")
    assert bitmap["count"] == 2 * 64 * KIB


def test_there_is_nothing_to_stream(live: Live) -> None:
    live.serve(live.chain(2)[-1])
    with pytest.raises(ConfigError, match=r"nothing to stream into .*1\.qcow2: that is its backing file already"):
        live.execute("block-stream", base="0.qcow2")
    assert live.run("block-stream").error is None
    with pytest.raises(ConfigError, match=r"nothing to stream into .*1\.qcow2: it has no backing file"):
        live.execute("block-stream")
