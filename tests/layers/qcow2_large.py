"""Images too large to be written: tables laid out by hand, holes for data. Clusters of 64 KiB, refcounts of 16 bits.

::

    header ... │ refcount blocks │ L2 tables, one for each L1 entry │ data clusters, all of them a hole
"""

from __future__ import annotations

import random
import struct
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from tests.serving import create

CLUSTER = 65536
#: Clusters that a refcount block counts, and that an L2 table maps.
PER_BLOCK, PER_TABLE = CLUSTER // 2, CLUSTER // 8
COPIED = 1 << 63


def make_large(path: Path, size: int, *, data: bool = False) -> Path:
    """An image all of whose L2 tables are there. With ``data`` all of the disk is allocated, and within each table no
    two clusters follow one another in the file; else the tables are empty."""
    create(path, size, cluster_size=CLUSTER)
    with path.open("r+b") as file:
        l1_count, l1_at, table_at, table_clusters = struct.unpack(">IQQI", _at(file, 36, 24))
        table = _numbers(_at(file, table_at, table_clusters * CLUSTER))
        first = -(-path.stat().st_size // CLUSTER)
        used = l1_count * (PER_TABLE + 1 if data else 1)
        blocks = 1
        while first + blocks + used > blocks * PER_BLOCK:
            blocks += 1
        table[1:blocks] = array("Q", range(first * CLUSTER, (first + blocks - 1) * CLUSTER, CLUSTER))
        tables, stop = first + blocks - 1, first + blocks - 1 + used
        for number in range(blocks):
            count = min(PER_BLOCK, stop - number * PER_BLOCK)
            _put(file, table[number], (b"\0\1" * count).ljust(CLUSTER, b"\0"))
        _put(file, table_at, _encoded(table))
        _put(file, l1_at, _encoded(COPIED | place * CLUSTER for place in range(tables, tables + l1_count)))
        if data:
            _put_data(file, tables, l1_count)
        file.truncate(stop * CLUSTER)
    return path


def _put_data(file: BinaryIO, tables: int, count: int) -> None:
    order = [*range(0, PER_TABLE, 2), *range(1, PER_TABLE, 2)]
    random.Random(1).shuffle(order)
    for number in range(count):
        start = tables + count + number * PER_TABLE
        _put(file, (tables + number) * CLUSTER, _encoded(COPIED | (start + at) * CLUSTER for at in order))


def _at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _put(file: BinaryIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    file.write(data)


def _numbers(data: bytes) -> array[int]:
    numbers = array("Q", data)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _encoded(numbers: Iterable[int]) -> bytes:
    words = array("Q", numbers)
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()
