"""Commit of images under an export that is being written."""

from __future__ import annotations

from tests.live.kit import Live, Writer
from tests.serving import check, content


def test_the_active_image_is_committed_while_it_is_written(live: Live) -> None:
    paths = live.chain(3)
    client = live.serve(paths[-1]).connect()
    writer = Writer(client, content(paths[-1]))
    job = live.run("block-commit", base="0.qcow2")
    assert job.error is None
    assert (live.files, live.types) == (["0.qcow2"], [])
    expected = writer.stop()
    assert writer.count > 0
    client.write(0, b"after")
    expected = b"after" + expected[5:]
    assert client.read() == expected
    live.stop()
    assert content(paths[0]) == expected
    assert content(paths[2]) == expected, "the active image shows the disk through the base"
    check(paths[0])
    check(paths[2])


def test_images_between_are_committed(live: Live) -> None:
    paths = live.chain(4)
    client = live.serve(paths[-1]).connect()
    writer = Writer(client, content(paths[-1]))
    job = live.run("block-commit", top="2.qcow2", base="0.qcow2")
    assert job.error is None
    assert (live.files, live.types) == (["3.qcow2", "0.qcow2"], [])
    expected = writer.stop()
    assert client.read() == expected
    live.stop()
    assert content(paths[3]) == expected
    check(paths[0])
    check(paths[3])
