"""What there is to say of an image: QEMU's ``ImageInfoSpecificQCow2``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layers.ondisk.qcow2 import COMPRESSION_ZSTD, INCOMPATIBLE_CORRUPT
from layers.qcow2.encryption import Encryption
from layers.qcow2.header import Header
from nbdserver.format import Bitmap


def describe(
    header: Header, bitmaps: Sequence[Bitmap], encryption: Encryption | None, *, is_corrupt: bool
) -> dict[str, Any]:
    """`nbdserver.format.Describes.info`. ``is_corrupt``: whether that has turned out since the header was read."""
    data: dict[str, Any] = {  # in the order in which qemu-img prints them
        "compat": "1.1" if header.version >= 3 else "0.10",
        "compression-type": "zstd" if header.compression == COMPRESSION_ZSTD else "zlib",
    }
    if header.version >= 3:
        data["lazy-refcounts"] = header.is_lazy
        if bitmaps:
            data["bitmaps"] = [_bitmap(bitmap) for bitmap in bitmaps]
    data["refcount-bits"] = header.geometry.refcount_bits
    if encryption is not None:
        data["encrypt"] = encryption.info()
    if header.version >= 3:
        if header.geometry.has_data_file:
            if header.data_file_name is not None:
                data["data-file"] = header.data_file_name
            data["data-file-raw"] = header.is_raw
        data["corrupt"] = is_corrupt or bool(header.incompatible & INCOMPATIBLE_CORRUPT)
        data["extended-l2"] = header.geometry.subclusters > 1
    return {"type": "qcow2", "data": data}


def _bitmap(bitmap: Bitmap) -> dict[str, Any]:
    flags = [flag for flag, is_set in (("in-use", bitmap.in_use), ("auto", bitmap.auto)) if is_set]
    return {"flags": flags, "name": bitmap.name, "granularity": bitmap.granularity}
