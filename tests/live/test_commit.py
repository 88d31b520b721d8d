"""Commit of images under an export that is being written."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserver.errors import ConfigError, ImageError
from nbdserver.live import copying
from tests.live.kit import KIB, MIB, SIZE, Live, Writer
from tests.serving import check, content, create, qemu_io, run, run_json


@pytest.fixture
def backend() -> str:
    """The engine's is of no matter here."""
    return "auto"


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


def test_the_header_of_an_image_that_is_only_read_is_written_for_it(live: Live) -> None:
    """3 -> 2 -> 1 -> 0, of which 1 is committed: it is 2 that names it."""
    paths = live.chain(4)
    before = content(paths[3])
    live.serve(paths[3])
    assert live.run("block-commit", top="1.qcow2", base="0.qcow2").error is None
    assert live.files == ["3.qcow2", "2.qcow2", "0.qcow2"]
    assert live.connect().read() == before
    live.stop()
    assert content(paths[3]) == before
    info = run_json("qemu-img", "info", "--output=json", paths[2])
    assert (info["backing-filename"], info["backing-filename-format"]) == ("0.qcow2", "qcow2")


def test_the_active_image_goes_on_naming_the_disk_when_others_are_committed_with_it(live: Live) -> None:
    paths = live.chain(3)
    client = live.serve(paths[2]).connect()
    assert live.run("block-commit").error is None
    # Where the image between hides the base.
    client.write(600 * KIB, b"n" * MIB)
    expected = client.read()
    live.stop()
    assert content(paths[2]) == expected
    assert run_json("qemu-img", "info", "--output=json", paths[2])["backing-filename"] == "0.qcow2"


def test_a_base_that_is_smaller_grows_and_zeroes_behind_its_end_stay_zeroes(live: Live) -> None:
    base = create(live.directory / "base.qcow2", SIZE)
    qemu_io(base, f"write -q -P 97 0 {SIZE}")
    short = create(live.directory / "short.qcow2", MIB, backing=base)
    top = create(live.directory / "top.qcow2", SIZE + 64 * KIB, backing=short)
    qemu_io(top, "write -q -P 98 0 64k", f"write -q -P 99 {SIZE} 64k")
    before = content(top)
    assert before[2 * MIB : 3 * MIB] == bytes(MIB)
    client = live.serve(top).connect()
    assert live.run("block-commit").error is None
    assert client.read(0, SIZE + 64 * KIB) == before
    live.stop()
    assert content(base) == before
    assert content(top) == before


def test_zeroes_behind_the_end_of_an_image_that_is_committed_stay_zeroes(live: Live) -> None:
    base = create(live.directory / "base.qcow2", SIZE)
    qemu_io(base, f"write -q -P 97 0 {SIZE}")
    short = create(live.directory / "short.qcow2", MIB + 4096, backing=base)
    qemu_io(short, "write -q -P 98 8k 4k")
    top = create(live.directory / "top.qcow2", SIZE, backing=short)
    qemu_io(top, "write -q -P 98 4M 4k")
    before = content(top)
    live.serve(top)
    assert live.run("block-commit", top="short.qcow2").error is None
    assert live.files == ["top.qcow2", "base.qcow2"]
    assert live.connect().read() == before
    live.stop()
    assert content(top) == before
    check(top)


@pytest.mark.parametrize("cluster_size", [512, 2 * MIB])
def test_a_base_of_another_cluster_size(live: Live, cluster_size: int) -> None:
    base = create(live.directory / "base.qcow2", SIZE, cluster_size=cluster_size)
    qemu_io(base, "write -q -P 97 3M 100k")
    top = create(live.directory / "top.qcow2", SIZE, backing=base, cluster_size=4096)
    qemu_io(top, "write -q -P 98 1M 6k", "write -q -z 3M 8k", "write -q -P 99 7M 1M")
    before = content(top)
    live.serve(top)
    assert live.run("block-commit").error is None
    live.stop()
    assert content(base) == before
    check(base)


def test_a_base_with_an_external_data_file(live: Live) -> None:
    base = create(live.directory / "base.qcow2", SIZE, data_file="beside")
    qemu_io(base, "write -q -P 97 3M 100k")
    top = create(live.directory / "top.qcow2", SIZE, backing=base)
    qemu_io(top, "write -q -P 98 1M 6k")
    before = content(top)
    client = live.serve(top).connect()
    assert live.run("block-commit").error is None
    client.write(0, b"x")
    live.stop()
    assert content(base) == b"x" + before[1:]
    check(base)


@pytest.mark.parametrize("cache", ["none", "writethrough"])
def test_files_are_used_as_they_were(live: Live, cache: str) -> None:
    paths = live.chain(1)
    client = live.serve(paths[0], more=f'cache = "{cache}"\n').connect()
    live.execute("blockdev-snapshot-sync", snapshot_file="snap.qcow2")
    assert live.modes == {cache}
    client.write(100, b"x" * 5000)
    expected = client.read()
    assert live.run("block-commit").error is None
    client.write(0, b"after")
    assert live.modes == {cache}
    live.stop()
    assert content(paths[0]) == b"after" + expected[5:]


def test_a_compressed_image_is_committed(live: Live) -> None:
    raw = live.directory / "raw"
    raw.write_bytes(b"z" * SIZE)
    base = create(live.directory / "base.qcow2", SIZE)
    top = live.directory / "top.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-B", base, "-F", "qcow2", raw, top)
    live.serve(top)
    assert live.run("block-commit").error is None
    live.stop()
    assert content(base) == b"z" * SIZE


def test_how_a_job_is_told_of_and_held(live: Live) -> None:
    live.serve(live.chain(2)[-1])
    assert live.execute("block-commit", **{"job-id": "mine", "speed": "64K"}) == {"id": "mine", "active": True}
    job = live.job("mine")
    (told,) = live.execute("query-jobs")
    assert (told["type"], told["status"], told["speed"]) == ("commit", "running", 64 * KIB)
    assert told["total-progress"] == SIZE
    live.execute("job-pause", id="mine")
    assert job.status.value == "paused"
    live.execute("block-job-set-speed", id="mine", speed=0)
    assert not job.wait(0.1)
    live.execute("job-resume", id="mine")
    assert live.end("mine").error is None
    (told,) = live.execute("query-jobs")
    assert (told["status"], told["current-progress"]) == ("concluded", SIZE)


def test_a_server_that_stops_ends_its_jobs_and_leaves_the_chain_as_it_is(live: Live) -> None:
    paths = live.chain(2)
    client = live.serve(paths[-1]).connect()
    live.ready(live.execute("block-commit")["id"])
    client.write(0, b"last")
    expected = client.read()
    live.stop()
    assert content(paths[1]) == expected
    check(paths[0])
    check(paths[1])


def test_an_export_that_goes_leaves_its_job_to_end(live: Live) -> None:
    paths = live.chain(2)
    before = content(paths[1])
    live.serve(paths[1])
    id = live.execute("block-commit", speed="1M")["id"]
    live.service.server.remove("vm")
    live.job(id).set_speed(0)
    assert live.end(id).error is None
    assert content(paths[0]) == content(paths[1]) == before, "nobody has either open any more"


# -- what is refused -----------------------------------------------------------------------------------------------


def test_one_change_of_a_chain_at_a_time(live: Live) -> None:
    live.serve(live.chain(3)[-1])
    live.ready(live.execute("block-commit", job_id="first")["id"])
    for command, arguments in (
        ("block-commit", {}),
        ("block-stream", {}),
        ("blockdev-snapshot-sync", {"snapshot_file": "s.qcow2"}),
        ("blockdev-snapshot-internal-sync", {"name": "s"}),
        ("block_resize", {"size": 2 * SIZE}),
    ):
        with pytest.raises(ConfigError, match="job 'first' works on"):
            live.execute(command, **arguments)
    with pytest.raises(ConfigError, match="the topmost layer of export 'vm' is there for job 'first'"):
        live.service.remove_filter("vm")
    assert live.end("first").error is None
    live.execute("block_resize", size=2 * SIZE)


def test_who_else_looks_at_the_base_is_in_the_way(live: Live) -> None:
    paths = live.chain(3)
    live.serve(paths[2], more=f'[exports.base]\nimage = "{paths[0]}"\nread_only = true\n')
    before = content(paths[2])
    with pytest.raises((ConfigError, ImageError), match=r"0\.qcow2"):
        live.execute("block-commit")
    assert (live.files, live.types) == (["2.qcow2", "1.qcow2", "0.qcow2"], [])
    assert live.connect().read() == before
    live.service.server.remove("base")
    assert live.run("block-commit").error is None


def test_nobody_comes_to_look_at_what_is_being_committed(live: Live) -> None:
    paths = live.chain(3)
    live.serve(paths[2])
    id = live.ready(live.execute("block-commit")["id"]).id
    for path in paths[:2]:
        with pytest.raises((ConfigError, ImageError)):
            live.service.add("other", {"image": path.name, "read_only": True}, str(live.directory))
    create(live.directory / "sibling.qcow2", SIZE, backing=paths[1])
    with pytest.raises((ConfigError, ImageError), match="commit"):
        live.service.add("other", {"image": "sibling.qcow2"}, str(live.directory))
    assert live.end(id).error is None


def test_another_program_that_has_the_base_is_in_the_way(live: Live) -> None:
    paths = live.chain(2)
    live.serve(paths[1])
    with live.reader(paths[0]), pytest.raises(ImageError, match=r"0\.qcow2.*held by another process"):
        live.execute("block-commit")
    assert live.run("block-commit").error is None


def test_images_with_internal_snapshots_are_not_committed(live: Live) -> None:
    paths = live.chain(2)
    run("qemu-img", "snapshot", "-c", "kept", paths[1])
    live.serve(paths[1])
    with pytest.raises(ConfigError, match=r"1\.qcow2 has internal snapshots, which show some of its backing file"):
        live.execute("block-commit")


def test_images_that_are_not_there_or_the_wrong_way_round(live: Live) -> None:
    live.serve(live.chain(2)[-1])
    with pytest.raises(
        ConfigError, match=r"none\.qcow2 is not in the chain of images, which is .*1\.qcow2, .*0\.qcow2"
    ):
        live.execute("block-commit", base="none.qcow2")
    with pytest.raises(ConfigError, match=r"1\.qcow2 is not below .*0\.qcow2"):
        live.execute("block-commit", top="0.qcow2", base="1.qcow2")
    with pytest.raises(ConfigError, match=r"1\.qcow2 is not below .*1\.qcow2"):
        live.execute("block-commit", base="1.qcow2")


def test_no_room_in_the_base_leaves_the_disk_as_it_is(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[Path] = live.chain(2)
    before = content(paths[1])
    client = live.serve(paths[1]).connect()

    def fail(*_: object) -> None:
        raise OSError(28, "no room")

    monkeypatch.setattr(copying, "execute", fail)
    job = live.run("block-commit")
    assert job.error is not None and "no room" in job.error
    assert (live.files, live.types) == (["1.qcow2", "0.qcow2"], [])
    assert client.read() == before
