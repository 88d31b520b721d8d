"""How large an image would be: what ``qemu-img measure`` says, by the same reckoning.

All tables are counted as for a disk that is full: the required size is too large by the tables that an emptier disk
does without.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from layers.ondisk.qcow2 import BITMAP_ENTRY
from layers.qcow2.create import Options, refcount_clusters
from layers.qcow2.limits import L1_TABLE_MAX
from nbdserver.errors import ConfigError
from nbdserver.format import Bitmap, Measure


def measure(
    size: int, options: Options, allocated: Iterable[tuple[int, int]], bitmaps: Sequence[Bitmap] | None
) -> Measure:
    """See `nbdserver.format.Creates.measure`.

    With a backing file, all of the disk counts as soon as anything is allocated: nobody knows what of it the backing
    file has too.
    """
    cluster_size = options.cluster_size
    entry_size = 16 if options.extended_l2 else 8
    clusters = _up(size, cluster_size)
    l2_tables = _up(clusters * entry_size, cluster_size)
    if size < 0 or l2_tables * 8 > L1_TABLE_MAX:
        raise ConfigError(
            f"found {size}, but with clusters of {cluster_size} bytes a disk has at most "
            f"{L1_TABLE_MAX // 8 * (cluster_size // entry_size) * cluster_size} (try a larger cluster size)",
            key="size",
        )
    others = 1 + l2_tables + _up(l2_tables * 8, cluster_size) + clusters
    full = others + sum(refcount_clusters(others, cluster_size, options.refcount_bits))
    if options.preallocation in ("falloc", "full"):
        used = clusters
    else:
        used = _touched(allocated, cluster_size)
        used = clusters if used and options.backing_file is not None else used
    encryption = 0 if options.recipe is None else _up(options.recipe.length, cluster_size)
    more = _bitmaps(size, cluster_size, bitmaps) if bitmaps is not None and options.version >= 3 else None
    return Measure((full - clusters + used + encryption) * cluster_size, (full + encryption) * cluster_size, more)


def _bitmaps(size: int, cluster_size: int, bitmaps: Sequence[Bitmap]) -> int:
    """What bitmaps of a disk take up, each of them full, with their tables and their directory."""
    clusters = [_up(_up(_up(size, bitmap.granularity), 8), cluster_size) for bitmap in bitmaps]
    tables = sum(_up(count * 8, cluster_size) for count in clusters)
    directory = sum(_up(BITMAP_ENTRY.size + len(os.fsencode(bitmap.name)), 8) * 8 for bitmap in bitmaps)
    return (sum(clusters) + tables + _up(directory, cluster_size)) * cluster_size


def _touched(ranges: Iterable[tuple[int, int]], cluster_size: int) -> int:
    """How many clusters the ranges, which ascend, touch."""
    count = behind = 0
    for offset, length in ranges:
        first, stop = max(offset // cluster_size, behind), _up(offset + length, cluster_size)
        if length and first < stop:
            count, behind = count + stop - first, stop
    return count


def _up(number: int, unit: int) -> int:
    return -(-number // unit)
