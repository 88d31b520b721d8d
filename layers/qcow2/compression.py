"""Compressed clusters: raw deflate or zstd, exactly one cluster into and out of each, whatever the bytes claim.

Specification: "Additional fields", compression_type; "Compressed Clusters Descriptor".
"""

from __future__ import annotations

import io
import threading
import zlib
from typing import Final

import zstandard

from layers.ondisk.qcow2 import COMPRESSION_ZSTD
from layers.qcow2.limits import ZSTD_WINDOW_MAX

#: What deflate looks back to, as a power of two: QEMU's decoder has no more than this.
WINDOW_BITS: Final = 12

#: The usual effort, as zlib's is by default, and QEMU's.
ZSTD_LEVEL: Final = 3

_own = threading.local()


class BadData(Exception):
    """Compressed bytes that do not make a cluster; the text says why."""


def decompress(data: bytes, compression: int, cluster_size: int) -> bytes:
    """The ``cluster_size`` bytes that ``data`` begins with, compressed. What follows them is ignored.

    Never makes more than one cluster of it. Raises BadData.
    """
    try:
        plain = _zstd(data, cluster_size) if compression == COMPRESSION_ZSTD else _deflate(data, cluster_size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise BadData(str(error)) from error
    if len(plain) != cluster_size:
        raise BadData(f"{len(plain)} bytes came out of it")
    return plain


def compress(plain: bytes, compression: int) -> bytes | None:
    """The bytes of a cluster, compressed as QEMU does it; None if that makes them no fewer."""
    if compression == COMPRESSION_ZSTD:
        data = _zstd_compressor().compress(plain)
    else:
        # With the usual memory, not the most as QEMU: no larger, all in all, and a fifth faster.
        data = zlib.compress(plain, wbits=-WINDOW_BITS)
    return data if len(data) < len(plain) else None


def _zstd_compressor() -> zstandard.ZstdCompressor:
    """This thread's: it keeps its memory from one cluster to the next, and serves one thread at a time."""
    compressor: zstandard.ZstdCompressor | None = getattr(_own, "zstd", None)
    if compressor is None:
        compressor = _own.zstd = zstandard.ZstdCompressor(ZSTD_LEVEL)
    return compressor


def _deflate(data: bytes, cluster_size: int) -> bytes:
    # The widest window decodes what was written with any.
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size)


def _zstd(data: bytes, cluster_size: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX)
    # A cluster may consist of several frames.
    with decompressor.stream_reader(io.BytesIO(data), read_size=len(data), read_across_frames=True) as reader:
        return reader.read(cluster_size)
