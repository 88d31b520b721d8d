"""``snapshot-access``, end to end: a disk as it was, exported beside the disk that goes on being written."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from layers.copy_before_write import CLUSTER_MIN, CopyBeforeWrite
from layers.file import File
from layers.memory import Memory
from layers.raw import Raw
from layers.snapshot_access import SnapshotAccess
from nbdserver import uri
from nbdserver.errors import ConfigError
from nbdserver.extent import Intent
from nbdserver.graph import execute
from nbdserver.reference import open_stack
from nbdserver.request import Operation, Request, Vector
from nbdserver.testing import NbdServers
from tests.coherence.pages import SOON, Background, stopped_at
from tests.interop.wire import READ, WRITE, Wire
from tests.oracle.model import Kind, Model
from tests.oracle.storm import Storm, Weather
from tests.registered import Spy
from tests.serving import SEED, amount, backend, check, content, create, qemu_io, run

__all__ = ["backend"]

CLUSTER = CLUSTER_MIN
MIB = 1 << 20


def test_it_stands_on_a_layer_that_keeps_a_snapshot() -> None:
    with pytest.raises(ConfigError) as caught, open_stack(SnapshotAccess(Raw(Memory(4096)))):
        pass
    assert str(caught.value).endswith("which keeps no snapshot; allowed is copy-before-write")


# -- races, decided --------------------------------------------------------------------------------------------------


class Stage:
    """A live disk of four clusters, 'A' to 'D', its snapshot, and a client of each."""

    def __init__(self, nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
        self.path = tmp_path / "live.raw"
        self.path.write_bytes(b"".join(letter(index) for index in range(4)))
        self.file = File(str(self.path))
        self.layer = CopyBeforeWrite(self.file, Memory(4 * CLUSTER))
        self.view = SnapshotAccess(self.layer)
        self.server, live = nbd_server.start(self.layer, name="live", backend=backend)
        self.server.export("snap", self.view)
        self.live = connect(live)
        self.snap = connect(str(uri.parse(live).with_export("snap")))

    def write(self, offset: int, data: bytes) -> None:
        """As a fault thread does it: no worker that a test has stopped is needed."""
        execute(self.layer, Request.write(offset, Vector.of(data)))

    def read(self, cluster: int) -> bytes:
        """The snapshot, likewise."""
        vector = Vector.of(CLUSTER)
        execute(self.view, Request.read(cluster * CLUSTER, vector))
        return vector.tobytes()

    def on_disk(self, cluster: int) -> bytes:
        return self.path.read_bytes()[cluster * CLUSTER : (cluster + 1) * CLUSTER]

    def is_writable(self, cluster: int) -> bool:
        return next(iter(self.layer.resolve(cluster * CLUSTER, 1, Intent.WRITE))).writable

    def counters(self, export: str) -> dict[str, int]:
        return self.server._exports[export].counters()


@pytest.fixture
def stage(nbd_server: NbdServers, tmp_path: Path, backend: str) -> Stage:
    return Stage(nbd_server, tmp_path, backend)


def letter(index: int) -> bytes:
    return bytes([ord("A") + index]) * CLUSTER


def connect(address: str) -> Wire:
    client = Wire(address)
    client.go()
    return client


def ask(client: Wire, cluster: int) -> bytes:
    client.request(READ, cluster * CLUSTER, CLUSTER)
    return answer(client)


def answer(client: Wire) -> bytes:
    assert client.reply()[1] == 0
    return client.receive(CLUSTER)


def test_a_write_waits_for_a_read_of_the_snapshot_in_flight(stage: Stage) -> None:
    assert ask(stage.snap, 0) == letter(0)  # from now on the engine knows where it is
    with stopped_at("worker.read") as stop:
        stage.snap.request(READ, 0, CLUSTER)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        write = Background(stage.write, 10, b"new")
        assert not write.is_done(), "the old data is being read"
        assert stage.on_disk(0) == letter(0)
        assert stage.read(0) == letter(0), "who comes now is sent to the target and waits for nobody"
        assert not stage.is_writable(0)
        other = Background(stage.write, CLUSTER, b"other")
        other.finish()
    write.finish()
    assert answer(stage.snap) == letter(0)
    assert ask(stage.snap, 0) == letter(0)
    assert stage.on_disk(0) == b"A" * 10 + b"new" + b"A" * (CLUSTER - 13)


def test_a_second_write_waits_too_though_its_cluster_is_copied(stage: Stage) -> None:
    ask(stage.snap, 0)
    with stopped_at("worker.read") as stop:
        stage.snap.request(READ, 0, CLUSTER)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        first = Background(stage.write, 0, b"first")
        assert not first.is_done()
        second = Background(stage.write, CLUSTER - 6, b"second")
        assert not second.is_done()
        assert stage.on_disk(0) == letter(0)
    first.finish()
    second.finish()
    assert answer(stage.snap) == letter(0)
    assert stage.on_disk(0) == b"first" + b"A" * (CLUSTER - 11) + b"second"


@pytest.mark.parametrize("operation", ["write", "zero", "trim"])
def test_a_change_across_clusters_waits_for_each(stage: Stage, operation: str) -> None:
    ask(stage.snap, 2)
    with stopped_at("worker.read") as stop:
        stage.snap.request(READ, 2 * CLUSTER, CLUSTER)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        offset, length = 3 * CLUSTER // 2, CLUSTER
        request = Request.write(offset, Vector.of(length)) if operation == "write" else None
        change = Background(execute, stage.layer, request or getattr(Request, operation)(offset, length))
        assert not change.is_done()
        assert stage.on_disk(2) == letter(2)
    change.finish()
    assert answer(stage.snap) == letter(2)
    assert stage.on_disk(2) == bytes(CLUSTER // 2) + letter(2)[CLUSTER // 2 :]
    assert [ask(stage.snap, index) for index in range(4)] == [letter(index) for index in range(4)]


def test_without_waiting_a_read_in_flight_would_see_the_write(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would find: they do hold the reader where it matters."""
    monkeypatch.setattr(type(stage.layer.file), "wait_unused", lambda *_: None)
    ask(stage.snap, 0)
    with stopped_at("worker.read") as stop:
        stage.snap.request(READ, 0, CLUSTER)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        Background(stage.write, 0, letter(25)).finish()
    assert answer(stage.snap) == letter(25)


def test_a_write_in_place_is_for_clusters_that_were_copied(stage: Stage) -> None:
    """The live export's fast path: one call of the layer for a cluster's first write, none for those after it."""

    def write(data: bytes) -> None:
        stage.live.request(WRITE, 0, len(data), data=data)
        assert stage.live.reply()[1] == 0

    ask(stage.live, 0)
    write(b"one")
    calls = stage.counters("live")["write_calls"]
    write(b"two")  # enters the permission
    faults = stage.counters("live")["faults"]
    write(b"three")
    after = stage.counters("live")
    assert (after["faults"], after["write_calls"] - calls) == (faults, 1)
    assert ask(stage.snap, 0) == letter(0)


def test_the_snapshot_is_read_with_no_python_where_it_is_known(stage: Stage) -> None:
    stage.write(0, b"new")
    for _ in range(2):
        assert [ask(stage.snap, index) for index in range(4)] == [letter(index) for index in range(4)]
    counters = stage.counters("snap")
    assert counters["reads"] - counters["hits"] == counters["faults"] <= 4
    assert counters["read_calls"] == 0


def test_the_flag_is_kept_from_the_socket_to_both_files(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    path = tmp_path / "live.raw"
    path.write_bytes(letter(0))
    file, target = Spy(File(str(path))), Spy(Memory(CLUSTER))
    layer = CopyBeforeWrite(file, target)
    server, address = nbd_server.start(layer, name="live", backend=backend)
    server.export("snap", SnapshotAccess(layer))
    live, snap = connect(address), connect(str(uri.parse(address).with_export("snap")))
    ask(snap, 0)
    live.request(WRITE, 5, 3, data=b"new")
    assert live.reply()[1] == 0
    assert ask(snap, 0) == letter(0)
    seen = [seen.operation for seen in (*file.seen, *target.seen)]
    assert seen == [Operation.READ, Operation.READ, Operation.WRITE, Operation.WRITE, Operation.READ]
    # Threads register nothing, so there is nothing to keep.
    assert {seen.is_registered for seen in (*file.seen, *target.seen)} == {backend == "io_uring"}


# -- the whole -------------------------------------------------------------------------------------------------------


def _raw(directory: Path, size: int) -> Path:
    path = directory / "live.raw"
    pick = random.Random(SEED)
    path.write_bytes(b"".join(pick.randbytes(MIB) if index % 4 else bytes(MIB) for index in range(size // MIB)))
    return path


def _chain(directory: Path, size: int) -> Path:
    """Three images: compressed clusters at the bottom, other cluster sizes above, clusters shared with a snapshot."""
    base = directory / "base.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", _raw(directory, size), base)
    middle = create(directory / "middle.qcow2", size, backing=base, cluster_size=4096)
    qemu_io(middle, "write -P 7 1M 3333k", "write -z 9M 200k", "write -P 9 11500000 1")
    top = create(directory / "top.qcow2", size, backing=middle)
    qemu_io(top, "write -P 3 2M 1M", "write -P 4 20M 300k", "discard 5M 1M")
    run("qemu-img", "snapshot", "-c", "kept", top)
    return top


DISKS = {"raw": _raw, "chain": _chain}

CONFIG = """
listen = []
[nodes.disk]
layers = [
    {{type = "copy-before-write", target = [{target}]}},
    {stack}
    {{type = "file", path = "{path}"}},
]
[exports.snap]
layers = [{{type = "snapshot-access"}}, {{node = "disk"}}]
read_only = true
[exports.live]
layers = [{{node = "disk"}}]
"""


class Scene:
    """A server of a disk and of its snapshot, as it was when the server began."""

    def __init__(self, nbd_server: NbdServers, directory: Path, kind: str, size: int, backend: str) -> None:
        self.path = DISKS[kind](directory, size)
        self.format = "raw" if kind == "raw" else "qcow2"
        self.before = content(self.path, format=self.format)
        create(directory / "target.qcow2", size)
        target = f'{{type = "memory", size = {size}}}'
        if kind == "chain":
            target = '{type = "qcow2"}, {type = "file", path = "target.qcow2"}'
        stack = "" if kind == "raw" else '{type = "qcow2"},'
        text = CONFIG.format(target=target, stack=stack, path=self.path.name).replace("listen = []\n", "")
        (directory / "exports.toml").write_text(text)
        self.server = nbd_server.process(directory / "exports.toml", "--backend", backend)
        self._copy = directory / "copy.raw"

    def is_copied_right(self) -> bool:
        """Whether the snapshot, as nbdcopy copies it out, is the disk as it was."""
        self._copy.unlink(missing_ok=True)
        run("nbdcopy", self.server.uri("snap"), self._copy)
        return self._copy.read_bytes() == self.before


def test_the_copy_is_the_disk_as_it_was_while_a_storm_goes_over_it(
    nbd_server: NbdServers, tmp_path: Path, backend: str, kind: str, round: int
) -> None:
    """Overlapping unaligned writes, zeroes, trims and reads on four connections; the live disk is checked too."""
    scene = Scene(nbd_server, tmp_path, kind, 24 * MIB, backend)
    model = Model(24 * MIB, grain=16, initial=scene.before)
    weather = Weather(length_max=128 << 10)
    with scene.server as server, Storm(server.uri("live"), model, seed=SEED + round, weather=weather) as storm:
        copies: list[bool] = []
        copying = Background(lambda: copies.extend(scene.is_copied_right() for _ in range(3)))
        while not copying.is_done(0):
            storm.run(seconds=0.05)
        copying.finish()
        assert storm.done[Kind.WRITE] > 20
        final = storm.verify()
        assert scene.is_copied_right()
    assert copies == [True] * 3
    assert content(scene.path, format=scene.format) == final
    if kind == "chain":
        check(scene.path)


def test_the_copy_is_the_disk_as_it_was_while_writers_write_at_full_rate(
    nbd_server: NbdServers, tmp_path: Path, backend: str, kind: str, round: int
) -> None:
    """Copied again and again, from before the first write on."""
    scene = Scene(nbd_server, tmp_path, kind, 64 * MIB, backend)
    with scene.server as server:
        unwritten = scene.path.stat().st_mtime_ns
        writers = subprocess.Popen(
            [
                *("fio", "--name=write", "--ioengine=nbd", f"--uri={server.uri('live')}", "--rw=randwrite"),
                *("--bsrange=512-256k", "--bs_unaligned", "--norandommap", f"--randseed={SEED + round}"),
                *("--numjobs=3", "--thread", "--iodepth=16", f"--size={64 * MIB}", "--time_based", "--runtime=60"),
            ],
            stdout=subprocess.DEVNULL,
        )
        try:
            copies = 0  # of those that began after the first write
            while copies < 3:
                copies += scene.path.stat().st_mtime_ns != unwritten
                assert scene.is_copied_right()
            assert writers.poll() is None, "they were to write all the time"
        finally:
            writers.terminate()
            writers.wait()
        assert scene.is_copied_right()
    assert content(scene.path, format=scene.format) != scene.before
    if kind == "chain":
        check(scene.path)


@pytest.fixture(params=DISKS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=range(amount(1, 10)))
def round(request: pytest.FixtureRequest) -> int:
    return int(request.param)
