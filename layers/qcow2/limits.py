"""Bounds on what is believed of a qcow2 image, and on what is held in memory for one. Bytes unless the suffix says."""

from __future__ import annotations

from typing import Final

from nbdserver.limits import GIB, KIB, MIB

#: The format's least cluster size, and the greatest that QEMU can open.
CLUSTER_BITS_MIN: Final = 9
CLUSTER_BITS_MAX: Final = 21

#: Refcounts are at most 64 bits wide.
REFCOUNT_ORDER_MAX: Final = 6

#: The specification's bound on a backing file's name.
BACKING_NAME_MAX: Final = 1023

#: QEMU's QCOW_MAX_L1_SIZE: enough for 2 PiB at 64 KiB clusters. What QEMU cannot open we neither read nor make.
L1_TABLE_MAX: Final = 32 * MIB

#: QEMU's QCOW_MAX_REFTABLE_SIZE: enough for 2 PiB at 64 KiB clusters.
REFCOUNT_TABLE_MAX: Final = 8 * MIB

#: QEMU's QCOW_MAX_SNAPSHOTS, QCOW_MAX_SNAPSHOTS_SIZE and QCOW_MAX_SNAPSHOT_EXTRA_DATA.
SNAPSHOTS_COUNT_MAX: Final = 65536
SNAPSHOT_TABLE_MAX: Final = 64 * MIB
SNAPSHOT_EXTRA_DATA_MAX: Final = 1024

#: A snapshot table is read in pieces of this: most are smaller, and its length is not known before.
SNAPSHOT_TABLE_READ: Final = 64 * KIB

#: The longest name that is given to a snapshot: QEMU shows no more (QEMUSnapshotInfo).
SNAPSHOT_NAME_MAX: Final = 255

#: References that are counted, or taken back, at once: a few megabytes of memory, and then a flush if one is due.
REFERENCES_COUNT_MAX: Final = 65536

#: QEMU's DEFAULT_L2_CACHE_MAX_SIZE: maps 256 GiB at 64 KiB clusters.
L2_CACHE_DEFAULT: Final = 32 * MIB

#: Counts 256 GiB at 64 KiB clusters and 16 bits.
REFCOUNT_CACHE_DEFAULT: Final = 8 * MIB

#: How much longer than it needs to be a growing file is made, so that few new clusters need that. A hole, which goes
#: when the image is closed.
GROWTH: Final = 16 * MIB

#: The fewest tables a cache is of use with: an old and a new L2 table; the blocks that one growth touches.
CACHED_COUNT_MIN: Final = 4

#: Freed clusters that wait to be reusable: so many, or so much, and the metadata is written back to set them free,
#: lest the file grow for want of them.
FREED_COUNT_MAX: Final = 65536
FREED_MAX: Final = GIB

#: Runs of free clusters that are remembered behind the allocation cursor; past that it goes back and looks again.
FREE_RUNS_COUNT_MAX: Final = 16384

#: Clusters behind what is asked for whose places are told along with it: each costs some 50 ns, and a page fault that
#: brings so many need not come again for a while.
CLUSTERS_AHEAD_MAX: Final = 512

#: Entries of an L2 table that are handed out at once, packed: all of it, but where clusters are large.
WORDS_MAX: Final = 16384

#: Zeroes around the data of a partly written cluster: up to this many are written along with it, more of them are
#: zeroed by the file, which keeps large clusters sparse.
ZEROES_INLINE_MAX: Final = 64 * KIB

#: Data in the middle of a cluster that is copied: up to this much, what it takes the place of is read along with what
#: surrounds it.
COPIED_OVER_MAX: Final = 16 * KIB

#: Decompressed clusters that are kept, for readers that go through one in small steps.
DECOMPRESSED_KEPT_MAX: Final = 4 * MIB

#: A zstd frame's window: what RFC 8878 recommends decoders to support, and no cluster needs more than its own size.
ZSTD_WINDOW_MAX: Final = 8 * MIB

#: Tables of new images are written in pieces of about this size.
TABLES_PIECE: Final = 4 * MIB

#: Subcluster bitmaps whose meaning is remembered: most images have few different ones. About 2 KiB each at worst.
BITMAPS_KEPT_MAX: Final = 1024

#: An external data file is discarded in pieces of this, each of which is left for later if a request is at work in it.
DISCARD_PIECE: Final = 16 * MIB

#: Clusters of the file that a check counts references to at once, in two bytes each; larger files are gone over again
#: for each further such range. That is 2 TiB at 64 KiB clusters.
CHECKED_COUNT: Final = 1 << 25

#: The most clusters of a file that can be checked: as QEMU, which counts them in an int. 128 TiB at 64 KiB clusters.
CHECKED_COUNT_MAX: Final = (1 << 31) - 1

#: Pages of the file, of 4 KiB, that a check keeps for looking up single numbers: refcounts of 128 GiB, where they have
#: 16 bits and clusters 64 KiB.
CHECKED_PAGES_COUNT: Final = 1024

#: Refcounts of clusters behind the end of the file that are looked up, each of them somewhere else at worst: more than
#: there are by accident. What counts those that are further on is anyhow wrong.
CHECKED_STRAYS_COUNT: Final = 4096

#: How much of L2 tables that are not aligned to clusters is looked into, for each L1 table: two of the longest, as much
#: as there can be by accident. They may overlap, so that in all they can be thousands of times as long as the file.
CHECKED_MISPLACED_MAX: Final = 4 * MIB

#: Findings of a check that are told in words. Nobody reads more.
FINDINGS_COUNT_MAX: Final = 1000

#: How much is allocated at once around a write where nothing is, by default: enough that random writes soon find their
#: places, and holes of the file until then. And how much at most, where writes follow one another.
ALLOCATION_AHEAD_DEFAULT: Final = 4 * MIB
ALLOCATION_AHEAD_MAX: Final = 16 * MIB

#: It grows to that, too, so that it is no more than this part of what has been allocated since the image was opened:
#: random writes to a large disk come to an end of first writes soon, and single ones take little more than they need.
ALLOCATION_AHEAD_SHARE: Final = 64

#: QEMU's QCOW2_MAX_BITMAPS, QCOW2_MAX_BITMAP_DIRECTORY_SIZE, and its bounds on a bitmap's table, its size in bytes,
#: its granularity and the length of its name.
BITMAPS_COUNT_MAX: Final = 65535
BITMAP_DIRECTORY_MAX: Final = 64 * MIB
BITMAP_TABLE_COUNT_MAX: Final = 0x8000000
BITMAP_MAX: Final = 0x20000000
BITMAP_GRANULARITY_BITS_MIN: Final = 9
BITMAP_GRANULARITY_BITS_MAX: Final = 31
BITMAP_NAME_MAX: Final = 1023

#: QEMU's bounds on the granularity of a bitmap that is added with none said: the cluster size, but within these.
BITMAP_GRANULARITY_DEFAULT_MIN: Final = 4 * KIB
BITMAP_GRANULARITY_DEFAULT_MAX: Final = 64 * KIB

#: All bitmaps of one image together, as if every bit of them took memory: thirty disks of 64 TiB at 64 KiB a bit. What
#: is all clear or all set takes a thousandth of that.
BITMAPS_MAX: Final = 4 * GIB

#: Entries of all bitmap tables together: what BITMAPS_MAX needs with the smallest clusters. They are read at opening.
BITMAP_TABLES_COUNT_MAX: Final = BITMAPS_MAX // 512

#: Bitmaps are read and written in pieces of about this size.
BITMAP_PIECE: Final = MIB
