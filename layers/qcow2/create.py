"""Making images: what QEMU's ``-o`` options ask for, and where things go.

::

    header │ refcount table │ refcount blocks │ L1 table │ L2 tables │ encryption header │ data
                                                           with                            with
                                                           preallocation                   preallocation

The header is written last, when all that it names is durable: what a crash leaves is either no qcow2 image or the
image. An image without preallocation has the layout that QEMU gives it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from array import array
from typing import Final, Literal

from layers.luks.create import Recipe, make_header
from layers.luks.keyslots import Unlocked
from layers.ondisk.qcow2 import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_ZLIB,
    COMPRESSION_ZSTD,
    COPIED,
    CRYPT_LUKS,
    CRYPT_NONE,
    ENCRYPTION_FIELDS,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_ENCRYPTION,
    EXTENSION_FEATURE_NAMES,
    HEADER_LENGTH_3,
    HEADER_LENGTH_3_MIN,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    MAGIC,
    OFFSET_END,
    SUBCLUSTERS_COUNT,
    HeaderFields,
    HeaderFields3,
)
from layers.qcow2.compose import FEATURE_NAMES_CLUSTER_MIN, FirstCluster, feature_names
from layers.qcow2.encryption import Encrypted
from layers.qcow2.limits import (
    BACKING_NAME_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    L1_TABLE_MAX,
    REFCOUNT_TABLE_MAX,
    TABLES_PIECE,
)
from layers.qcow2.storage import Storage
from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import Size
from nbdserver.format import TACIT, Progress, grow, preallocate
from nbdserver.layer import Layer, Opener, finish
from nbdserver.limits import DISK_MAX
from nbdserver.request import Flag, Request

#: QEMU measures disks in these; other sizes are rounded up.
SECTOR: Final = 512


@dataclasses.dataclass
class Options:
    """QEMU's creation options, in its order; the comments are their help. Raises ConfigError for what no image can
    have, alone or together."""

    #: Encrypt the image: luks; aes is not made any more.
    encrypt_format: Literal["aes", "luks"] | None = dataclasses.field(
        default=None, metadata={"option": "encrypt.format"}
    )
    #: ID of the secret (--object) that is the passphrase.
    encrypt_key_secret: str | None = dataclasses.field(default=None, metadata={"option": "encrypt.key-secret"})
    #: The cipher: aes-128, aes-192 or aes-256.
    encrypt_cipher_alg: str | None = dataclasses.field(default=None, metadata={"option": "encrypt.cipher-alg"})
    #: Its mode: xts, cbc or ecb.
    encrypt_cipher_mode: str | None = dataclasses.field(default=None, metadata={"option": "encrypt.cipher-mode"})
    #: What makes its IVs: plain, plain64 or essiv.
    encrypt_ivgen_alg: str | None = dataclasses.field(default=None, metadata={"option": "encrypt.ivgen-alg"})
    #: The hash of essiv.
    encrypt_ivgen_hash_alg: str | None = dataclasses.field(default=None, metadata={"option": "encrypt.ivgen-hash-alg"})
    #: The hash of passphrases and keys.
    encrypt_hash_alg: str | None = dataclasses.field(default=None, metadata={"option": "encrypt.hash-alg"})
    #: How long trying a passphrase is to take, in milliseconds.
    encrypt_iter_time: int | None = dataclasses.field(default=None, metadata={"option": "encrypt.iter-time"})
    #: The unit of allocation: a power of two from 512 to 2M.
    cluster_size: Size = 65536
    #: Whether L2 entries say what is in each of 32 parts of a cluster.
    extended_l2: bool = False
    #: What is there from the beginning: nothing, the tables, reserved space for all, or zeroes written to all.
    preallocation: Literal["off", "metadata", "falloc", "full"] = dataclasses.field(default="off", metadata=TACIT)
    #: How compressed clusters are compressed.
    compression_type: Literal["zlib", "zstd"] = "zlib"
    #: The version of the format: v2 (0.10) or v3 (1.1).
    compat: Literal["0.10", "1.1", "v2", "v3"] = dataclasses.field(default="1.1", metadata=TACIT)
    #: The image that unallocated clusters show, relative to the new image.
    backing_file: str | None = None
    #: That image's format.
    backing_fmt: str | None = None
    #: An external file for all of the disk's data.
    data_file: str | None = None
    #: Whether the external file is to be a raw image by itself at all times.
    data_file_raw: bool = dataclasses.field(default=False, metadata=TACIT)
    #: Whether refcounts may wait; after a crash they are then counted anew.
    lazy_refcounts: bool = False
    #: The width of refcounts: 1, 2, 4, ... 64.
    refcount_bits: int = 16

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def version(self) -> int:
        return 2 if self.compat in ("0.10", "v2") else 3

    @property
    def recipe(self) -> Recipe | None:
        """What the encryption header is to say. Raises ConfigError."""
        if self.encrypt_format is None:
            return None
        try:
            return Recipe(
                self.encrypt_cipher_alg,
                self.encrypt_cipher_mode,
                self.encrypt_ivgen_alg,
                self.encrypt_ivgen_hash_alg,
                self.encrypt_hash_alg,
                self.encrypt_iter_time,
            )
        except ConfigError as error:
            raise ConfigError(error.message, key=f"encrypt.{error.key}") from error


def check_options(options: Options) -> None:
    """Raise ConfigError for what no image can have, alone or together."""
    _check_geometry(options)
    _check_names(options)
    _check_encryption(options)


def _check_encryption(options: Options) -> None:
    if options.encrypt_format is None:
        given = (field for field in dataclasses.fields(options) if field.name.startswith("encrypt_"))
        for field in given:
            if getattr(options, field.name) is not None:
                raise ConfigError("there is no encrypt.format that it is of", key=field.metadata["option"])
        return
    if options.encrypt_format == "aes":
        raise ConfigError("found 'aes', which is too weak to be used; allowed is luks", key="encrypt.format")
    if options.data_file_raw:
        raise ConfigError("a data file that is an image by itself cannot be encrypted", key="data_file_raw")
    if options.data_file is not None and options.preallocation != "off":
        raise ConfigError(
            "what is preallocated in an encrypted data file, and never written, would be noise", key="preallocation"
        )
    assert options.recipe is not None  # it can be had
    if options.encrypt_key_secret is None:
        raise ConfigError("missing: the passphrase of the image", key="encrypt.key-secret")


def _check_geometry(options: Options) -> None:
    cluster_size, is_old = options.cluster_size, options.version < 3
    if not _is_power(cluster_size, 1 << CLUSTER_BITS_MIN, 1 << CLUSTER_BITS_MAX):
        raise ConfigError(
            f"found {cluster_size}, allowed is a power of two from {1 << CLUSTER_BITS_MIN} to {1 << CLUSTER_BITS_MAX}",
            key="cluster_size",
        )
    if not _is_power(options.refcount_bits, 1, 64):
        raise ConfigError(f"found {options.refcount_bits}, allowed is a power of two from 1 to 64", key="refcount_bits")
    needs_new = {
        "lazy_refcounts": options.lazy_refcounts,
        "refcount_bits": options.refcount_bits != 16,
        "extended_l2": options.extended_l2,
        "data_file": options.data_file is not None,
        "compression_type": options.compression_type != "zlib",
    }
    for key, is_asked in needs_new.items():
        if is_asked and is_old:
            raise ConfigError("only images of version 3 have this (use compat=1.1)", key=key)
    subclusters_min = SUBCLUSTERS_COUNT << CLUSTER_BITS_MIN
    if options.extended_l2 and cluster_size < subclusters_min:
        raise ConfigError(
            f"found {cluster_size}, but extended L2 entries need clusters of at least {subclusters_min} bytes",
            key="cluster_size",
        )


def _check_names(options: Options) -> None:
    if options.backing_file is None:
        if options.backing_fmt is not None:
            raise ConfigError("there is no backing file that could have this format", key="backing_fmt")
    else:
        length = len(os.fsencode(options.backing_file))
        if not 0 < length <= BACKING_NAME_MAX:
            raise ConfigError(f"found a name of {length} bytes, allowed is 1 to {BACKING_NAME_MAX}", key="backing_file")
        if options.data_file_raw:
            raise ConfigError("a data file that is an image by itself cannot have a backing file", key="data_file_raw")
        if options.preallocation != "off" and not options.extended_l2:
            raise ConfigError(
                "what is preallocated would hide the backing file, unless extended_l2 is on", key="preallocation"
            )
    if options.data_file_raw and options.data_file is None:
        raise ConfigError("there is no data_file that could be raw", key="data_file_raw")


def _is_power(number: int, least: int, most: int) -> bool:
    return least <= number <= most and number & (number - 1) == 0


class Plan:
    """Where everything goes in an image of ``size`` bytes: numbers of clusters, and the first of each kind.

    Raises ConfigError for a disk, or a preallocation, that is larger than the format can hold.
    """

    def __init__(self, size: int, options: Options) -> None:
        if options.backing_file is not None and options.backing_fmt is None:
            raise ConfigError("a backing file needs its format named", key="backing_fmt")
        self.options = options
        self.size = -(-size // SECTOR) * SECTOR
        self.cluster_size = options.cluster_size
        self.entry_size = 16 if options.extended_l2 else 8
        self.l2_entries = self.cluster_size // self.entry_size
        if not 0 <= size <= DISK_MAX:
            raise ConfigError(f"found {size}, allowed is 0 to {DISK_MAX}", key="size")
        #: Clusters of the disk.
        self.clusters = self._up(self.size)
        self.l1_count = -(-self.clusters // self.l2_entries)
        if self.l1_count * 8 > L1_TABLE_MAX:
            most = L1_TABLE_MAX // 8 * self.l2_entries * self.cluster_size
            raise ConfigError(
                f"found {size}, but with clusters of {self.cluster_size} bytes a disk has at most {most} "
                "(try a larger cluster size)",
                key="size",
            )
        #: Whether all clusters are mapped from the beginning. A raw data file must be, for it can be written alone.
        self.is_mapped = options.preallocation != "off" or options.data_file_raw
        self.l1_clusters = self._up(self.l1_count * 8)
        self.l2_tables = self.l1_count if self.is_mapped else 0
        self.data_clusters = self.clusters if self.is_mapped and options.data_file is None else 0
        self.recipe = options.recipe
        self.encryption_clusters = self._up(self.recipe.length) if self.recipe is not None else 0
        others = 1 + self.l1_clusters + self.l2_tables + self.encryption_clusters + self.data_clusters
        self.table_clusters, self.blocks = refcount_clusters(others, self.cluster_size, options.refcount_bits)
        #: All clusters of the file.
        self.total = others + self.table_clusters + self.blocks
        self.blocks_at = 1 + self.table_clusters
        self.l1_at = self.blocks_at + self.blocks
        self.l2_at = self.l1_at + self.l1_clusters
        self.encryption_at = self.l2_at + self.l2_tables
        self.data_at = self.encryption_at + self.encryption_clusters
        if self.table_clusters * self.cluster_size > REFCOUNT_TABLE_MAX or self.total * self.cluster_size > OFFSET_END:
            raise ConfigError(
                f"{size} bytes are too many to be preallocated with clusters of {self.cluster_size} bytes",
                key="preallocation",
            )

    def _up(self, length: int) -> int:
        return -(-length // self.cluster_size)


def refcount_clusters(others: int, cluster_size: int, refcount_bits: int) -> tuple[int, int]:
    """(clusters of the refcount table, refcount blocks) that count ``others`` clusters and themselves."""
    per_block, per_table_cluster = cluster_size * 8 // refcount_bits, cluster_size // 8
    table, blocks = 1, 1
    while True:
        needed = -(-(others + table + blocks) // per_block)
        if needed <= blocks and -(-blocks // per_table_cluster) <= table:
            return table, blocks
        blocks = max(needed, blocks)
        table = max(-(-blocks // per_table_cluster), table)


def make_image(file: Layer, size: int, options: Options, opener: Opener, progress: Progress) -> None:
    """Make an empty image in ``file`` (see `nbdserver.format.Creates.create`)."""
    plan = Plan(size, options)
    first = _first_cluster(plan)
    try:
        header = first.encode()
    except RequestError as error:
        raise ConfigError(str(error), key="backing_file" if options.backing_file else "data_file") from error
    maker = _Maker(file, plan, progress)
    if plan.recipe is not None and options.encrypt_key_secret is not None:
        maker.encryption = make_header(plan.recipe, opener.named_secret(options.encrypt_key_secret))
    maker.make(header)


def _first_cluster(plan: Plan) -> FirstCluster:
    options, size = plan.options, plan.cluster_size
    fields = HeaderFields(
        magic=MAGIC,
        version=options.version,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=size.bit_length() - 1,
        size=plan.size,
        crypt_method=CRYPT_NONE if plan.recipe is None else CRYPT_LUKS,
        l1_size=plan.l1_count,
        l1_table_offset=plan.l1_at * size if plan.l1_count else 0,
        refcount_table_offset=size,
        refcount_table_clusters=plan.table_clusters,
        nb_snapshots=0,
        snapshots_offset=0,
    )
    extensions = {}
    if options.backing_fmt is not None:
        extensions[EXTENSION_BACKING_FORMAT] = options.backing_fmt.encode()
    if options.data_file is not None:
        extensions[EXTENSION_DATA_FILE] = os.fsencode(options.data_file)
    if plan.recipe is not None:
        extensions[EXTENSION_ENCRYPTION] = ENCRYPTION_FIELDS.pack(plan.encryption_at * size, plan.recipe.length)
    backing_name = os.fsencode(options.backing_file) if options.backing_file is not None else b""
    if options.version < 3:
        return FirstCluster(fields, None, b"", extensions, backing_name)
    if size >= FEATURE_NAMES_CLUSTER_MIN:
        extensions[EXTENSION_FEATURE_NAMES] = feature_names()
    is_zstd = options.compression_type == "zstd"
    incompatible = (
        (INCOMPATIBLE_DATA_FILE if options.data_file is not None else 0)
        | (INCOMPATIBLE_COMPRESSION if is_zstd else 0)
        | (INCOMPATIBLE_EXTENDED_L2 if options.extended_l2 else 0)
    )
    fields3 = HeaderFields3(
        incompatible_features=incompatible,
        compatible_features=COMPATIBLE_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear_features=AUTOCLEAR_DATA_FILE_RAW if options.data_file_raw else 0,
        refcount_order=options.refcount_bits.bit_length() - 1,
        header_length=HEADER_LENGTH_3,
    )
    compression = bytes([COMPRESSION_ZSTD if is_zstd else COMPRESSION_ZLIB])
    additional = compression.ljust(HEADER_LENGTH_3 - HEADER_LENGTH_3_MIN, b"\0")
    return FirstCluster(fields, fields3, additional, extensions, backing_name)


class _Maker:
    """Writes a plan into a file."""

    def __init__(self, file: Layer, plan: Plan, progress: Progress) -> None:
        self._file, self._plan, self._progress = file, plan, progress
        #: The encryption header, and the key in it, if the image is to be encrypted.
        self.encryption: tuple[bytes, Unlocked] | None = None

    def make(self, header: bytes) -> None:
        plan, size = self._plan, self._plan.cluster_size
        self._grow(plan.total * size)
        blocks = [(plan.blocks_at + number) * size for number in range(plan.blocks)]
        self._write(size, _big_endian(array("Q", blocks)).ljust(plan.table_clusters * size, b"\0"))
        self._write_refcounts()
        self._write_l1()
        self._write_l2()
        if self.encryption is not None:
            self._write(plan.encryption_at * size, self.encryption[0])
        self._write_data()
        finish(self._file.flush())
        self._write(0, header)
        finish(self._file.flush())

    def _grow(self, length: int) -> None:
        """Make the file large enough, and zeroes where nothing will be written."""
        there = self._file.size
        grow(self._file, length)
        if there:  # a block device, or a file that was not empty: an image in it is none from now on
            self._zero(0, min(there, self._plan.total * self._plan.cluster_size), Flag.MAY_UNMAP)

    def _write(self, offset: int, data: bytes) -> None:
        self._file.pwrite(offset, data)

    def _zero(self, offset: int, length: int, flags: Flag) -> None:
        finish(self._file.zero(Request.zero(offset, length, flags)))

    def _write_refcounts(self) -> None:
        """All clusters of the file count 1."""
        plan, size = self._plan, self._plan.cluster_size
        bits, left, place = plan.options.refcount_bits, plan.total, plan.blocks_at * size
        step = max(TABLES_PIECE // size, 1) * size
        while left:
            count = min(left, step * 8 // bits)
            data = _ones(bits, count)
            self._write(place, data.ljust(-(-len(data) // size) * size, b"\0"))
            place, left = place + step, left - count

    def _write_l1(self) -> None:
        plan, size = self._plan, self._plan.cluster_size
        length = plan.l1_clusters * size
        if plan.l2_tables:
            start = COPIED | plan.l2_at * size
            entries = array("Q", range(start, start + plan.l1_count * size, size))
            self._write(plan.l1_at * size, _big_endian(entries).ljust(length, b"\0"))
        elif length:
            self._zero(plan.l1_at * size, length, Flag.MAY_UNMAP)

    def _write_l2(self) -> None:
        """Every cluster has its own place: in this file in order, in a data file where it is on the disk."""
        plan, size = self._plan, self._plan.cluster_size
        if not plan.l2_tables:
            return
        first = COPIED | (plan.data_at * size if plan.data_clusters else 0)
        step = max(TABLES_PIECE // size, 1) * plan.l2_entries
        for start in range(0, plan.clusters, step):
            stop = min(start + step, plan.clusters)
            entries = array("Q", range(first + start * size, first + stop * size, size))
            if plan.options.extended_l2:  # its second half: no part of the cluster has data yet
                entries, pairs = array("Q", bytes(2 * 8 * len(entries))), entries
                entries[::2] = pairs
            data = _big_endian(entries)
            self._write(plan.l2_at * size + start * plan.entry_size, data.ljust(-(-len(data) // size) * size, b"\0"))
            self._progress(stop, plan.clusters)

    def _write_data(self) -> None:
        plan, size = self._plan, self._plan.cluster_size
        mode = plan.options.preallocation
        if self.encryption is not None and plan.data_clusters and not plan.options.extended_l2:
            # Every cluster is named as data, and what is not written would be noise.
            data = Encrypted(Storage(self._file, size), self.encryption[1], self._file).file
            preallocate(data, plan.data_at * size, plan.data_clusters * size, written=True, progress=self._progress)
        elif mode not in ("off", "metadata"):
            preallocate(
                self._file,
                plan.data_at * size,
                plan.data_clusters * size,
                written=mode == "full",
                progress=self._progress,
            )


def _ones(bits: int, count: int) -> bytes:
    """``count`` refcounts of 1."""
    if bits >= 8:
        return (1).to_bytes(bits // 8, "big") * count
    per_byte = 8 // bits
    pattern = sum(1 << slot * bits for slot in range(per_byte))
    rest = pattern & (1 << count % per_byte * bits) - 1
    return bytes([pattern]) * (count // per_byte) + (bytes([rest]) if rest else b"")


def _big_endian(entries: array[int]) -> bytes:
    if sys.byteorder == "little":
        entries.byteswap()
    return entries.tobytes()
