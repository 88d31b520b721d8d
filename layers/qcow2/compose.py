"""The first cluster of a new image: the header, its extensions and the backing file's name.

::

    header │ additional fields │ extensions, each padded to 8 bytes │ end │ backing file name │ nothing

How they are changed later is in `extensions`. Specification: "Header", "Additional fields", "Header extensions".
"""

from __future__ import annotations

import dataclasses
import errno
from typing import Final

from layers.ondisk.qcow2 import (
    EXTENSION,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_DATA_FILE,
    EXTENSION_ENCRYPTION,
    EXTENSION_END,
    EXTENSION_FEATURE_NAMES,
    FEATURE_AUTOCLEAR,
    FEATURE_COMPATIBLE,
    FEATURE_INCOMPATIBLE,
    FEATURE_NAME,
    HEADER,
    HEADER3,
    HEADER_LENGTH_2,
    HEADER_LENGTH_3_MIN,
    HeaderFields,
    HeaderFields3,
)
from nbdserver.errors import RequestError

#: Extensions in the order in which QEMU writes them; those it does not know come last.
EXTENSIONS_ORDER: Final = (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_ENCRYPTION,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_BITMAPS,
)

#: What the feature name table says.
FEATURE_NAMES: Final = (
    (FEATURE_INCOMPATIBLE, 0, b"dirty bit"),
    (FEATURE_INCOMPATIBLE, 1, b"corrupt bit"),
    (FEATURE_INCOMPATIBLE, 2, b"external data file"),
    (FEATURE_INCOMPATIBLE, 3, b"compression type"),
    (FEATURE_INCOMPATIBLE, 4, b"extended L2 entries"),
    (FEATURE_COMPATIBLE, 0, b"lazy refcounts"),
    (FEATURE_AUTOCLEAR, 0, b"bitmaps"),
    (FEATURE_AUTOCLEAR, 1, b"raw external data"),
)

#: In smaller clusters a feature name table would leave no room for a backing file's name.
FEATURE_NAMES_CLUSTER_MIN: Final = 8192


@dataclasses.dataclass
class FirstCluster:
    """What the first cluster of an image says. Places and lengths of what is in it follow when it is encoded."""

    fields: HeaderFields
    #: Version 3 only; None in version 2.
    fields3: HeaderFields3 | None
    #: Fields behind those of ``fields3``, padding included.
    additional: bytes = b""
    extensions: dict[int, bytes] = dataclasses.field(default_factory=dict)
    backing_name: bytes = b""

    @property
    def area(self) -> tuple[int, int]:
        """Where the extensions begin, and where their end mark ends."""
        length = HEADER_LENGTH_3_MIN + len(self.additional) if self.fields3 else HEADER_LENGTH_2
        sizes = sum(EXTENSION.size + _padded(len(data)) for data in self.extensions.values())
        return length, length + sizes + EXTENSION.size

    def encode(self, name_at: int | None = None) -> bytes:
        """The whole cluster; the backing file's name at ``name_at``, by default right behind the extensions.

        Raises RequestError: ENOSPC if it does not hold all that.
        """
        start, stop = self.area
        name_at = stop if name_at is None else name_at
        cluster_size = 1 << self.fields.cluster_bits
        if max(stop, name_at + len(self.backing_name) if self.backing_name else 0) > cluster_size:
            raise RequestError(
                errno.ENOSPC, f"the first cluster has no room for this: it is {cluster_size} bytes, as all clusters are"
            )
        place = (name_at, len(self.backing_name)) if self.backing_name else (0, 0)
        fields = self.fields._replace(backing_file_offset=place[0], backing_file_size=place[1])
        data = bytearray(HEADER.pack(*fields))
        if self.fields3:
            data += HEADER3.pack(*self.fields3._replace(header_length=start)) + self.additional
        for kind in sorted(self.extensions, key=_rank):
            contents = self.extensions[kind]
            data += EXTENSION.pack(kind, len(contents)) + contents.ljust(_padded(len(contents)), b"\0")
        data += EXTENSION.pack(EXTENSION_END, 0)
        if self.backing_name:
            data += bytes(name_at - len(data)) + self.backing_name
        return bytes(data.ljust(cluster_size, b"\0"))


def feature_names() -> bytes:
    """The feature name table."""
    return b"".join(FEATURE_NAME.pack(*entry) for entry in FEATURE_NAMES)


def _padded(length: int) -> int:
    return -(-length // 8) * 8


def _rank(kind: int) -> int:
    return EXTENSIONS_ORDER.index(kind) if kind in EXTENSIONS_ORDER else len(EXTENSIONS_ORDER)
