"""The header: parsed, and believed only as far as it can be checked.

`read_header` takes what every open needs; `check_writable` says why an image may be read but not written.
Specification: "Header", "Header extensions", "Feature name table".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from layers.ondisk.qcow2 import (
    AUTOCLEAR_AT,
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_TYPE_AT,
    COMPRESSION_ZLIB,
    COMPRESSION_ZSTD,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    ENCRYPTION_FIELDS,
    EXTENSION,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_ENCRYPTION,
    EXTENSION_END,
    EXTENSION_FEATURE_NAMES,
    FEATURE_INCOMPATIBLE,
    FEATURE_NAME,
    HEADER,
    HEADER3,
    HEADER_LENGTH_2,
    HEADER_LENGTH_3_MIN,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_EXTENDED_L2,
    MAGIC,
    SUBCLUSTERS_COUNT,
    HeaderFields,
    HeaderFields3,
)
from layers.qcow2.clusters import Geometry
from layers.qcow2.limits import (
    BACKING_NAME_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    L1_TABLE_MAX,
    REFCOUNT_ORDER_MAX,
    REFCOUNT_TABLE_MAX,
    SNAPSHOTS_COUNT_MAX,
)
from nbdserver.errors import ImageError
from nbdserver.layer import Layer
from nbdserver.limits import DISK_MAX

#: What is understood: images that use any other incompatible feature are refused.
UNDERSTOOD = (
    INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2
)

#: What autoclear features promise of these, writing here keeps up.
KEPT = AUTOCLEAR_DATA_FILE_RAW | AUTOCLEAR_BITMAPS


@dataclass(frozen=True)
class Header:
    """What an image's header says, every number in it bounded and every offset aligned and inside the file."""

    version: int
    geometry: Geometry
    size: int
    l1_offset: int
    l1_count: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots_offset: int
    snapshots_count: int
    compression: int
    crypt_method: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    backing_name: str | None = None
    backing_format: str | None = None
    extensions: dict[int, bytes] = field(default_factory=dict)

    @property
    def data_file_name(self) -> str | None:
        """The external data file that it names."""
        name = self.extensions.get(EXTENSION_DATA_FILE)
        return os.fsdecode(name) if name else None

    @property
    def encryption(self) -> tuple[int, int]:
        """(offset, length) of the encryption header, which images with LUKS have."""
        offset, length = ENCRYPTION_FIELDS.unpack(self.extensions[EXTENSION_ENCRYPTION])
        return offset, length

    @property
    def is_lazy(self) -> bool:
        """Whether refcounts may be written late."""
        return bool(self.compatible & COMPATIBLE_LAZY_REFCOUNTS)

    @property
    def is_raw(self) -> bool:
        """Whether the external data file is, and is to stay, a raw image of the disk by itself."""
        return bool(self.autoclear & AUTOCLEAR_DATA_FILE_RAW)


def read_header(file: Layer, *, checking: bool = False) -> Header:
    """Read and check the header of the image in ``file``. Raises ImageError, OSError.

    ``checking``: for those who check or describe the image, and not use it: its tables may be where nothing is, and
    guest data where it cannot be had.
    """
    return _Parser(file, checking).parse()


def check_writable(header: Header, path: str | None) -> None:
    """Raise ImageError if the image may be read but not written."""
    if header.incompatible & INCOMPATIBLE_CORRUPT:
        raise ImageError(
            "is marked as corrupt and can only be opened read-only; repair it with nbdserver image check --repair all",
            path=path,
        )
    if header.geometry.has_data_file and header.snapshots_count:
        raise ImageError("has internal snapshots, which an image with an external data file cannot have", path=path)


class _Parser:
    def __init__(self, file: Layer, checking: bool) -> None:
        self._file, self._checking = file, checking
        self._path = file.filename
        self._file_size = file.size
        self._head = file.pread(0, min(HEADER.size + HEADER3.size + 8, self._file_size))

    def parse(self) -> Header:
        if self._head[:4] != MAGIC.to_bytes(4, "big"):
            self._refuse("is not a qcow2 image: wrong magic", 0, self._head[:4].hex() or "nothing", f"{MAGIC:08x}")
        if len(self._head) < HEADER.size:
            self._refuse("header is cut off", None, self._file_size, f"at least {HEADER_LENGTH_2} bytes")
        fields = HeaderFields._make(HEADER.unpack_from(self._head))
        if fields.version not in (2, 3):
            self._refuse("unsupported qcow2 version", 4, fields.version, "2 or 3")
        if not CLUSTER_BITS_MIN <= fields.cluster_bits <= CLUSTER_BITS_MAX:
            self._refuse("cluster_bits", 20, fields.cluster_bits, f"{CLUSTER_BITS_MIN} to {CLUSTER_BITS_MAX}")
        fields3 = self._fields3(fields)
        extensions_stop = self._check_backing_place(fields, fields3)
        extensions = dict(self._extensions(fields3.header_length, extensions_stop))
        self._check_features(fields, fields3, extensions)
        geometry = self._geometry(fields, fields3)
        if not self._checking:
            self._check_encryption(fields, extensions, geometry)
        self._check_tables(fields, geometry)
        backing_name, backing_format = self._backing(fields, extensions)
        return Header(
            version=fields.version,
            geometry=geometry,
            size=fields.size,
            l1_offset=fields.l1_table_offset,
            l1_count=fields.l1_size,
            refcount_table_offset=fields.refcount_table_offset,
            refcount_table_clusters=fields.refcount_table_clusters,
            snapshots_offset=fields.snapshots_offset,
            snapshots_count=fields.nb_snapshots,
            compression=self._compression(fields, fields3),
            crypt_method=fields.crypt_method,
            incompatible=fields3.incompatible_features,
            compatible=fields3.compatible_features,
            autoclear=fields3.autoclear_features,
            backing_name=backing_name,
            backing_format=backing_format,
            extensions=extensions,
        )

    def _fields3(self, fields: HeaderFields) -> HeaderFields3:
        if fields.version == 2:
            return HeaderFields3(0, 0, 0, 4, HEADER_LENGTH_2)
        if len(self._head) < HEADER_LENGTH_3_MIN:
            self._refuse("header is cut off", None, self._file_size, f"at least {HEADER_LENGTH_3_MIN} bytes")
        fields3 = HeaderFields3._make(HEADER3.unpack_from(self._head, HEADER.size))
        cluster_size = 1 << fields.cluster_bits
        length = fields3.header_length
        if not HEADER_LENGTH_3_MIN <= length <= cluster_size or length % 8:
            wanted = f"a multiple of 8 from {HEADER_LENGTH_3_MIN} to the cluster size, {cluster_size}"
            self._refuse("header_length", 100, length, wanted)
        if fields3.refcount_order > REFCOUNT_ORDER_MAX:
            self._refuse("refcount_order", 96, fields3.refcount_order, f"at most {REFCOUNT_ORDER_MAX}")
        return fields3

    # -- header extensions ------------------------------------------------------------------------------------------

    def _check_backing_place(self, fields: HeaderFields, fields3: HeaderFields3) -> int:
        """Check where the backing file's name is; where the header extensions end at the latest."""
        cluster_size = 1 << fields.cluster_bits
        offset, length = fields.backing_file_offset, fields.backing_file_size
        if not offset:
            return cluster_size
        if length > BACKING_NAME_MAX:
            self._refuse("backing_file_size", 16, length, f"at most {BACKING_NAME_MAX}")
        if not fields3.header_length <= offset <= cluster_size - length:
            wanted = f"within the first cluster, {fields3.header_length} to {cluster_size - length}"
            self._refuse("backing_file_offset", 8, offset, wanted)
        return offset

    def _extensions(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        area = self._file.pread(start, max(min(stop, self._file_size) - start, 0))
        at = 0
        while at + EXTENSION.size <= len(area):
            kind, length = EXTENSION.unpack_from(area, at)
            if kind == EXTENSION_END:
                return
            at += EXTENSION.size
            if length > len(area) - at:
                name = f"header extension {kind:#010x}: length"
                self._refuse(name, start + at - 4, length, f"at most the {len(area) - at} bytes left")
            yield kind, area[at : at + length]
            at += -(-length // 8) * 8

    def _backing(self, fields: HeaderFields, extensions: dict[int, bytes]) -> tuple[str | None, str | None]:
        """(name, format) of the backing file that the header names."""
        if not fields.backing_file_offset or not fields.backing_file_size:
            return None, None
        name = self._file.pread(fields.backing_file_offset, fields.backing_file_size)
        format = extensions.get(EXTENSION_BACKING_FORMAT, b"").decode("ascii", "backslashreplace")
        return os.fsdecode(name), format or None

    # -- features ---------------------------------------------------------------------------------------------------

    def _check_features(self, fields: HeaderFields, fields3: HeaderFields3, extensions: dict[int, bytes]) -> None:
        incompatible = fields3.incompatible_features
        unknown = incompatible & ~UNDERSTOOD
        if unknown:
            names = dict(_feature_names(extensions.get(EXTENSION_FEATURE_NAMES, b"")))
            bits = [bit for bit in range(64) if unknown >> bit & 1]
            used = ", ".join(f"{names[bit]} (bit {bit})" if bit in names else f"bit {bit}" for bit in bits)
            self._refuse(f"uses incompatible features that are not supported: {used}")

    def _geometry(self, fields: HeaderFields, fields3: HeaderFields3) -> Geometry:
        extended = bool(fields3.incompatible_features & INCOMPATIBLE_EXTENDED_L2)
        has_data_file = bool(fields3.incompatible_features & INCOMPATIBLE_DATA_FILE)
        least = SUBCLUSTERS_COUNT << CLUSTER_BITS_MIN
        if extended and 1 << fields.cluster_bits < least:
            wanted = f"clusters of at least {least} bytes with extended L2 entries"
            self._refuse("cluster_bits", 20, fields.cluster_bits, wanted)
        if fields3.autoclear_features & AUTOCLEAR_DATA_FILE_RAW and not has_data_file:
            found = f"{fields3.autoclear_features:#x}"
            self._refuse("autoclear_features", AUTOCLEAR_AT, found, "bit 1 clear without an external data file")
        return Geometry(
            fields.cluster_bits,
            fields3.refcount_order,
            has_zero=fields.version >= 3,
            extended=extended,
            has_data_file=has_data_file,
        )

    def _check_encryption(self, fields: HeaderFields, extensions: dict[int, bytes], geometry: Geometry) -> None:
        """Check where the encryption header is, which LUKS has and nothing else."""
        method, data = fields.crypt_method, extensions.get(EXTENSION_ENCRYPTION)
        if method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
            self._refuse("unsupported encryption method", 32, method, f"{CRYPT_NONE}, {CRYPT_AES} or {CRYPT_LUKS}")
        if method != CRYPT_LUKS:
            if data is not None:
                self._refuse("names an encryption header, but is not encrypted with LUKS: method", 32, method)
            return
        if data is None:
            self._refuse("is encrypted with LUKS and names no encryption header")
        if len(data) != ENCRYPTION_FIELDS.size:
            self._refuse("encryption header extension: length", None, len(data), ENCRYPTION_FIELDS.size)
        offset, length = ENCRYPTION_FIELDS.unpack(data)
        if not length:
            self._refuse("encryption header: length", None, 0, "at least a LUKS header's")
        self._check_place("encryption header", None, offset, length, geometry)

    def _compression(self, fields: HeaderFields, fields3: HeaderFields3) -> int:
        has_field = fields.version >= 3 and fields3.header_length > COMPRESSION_TYPE_AT
        found = self._file.pread(COMPRESSION_TYPE_AT, 1)[0] if has_field else COMPRESSION_ZLIB
        if found not in (COMPRESSION_ZLIB, COMPRESSION_ZSTD):
            self._refuse("unsupported compression type", COMPRESSION_TYPE_AT, found, "0 (zlib) or 1 (zstd)")
        if bool(found) != bool(fields3.incompatible_features & INCOMPATIBLE_COMPRESSION):
            wanted = "not 0 if and only if incompatible feature bit 3 is set"
            self._refuse("compression type", COMPRESSION_TYPE_AT, found, wanted)
        return found

    # -- tables -----------------------------------------------------------------------------------------------------

    def _check_tables(self, fields: HeaderFields, geometry: Geometry) -> None:
        if fields.size > DISK_MAX:
            self._refuse("virtual disk size", 24, fields.size, f"at most {DISK_MAX}")
        needed = -(-geometry.clusters(fields.size) // geometry.l2_entries)
        if not needed <= fields.l1_size <= L1_TABLE_MAX // 8:
            wanted = f"{needed} (for a disk of {fields.size} bytes) to {L1_TABLE_MAX // 8}"
            self._refuse("l1_size", 36, fields.l1_size, wanted)
        self._check_place("L1 table", 40, fields.l1_table_offset, fields.l1_size * 8, geometry)
        clusters_max = REFCOUNT_TABLE_MAX // geometry.cluster_size
        if not (0 if self._checking else 1) <= fields.refcount_table_clusters <= clusters_max:
            self._refuse("refcount_table_clusters", 56, fields.refcount_table_clusters, f"1 to {clusters_max}")
        length = fields.refcount_table_clusters * geometry.cluster_size
        self._check_place("refcount table", 48, fields.refcount_table_offset, length, geometry)
        if fields.nb_snapshots > SNAPSHOTS_COUNT_MAX:
            self._refuse("nb_snapshots", 60, fields.nb_snapshots, f"at most {SNAPSHOTS_COUNT_MAX}")
        self._check_place("snapshot table", 64, fields.snapshots_offset, fields.nb_snapshots * 40, geometry)

    def _check_place(self, what: str, at: int | None, offset: int, length: int, geometry: Geometry) -> None:
        if not length:
            return
        if offset % geometry.cluster_size or not (offset or self._checking):
            self._refuse(f"{what}: its place", at, f"{offset:#x}", f"a multiple of {geometry.cluster_size}, not 0")
        # The last cluster of a file may be cut off behind what it is used for.
        end = -(-self._file_size // geometry.cluster_size) * geometry.cluster_size
        if offset > (DISK_MAX if self._checking else end) - length:
            found = f"{offset:#x} to {offset + length:#x}"
            self._refuse(f"{what}: its place", at, found, f"within the file, which ends at {self._file_size:#x}")

    def _refuse(self, message: str, offset: int | None = None, found: object = None, wanted: object = None) -> NoReturn:
        raise ImageError(message, path=self._path, offset=offset, found=found, wanted=wanted)


def _feature_names(table: bytes) -> Iterator[tuple[int, str]]:
    for at in range(0, len(table) - FEATURE_NAME.size + 1, FEATURE_NAME.size):
        kind, bit, name = FEATURE_NAME.unpack_from(table, at)
        if kind == FEATURE_INCOMPATIBLE:
            text = name.rstrip(b"\0").decode("utf-8", "replace")
            yield bit, "".join(c if c.isprintable() else "?" for c in text)
