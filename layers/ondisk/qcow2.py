"""qcow2 on disk: structures and bits, no logic.

Specification: QEMU's ``docs/interop/qcow2.rst``, "Qcow2 Image File Format"; the sections are named below. All numbers
are big-endian.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

# -- Header ----------------------------------------------------------------------------------------------------------

MAGIC: Final = 0x514649FB  # "QFI\xfb"


class HeaderFields(NamedTuple):
    """The header through ``snapshots_offset``: all of a version 2 header."""

    magic: int
    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int


class HeaderFields3(NamedTuple):
    """What version 3 adds."""

    incompatible_features: int
    compatible_features: int
    autoclear_features: int
    refcount_order: int
    header_length: int


HEADER: Final = struct.Struct(">IIQIIQIIQQIIQ")
HEADER3: Final = struct.Struct(">QQQII")
HEADER_LENGTH_2: Final = 72
HEADER_LENGTH_3_MIN: Final = 104
#: With the field ``compression_type``, and padding.
HEADER_LENGTH_3: Final = 112

#: Offsets in the file of what is rewritten in place; each lies within the first 512-byte sector.
BACKING_NAME_AT: Final = 8
DISK_AT: Final = 24
REFCOUNT_TABLE_AT: Final = 48
SNAPSHOTS_AT: Final = 60
AUTOCLEAR_AT: Final = 88
COMPRESSION_TYPE_AT: Final = 104
INCOMPATIBLE_AT: Final = 72

BACKING_NAME_FIELD: Final = struct.Struct(">Q")
#: ``backing_file_offset`` and ``backing_file_size``.
BACKING_FIELDS: Final = struct.Struct(">QI")
#: ``size``, ``crypt_method``, ``l1_size`` and ``l1_table_offset``, which change together.
DISK_FIELDS: Final = struct.Struct(">QIIQ")
#: ``nb_snapshots`` and ``snapshots_offset``, and so do these.
SNAPSHOTS_FIELDS: Final = struct.Struct(">IQ")
#: And ``refcount_table_offset`` and ``refcount_table_clusters``.
REFCOUNT_TABLE_FIELDS: Final = struct.Struct(">QI")
AUTOCLEAR_FIELD: Final = struct.Struct(">Q")
INCOMPATIBLE_FIELD: Final = struct.Struct(">Q")

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

INCOMPATIBLE_DIRTY: Final = 1 << 0
INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_COMPRESSION: Final = 1 << 3
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4

COMPATIBLE_LAZY_REFCOUNTS: Final = 1 << 0

AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_DATA_FILE_RAW: Final = 1 << 1

COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1

# -- Header extensions -------------------------------------------------------------------------------------------------

EXTENSION: Final = struct.Struct(">II")
EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_ENCRYPTION: Final = 0x0537BE77
EXTENSION_DATA_FILE: Final = 0x44415441

#: No kind of the specification's: one that readers pass over, in the place of others that are being rewritten.
EXTENSION_SKIP: Final = 0x534B4950

#: Feature name table entry: type, bit number, name.
FEATURE_NAME: Final = struct.Struct(">BB46s")
FEATURE_INCOMPATIBLE: Final = 0
FEATURE_COMPATIBLE: Final = 1
FEATURE_AUTOCLEAR: Final = 2

# -- Host cluster management -------------------------------------------------------------------------------------------

REFCOUNT_TABLE_RESERVED: Final = 0x1FF

# -- Cluster mapping ---------------------------------------------------------------------------------------------------

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE

#: The first offset that neither an L1 nor an L2 entry can name.
OFFSET_END: Final = 1 << 56

#: An extended L2 entry says what is in each of so many parts of its cluster. None may be smaller than the format's
#: least cluster.
SUBCLUSTERS_COUNT: Final = 32

#: Its second word has a bit for each of them that is stored in the host cluster, and, above, for each that is zeroes.
ALLOCATED_ALL: Final = 0x0000_0000_FFFF_FFFF
ZERO_ALL: Final = 0xFFFF_FFFF_0000_0000

#: The unit in which compressed data is measured.
COMPRESSED_SECTOR: Final = 512

# -- Snapshots ---------------------------------------------------------------------------------------------------------


class SnapshotFields(NamedTuple):
    """The fixed part of a snapshot table entry; extra data, ID and name follow, padded to 8 bytes."""

    l1_table_offset: int
    l1_size: int
    id_size: int
    name_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    extra_data_size: int


SNAPSHOT: Final = struct.Struct(">QIHHIIQII")

#: The extra data that is defined: ``vm_state_size`` in 64 bits, the disk's size, the instruction count (-1: none).
SNAPSHOT_EXTRA: Final = struct.Struct(">QQQ")
SNAPSHOT_EXTRA_FIELD: Final = struct.Struct(">Q")
ICOUNT_NONE: Final = (1 << 64) - 1

# -- Bitmaps -----------------------------------------------------------------------------------------------------------


class BitmapEntryFields(NamedTuple):
    """The fixed part of a bitmap directory entry; extra data and name follow, padded to 8 bytes."""

    table_offset: int
    table_size: int
    flags: int
    type: int
    granularity_bits: int
    name_size: int
    extra_data_size: int


#: The header extension: number of bitmaps, reserved, size and offset of the bitmap directory.
BITMAPS_FIELDS: Final = struct.Struct(">IIQQ")
BITMAP_ENTRY: Final = struct.Struct(">QIIBBHI")
BITMAP_TYPE_DIRTY: Final = 1
BITMAP_IN_USE: Final = 1 << 0
BITMAP_AUTO: Final = 1 << 1
BITMAP_EXTRA_COMPATIBLE: Final = 1 << 2
BITMAP_FLAGS_RESERVED: Final = 0xFFFF_FFF8
BITMAP_TABLE_RESERVED: Final = 0xFF00_0000_0000_01FE
BITMAP_ALL_ONES: Final = 1

# -- Encryption --------------------------------------------------------------------------------------------------------

#: The header extension: offset and length of the encryption header.
ENCRYPTION_FIELDS: Final = struct.Struct(">QQ")
