"""Sound images of every kind, made by QEMU, for who goes on to break them; and where in each of them what is."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.layers.bitmap_kit import EXTENSION, extensions
from tests.layers.qcow2_broken import PLACE
from tests.serving import run

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40

COMPRESSED_BIT = 1 << 62
COPIED_BIT = 1 << 63


@dataclasses.dataclass
class Seed:
    """``image``: the bytes of the image file. ``beside``: those of files that it names. ``known``: (offset, data) of
    what its disk shows."""

    name: str
    image: bytes
    beside: dict[str, bytes]
    known: list[tuple[int, bytes]]
    size: int


class Kind(NamedTuple):
    """``writes`` come, then a snapshot, then ``more``, then a snapshot, ... ``bitmaps``: how many are added then."""

    size: int
    options: dict[str, Any]
    writes: tuple[tuple[str, ...], ...] = ()
    bitmaps: int = 0
    #: The format of a backing file.
    backing: str = ""
    #: Whether the content is compressed by convert.
    compress: bool = False


def _writes(size: int, cluster: int, tag: str, *, zeroes: bool = True, compressed: bool = False) -> tuple[str, ...]:
    """A few writes of everything there is, all over the disk."""
    pick = random.Random(f"seed {tag}")
    commands = []
    if compressed:
        for at in sorted(pick.sample(range(size // cluster), 3)):
            commands.append(f"write -c -P {pick.randrange(1, 256)} {at * cluster} {cluster}")
    for number in range(6):
        start = pick.randrange(size // 512) * 512
        length = min(pick.randint(1, 4 * cluster // 512) * 512, size - start)
        what = "write -z" if zeroes and number % 3 == 2 else f"write -P {pick.randrange(1, 256)}"
        commands.append(f"{what} {start} {length}")
    commands.append(f"discard {size // cluster // 2 * cluster} {cluster}")
    return tuple(commands)


def _kind(
    size: int,
    cluster: int,
    tag: str,
    *,
    rounds: int = 1,
    v2: bool = False,
    compressed: bool = True,
    bitmaps: int = 0,
    backing: str = "",
    compress: bool = False,
    **options: Any,
) -> Kind:
    writes = tuple(
        _writes(size, cluster, f"{tag} {number}", zeroes=not v2, compressed=compressed and not number)
        for number in range(rounds)
    )
    options = {"cluster_size": cluster, **({"compat": "0.10"} if v2 else {}), **options}
    return Kind(size, options, writes, bitmaps, backing, compress)


#: Far apart, on disks too large to be compared as a whole.
SCATTERED = ("write -P 7 0 64k", "write -P 8 3G 64k", "write -z 5G 64k", "write -P 9 900G 4k")

KINDS = {
    "512": _kind(300 * KIB, 512, "a"),
    "512, 1 bit": _kind(200 * KIB, 512, "b", refcount_bits=1, compressed=False),
    "4K, two snapshots": _kind(1 * MIB, 4096, "c", rounds=3),
    "4K, lazy": _kind(1 * MIB, 4096, "d", lazy_refcounts="on"),
    "64K, snapshot": _kind(4 * MIB, 65536, "e", rounds=2),
    "2M": _kind(10 * MIB, 2 * MIB, "f", compressed=False),
    "2K, 4 bits, snapshot": _kind(600 * KIB, 2048, "g", rounds=2, refcount_bits=4, compressed=False),
    "4K, 64 bits, snapshot": _kind(1 * MIB, 4096, "h", rounds=2, refcount_bits=64),
    "version 2": _kind(500 * KIB, 1024, "i", rounds=2, v2=True),
    "subclusters, snapshot": _kind(2 * MIB, 16384, "j", rounds=2, extended_l2="on"),
    "subclusters, backing": _kind(2 * MIB, 16384, "k", backing="qcow2", extended_l2="on"),
    "data file": _kind(1 * MIB, 4096, "l", compressed=False, data_file="data"),
    "raw data file": _kind(1 * MIB, 4096, "m", compressed=False, data_file="data", data_file_raw="on"),
    "data file, subclusters": _kind(1 * MIB, 16384, "n", compressed=False, data_file="data", extended_l2="on"),
    "bitmaps": _kind(1 * MIB, 4096, "o", rounds=2, bitmaps=3),
    "bitmaps, 512": _kind(300 * KIB, 512, "p", bitmaps=2, refcount_bits=8),
    "backing raw": _kind(1 * MIB, 4096, "q", backing="raw"),
    "backing, version 2": _kind(1 * MIB, 4096, "r", v2=True, backing="qcow2"),
    "all deflated": _kind(2 * MIB, 65536, "s", compress=True),
    "all zstd": _kind(1 * MIB, 4096, "t", compress=True, compression_type="zstd"),
    "preallocated": _kind(1 * MIB, 4096, "u", compressed=False, preallocation="metadata"),
    "64T": Kind(64 * TIB, {}, (SCATTERED,)),
    "2M, 2P": Kind(2048 * TIB, {"cluster_size": 2 * MIB}, (SCATTERED,)),
    "512, 1G": Kind(1024 * MIB, {"cluster_size": 512}, (("write -P 3 0 4k", "write -P 4 1000M 4k"),)),
}  # fmt: skip


def make_seeds(folder: Path) -> list[Seed]:
    """All of them, in the order of KINDS; ``folder`` is theirs."""
    return [_make(folder / str(number), name, kind) for number, (name, kind) in enumerate(KINDS.items())]


def _make(folder: Path, name: str, kind: Kind) -> Seed:
    folder.mkdir()
    path = folder / "image"
    options = ["-o", ",".join(f"{key}={value}" for key, value in kind.options.items())] if kind.options else []
    backing = []
    if kind.backing:
        run("qemu-img", "create", "-q", "-f", kind.backing, "base", str(kind.size - 100 * KIB), cwd=folder)
        _write(folder, "base", kind.backing, f"write -P 200 0 {kind.size // 2}")
        backing = ["-b", "base", "-F", kind.backing]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, *backing, "image", str(kind.size), cwd=folder)
    for number, writes in enumerate(kind.writes):
        if number:
            run("qemu-img", "snapshot", "-c", f"s{number}", path)
        _write(folder, "image", "qcow2", *writes)
    for number in range(kind.bitmaps):
        run("qemu-img", "bitmap", "--add", path, f"b{number}", *(["--disable"] if number == 2 else []))
    if kind.bitmaps:
        _write(folder, "image", "qcow2", "write -P 9 1k 100k", "write -P 10 200k 512")
    if kind.compress:
        path.rename(folder / "plain")
        run("qemu-img", "convert", "-c", "-O", "qcow2", *options, "plain", "image", cwd=folder)
        (folder / "plain").unlink()
    known = list(_known(path, kind))
    beside = {each.name: each.read_bytes() for each in folder.iterdir() if each != path}
    return Seed(name, path.read_bytes(), beside, known, kind.size)


def _write(folder: Path, name: str, format: str, *commands: str) -> None:
    """Run qemu-io there: a data file's name is relative to the working directory."""
    output = run("qemu-io", "-f", format, *(word for each in commands for word in ("-c", each)), name, cwd=folder)
    assert "failed" not in output and "rror" not in output, output


def _known(path: Path, kind: Kind) -> Iterator[tuple[int, bytes]]:
    """What QEMU says is on the disk; on large ones, where it was written."""
    if kind.size <= 16 * MIB:
        raw = path.with_name("raw")
        run("qemu-img", "convert", "-O", "raw", path, raw, cwd=path.parent)
        yield 0, raw.read_bytes()
        raw.unlink()
        return
    unit = {"k": KIB, "M": MIB, "G": KIB * MIB}
    for command in kind.writes[0]:
        words = command.split()
        start, length = (int(word.rstrip("kMG")) * unit.get(word[-1], 1) for word in words[-2:])
        yield start, bytes([0 if words[1] == "-z" else int(words[2])]) * length


# -- what is where ----------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """``size`` bytes of metadata at ``offset``. ``harmless``: whatever it says, the disk shows what it shows (if the
    image can be opened at all)."""

    kind: str
    offset: int
    size: int
    harmless: bool = False


HEADER = (
    Field("version", 4, 4), Field("backing file", 8, 8), Field("backing file", 16, 4), Field("cluster bits", 20, 4),
    Field("size", 24, 8), Field("encryption", 32, 4), Field("L1 size", 36, 4), Field("L1 table", 40, 8),
    Field("refcount table", 48, 8, True), Field("refcount table", 56, 4, True), Field("snapshots", 60, 4, True),
    Field("snapshots", 64, 8, True),
)  # fmt: skip
HEADER3 = (
    Field("incompatible", 72, 8), Field("compatible", 80, 8, True), Field("autoclear", 88, 8, True),
    Field("refcount order", 96, 4, True), Field("header length", 100, 4), Field("compression", 104, 1),
)  # fmt: skip

#: Words of one table that are fields: more of the same would only crowd out what is rare.
WORDS_MAX = 200


def fields(data: bytes) -> list[Field]:
    """The fields of a sound image, those of the header first."""
    return list(dict.fromkeys(_Fields(data).all()))


class _Fields:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._cluster = 1 << self._number(20, 4)
        self._has_data_file = data[7] == 3 and bool(data[79] & 4)
        self._width = 16 if data[7] == 3 and data[79] & 16 else 8
        self._seen: set[int] = set()

    def all(self) -> Iterator[Field]:
        yield from HEADER
        if self._data[7] == 3:
            yield from HEADER3
        for kind, (at, content) in extensions(self._data).items():
            is_kept = kind not in (0xE2792ACA, 0x44415441)  # those that name files
            yield from (Field("extension", at - 8, 4), Field("extension", at - 4, 4))
            yield from (Field("extension content", at + word, 8, is_kept) for word in range(0, len(content) & ~7, 8))
        if name_at := self._number(8, 8):
            yield from (Field("backing name", at, 1) for at in range(name_at, name_at + self._number(16, 4)))
        yield from self._l1("", self._number(40, 8), self._number(36, 4), False)
        yield from self._snapshots()
        yield from self._refcounts()
        yield from self._bitmaps()

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self._data[at : at + size], "big")

    def _used(self, place: int, length: int) -> list[int]:
        """The words of a table that are not zero, and a few that are."""
        table = self._data[place : place + length]
        used = [at for at in range(0, len(table), 8) if any(table[at : at + 8])][:WORDS_MAX]
        return [place + at for at in dict.fromkeys([*used, 0, 8, length - 8]) if 0 <= at < len(table)]

    def _l1(self, whose: str, at: int, count: int, harmless: bool) -> Iterator[Field]:
        for word in self._used(at, count * 8):
            yield Field(f"{whose}L1", word, 8, harmless)
            place = self._number(word, 8) & PLACE
            if place and place not in self._seen:
                self._seen.add(place)
                yield from self._l2(whose, place, harmless)

    def _l2(self, whose: str, place: int, harmless: bool) -> Iterator[Field]:
        for word in self._used(place, self._cluster):
            yield Field(f"{whose}L2", word, 8, harmless)
            entry = self._number(word, 8)
            if entry & COMPRESSED_BIT and word % self._width == 0:
                start = entry & (1 << 62 - (self._cluster.bit_length() - 9)) - 1
                # What is behind it may be another cluster's.
                yield from (Field(f"{whose}compressed", start + at, 4) for at in (0, 4, 40))

    def _snapshots(self) -> Iterator[Field]:
        at = self._number(64, 8)
        for _ in range(self._number(60, 4)):
            at = -(-at // 8) * 8
            sizes = (8, 4, 2, 2, 4, 4, 8, 4, 4, 8, 8, 8)
            position = at
            for size in sizes:
                yield Field("snapshot", position, size, True)
                position += size
            yield from self._l1("snapshot's ", self._number(at, 8), self._number(at + 8, 4), True)
            at += 40 + self._number(at + 36, 4) + self._number(at + 12, 2) + self._number(at + 14, 2)

    def _refcounts(self) -> Iterator[Field]:
        table, clusters = self._number(48, 8), self._number(56, 4)
        for word in self._used(table, clusters * self._cluster):
            yield Field("refcount table entry", word, 8, True)
            if place := self._number(word, 8):
                yield from (Field("refcounts", at, 8, True) for at in self._used(place, self._cluster))

    def _bitmaps(self) -> Iterator[Field]:
        _, content = extensions(self._data).get(EXTENSION, (0, b""))
        if not content:
            return
        count, _, _, at = struct.unpack(">IIQQ", content)
        for _ in range(count):
            position = at
            for size in (8, 4, 4, 1, 1, 2, 4):
                yield Field("bitmap", position, size, True)
                position += size
            table, length = self._number(at, 8), self._number(at + 8, 4)
            yield from (Field("bitmap table", word, 8, True) for word in self._used(table, length * 8))
            at += -(-(24 + self._number(at + 18, 2) + self._number(at + 20, 4)) // 8) * 8
