"""The head: those fields of the header that say which disk an image is, and which snapshots it has.

They are what `order` calls the switch: whatever else has changed, the image is what it was until they are written, and
it is something else from then on. Each group is written whole, within one sector.
"""

from __future__ import annotations

from layers.ondisk.qcow2 import DISK_AT, DISK_FIELDS, SNAPSHOTS_AT, SNAPSHOTS_FIELDS
from layers.qcow2.cache import Write
from layers.qcow2.header import Header
from layers.qcow2.order import Cut


class Head:
    """The fields as they are to be. Whoever changes them holds the metadata lock."""

    def __init__(self, header: Header) -> None:
        #: The disk's size, bytes, and its L1 table.
        self.size, self.l1_place, self.l1_count = header.size, header.l1_offset, header.l1_count
        #: The snapshot table.
        self.snapshots_place, self.snapshots_count = header.snapshots_offset, header.snapshots_count
        self._crypt_method = header.crypt_method
        #: What the file has, as far as that is known.
        self._in_file = self._fields()

    @property
    def is_clean(self) -> bool:
        """Whether the file has them."""
        return self._in_file == self._fields()

    def cut(self, cut: Cut) -> None:
        """Give what the file lacks to ``cut``."""
        for offset, data in self._fields().items():
            if self._in_file.get(offset) != data:
                self._in_file.pop(offset, None)  # until the write is known to have succeeded
                cut.switch(Write(offset, data))

    def settle(self, cut: Cut) -> None:
        """The file has what the cut took."""
        self._in_file.update((write.offset, write.data) for write in cut.switches)

    def _fields(self) -> dict[int, bytes]:
        return {
            DISK_AT: DISK_FIELDS.pack(self.size, self._crypt_method, self.l1_count, self.l1_place),
            SNAPSHOTS_AT: SNAPSHOTS_FIELDS.pack(self.snapshots_count, self.snapshots_place),
        }
