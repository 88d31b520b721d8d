"""Points in time, passed at random on a disk that a storm goes over."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass

import nbd
import pytest

from layers.qcow2 import Qcow2
from layers.snapshot import Snapshot
from nbdserver import uri
from nbdserver.errors import RequestError
from nbdserver.reference import Reference
from nbdserver.server import Server
from tests.oracle.model import Kind, Model
from tests.oracle.storm import Storm

#: Snapshots that there are at once.
_SNAPSHOTS_MAX = 5


@dataclass
class Made:
    """A snapshot: what is in it, and when it was made and deleted, by a clock that tells crashes apart."""

    content: bytes
    began: int
    ended: int
    delete_began: int | None = None
    delete_ended: int | None = None

    @property
    def is_there(self) -> bool:
        return self.delete_began is None

    def must_be(self, crash: int) -> bool:
        """Whether it is there after a crash at that time."""
        return self.ended <= crash and (self.delete_began is None or crash <= self.delete_began)

    def may_be(self, crash: int) -> bool:
        return self.began < crash and (self.delete_ended is None or crash < self.delete_ended)


class Points:
    """Passes points in time on a disk that a storm goes over, and knows what must be in each snapshot."""

    def __init__(
        self,
        server: Server,
        live: Qcow2,
        storm: Storm,
        model: Model,
        pick: random.Random,
        clock: Callable[[], int] = lambda: 0,
    ) -> None:
        self.server, self.live, self.storm, self.model, self.pick = server, live, storm, model, pick
        #: What clients know of the disk: it becomes larger at times, but never smaller than that.
        self.size = model.size
        self._clock = clock
        #: (began, ended) of all points, by the clock.
        self.windows: list[tuple[int, int]] = []
        #: All snapshots that there are or have been.
        self.made: dict[str, Made] = {}
        self.shown: set[str] = set()
        self._count = 0

    def one(self) -> None:
        began, there = self._clock(), list(self.snapshots)
        choice = self.pick.random()
        if not there or (choice < 0.4 and len(there) < _SNAPSHOTS_MAX):
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
        self.windows.append((began, self._clock()))

    @property
    def snapshots(self) -> dict[str, bytes]:
        """What is in the snapshots that there are."""
        return {name: made.content for name, made in self.made.items() if made.is_there}

    def _create(self) -> None:
        """What the disk is in the drained section is one of the things that the model allows, and is in the snapshot
        from then on."""
        self._count += 1
        name = f"s{self._count}"
        reading = self.model.submit(Kind.READ, 0, self.size)
        with self.server.drained(self.live):
            began = self._clock()
            self.live.create_snapshot(name)
            ended = self._clock()
            content = Reference(self.live).read(0, self.live.size)
        self.made[name] = Made(content, began, ended)
        self.model.complete(reading, content[: self.size])

    def _apply(self, name: str) -> None:
        replacing = self.model.replace(self.made[name].content[: self.size])
        with self.server.drained(self.live) as exports:
            self.live.apply_snapshot(name)
            for export in exports:
                export.resized()
        self.model.complete(replacing)

    def _resize(self) -> None:
        """What the disk grows by reads as zeroes; it never becomes smaller than clients take it to be."""
        old, new = self.live.size, self.size + self.pick.randrange(self.size // 512) * 512
        with self.server.drained(self.live) as exports:
            self.live.resize(new)
            for export in exports:
                export.resized()
            disk = Reference(self.live)
            assert new <= old or not any(disk.read(old, new - old))
            if new > self.size:
                disk.write(self.size, b"behind" * 10)

    def _delete(self, name: str) -> None:
        with self.server.drained(self.live):
            if name in self.shown:
                with pytest.raises(RequestError) as caught:
                    self.live.delete_snapshot(name)
                assert caught.value.errno == errno.EBUSY
                return
            self.made[name].delete_began = self._clock()
            self.live.delete_snapshot(name)
            self.made[name].delete_ended = self._clock()

    def _show(self, name: str) -> None:
        """Read through a connection of its own, perhaps again and again."""
        if name not in self.shown:
            self.server.export(name, Snapshot(self.live, name))
            self.shown.add(name)
        content = self.made[name].content
        handle = nbd.NBD()
        handle.connect_uri(str(uri.parse(self.server.listening[0]).with_export(name)))
        assert handle.is_read_only() and handle.get_size() == len(content)
        start = self.pick.randrange(len(content) // 2)
        length = len(content) // 2
        assert bytes(handle.pread(length, start)) == content[start : start + length], name
        handle.shutdown()

    def _hide(self, name: str) -> None:
        while self.server.clients_of(self.server.exports[name]):
            self.storm.run(seconds=0.01)
        assert self.server.remove(name)
        self.shown.discard(name)
