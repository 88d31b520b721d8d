"""What an image file may say of its bitmaps, at every instant: known exactly.

It says what the last change that was answered made of them, or, while one is being made, what it will. Enabled ones are
in use as long as the image is open.
"""

from __future__ import annotations

from layers.qcow2 import Qcow2
from nbdserver.extent import DirtyBitmap
from tests.layers.bitmap_kit import AUTO, IN_USE, stored

#: Name -> (flags, marked granules; None if it is in use, and what it says is of no account).
Said = dict[str, tuple[int, frozenset[int] | None]]


class BitmapHistory:
    """The changes of an image's bitmaps, by a clock that tells crashes apart."""

    def __init__(self) -> None:
        #: (began, ended, what the file says from then on).
        self.changes: list[tuple[int, int, Said]] = [(-1, -1, {})]

    def changed(self, began: int, ended: int, says: Said) -> None:
        self.changes.append((began, ended, says))

    @property
    def last(self) -> Said:
        return self.changes[-1][2]

    def allowed(self, crash: int) -> list[Said]:
        """What the file may say after a crash at that time, before which everything had begun."""
        ended = [change for change in self.changes if change[1] <= crash]
        return [ended[-1][2], *(says for began, _, says in self.changes[len(ended) :] if began < crash)]


def said(layer: Qcow2) -> Said:
    """What the file should say now of the bitmaps of an open layer."""
    return {
        bitmap.name: (AUTO | IN_USE, None) if bitmap.auto else (0, marked(layer, bitmap.name))
        for bitmap in layer.bitmaps()
    }


def said_when_closed(layer: Qcow2) -> Said:
    """What it should say once the layer, which is open, has been closed."""
    return {name: (flags & ~IN_USE, marked(layer, name)) for name, (flags, _) in said(layer).items()}


def marked(layer: Qcow2, name: str) -> frozenset[int]:
    """The granules that are marked in a bitmap of an open layer."""
    bits: DirtyBitmap = layer.bitmap_list.bits(name)
    data = bits.data(0, -(-bits.size // bits.granularity // 64) * 8 + 8)
    value = int.from_bytes(data, "little")
    return frozenset(bit for bit in range(value.bit_length()) if value >> bit & 1)


def found_in(state: bytes | bytearray) -> Said:
    """What an image file says."""
    return {
        name: (bitmap.flags, None if bitmap.flags & IN_USE else frozenset(bitmap.dirty))
        for name, bitmap in stored(state).items()
    }
