"""Points in time at random moments of a storm: snapshots made, applied, deleted, shown beside the disk; other sizes."""

from __future__ import annotations

import contextlib
import errno
import random
from pathlib import Path

import nbd
import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.snapshot import Snapshot
from nbdserver import uri
from nbdserver.errors import RequestError
from nbdserver.reference import Reference
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.oracle.model import Kind, Model
from tests.oracle.storm import Storm, Weather
from tests.serving import SEED, amount, check, content, create, qemu_io, run

MIB = 1 << 20
SIZE = 4 * MIB
#: Points in time that are passed over each disk, a tenth of a second apart.
POINTS = amount(16, 600)
SNAPSHOTS_MAX = 5

DISKS = {
    "64k": {},
    "4k": {"cluster_size": 4096},
    "512": {"cluster_size": 512},
}


class Points:
    """Passes points in time on a disk that a storm goes over, and knows what must be in each snapshot."""

    def __init__(self, server: Server, live: Qcow2, storm: Storm, model: Model, pick: random.Random) -> None:
        self.server, self.live, self.storm, self.model, self.pick = server, live, storm, model, pick
        self.contents: dict[str, bytes] = {}
        #: What is behind the end that clients know.
        self.behind: dict[str, bytes] = {}
        self.shown: set[str] = set()
        self._count = 0

    def one(self) -> None:
        there = list(self.contents)
        choice = self.pick.random()
        if not there or (choice < 0.4 and len(there) < SNAPSHOTS_MAX):
            self._create()
        elif choice < 0.55:
            self._apply(self.pick.choice(there))
        elif choice < 0.75:
            self._delete(self.pick.choice(there))
        elif choice < 0.82:
            self._resize()
        elif choice < 0.93:
            self._show(self.pick.choice(there))
        elif self.shown:
            self._hide(self.pick.choice(list(self.shown)))

    def _create(self) -> None:
        """What the disk is in the drained section is one of the things that the model allows, and is in the snapshot
        from then on."""
        self._count += 1
        name = f"s{self._count}"
        reading = self.model.submit(Kind.READ, 0, SIZE)
        with self.server.drained(self.live):
            self.live.create_snapshot(name)
            self.contents[name] = Reference(self.live).read(0, SIZE)
            self.behind[name] = Reference(self.live).read(SIZE, self.live.size - SIZE)
        self.model.complete(reading, self.contents[name])

    def _apply(self, name: str) -> None:
        replacing = self.model.replace(self.contents[name])
        with self.server.drained(self.live) as exports:
            self.live.apply_snapshot(name)
            for export in exports:
                export.resized()
        self.model.complete(replacing)

    def _resize(self) -> None:
        """What the disk grows by reads as zeroes; it never becomes smaller than clients take it to be."""
        old, new = self.live.size, SIZE + self.pick.randrange(SIZE // 512) * 512
        with self.server.drained(self.live) as exports:
            self.live.resize(new)
            for export in exports:
                export.resized()
            disk = Reference(self.live)
            assert new <= old or not any(disk.read(old, new - old))
            if new > SIZE:
                disk.write(SIZE, b"behind" * 10)

    def _delete(self, name: str) -> None:
        with self.server.drained(self.live):
            if name in self.shown:
                with pytest.raises(RequestError) as caught:
                    self.live.delete_snapshot(name)
                assert caught.value.errno == errno.EBUSY
                return
            self.live.delete_snapshot(name)
        del self.contents[name]

    def _show(self, name: str) -> None:
        """Read through a connection of its own, perhaps again and again."""
        if name not in self.shown:
            self.server.export(name, Snapshot(self.live, name))
            self.shown.add(name)
        handle = nbd.NBD()
        handle.connect_uri(str(uri.parse(self.server.listening[0]).with_export(name)))
        assert handle.is_read_only() and handle.get_size() == SIZE + len(self.behind[name])
        start = self.pick.randrange(SIZE // 2)
        assert bytes(handle.pread(SIZE // 2, start)) == self.contents[name][start : start + SIZE // 2], name
        handle.shutdown()

    def _hide(self, name: str) -> None:
        while self.server.clients_of(self.server.exports[name]):
            self.storm.run(seconds=0.01)
        assert self.server.remove(name)
        self.shown.discard(name)


@pytest.mark.parametrize("name", DISKS)
def test_points_in_time(nbd_server: NbdServers, tmp_path: Path, backend: str, name: str) -> None:
    base = create(tmp_path / "base.qcow2", SIZE - MIB // 2)
    qemu_io(base, "write -P 5 0 700k", "write -P 6 2M 300k")
    path = create(tmp_path / "disk.qcow2", SIZE, backing=base, **DISKS[name])
    qemu_io(path, "write -c -P 7 1M 64k")
    live, model, pick = Qcow2(File(str(path))), Model(SIZE, initial=content(path)), random.Random(SEED)
    with contextlib.ExitStack() as ending:
        servers = NbdServers(tmp_path, ending)
        server, address = servers.start(live, backend=backend)
        storm = ending.enter_context(Storm(address, model, seed=SEED, weather=Weather(length_max=32 << 10)))
        points = Points(server, live, storm, model, pick)
        for _ in range(POINTS):
            storm.run(seconds=pick.uniform(0, 0.2))
            points.one()
        final = storm.verify()
    check(path)
    assert content(path)[:SIZE] == final
    for snapshot, before in points.contents.items():
        run("qemu-img", "snapshot", "-a", snapshot, path)
        assert content(path) == before + points.behind[snapshot], snapshot
