"""Stream: a backing chain pulled in while the disk is written."""

from __future__ import annotations

import pytest

from tests.live.kit import Live, Writer
from tests.serving import check, content, run_json


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
