"""What is measured: the rows of the table, in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.clients import Copy, Fio, Work
from tests.bench.contest import Contestant, nothing
from tests.bench.images import MIB, SCATTERED_PIECES, Images, drop_cache
from tests.bench.servers import SERVERS, Disk

K4, K256 = 4 << 10, 256 << 10
GIB, TIB = 1 << 30, 1 << 40
#: How large the image is that allocating writes fill, and how much of it they do.
FRESH_SIZE = 8 * GIB
FRESH_SEQUENTIAL, FRESH_RANDOM = 512 * MIB, 32 * MIB
#: Per request, to a chain of one image or a disk of 1 GiB: time may grow by 15 %.
GROWTH_MAX = 1.15


@dataclass(frozen=True)
class Wanted:
    """The rate at least and the CPU time per request at most, over the best peer."""

    rate: float
    cpu: float


@dataclass(frozen=True)
class Row:
    """One comparison with the peers. ``disk`` is asked with the contestant's name, so that fresh ones are its own."""

    name: str
    disk: Callable[[str], Disk]
    work: Work
    wanted: Wanted | None = None
    quick: bool = False
    fresh: bool = False
    warm: Work | None = None
    #: Nothing of the image is in the page cache before a sample.
    cold: bool = False

    def contestants(self) -> Iterator[Contestant]:
        shared = None if self.fresh else self.disk("")
        for server in SERVERS:
            if shared is None:
                probe = Disk(Path("fresh"), "qcow2", read_only=False)
            else:
                probe = shared
            if server.serves(probe):
                disk = _always(shared) if shared else _each(self.disk, server.name.replace(" ", "-"))
                before = _cold(shared.path) if self.cold and shared else nothing
                yield Contestant(server.name, server, disk, self.work, self.fresh, self.warm, before)


def _always(disk: Disk) -> Callable[[], Disk]:
    return lambda: disk


def _each(make: Callable[[str], Disk], name: str) -> Callable[[], Disk]:
    return lambda: make(name)


def _cold(path: Path) -> Callable[[], None]:
    return lambda: drop_cache(path)


@dataclass(frozen=True)
class Growth:
    """Our server alone, on disks that differ in one thing: each point in ratio to the first."""

    name: str
    points: tuple[Contestant, ...]
    #: The rate at least, to the first point's.
    rate_min: float | None = None


def rows(images: Images, seconds: float) -> list[Row]:
    """The comparisons with the peers."""

    def fio(pattern: str, block: int, depth: int, jobs: int = 1) -> Fio:
        return Fio(pattern, block, depth, images.size, jobs, seconds)

    def raw(*, write: bool = False, direct: bool = False, tcp: bool = False) -> Callable[[str], Disk]:
        return lambda _: Disk(images.raw(), read_only=not write, direct=direct, tcp=tcp)

    def chain(_: str) -> Disk:
        return Disk(images.chain(3), "qcow2")

    def luks(*, write: bool = False) -> Callable[[str], Disk]:
        return lambda _: Disk(images.luks()[0], "luks", images.luks()[1], read_only=not write)

    def tls(_: str) -> Disk:
        return Disk(images.raw(), tcp=True, tls=images.certificates())

    def fresh(name: str) -> Disk:
        return Disk(images.empty(name, FRESH_SIZE), "qcow2", read_only=False)

    read, write = fio("randread", K4, 16), fio("randwrite", K4, 16)
    large_read, large_write = fio("read", K256, 8), fio("write", K256, 8)
    copy, convert = Copy("nbdcopy", images.size), Copy("qemu-img", images.size)
    filling = replace(large_write, size=FRESH_SIZE, amount=FRESH_SEQUENTIAL)
    scattering = replace(write, size=FRESH_SIZE, amount=FRESH_RANDOM)
    return [
        Row("raw-4k-read-d1", raw(), replace(read, depth=1), Wanted(1.8, 0.9), quick=True),
        Row("raw-4k-read-d16", raw(), read, Wanted(1.3, 0.6), quick=True),
        Row("raw-4k-read-d64", raw(), replace(read, depth=64), Wanted(1.3, 0.5)),
        Row("raw-4k-read-d16-x2", raw(), replace(read, jobs=2), Wanted(2.0, 0.4), quick=True),
        Row("raw-4k-read-d16-x4", raw(), replace(read, jobs=4)),
        Row("raw-4k-write-d1", raw(write=True), replace(write, depth=1)),
        Row("raw-4k-write-d16", raw(write=True), write, Wanted(1.3, 0.65), quick=True),
        Row("raw-4k-write-d64", raw(write=True), replace(write, depth=64)),
        Row("raw-4k-write-d16-x2", raw(write=True), replace(write, jobs=2)),
        Row("raw-256k-read", raw(), large_read, Wanted(1.4, 0.35), quick=True),
        Row("raw-256k-read-x2", raw(), replace(large_read, jobs=2)),
        Row("raw-256k-write", raw(write=True), large_write, Wanted(1.1, 0.85)),
        Row("raw-nbdcopy", raw(), copy, Wanted(1.5, 0.4), quick=True),
        Row("raw-convert", raw(), convert),
        Row("direct-4k-read-d16", raw(direct=True), read),
        Row("direct-4k-read-d64", raw(direct=True), replace(read, depth=64), Wanted(1.5, 0.5), quick=True),
        Row("direct-4k-write-d16", raw(direct=True, write=True), write),
        Row("direct-256k-read", raw(direct=True), large_read, Wanted(1.4, 0.5)),
        Row("direct-256k-write", raw(direct=True, write=True), large_write),
        Row("tcp-4k-read-d16", raw(tcp=True), read, Wanted(1.1, 0.75), quick=True),
        Row("tcp-256k-read", raw(tcp=True), large_read, Wanted(1.25, 0.75), quick=True),
        Row("tcp-256k-write", raw(tcp=True, write=True), large_write),
        Row("tcp-nbdcopy", raw(tcp=True), copy),
        Row("tls-4k-read-d16", tls, replace(copy, block=K4, depth=16)),
        Row("tls-256k-read", tls, replace(copy, block=K256, depth=8), Wanted(1.0, 1.0), quick=True),
        Row("chain3-4k-read-d16", chain, read, Wanted(1.4, 0.5), quick=True, warm=copy),
        Row("chain3-4k-read-d64", chain, replace(read, depth=64), warm=copy),
        Row("chain3-256k-read", chain, large_read, warm=copy),
        Row("chain3-nbdcopy", chain, copy, warm=copy),
        Row("chain3-convert", chain, convert, warm=copy),
        Row("luks-4k-read-d16", luks(), read),
        Row("luks-4k-write-d16", luks(write=True), write),
        Row("luks-256k-read", luks(), large_read),
        Row("luks-nbdcopy", luks(), copy),
        Row("fresh-256k-write", fresh, filling, Wanted(1.2, 1.0), fresh=True),
        Row("fresh-4k-write-d16", fresh, scattering, Wanted(1.2, 1.0), quick=True, fresh=True),
        Row("cold-4k-read-d16", raw(), read, Wanted(1.0, 1.0), cold=True),
    ]


def growths(images: Images, seconds: float) -> list[tuple[str, Callable[[], Growth]]]:
    """What must not cost more as something grows; each made when it is its turn, with the images it takes."""
    ours = SERVERS[0]
    read = Fio("randread", K4, 16, images.size, 1, seconds)

    def point(name: str, disk: Disk, work: Fio = read, idle: int = 0) -> Contestant:
        data = SCATTERED_PIECES * MIB if work.stride else images.size
        warm = replace(work, pattern="read", block=MIB, depth=1, amount=data)
        return Contestant(name, ours, lambda: disk, work, warm=warm, idle=idle)

    def layers() -> Growth:
        raw, chain = Disk(images.raw()), Disk(images.chain(3), "qcow2")
        return Growth("chain3-over-raw", (point("raw", raw), point("chain of 3", chain)), 0.9)

    def depth() -> Growth:
        points = [point(f"depth {depth}", Disk(images.chain(depth), "qcow2")) for depth in (1, 5, 50)]
        return Growth("chain-depth", tuple(points), 1 / GROWTH_MAX)

    def size() -> Growth:
        points = []
        for label, size in (("1 GiB", GIB), ("1 TiB", TIB), ("64 TiB", 64 * TIB)):
            work = replace(read, size=size, piece=MIB, stride=size // SCATTERED_PIECES)
            points.append(point(label, Disk(images.scattered(size), "qcow2"), work))
        return Growth("virtual-size", tuple(points), 1 / GROWTH_MAX)

    def fragmentation(name: str, work: Fio) -> Callable[[], Growth]:
        def make() -> Growth:
            made = [(apart, images.fragmented(images.size, 64 << 10, apart=apart)) for apart in (False, True)]
            points = [point("apart" if apart else "in order", Disk(path, "qcow2"), work) for apart, path in made]
            return Growth(name, tuple(points))

        return make

    def connections() -> Growth:
        points = [point(f"{count + 1} connections", Disk(images.raw()), read, count) for count in (0, 99, 999)]
        return Growth("connections", tuple(points))

    large = replace(read, pattern="read", block=K256, depth=8)
    return [
        ("chain3-over-raw", layers),
        ("chain-depth", depth),
        ("virtual-size", size),
        ("fragmentation-4k", fragmentation("fragmentation-4k", read)),
        ("fragmentation-256k", fragmentation("fragmentation-256k", large)),
        ("connections", connections),
    ]
