"""Sound images made unsound: fields of their metadata get values that have hurt somebody, bytes change anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tests.layers.qcow2_seeds import Field

#: Where a number is wide enough for it: bounds of the format and of its readers, and what lies just behind them.
BOUNDS = (
    0, 1, 2, 3, 7, 8, 9, 21, 22, 31, 63, 64, 255, 511, 512, 513, 1023, 1024, 4095, 4096, 65535, 65536, 65537, 1 << 20,
    (1 << 22) - 1, 1 << 22, (1 << 22) + 1, 1 << 23, 1 << 25, 1 << 27, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
    1 << 40, 1 << 48, (1 << 56) - 512, 1 << 56, (1 << 62) - 1, 1 << 62, (1 << 63) - 512, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 512, (1 << 64) - 1,
)  # fmt: skip


class Mutator:
    """Changes ``data`` as ``pick`` says; `notes` tell how."""

    def __init__(self, data: bytearray, fields: Sequence[Field], pick: random.Random) -> None:
        self.data, self._fields, self._pick = data, fields, pick
        self.notes: list[str] = []
        #: Whether the disk still shows what it did.
        self.is_harmless = True
        self._kinds = sorted({field.kind for field in fields})
        self._cluster = 1 << self._number(20, 4)

    def run(self) -> None:
        """One change, or a few."""
        for _ in range(self._pick.choice((1, 1, 1, 1, 2, 3, 6))):
            if self._pick.random() < 0.75:
                self._field()
            else:
                self.is_harmless = False
                self._pick.choice(
                    (self._bytes, self._bytes, self._header_bytes, self._cut, self._lengthen, self._fill, self._copy)
                )()

    def _field(self) -> None:
        # By kinds first: there are a thousand L2 entries for each field of the header.
        kind = self._pick.choice(self._kinds)
        if self._pick.random() < 0.08:
            kind = self._pick.choice(("size", "L1 table", "cluster bits", "refcount table", "L1 size"))
        field = self._pick.choice([field for field in self._fields if field.kind == kind])
        before = self._number(field.offset, field.size)
        after = self._value(before, field.size) & (1 << field.size * 8) - 1
        if field.offset + field.size > len(self.data):
            return
        self.data[field.offset : field.offset + field.size] = after.to_bytes(field.size, "big")
        self.is_harmless = self.is_harmless and field.harmless
        self.notes.append(f"{field.kind} at {field.offset:#x}: {before:#x} is now {after:#x}")

    def _value(self, before: int, size: int) -> int:
        """What a field gets instead."""
        choices: tuple[Callable[[], int], ...] = (
            lambda: before ^ 1 << self._pick.randrange(size * 8),
            lambda: before ^ 1 << self._pick.randrange(size * 8),
            lambda: before + self._pick.choice((1, -1, 8, -8, 512, -512, self._cluster, -self._cluster)),
            lambda: before * self._pick.choice((2, 8, 512)),
            lambda: self._pick.choice(BOUNDS),
            lambda: self._pick.choice(BOUNDS) | before,
            lambda: self._pick.getrandbits(size * 8),
            lambda: self._place() | before & (0xF << 60 if size == 8 else 0),
            lambda: self._somewhere(size),
            lambda: int.from_bytes(before.to_bytes(size, "big"), "little"),
        )
        return self._pick.choice(choices)()

    def _place(self) -> int:
        """Some cluster of the file, of its metadata more often than not; or one just behind its end."""
        if self._pick.random() < 0.5:
            return self._pick.choice(self._fields).offset // self._cluster * self._cluster
        return self._pick.randrange(len(self.data) // self._cluster + 2) * self._cluster

    def _somewhere(self, size: int) -> int:
        """What another field says."""
        other = self._pick.choice([field for field in self._fields if field.size == size])
        return self._number(other.offset, size)

    # -- bytes ------------------------------------------------------------------------------------------------------

    def _header_bytes(self) -> None:
        self._put(self._pick.randrange(min(600, len(self.data))))

    def _bytes(self) -> None:
        if self._pick.random() < 0.5:
            self._put(self._pick.choice(self._fields).offset)
        else:
            self._put(self._pick.randrange(len(self.data)))

    def _put(self, at: int) -> None:
        garbage = self._pick.choice((b"\0", b"\xff", b"\x7f", b"\x80", self._pick.randbytes(self._pick.randint(1, 9))))
        end = min(at + len(garbage), len(self.data))
        self.data[at:end] = garbage[: end - at]
        self.notes.append(f"{garbage.hex()} at {at:#x}")

    def _cut(self) -> None:
        size = self._pick.choice((self._pick.randrange(len(self.data)), self._pick.randrange(200)))
        if self._pick.random() < 0.5:
            size -= size % self._cluster
        del self.data[max(size, 1) :]
        self.notes.append(f"cut off at {len(self.data):#x}")

    def _lengthen(self) -> None:
        self.data += bytes(self._pick.choice((1, 511, 4096, 3 << 20)))
        self.notes.append(f"lengthened to {len(self.data):#x}")

    def _fill(self) -> None:
        at, length = self._place(), self._pick.choice((8, 512, self._cluster))
        end = min(at + length, len(self.data))
        if at < end:
            self.data[at:end] = self._pick.choice((b"\0", b"\xff", b"\x80", self._pick.randbytes(1))) * (end - at)
            self.notes.append(f"filled from {at:#x} to {end:#x}")

    def _copy(self) -> None:
        """One cluster over another."""
        source, target = self._place(), self._place()
        cluster = self.data[source : source + self._cluster]
        self.data[target : min(target + len(cluster), len(self.data))] = cluster[: max(len(self.data) - target, 0)]
        self.notes.append(f"the cluster at {source:#x} also at {target:#x}")

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self.data[at : at + size], "big")
