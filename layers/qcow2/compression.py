"""Compressed clusters: raw deflate or zstd, exactly one cluster out of each, whatever the bytes claim.

Specification: "Additional fields", compression_type; "Compressed Clusters Descriptor".
"""

from __future__ import annotations

import io
import zlib

import zstandard

from layers.ondisk.qcow2 import COMPRESSION_ZSTD
from layers.qcow2.limits import ZSTD_WINDOW_MAX


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


def _deflate(data: bytes, cluster_size: int) -> bytes:
    # The widest window decodes what was written with any.
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size)


def _zstd(data: bytes, cluster_size: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX)
    # A cluster may consist of several frames.
    with decompressor.stream_reader(io.BytesIO(data), read_size=len(data), read_across_frames=True) as reader:
        return reader.read(cluster_size)
