"""QEMU and we write the same images in turns, and each finds what the other has left."""

from __future__ import annotations

import contextlib
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from tests.interop.qcow2_matrix import (
    MATRIX,
    MIB,
    SECTOR,
    Exports,
    Picture,
    Stroke,
    check_by_qemu,
    check_over_nbd,
    draw,
    draw_by_qemu,
    exports,
    make_chain,
    options,
    strokes,
)
from tests.serving import SEED, amount, check, eventually, run

__all__ = ["exports"]

#: Rounds, in each of which both take a turn.
ROUNDS = amount(3, 20)

KINDS = [
    "512", "4096", "65536", "4096, v2", "1 bits", "lazy, 4096", "subclusters, 16384", "metadata, 65536",
    "data file, 4096", "raw data file, 65536", "data file, subclusters", "zlib, 4096", "zstd, subclusters", "four deep",
    "subclusters on a chain", "snapshots, 512", "snapshots, subclusters", "64T, subclusters",
]  # fmt: skip

#: Snapshots that there are at once.
SNAPSHOTS_MAX = 3

#: The flags of a socket that listens, in /proc/net/unix: the kernel's __SO_ACCEPTCON.
ACCEPTS = "00010000"


class Game:
    """One image, and what must be on it."""

    def __init__(self, folder: Path, name: str, exports: Exports) -> None:
        self.kind, self._name, self._exports = MATRIX[name], name, exports
        self.path, self.pick = folder / "image", random.Random(f"{SEED} {name}")
        arguments, self.picture = make_chain(folder, self.kind, name)
        words = [*options(self.kind.options, self.path), *arguments]
        run("qemu-img", "create", "-q", "-f", "qcow2", *words, self.path, str(self.kind.size))
        self.snapshots: dict[str, Picture] = {}
        self._number = 0
        if self.kind.compress:
            self._write_compressed()

    def _write_compressed(self) -> None:
        """As QEMU does, where nothing is yet."""
        clusters = self.pick.sample(range(self.kind.size // self.kind.cluster), 8)
        commands = [f"write -c -P 99 {at * self.kind.cluster} {self.kind.cluster}" for at in clusters]
        output = run("qemu-io", "-f", "qcow2", *(word for each in commands for word in ("-c", each)), self.path)
        assert "failed" not in output, output
        self.picture.draw([Stroke(at * self.kind.cluster, self.kind.cluster, 99) for at in clusters])

    def theirs(self) -> None:
        """QEMU's turn: by its tools, or as a server."""
        check_by_qemu(self.path, self.picture)
        self._pass_point_by_qemu()
        drawn = self._drawn()
        if self.pick.random() < 0.5:
            draw_by_qemu(self.path, "qcow2", drawn)
            self.picture.draw(drawn)
        else:
            with _qemu_nbd(self.path) as handle:
                draw(handle, drawn, self.picture, self.pick)
                check_over_nbd(handle, self.picture)
        check(self.path)

    def ours(self) -> None:
        layer = Qcow2(File(str(self.path)))
        with self._exports.serving(layer, read_only=False) as handle:
            check_over_nbd(handle, self.picture)
            with self._exports.server.drained(layer) as served:
                self._pass_point(layer)
                for export in served:
                    export.resized()
        with self._exports.serving(layer := Qcow2(File(str(self.path))), read_only=False) as handle:
            draw(handle, self._drawn(), self.picture, self.pick)
            check_over_nbd(handle, self.picture)
        check(self.path)

    def _drawn(self) -> list[Stroke]:
        self._number += 1
        return strokes(self.picture.size, self.kind.cluster, f"{self._name} {self._number}", 10)

    # -- points in time ---------------------------------------------------------------------------------------------

    @property
    def _has_points(self) -> bool:
        return self.kind.snapshots > 0

    def _pass_point(self, layer: Qcow2) -> None:
        if self.pick.random() < 0.4 and self.kind.is_small:
            self._grow()
            layer.resize(self.picture.size)
        elif self._has_points and len(self.snapshots) < SNAPSHOTS_MAX:
            layer.create_snapshot(self._new_snapshot())
        elif self._has_points:
            layer.delete_snapshot(self._gone_snapshot())

    def _pass_point_by_qemu(self) -> None:
        if self.pick.random() < 0.4 and self.kind.is_small:
            self._grow()
            run("qemu-img", "resize", "-q", "-f", "qcow2", self.path, str(self.picture.size))
        elif self._has_points and len(self.snapshots) < SNAPSHOTS_MAX:
            run("qemu-img", "snapshot", "-c", self._new_snapshot(), self.path)
        elif self._has_points:
            run("qemu-img", "snapshot", "-d", self._gone_snapshot(), self.path)

    def _grow(self) -> None:
        self.picture.size += self.pick.randint(1, MIB // SECTOR) * SECTOR

    def _new_snapshot(self) -> str:
        self._number += 1
        self.snapshots[f"s{self._number}"] = self.picture.copy()
        return f"s{self._number}"

    def _gone_snapshot(self) -> str:
        name = self.pick.choice(list(self.snapshots))
        del self.snapshots[name]
        return name

    def check_snapshots(self) -> None:
        """They show what they did, here and there."""
        for name, shown in self.snapshots.items():
            with self._exports.serving(Qcow2(File(str(self.path)), snapshot=name), read_only=True) as handle:
                check_over_nbd(handle, shown)
            raw = self.path.with_name("raw")
            run("qemu-img", "convert", "-l", name, "-O", "raw", self.path, raw)
            # QEMU shows it in a disk of the size that the disk has now.
            assert raw.read_bytes() == shown.bytes(0, shown.size).ljust(self.picture.size, b"\0"), name


@contextlib.contextmanager
def _qemu_nbd(path: Path) -> Iterator[nbd.NBD]:
    """A client of qemu-nbd, which has ended when the block has."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as directory:
        address = f"{directory}/socket"
        server = subprocess.Popen(["qemu-nbd", "-f", "qcow2", "--discard=unmap", "-k", address, path])
        try:
            eventually(lambda: _listens(address))
            handle = nbd.NBD()
            handle.connect_unix(address)
            yield handle
            handle.flush()
            handle.shutdown()
            assert server.wait(60) == 0
        finally:
            server.kill()
            server.wait()


def _listens(address: str) -> bool:
    """Whether connections are taken there: the socket is there a moment before. None is made, for who makes the first
    ends the server with it."""
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(words[-1] == address and words[3] == ACCEPTS for words in sockets)


@pytest.mark.parametrize("name", KINDS)
def test_in_turns(exports: Exports, tmp_path: Path, name: str) -> None:
    game = Game(tmp_path, name, exports)
    for _ in range(ROUNDS):
        game.theirs()
        game.ours()
    check_by_qemu(game.path, game.picture)
    game.check_snapshots()
