"""A checker and reader of qcow2 images that shares nothing with the layer: simple, slow, and sure of what it says.

`check` counts every reference there is and compares it with the refcounts, as ``qemu-img check`` does; `read` gives
the disk's content. Both take the image file as bytes. Specification: QEMU's ``docs/interop/qcow2.rst``.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import zstandard

from tests.layers import bitmap_kit

#: Bytes of the file at a place, decrypted.
Decrypt = Callable[[int, bytes], bytes]

COPIED = 1 << 63
COMPRESSED = 1 << 62
PLACE = 0x00FFFFFFFFFFFE00


@dataclass
class Report:
    errors: list[str] = field(default_factory=list)
    #: Those of the errors that do no harm: COPIED is not what the refcount says, but nobody shares the place.
    flags: list[str] = field(default_factory=list)
    leaks: int = 0


class Snapshot(NamedTuple):
    name: str
    l1_offset: int
    l1_size: int
    disk_size: int


class Image:
    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        (
            magic, self.version, _, _, self.bits, self.size, self.crypt_method, self.l1_size, self.l1_offset,
            self.table_offset, self.table_clusters, self.snapshots, self.snapshots_offset,
        ) = struct.unpack_from(">IIQIIQIIQQIIQ", data)  # fmt: skip
        assert magic == 0x514649FB
        self.cluster = 1 << self.bits
        features = struct.unpack_from(">Q", data, 72)[0] if self.version == 3 else 0
        self.has_data_file, self.extended = bool(features & 4), bool(features & 16)
        self.is_zstd = bool(features & 8)
        self.is_raw = self.version == 3 and bool(struct.unpack_from(">Q", data, 88)[0] & 2)
        #: How many parts of a cluster have a state of their own.
        self.parts = 32 if self.extended else 1
        self.refcount_bits = 1 << (struct.unpack_from(">I", data, 96)[0] if self.version == 3 else 4)
        self.clusters = -(-len(data) // self.cluster)

    @property
    def encryption(self) -> tuple[int, int]:
        """(offset, length) of the encryption header."""
        at = self.data.index(b"\x05\x37\xbe\x77\0\0\0\x10", 0, self.cluster) + 8
        offset, length = self.numbers(at, 2)
        return offset, length

    def numbers(self, offset: int, count: int) -> tuple[int, ...]:
        part = bytes(self.data[offset : offset + count * 8])
        return struct.unpack(f">{count}Q", part + bytes(count * 8 - len(part)))

    def refcounts(self) -> list[int]:
        """The refcount of every cluster of the file."""
        per_block = self.cluster * 8 // self.refcount_bits
        counts: list[int] = []
        for place in self.numbers(self.table_offset, self.table_clusters * self.cluster // 8):
            if len(counts) >= self.clusters:
                break
            block = bytes(self.data[place : place + self.cluster]).ljust(self.cluster, b"\0") if place else b""
            counts += self._block(block) if place else [0] * per_block
        return counts + [0] * (self.clusters - len(counts))

    def _block(self, block: bytes) -> list[int]:
        width = self.refcount_bits
        if width >= 8:
            return list(
                struct.unpack(f">{len(block) * 8 // width}{ {8: 'B', 16: 'H', 32: 'I', 64: 'Q'}[width] }", block)
            )
        return [byte >> shift & (1 << width) - 1 for byte in block for shift in range(0, 8, width)]

    def l1_tables(self) -> Iterator[tuple[int, int, bool]]:
        """(offset, entries, whether it is the active one)."""
        yield self.l1_offset, self.l1_size, True
        for _, snapshot in self.snapshot_table():
            yield snapshot.l1_offset, snapshot.l1_size, False

    def snapshot_table(self) -> Iterator[tuple[int, Snapshot]]:
        """(where it ends, snapshot) of each entry."""
        at = self.snapshots_offset
        for _ in range(self.snapshots):
            at = -(-at // 8) * 8
            offset, size, id_size, name_size, *_, extra = struct.unpack_from(">QIHHIIQII", self.data, at)
            disk_size = struct.unpack_from(">Q", self.data, at + 48)[0] if extra >= 16 else self.size
            at += 40 + extra + id_size + name_size
            yield at, Snapshot(bytes(self.data[at - name_size : at]).decode(), offset, size, disk_size)

    def entries(self, table: int) -> Iterator[tuple[int, int]]:
        """(entry, subcluster bitmap) of all clusters of an L2 table; where images have no bitmaps, one of one bit."""
        words = self.numbers(table, self.cluster // 8) if table else (0,) * (self.cluster // 8)
        if self.extended:
            yield from zip(words[::2], words[1::2], strict=True)
            return
        for entry in words:
            is_stored = entry & PLACE or (self.has_data_file and entry & COPIED)
            yield (entry, 0) if entry & COMPRESSED else (entry & ~1, 1 << 32 if entry & 1 else 1 if is_stored else 0)

    def compressed(self, entry: int) -> tuple[int, int]:
        shift = 62 - (self.bits - 8)
        offset = entry & (1 << shift) - 1
        sectors = (entry >> shift & (1 << self.bits - 8) - 1) + 1
        return offset, sectors * 512 - offset % 512


def check(data: bytes | bytearray) -> Report:
    image, report = Image(data), Report()
    counts, references = image.refcounts(), Counter[int]()
    #: (what, place) of what the active tables say is theirs alone.
    copied: list[tuple[str, int]] = []

    def refer(what: str, offset: int, length: int) -> None:
        if offset + length - len(data) >= image.cluster:
            report.errors.append(f"{what} at {offset:#x} is outside of the file, {len(data):#x}")
        references.update(range(offset // image.cluster, (offset + length - 1) // image.cluster + 1))

    def count(place: int) -> int:
        cluster = place // image.cluster
        return counts[cluster] if cluster < len(counts) else 0

    def flag(what: str, entry: int) -> None:
        if entry & COPIED:
            copied.append((what, entry & PLACE))
        if bool(entry & COPIED) != (count(entry & PLACE) == 1):
            report.flags.append(f"{what}: refcount {count(entry & PLACE)}")

    refer("header", 0, image.cluster)
    refer("refcount table", image.table_offset, image.table_clusters * image.cluster)
    for number, place in enumerate(image.numbers(image.table_offset, image.table_clusters * image.cluster // 8)):
        if place % image.cluster:
            report.errors.append(f"refcount block {number} is at {place:#x}")
        elif place:
            refer(f"refcount block {number}", place, image.cluster)
            if references[place // image.cluster] > 1:
                report.errors.append(f"refcount block {number} lies on something else")
    if image.snapshots:
        end = max(at for at, _ in image.snapshot_table())
        refer("snapshot table", image.snapshots_offset, end - image.snapshots_offset)
    if image.crypt_method:
        refer("encryption header", *image.encryption)
    for what, offset, length in bitmap_kit.references(data):
        refer(what, offset, length)
    for offset, size, active in image.l1_tables():
        refer("L1 table", offset, max(size * 8, 1))
        for index, l1_entry in enumerate(image.numbers(offset, size)):
            table = l1_entry & PLACE
            if l1_entry & ~(PLACE | COPIED) or table % image.cluster:
                report.errors.append(f"L1 entry {index} is {l1_entry:#x}")
                continue
            if not table:
                continue
            refer(f"L2 table {index}", table, image.cluster)
            if active:
                flag(f"L1 entry {index} {l1_entry:#x}", l1_entry)
            per_table = image.cluster // (16 if image.extended else 8)
            for at, (entry, bitmap) in enumerate(image.entries(table)):
                name = f"L2 entry {index}.{at} {entry:#x} {bitmap:#x}"
                place = entry & PLACE
                if entry & COMPRESSED:
                    refer(name, *image.compressed(entry))
                    if entry & COPIED or bitmap or image.has_data_file:
                        report.errors.append(f"{name}: compressed and more")
                    continue
                if entry & ~(PLACE | COPIED) or place % image.cluster or bitmap >> 32 & bitmap:
                    report.errors.append(f"{name}: not an entry")
                elif image.has_data_file:
                    if entry and entry != COPIED | (index * per_table + at) * image.cluster:
                        report.errors.append(f"{name}: not its place in the data file")
                elif place:
                    refer(name, place, image.cluster)
                    if active:
                        flag(name, entry)
                if not entry and bitmap & 0xFFFFFFFF:
                    report.errors.append(f"{name}: allocated nowhere")
    for cluster in range(max(len(counts), max(references) + 1)):
        found = counts[cluster] if cluster < len(counts) else 0
        if found < references[cluster]:
            report.errors.append(f"cluster {cluster}: refcount {found}, references {references[cluster]}")
        elif found > references[cluster]:
            report.leaks += 1
    for what, place in copied:
        if references[place // image.cluster] != 1:
            report.errors.append(f"{what}: COPIED, but {references[place // image.cluster]} refer to it")
    report.errors += report.flags
    return report


def snapshots(data: bytes | bytearray, backing: bytes = b"") -> dict[str, bytes]:
    """What the disk was in each snapshot, by name."""
    image = Image(data)
    return {
        each.name: _read(image, each.l1_offset, each.l1_size, each.disk_size, backing, data)
        for _, each in image.snapshot_table()
    }


def read(
    data: bytes | bytearray,
    backing: bytes = b"",
    data_file: bytes | bytearray | None = None,
    decrypt: Decrypt = lambda place, data: data,
) -> bytes:
    """The whole disk."""
    image = Image(data)
    assert image.has_data_file == (data_file is not None)
    guest = data if data_file is None else data_file
    return _read(image, image.l1_offset, image.l1_size, image.size, backing, guest, decrypt)


def _read(
    image: Image,
    l1_offset: int,
    l1_size: int,
    size: int,
    backing: bytes,
    guest: bytes | bytearray,
    decrypt: Decrypt = lambda place, data: data,
) -> bytes:
    below = backing[:size].ljust(size, b"\0")
    disk = bytearray()
    unit = image.cluster // image.parts
    for l1_entry in image.numbers(l1_offset, l1_size):
        for entry, bitmap in image.entries(l1_entry & PLACE):
            if len(disk) >= size:
                break
            if entry & COMPRESSED:
                offset, length = image.compressed(entry)
                disk += _decompressed(bytes(image.data[offset : offset + length]), image)
                continue
            for part in range(image.parts):
                place = (entry & PLACE) + part * unit
                if bitmap >> 32 + part & 1:
                    disk += bytes(unit)
                elif bitmap >> part & 1:
                    disk += decrypt(place, bytes(guest[place : place + unit]).ljust(unit, b"\0"))
                else:
                    disk += below[len(disk) : len(disk) + unit].ljust(unit, b"\0")
    return bytes(disk[:size]).ljust(size, b"\0")


def _decompressed(data: bytes, image: Image) -> bytes:
    if image.is_zstd:
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return zlib.decompressobj(-12).decompress(data, image.cluster)  # QEMU's window
