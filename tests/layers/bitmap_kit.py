"""Persistent bitmaps read by the specification alone, and as QEMU reads them: shares nothing with the layer."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.serving import run_json

EXTENSION = 0x23852875
IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4
PLACE = 0x00FFFFFFFFFFFE00


@dataclass
class Stored:
    """One bitmap of an image file."""

    name: str
    table_offset: int
    table_count: int
    flags: int
    granularity: int
    extra: bytes
    #: Places of the clusters of its data.
    data: list[int]
    #: Its bits in a row, the lowest first.
    bits: int

    @property
    def dirty(self) -> set[int]:
        """The numbers of the granules that are marked."""
        found, bits = set(), self.bits
        while bits:
            low = bits & -bits
            found.add(low.bit_length() - 1)
            bits ^= low
        return found


def extensions(data: bytes | bytearray) -> dict[int, tuple[int, bytes]]:
    """The header extensions of an image: kind -> (offset of the content, content)."""
    name_at, bits = struct.unpack_from(">Q", data, 8)[0], struct.unpack_from(">I", data, 20)[0]
    at = struct.unpack_from(">I", data, 100)[0] if data[7] == 3 else 72
    found = {}
    while at + 8 <= (name_at or 1 << bits):
        kind, length = struct.unpack_from(">II", data, at)
        if not kind:
            break
        found[kind] = (at + 8, bytes(data[at + 8 : at + 8 + length]))
        at += 8 + -(-length // 8) * 8
    return found


def directory(data: bytes | bytearray) -> tuple[int, int, int] | None:
    """(number of bitmaps, size, offset) of the directory; None if there are no bitmaps that can be believed."""
    extension = extensions(data).get(EXTENSION)
    assert data[7] < 3 or extension is not None or not data[95] & 1, (
        "the autoclear bit is set, and there is no extension"
    )
    if data[7] < 3 or extension is None or not data[95] & 1:
        return None
    count, reserved, size, offset = struct.unpack(">IIQQ", extension[1])
    assert not reserved and 0 < count <= 65535
    return count, size, offset


def stored(data: bytes | bytearray) -> dict[str, Stored]:
    """The bitmaps of an image file, by name. Asserts what the specification demands."""
    found = directory(data)
    if found is None:
        return {}
    (count, size, offset), cluster = found, 1 << struct.unpack_from(">I", data, 20)[0]
    disk = struct.unpack_from(">Q", data, 24)[0]
    assert offset % cluster == 0 and offset + size <= len(data)
    bitmaps: dict[str, Stored] = {}
    at = offset
    for _ in range(count):
        table_at, table_count, flags, kind, shift, name_size, extra_size = struct.unpack_from(">QIIBBHI", data, at)
        extra = bytes(data[at + 24 : at + 24 + extra_size])
        name = os.fsdecode(bytes(data[at + 24 + extra_size : at + 24 + extra_size + name_size]))
        assert kind == 1 and not flags & ~7 and name_size and table_at % cluster == 0 and name not in bitmaps
        assert flags & IN_USE or table_count == -(-disk // ((1 << shift) * 8 * cluster))
        table = struct.unpack_from(f">{table_count}Q", bytes(data[table_at : table_at + 8 * table_count]))
        places, bits = [], 0
        for index, entry in enumerate(table):
            assert not entry & ~(PLACE | 1) and not (entry & 1 and entry & PLACE)
            content = b"\xff" * cluster if entry & 1 else bytes(cluster)
            if entry & PLACE:
                places.append(entry)
                content = bytes(data[entry : entry + cluster]).ljust(cluster, b"\0")
            bits |= int.from_bytes(content, "little") << index * cluster * 8
        if not flags & IN_USE:
            assert not bits >> -(-disk // (1 << shift)), f"bitmap {name!r} has bits behind its end"
        bitmaps[name] = Stored(name, table_at, table_count, flags, 1 << shift, extra, places, bits)
        at += -(-(24 + extra_size + name_size) // 8) * 8
    assert at == offset + size
    return bitmaps


def references(data: bytes | bytearray) -> Iterator[tuple[str, int, int]]:
    """(what, offset, length) of all that bitmaps take up."""
    found = directory(data)
    if found is None:
        return
    cluster = 1 << struct.unpack_from(">I", data, 20)[0]
    yield "bitmap directory", found[2], found[1]
    for bitmap in stored(data).values():
        yield f"bitmap table of {bitmap.name!r}", bitmap.table_offset, 8 * bitmap.table_count
        for place in bitmap.data:
            yield f"bitmap data of {bitmap.name!r}", place, cluster


def qemu_flags(path: Path) -> dict[str, tuple[int, set[str]]]:
    """What ``qemu-img info`` says: name -> (granularity, flags)."""
    info = run_json("qemu-img", "info", "-U", "--output=json", path)
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: (bitmap["granularity"], set(bitmap["flags"])) for bitmap in bitmaps}


def qemu_dirty(path: Path, name: str) -> list[tuple[int, int]]:
    """The dirty (offset, length) runs of a bitmap, as QEMU exports it."""
    context = f"qemu:dirty-bitmap:{name}"
    server = ["qemu-nbd", "-r", "-f", "qcow2", "-B", name, path]
    extents = run_json("nbdinfo", f"--map={context}", "--json", "--", "[", *server, "]")
    return [(extent["offset"], extent["length"]) for extent in extents if extent["type"]]


def joined(granules: set[int], granularity: int, size: int) -> list[tuple[int, int]]:
    """The (offset, length) runs of a disk of ``size`` bytes that the marked granules make."""
    runs: list[tuple[int, int]] = []
    for granule in sorted(granules):
        at, length = granule * granularity, min(granularity, size - granule * granularity)
        if runs and sum(runs[-1]) == at:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((at, length))
    return runs


def granules(granularity: int, *ranges: tuple[int, int]) -> set[int]:
    """The granules that (offset, length) ranges touch."""
    return {
        granule
        for offset, length in ranges
        for granule in range(offset // granularity, (offset + length - 1) // granularity + 1)
    }
