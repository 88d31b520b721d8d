"""The layer ``snapshot``, and the key of ``qcow2``: a snapshot shown beside the disk, or alone."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import nbd
import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.raw import Raw
from layers.snapshot import Snapshot
from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import Intent, Special
from nbdserver.files import Files
from nbdserver.graph import Graph, flatten
from nbdserver.reference import Reference, open_stack
from nbdserver.testing import NbdServers
from tests.serving import SEED, check, create, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "base").write_bytes(b"b" * 2 * MIB)
    path = create(tmp_path / "image", MIB, backing=tmp_path / "base", backing_format="raw", cluster_size=4096)
    qemu_io(path, "write -P 1 0 300k", "write -z 300k 100k", "write -c -P 2 400k 4k")
    run("qemu-img", "snapshot", "-c", "before", path)
    qemu_io(path, "write -P 3 200k 200k")
    return path


BEFORE = b"\1" * 300 * KIB + bytes(100 * KIB) + b"\2" * 4 * KIB + b"b" * (MIB - 404 * KIB)
AFTER = b"\1" * 200 * KIB + b"\3" * 200 * KIB + b"\2" * 4 * KIB + b"b" * (MIB - 404 * KIB)


@contextmanager
def _both(path: Path, name: str = "before") -> Iterator[tuple[Qcow2, Reference, Reference, ExitStack]]:
    """(the live layer, the live disk, the snapshot beside it, what closes the snapshot)"""
    graph, files, live = Graph(), Files(), Qcow2(File(str(path)))
    with open_stack(live, graph=graph, files=files) as disk, ExitStack() as shown:
        yield live, disk, shown.enter_context(open_stack(Snapshot(live, name), graph=graph, files=files)), shown


def test_alone(path: Path) -> None:
    with open_stack(Qcow2(File(str(path)), snapshot="before"), read_only=True) as snapshot:
        assert snapshot.read(0, MIB) == BEFORE
        with pytest.raises(RequestError) as caught:
            snapshot.write(0, b"x")
        assert caught.value.errno == errno.EPERM
    with open_stack(Qcow2(File(str(path)), snapshot="1")) as snapshot:  # by its ID; and it is never written
        assert snapshot.read(0, MIB) == BEFORE
    check(path)


def test_beside_the_live_disk(path: Path) -> None:
    with _both(path) as (_, disk, snapshot, _):
        assert snapshot.read(0, MIB) == BEFORE and disk.read(0, MIB) == AFTER
        disk.write(0, b"\4" * MIB)
        disk.flush()
        disk.trim(0, 500 * KIB)
        disk.flush()
        disk.write(0, b"\5" * MIB)
        assert snapshot.read(0, MIB) == BEFORE
        assert disk.read(0, MIB) == b"\5" * MIB
    check(path)


def test_it_is_read_where_it_is(path: Path) -> None:
    """No code runs for what is not compressed; and no change of the disk makes anybody ask again."""
    with _both(path) as (_, disk, snapshot, _):
        leaf = next(flatten(snapshot.root, 0, 200 * KIB, Intent.READ))
        assert leaf.length >= 200 * KIB and not isinstance(leaf.target, Special)
        before = snapshot.root.changes
        disk.write(0, b"\4" * MIB)
        disk.flush()
        assert snapshot.root.changes == before


def test_what_clients_are_told_of_allocation(path: Path) -> None:
    with open_stack(Qcow2(File(str(path)), snapshot="before"), read_only=True) as alone:
        told = alone.status(0, MIB)
    with _both(path) as (_, disk, snapshot, _):
        disk.trim(0, MIB)
        assert snapshot.status(0, MIB) == told == [(300 * KIB, 0), (100 * KIB, 3), (MIB - 400 * KIB, 0)]


def test_it_cannot_be_deleted_meanwhile(path: Path) -> None:
    with _both(path) as (live, disk, snapshot, shown):
        with pytest.raises(RequestError, match="'before' is being exported") as caught:
            live.delete_snapshot("before")
        assert caught.value.errno == errno.EBUSY
        live.create_snapshot("another")
        live.apply_snapshot("before")
        disk.write(0, b"\7" * MIB)
        live.delete_snapshot("another")
        assert snapshot.read(0, MIB) == BEFORE
        shown.close()
        live.delete_snapshot("before")
        assert not live.snapshots()
    check(path)


def test_one_made_a_moment_ago(path: Path) -> None:
    """What it needs is in the file, whatever the disk holds back."""
    pick = random.Random(SEED)
    graph, files, live = Graph(), Files(), Qcow2(File(str(path)))
    with open_stack(live, graph=graph, files=files) as disk, ExitStack() as stack:
        shown: list[tuple[Reference, bytes]] = []
        for number in range(8):
            for _ in range(10):
                length = pick.randint(1, 50 * KIB)
                disk.write(pick.randrange(MIB - length), pick.randbytes(length))
            live.create_snapshot(f"s{number}")
            layer = Snapshot(live, f"s{number}")
            shown.append((stack.enter_context(open_stack(layer, graph=graph, files=files)), disk.read(0, MIB)))
            for snapshot, content in shown:
                assert snapshot.read(0, MIB) == content
    check(path)


def test_no_such_snapshot(path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"no snapshot 'after'; there are: 'before'") as caught,
        open_stack(Qcow2(File(str(path)), snapshot="after"), read_only=True),
    ):
        pass
    assert caught.value.key == "snapshot"
    with pytest.raises(ConfigError, match=r"no snapshot 'after'; there are: 'before'"), _both(path, "after"):
        pass
    check(path)


@pytest.mark.parametrize("named", ["before", "1", "snapshot.id=1", "snapshot.name=before"])
def test_on_the_command_line(nbd_server: NbdServers, path: Path, named: str) -> None:
    """As qemu-nbd's --load-snapshot; and the image may be read by others meanwhile."""
    server = nbd_server.process("--snapshot", named, path)
    raw = path.with_name("raw")
    run("nbdcopy", server.uri(), raw)
    assert raw.read_bytes() == BEFORE
    run("qemu-img", "info", path)


def test_in_a_configuration_beside_the_live_disk(nbd_server: NbdServers, path: Path) -> None:
    text = f"""
        [nodes.disk]
        layers = [{{type = "qcow2"}}, {{type = "file", path = "{path}"}}]
        [exports.vm]
        layers = [{{node = "disk"}}]
        [exports.vm-before]
        layers = [{{type = "snapshot", snapshot = "before"}}, {{node = "disk"}}]
    """
    file = path.with_name("exports.toml")
    file.write_text("\n".join(line.strip() for line in text.splitlines()))
    server = nbd_server.process(file)
    live, snapshot = nbd.NBD(), nbd.NBD()
    live.connect_uri(server.uri("vm"))
    snapshot.connect_uri(server.uri("vm-before"))
    assert snapshot.is_read_only() and not live.is_read_only()
    live.pwrite(b"\6" * MIB, 0)
    assert bytes(snapshot.pread(MIB, 0)) == BEFORE
    assert bytes(live.pread(MIB, 0)) == b"\6" * MIB
    live.shutdown()
    snapshot.shutdown()


def test_a_layer_without_snapshots(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(512))
    with (
        pytest.raises(ConfigError, match="found raw, which has no internal snapshots"),
        open_stack(Snapshot(Raw(File(str(tmp_path / "raw"))), "x")),
    ):
        pass


def test_a_snapshot_of_another_size(path: Path) -> None:
    """It is as large as the disk was."""
    run("qemu-img", "resize", "-q", path, "3M")
    with open_stack(Qcow2(File(str(path)), snapshot="before"), read_only=True) as snapshot:
        assert snapshot.size == MIB
        assert snapshot.read(0, MIB) == BEFORE
    run("qemu-img", "snapshot", "-c", "large", path)
    run("qemu-img", "resize", "-q", "--shrink", path, "512k")
    with open_stack(Qcow2(File(str(path)), snapshot="large"), read_only=True) as snapshot:
        assert snapshot.read(0, 3 * MIB) == AFTER + bytes(2 * MIB)
