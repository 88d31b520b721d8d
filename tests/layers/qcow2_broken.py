"""Broken qcow2 images for the tests of checking: made by QEMU, then changed where it hurts."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from tests.serving import create, qemu_io, run

PLACE = 0x00FFFFFFFFFFFE00

COMPRESSED = ("write -c -P 3 3M 64k", "write -c -P 4 3200k 64k")
WRITES = (
    "write -P 1 0 100k", "write -P 2 1M 64k", "write -z 2M 128k", "write -P 5 5M 1k", "discard 0 8k",
    "write -P 6 7M 200k", "write -z 5M 64k",
)  # fmt: skip

#: Name: (options, snapshots, bitmaps).
IMAGES = {
    "4K": ({"cluster_size": 4096}, 2, 0),
    "512": ({"cluster_size": 512}, 0, 0),
    "64K": ({}, 1, 0),
    "1 bit": ({"refcount_bits": 1}, 0, 0),
    "64 bits": ({"cluster_size": 4096, "refcount_bits": 64}, 1, 0),
    "subclusters": ({"cluster_size": 16384, "extended_l2": "on"}, 1, 0),
    "4 bits": ({"cluster_size": 2048, "refcount_bits": 4}, 2, 0),
    "version 2": ({"cluster_size": 1024, "compat": "0.10"}, 1, 0),
    "data file": ({"cluster_size": 4096, "data_file": True}, 0, 0),
    "bitmaps": ({"cluster_size": 4096, "refcount_bits": 8}, 1, 2),
}


def make(folder: Path, name: str, size: str = "8M") -> Path:
    """One of IMAGES."""
    options, snapshots, bitmaps = IMAGES[name]
    path = folder / name.replace(" ", "-")
    options = {key: folder / "data" if key == "data_file" else value for key, value in options.items()}
    create(path, size, **options)
    # Compressed clusters share host clusters: with snapshots too, narrow refcounts would not do.
    if "data_file" not in options and name != "4 bits":
        qemu_io(path, *COMPRESSED)
    for number in range(snapshots):
        qemu_io(path, *WRITES[number :: snapshots + 1])
        run("qemu-img", "snapshot", "-c", f"s{number}", path)
    qemu_io(path, *WRITES)
    for number in range(bitmaps):
        run("qemu-img", "bitmap", "--add", path, f"b{number}")
    if bitmaps:
        qemu_io(path, "write -P 7 1M 300k")
    return path


class Anatomy:
    """Where in an image its metadata is: offsets of 8-byte words, by the kind of table."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data
        self.cluster = 1 << struct.unpack_from(">I", data, 20)[0]
        l1_count, l1_at = struct.unpack_from(">IQ", data, 36)
        table_at, table_clusters = struct.unpack_from(">QI", data, 48)
        count, snapshots_at = struct.unpack_from(">IQ", data, 60)
        words = min(table_clusters * self.cluster // 8, 8)
        self.kinds: dict[str, list[int]] = {
            "header": [72, 80, 88, 60, 64, 48, 56, 40],
            "refcount table": [table_at + 8 * index for index in range(words)],
            "L1": [], "L2": [], "refcounts": [], "snapshots": [],
        }  # fmt: skip
        tables = [(l1_at, l1_count)]
        for _ in range(count):
            snapshots_at += -snapshots_at % 8
            l1_at, l1_count, id_size, name_size = struct.unpack_from(">QIHH", data, snapshots_at)
            tables.append((l1_at, l1_count))
            self.kinds["snapshots"] += [snapshots_at, snapshots_at + 8]
            extra = struct.unpack_from(">I", data, snapshots_at + 36)[0]
            snapshots_at += 40 + extra + id_size + name_size
        for at, count in tables:
            self.kinds["L1"] += [at + 8 * index for index in range(count)]
        for at in self.kinds["L1"]:
            self.kinds["L2"] += self._used(self.word(at) & PLACE)
        for at in self.kinds["refcount table"]:
            self.kinds["refcounts"] += self._used(self.word(at))

    def word(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self._data, at)[0]) if at + 8 <= len(self._data) else 0

    def _used(self, place: int) -> list[int]:
        """The words of the table at ``place`` that are not zero."""
        return [at for at in range(place, place + self.cluster, 8) if self.word(at)] if place else []


def mutate(data: bytearray, pick: random.Random) -> list[str]:
    """Change a few words of the image's metadata; what was changed, for who wants to know."""
    anatomy, notes = Anatomy(data), []
    kinds = {kind: places for kind, places in anatomy.kinds.items() if places}
    for _ in range(pick.choice((1, 1, 1, 2, 4))):
        kind = pick.choice([kind for kind in kinds if kind != "header" or pick.random() < 0.15] or ["L2"])
        at = pick.choice(kinds[kind])
        before = anatomy.word(at)
        after = pick.choice(
            (
                before ^ 1 << pick.randrange(64),
                0,
                before ^ 1 << 63,
                anatomy.word(pick.choice(kinds[pick.choice(list(kinds))])),
                pick.getrandbits(64),
                before & ~PLACE | pick.randrange(len(data) * 2) & PLACE,
                before ^ 1 << pick.randrange(9, 40),
            )
        )
        if at + 8 <= len(data):
            struct.pack_into(">Q", data, at, after)
            notes.append(f"{kind} at {at:#x}: {before:#x} is now {after:#x}")
    return notes
