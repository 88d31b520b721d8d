"""The matrix: qcow2 images of every kind that QEMU's creation options can make, and what is drawn on them."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbd
import pytest

from layers.qcow2 import Qcow2
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.serving import SEED, eventually, run

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
SECTOR = 512


class Base(NamedTuple):
    """A backing file: a format, a size, and creation options."""

    format: str
    size: int
    options: dict[str, Any] = {}


class Kind(NamedTuple):
    """A kind of image. ``chain``: what it stands on, the lowest first. ``compress``: it is made by convert -c."""

    size: int
    options: dict[str, Any] = {}
    chain: tuple[Base, ...] = ()
    snapshots: int = 0
    compress: bool = False

    @property
    def is_small(self) -> bool:
        """Whether it can be compared as a whole."""
        return self.size <= 16 * MIB

    @property
    def cluster(self) -> int:
        return int(self.options.get("cluster_size", 64 * KIB))


#: Neither a multiple of a cluster nor of an L2 table.
ODD = 3 * MIB + 7 * SECTOR


def _kinds() -> Iterator[tuple[str, Kind]]:
    for cluster in (512, KIB, 4 * KIB, 16 * KIB, 64 * KIB, 2 * MIB):
        size = 9 * MIB + SECTOR if cluster > MIB else ODD
        yield f"{cluster}", Kind(size, {"cluster_size": cluster})
        yield f"{cluster}, v2", Kind(size, {"cluster_size": cluster, "compat": "0.10"})
    for bits in (1, 2, 4, 8, 32, 64):
        yield f"{bits} bits", Kind(ODD, {"cluster_size": 4 * KIB, "refcount_bits": bits})
        yield f"{bits} bits, 512", Kind(MIB, {"cluster_size": 512, "refcount_bits": bits})
    for cluster in (16 * KIB, 64 * KIB, 2 * MIB):
        options = {"cluster_size": cluster, "extended_l2": "on"}
        size = 9 * MIB + SECTOR if cluster > MIB else ODD
        yield f"subclusters, {cluster}", Kind(size, options)
        yield f"subclusters, {cluster}, preallocated", Kind(size, {**options, "preallocation": "metadata"})
    for cluster in (4 * KIB, 64 * KIB):
        yield f"lazy, {cluster}", Kind(ODD, {"cluster_size": cluster, "lazy_refcounts": "on"})
        for how in ("metadata", "falloc", "full"):
            yield f"{how}, {cluster}", Kind(ODD, {"cluster_size": cluster, "preallocation": how})
        data = {"cluster_size": cluster, "data_file": "beside"}
        yield f"data file, {cluster}", Kind(ODD, data)
        yield f"raw data file, {cluster}", Kind(ODD, {**data, "data_file_raw": "on"})
    subclusters = {"data_file": "beside", "extended_l2": "on"}
    yield "data file, subclusters", Kind(ODD, subclusters)
    yield (
        "raw data file, preallocated",
        Kind(ODD, {"data_file": "beside", "data_file_raw": "on", "preallocation": "full"}),
    )
    for method in ("zlib", "zstd"):
        for cluster in (512, 4 * KIB, 64 * KIB, 2 * MIB):
            options = {"cluster_size": cluster, "compression_type": method}
            yield f"{method}, {cluster}", Kind(5 * MIB + SECTOR, options, compress=True)
    yield "zstd, subclusters", Kind(ODD, {"extended_l2": "on", "compression_type": "zstd"}, compress=True)
    yield from _chains()
    for name, options in {
        "snapshot": {}, "snapshots, 512": {"cluster_size": 512}, "snapshots, v2": {"compat": "0.10"},
        "snapshots, subclusters": {"extended_l2": "on"}, "snapshots, 4 bits": {"refcount_bits": 4},
    }.items():  # fmt: skip
        yield name, Kind(MIB if "512" in name else ODD, options, snapshots=2 if "snapshots" in name else 1)
    yield from _large()


def _chains() -> Iterator[tuple[str, Kind]]:
    raw, short = Base("raw", 5 * MIB), Base("raw", MIB + 700)
    overlay = Base("qcow2", 2 * MIB, {"cluster_size": 512})
    old = Base("qcow2", ODD, {"compat": "0.10", "cluster_size": 4 * KIB})
    yield "on longer raw", Kind(ODD, chain=(raw,))
    yield "on shorter raw", Kind(ODD, {"cluster_size": 4 * KIB}, chain=(short,))
    yield "v2 on v2", Kind(ODD, {"compat": "0.10"}, chain=(old,))
    yield "four deep", Kind(ODD, {"cluster_size": 16 * KIB}, chain=(raw, overlay, old))
    yield "subclusters on a chain", Kind(ODD, {"extended_l2": "on"}, chain=(short, old))
    yield "data file on a chain", Kind(ODD, {"data_file": "beside"}, chain=(overlay,))


def _large() -> Iterator[tuple[str, Kind]]:
    yield "64T", Kind(64 * TIB)
    yield "64T, 2M", Kind(64 * TIB, {"cluster_size": 2 * MIB})
    yield "64T, subclusters", Kind(64 * TIB, {"cluster_size": 256 * KIB, "extended_l2": "on"})
    yield "64T, 1 bit, v3", Kind(64 * TIB, {"cluster_size": MIB, "refcount_bits": 1})
    yield (
        "64T on a chain",
        Kind(64 * TIB, {"cluster_size": 128 * KIB}, chain=(Base("raw", 5 * MIB), Base("qcow2", TIB))),
    )
    yield "1T, 4K", Kind(TIB, {"cluster_size": 4 * KIB})
    yield "8G, 512", Kind(8 * GIB, {"cluster_size": 512})
    yield "2T, data file", Kind(2 * TIB, {"data_file": "beside"})


MATRIX = dict(_kinds())


# -- what is drawn ----------------------------------------------------------------------------------------------------


class Stroke(NamedTuple):
    """``value``: a byte that is written throughout; 0: zeroes, by a request for zeroes."""

    offset: int
    length: int
    value: int


def strokes(size: int, cluster: int, tag: str, count: int = 12) -> list[Stroke]:
    """Random ones, all over a disk, its first and last sector among them; on each other where it is small."""
    pick = random.Random(f"{SEED} {tag}")
    drawn = [Stroke(0, SECTOR, 1), Stroke(size // SECTOR * SECTOR - SECTOR, SECTOR, 2)]
    for _ in range(count):
        length = pick.randint(1, max(min(3 * cluster, 200 * KIB) // SECTOR, 8)) * SECTOR
        offset = pick.randrange(size // SECTOR) * SECTOR
        value = 0 if pick.random() < 0.25 else pick.randrange(3, 256)
        drawn.append(Stroke(offset, min(length, size - offset) // SECTOR * SECTOR, value))
    return drawn


class Picture:
    """What is on a disk, sector by sector: each holds one byte throughout. Zeroes where nothing has been drawn."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._sectors: dict[int, int] = {}

    def draw(self, drawn: list[Stroke]) -> None:
        for stroke in drawn:
            first, count = stroke.offset // SECTOR, stroke.length // SECTOR
            self._sectors.update(dict.fromkeys(range(first, first + count), stroke.value))

    def on_top_of(self, below: Picture) -> None:
        """Show what is below where nothing has been drawn."""
        self._sectors = {**{at: v for at, v in below._sectors.items() if at * SECTOR < self.size}, **self._sectors}

    def copy(self) -> Picture:
        other = Picture(self.size)
        other.on_top_of(self)
        return other

    def bytes(self, offset: int, length: int) -> bytes:
        """Whole sectors, or up to the end of the disk."""
        first, stop = offset // SECTOR, -(-(offset + length) // SECTOR)
        return b"".join(bytes([self._sectors.get(at, 0)]) * SECTOR for at in range(first, stop))[:length]

    def runs(self) -> Iterator[Stroke]:
        """Ranges of one value that cover all that was drawn, and a sector of what was not on either side."""
        touched = {near for at in self._sectors for near in (at - 1, at, at + 1)}
        start = stop = value = -1
        for at in sorted(at for at in touched if 0 <= at < self.size // SECTOR):
            if at != stop or self._sectors.get(at, 0) != value:
                if start >= 0:
                    yield Stroke(start * SECTOR, (stop - start) * SECTOR, value)
                start, value = at, self._sectors.get(at, 0)
            stop = at + 1
        if start >= 0:
            yield Stroke(start * SECTOR, (stop - start) * SECTOR, value)


def draw_by_qemu(path: Path, format: str, drawn: list[Stroke]) -> None:
    """Have qemu-io draw."""
    commands = [
        f"write -P {s.value} {s.offset} {s.length}" if s.value else f"write -z {s.offset} {s.length}" for s in drawn
    ]
    _qemu_io(path, format, commands)


def check_by_qemu(path: Path, picture: Picture, *, format: str = "qcow2") -> None:
    """QEMU reads what is in the picture."""
    _qemu_io(path, format, [f"read -P {run.value} {run.offset} {run.length}" for run in picture.runs()])


def _qemu_io(path: Path, format: str, commands: list[str]) -> None:
    for start in range(0, len(commands), 500):
        words = (word for command in commands[start : start + 500] for word in ("-c", command))
        output = run("qemu-io", "-f", format, *words, path)
        assert "failed" not in output and "rror" not in output, output


def make_chain(folder: Path, kind: Kind, name: str) -> tuple[list[str], Picture]:
    """The backing files of an image, made and drawn on by QEMU; the arguments that name the last one; what it shows."""
    picture, arguments = Picture(kind.size), list[str]()
    for number, base in enumerate(kind.chain):
        path = folder / f"{number}.{base.format}"
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            base.format,
            *options(base.options, path),
            *arguments,
            path,
            str(base.size),
        )
        drawn = strokes(base.size, 64 * KIB, f"{name} {number}")
        draw_by_qemu(path, base.format, drawn)
        above = Picture(base.size)
        above.draw(drawn)
        above.on_top_of(picture)
        picture, arguments = above, ["-b", str(path), "-F", base.format]
    top = Picture(kind.size)
    top.on_top_of(picture)
    return arguments, top


def drawn_on(kind: Kind, name: str, number: int = 0) -> list[Stroke]:
    """What is drawn on an image, before its first snapshot, before its second, ..."""
    return strokes(kind.size, kind.cluster, f"{name}, {number}")


def options(given: dict[str, Any], path: Path) -> list[str]:
    """As arguments of create and convert; a data file lies beside the image."""
    words = {**given, "data_file": f"{path}.data"} if "data_file" in given else given
    return ["-o", ",".join(f"{key}={value}" for key, value in words.items())] if words else []


# -- over NBD ---------------------------------------------------------------------------------------------------------


class Exports:
    """Exports of one server, one after another."""

    def __init__(self, server: Server, uri: str) -> None:
        self.server, self._uri, self._number = server, uri, 0

    @contextlib.contextmanager
    def serving(self, layer: Qcow2, *, read_only: bool) -> Iterator[nbd.NBD]:
        """A client of it."""
        self._number += 1
        name = str(self._number)
        self.server.export(name, layer, read_only=read_only, roots=["/"])
        handle = nbd.NBD()
        handle.connect_uri(self._uri.replace("first", name))
        try:
            yield handle
        finally:
            handle.shutdown()
            export = self.server.exports[name]
            eventually(lambda: not self.server.clients_of(export))
            assert self.server.remove(name)


@pytest.fixture(scope="module")
def exports() -> Iterator[Exports]:
    with tempfile.TemporaryDirectory(prefix="nbd-") as directory, contextlib.ExitStack() as stack:
        path = Path(directory) / "first.raw"
        path.write_bytes(bytes(MIB))
        server, uri = NbdServers(Path(directory), stack).start(path, format="raw", name="first")
        yield Exports(server, uri)


def draw(handle: nbd.NBD, drawn: list[Stroke], picture: Picture, pick: random.Random) -> None:
    """Draw over NBD; now and then, give up what has been drawn."""
    for stroke in drawn:
        if stroke.value:
            handle.pwrite(bytes([stroke.value]) * stroke.length, stroke.offset)
        else:
            handle.zero(stroke.length, stroke.offset, pick.choice((0, nbd.CMD_FLAG_NO_HOLE)))
        picture.draw([stroke])
        if pick.random() < 0.15:
            _trim(handle, stroke, picture)


def _trim(handle: nbd.NBD, stroke: Stroke, picture: Picture) -> None:
    """Give a range up: it shows something, sector by sector."""
    handle.trim(stroke.length, stroke.offset)
    data = read(handle, stroke.offset, stroke.length)
    for at in range(0, len(data), SECTOR):
        assert len(set(data[at : at + SECTOR])) == 1
        picture.draw([Stroke(stroke.offset + at, SECTOR, data[at])])


def check_over_nbd(handle: nbd.NBD, picture: Picture) -> None:
    """The export shows what is in the picture."""
    assert handle.get_size() == picture.size
    for drawn in picture.runs():
        assert read(handle, drawn.offset, drawn.length) == bytes([drawn.value]) * drawn.length, drawn


def read(handle: nbd.NBD, offset: int, length: int) -> bytes:
    """Any range."""
    end = offset + length
    return b"".join(bytes(handle.pread(min(MIB, end - at), at)) for at in range(offset, end, MIB))
