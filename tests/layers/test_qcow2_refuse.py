"""What is refused, one cause each: by name, and before anything is written."""

from __future__ import annotations

import errno
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.qcow2.order import Cut
from nbdserver.errors import ImageError, RequestError
from nbdserver.reference import Reference, open_stack
from tests.serving import content, create, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20

CLUSTER = 4096
SIZE = 8 * MIB


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with data, a compressed cluster, a zero cluster and a snapshot."""
    path = create(tmp_path_factory.mktemp("made") / "image", SIZE, cluster_size=CLUSTER)
    qemu_io(path, "write -P 1 0 64k", "write -c -P 2 128k 4k", "write -P 3 4M 64k")
    return path


@pytest.fixture
def image(made: Path, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    shutil.copy(made, path)
    return path


def _poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _number(path: Path, offset: int, format: str = ">Q") -> int:
    return int(struct.unpack_from(format, path.read_bytes(), offset)[0])


def _poke_number(path: Path, offset: int, value: int, format: str = ">Q") -> None:
    _poke(path, offset, struct.pack(format, value))


def _l1(path: Path, index: int = 0) -> int:
    return _number(path, 40) + index * 8


def _l2(path: Path, index: int = 0, table: int = 0) -> int:
    return (_number(path, _l1(path, table)) & 0x00FFFFFFFFFFFE00) + index * 8


def _refused(path: Path, words: str, *, read_only: bool = True) -> None:
    before = path.read_bytes()
    with pytest.raises(ImageError, match=words) as caught, open_stack(Qcow2(File(str(path))), read_only=read_only):
        pass
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def _reads(path: Path) -> None:
    with open_stack(Qcow2(File(str(path))), read_only=True) as disk:
        assert disk.read(0, disk.size) == content(path)


# -- header ---------------------------------------------------------------------------------------------------------

HEADER = {
    "magic": (lambda p: _poke(p, 0, b"nope"), "wrong magic"),
    "version": (lambda p: _poke_number(p, 4, 4, ">I"), "unsupported qcow2 version .*found 4, wanted 2 or 3"),
    "version 1": (lambda p: _poke_number(p, 4, 1, ">I"), "unsupported qcow2 version"),
    "clusters too small": (lambda p: _poke_number(p, 20, 8, ">I"), "cluster_bits .*found 8"),
    "clusters too large": (lambda p: _poke_number(p, 20, 22, ">I"), "cluster_bits .*found 22"),
    "disk too large": (lambda p: _poke_number(p, 24, 1 << 63), "virtual disk size"),
    "L1 table too short": (lambda p: _poke_number(p, 36, 1, ">I"), "l1_size .*found 1"),
    "L1 table too long": (lambda p: _poke_number(p, 36, 0xFFFFFFFF, ">I"), "l1_size .*found 4294967295"),
    "L1 table unaligned": (lambda p: _poke_number(p, 40, _number(p, 40) + 512), "L1 table: its place"),
    "L1 table outside": (lambda p: _poke_number(p, 40, 1 << 40), "L1 table: its place .*within the file"),
    "L1 table at 0": (lambda p: _poke_number(p, 40, 0), "L1 table: its place"),
    "AES": (lambda p: _poke_number(p, 32, 1, ">I"), "is encrypted with AES-CBC"),
    "LUKS": (lambda p: _poke_number(p, 32, 2, ">I"), "is encrypted with LUKS and names no encryption header"),
    "encryption of some kind": (lambda p: _poke_number(p, 32, 9, ">I"), "encryption method at offset 0x20: found 9"),
    "no refcount table": (lambda p: _poke_number(p, 56, 0, ">I"), "refcount_table_clusters .*found 0"),
    "refcount table too long": (lambda p: _poke_number(p, 56, 2049, ">I"), "refcount_table_clusters .*found 2049"),
    "refcount table unaligned": (lambda p: _poke_number(p, 48, 4097), "refcount table: its place"),
    "refcount table outside": (lambda p: _poke_number(p, 48, 1 << 50), "refcount table: its place"),
    "too many snapshots": (lambda p: _poke_number(p, 60, 65537, ">I"), "nb_snapshots"),
    "snapshots outside": (lambda p: _poke(p, 60, struct.pack(">IQ", 1, 1 << 50)), "snapshot table: its place"),
    "refcounts too wide": (lambda p: _poke_number(p, 96, 7, ">I"), "refcount_order .*found 7"),
    "header too short": (lambda p: _poke_number(p, 100, 96, ">I"), "header_length .*found 96"),
    "header too long": (lambda p: _poke_number(p, 100, 8192, ">I"), "header_length .*found 8192"),
    "header length uneven": (lambda p: _poke_number(p, 100, 107, ">I"), "header_length .*found 107"),
    "backing name too long": (lambda p: _poke(p, 8, struct.pack(">QI", 512, 1024)), "backing_file_size .*found 1024"),
    "backing name outside": (lambda p: _poke(p, 8, struct.pack(">QI", 4000, 200)), "backing_file_offset .*found 4000"),
    "backing name in the header": (lambda p: _poke(p, 8, struct.pack(">QI", 16, 8)), "backing_file_offset .*found 16"),
    "extension too long": (lambda p: _poke(p, 112, struct.pack(">II", 0x1234, 5000)), "header extension .*length"),
    "compression of another kind": (
        lambda p: _poke(p, 72, struct.pack(">QQQIIB", 8, 0, 0, 4, 112, 2)), "unsupported compression type .*found 2"
    ),
    "compression unannounced": (lambda p: _poke(p, 104, b"\1"), "compression type .*if and only if"),
    "compression announced in vain": (lambda p: _poke_number(p, 72, 8), "compression type .*if and only if"),
    "extended L2 entries in small clusters": (lambda p: _poke_number(p, 72, 16), "cluster_bits .*at least 16384 bytes"),
    "data file of no name": (lambda p: _poke_number(p, 72, 4), "data file and does not name it: set data-file"),
    "raw without a data file": (lambda p: _poke_number(p, 88, 2), "autoclear_features .*found 0x2"),
    "unknown feature": (lambda p: _poke_number(p, 72, 1 << 40), r"incompatible features .*: bit 40"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), HEADER.values(), ids=HEADER)
def test_headers(spoil: Callable[[Path], object], words: str, image: Path) -> None:
    spoil(image)
    _refused(image, words)


@pytest.mark.parametrize(
    ("length", "words"), [(0, "magic"), (3, "magic"), (50, "cut off"), (90, "cut off"), (200, "L1 table: its place")]
)
def test_a_file_that_is_too_short(length: int, words: str, image: Path) -> None:
    image.write_bytes(image.read_bytes()[:length])
    _refused(image, words)


def test_an_unknown_feature_is_named_by_the_image_s_own_table(image: Path) -> None:
    names = struct.pack(">BB46sBB46s", 2, 41, b"wrong", 0, 41, b"time travel\x1b[1m")
    _poke(image, 112, struct.pack(">II", 0x6803F857, len(names)) + names)
    _poke_number(image, 72, 1 << 41)
    _refused(image, r"time travel\?\[1m \(bit 41\)")


def test_images_that_qemu_makes_of_what_is_not_built(tmp_path: Path) -> None:
    secret = ["--object", "secret,id=s,data=x"]
    encrypt = ["-o", "encrypt.format=aes,encrypt.key-secret=s"]
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2", *encrypt, tmp_path / "c", "1M")
    _refused(tmp_path / "c", "is encrypted with AES-CBC")


# -- for writing ----------------------------------------------------------------------------------------------------


def test_corrupt_is_read_but_not_written(image: Path) -> None:
    _poke_number(image, 72, 2)
    with open_stack(Qcow2(File(str(image))), read_only=True) as disk:
        assert disk.read(0, 1) == b"\1"
    _refused(image, "corrupt.*read-only", read_only=False)


def test_unknown_autoclear_bits_are_cleared_before_writing(image: Path) -> None:
    _poke_number(image, 88, 1 << 50)
    _reads(image)
    assert _number(image, 88) == 1 << 50
    with open_stack(Qcow2(File(str(image)))):
        assert _number(image, 88) == 0


METADATA = {
    "L1 entry outside": (lambda p: _poke_number(p, _l1(p, 1), 1 << 63 | 1 << 40), "L1 table, entry 1 .*in the file"),
    "L1 entry unaligned": (lambda p: _poke_number(p, _l1(p, 1), 1 << 63 | 0x5200), "L1 table, entry 1 .*multiple"),
    "L1 entry reserved": (lambda p: _poke_number(p, _l1(p, 1), 1 << 63 | 0x5001), "L1 table, entry 1 .*reserved"),
    "L2 table twice": (lambda p: _poke_number(p, _l1(p, 1), _number(p, _l1(p))), "entry 0 and L1 table, entry 1"),
    "L2 table on the refcount table": (
        lambda p: _poke_number(p, _l1(p, 1), 1 << 63 | _number(p, 48)), "refcount table and L1 table.*overlap"
    ),
    "refcount block outside": (
        lambda p: _poke_number(p, _number(p, 48) + 8, 1 << 40), "refcount table, entry 1 .*in the file"
    ),
    "refcount block unaligned": (
        lambda p: _poke_number(p, _number(p, 48) + 8, 0x5200), "refcount table, entry 1 .*multiple"
    ),
    "refcount block reserved": (
        lambda p: _poke_number(p, _number(p, 48) + 8, 0x5001), "refcount table, entry 1 .*reserved"
    ),
    "refcount block twice": (
        lambda p: _poke_number(p, _number(p, 48) + 8, _number(p, _number(p, 48))), "refcount table, entry 0 and .*over"
    ),
    "refcount table on the L1 table": (lambda p: _poke_number(p, 48, _number(p, 40)), "overlap|entry 0"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), METADATA.values(), ids=METADATA)
def test_metadata_that_writing_would_destroy(spoil: Callable[[Path], object], words: str, image: Path) -> None:
    spoil(image)
    _refused(image, words, read_only=False)


def test_snapshot_tables(image: Path) -> None:
    run("qemu-img", "snapshot", "-c", "s", image)
    with open_stack(Qcow2(File(str(image)))) as disk:
        assert disk.read(0, 1) == b"\1"
    table = _number(image, 64)
    for offset, value, format, words in (
        (0, 1 << 40, ">Q", "entry 0: L1 table"),
        (8, 1 << 30, ">I", "entry 0: L1 table"),
        (36, 1025, ">I", "entry 0: extra data"),
        (0, _number(image, 40), ">Q", "L1 table and snapshot table, entry 0.*overlap"),
    ):
        kept = _number(image, table + offset, format)
        _poke_number(image, table + offset, value, format)
        _refused(image, words, read_only=False)
        _poke_number(image, table + offset, kept, format)


def test_an_l1_table_of_no_entries_may_be_anywhere(image: Path) -> None:
    run("qemu-img", "snapshot", "-c", "s", image)
    table = _number(image, 64)
    _poke_number(image, table, 1 << 40)
    _poke_number(image, table + 8, 0, ">I")
    layer = Qcow2(File(str(image)))
    with open_stack(layer) as disk:
        layer.apply_snapshot("s")
        assert disk.read(0, disk.size) == bytes(disk.size)


# -- entries, when they are come upon -------------------------------------------------------------------------------


Request = Callable[[Reference], object]


def _write(disk: Reference) -> None:
    disk.write(0, b"x" * CLUSTER)


def _read(disk: Reference) -> None:
    disk.read(0, 1)


def _trim(disk: Reference) -> None:
    disk.trim(0, CLUSTER)


def _fails(image: Path, words: str, request: Request = _write) -> None:
    """A request of the first cluster fails, and the image is marked as corrupt, with nothing else written from then on;
    what lies beside it can be read."""
    before = bytearray(image.read_bytes())
    with open_stack(Qcow2(File(str(image)))) as disk:
        with pytest.raises(RequestError, match=words):
            request(disk)
        for other in (disk.flush, lambda: disk.write(CLUSTER, b"y" * CLUSTER), lambda: disk.trim(CLUSTER, CLUSTER)):
            with pytest.raises(RequestError, match=f"corrupt.*{words}") as caught:
                other()
            assert caught.value.errno == errno.EIO
        assert disk.read(CLUSTER, CLUSTER) == b"\1" * CLUSTER
    if before[7] == 3:
        before[79] |= 2
    assert image.read_bytes()[: len(before)] == before
    if before[7] == 3:
        _refused(image, "marked as corrupt", read_only=False)
        _poke_number(image, 72, 0)


COPIED = 1 << 63

ENTRIES = {
    "reserved": (COPIED | 0x5000 | 1 << 57, "L2 table 0, entry 0 .*reserved"),
    "unaligned": (COPIED | 0x5200, "L2 table 0, entry 0 .*aligned to 4096"),
    "compressed and copied": (COPIED | 1 << 62 | 0x5000, "L2 table 0, entry 0 .*no COPIED"),
}


@pytest.mark.parametrize(("entry", "words"), ENTRIES.values(), ids=ENTRIES)
def test_entries_that_mean_nothing(entry: int, words: str, image: Path) -> None:
    _poke_number(image, _l2(image), entry)
    for request in (_write, _read, _trim):
        _fails(image, words, request)


def test_read_ahead_stops_short_of_a_bad_entry(image: Path) -> None:
    _poke_number(image, _l2(image, 5), COPIED | 0x5200)
    with open_stack(Qcow2(File(str(image)))) as disk:
        assert disk.read(0, 5 * CLUSTER) == b"\1" * 5 * CLUSTER
        with pytest.raises(RequestError, match="entry 5"):
            disk.read(0, 5 * CLUSTER + 1)


@pytest.mark.parametrize("request_", [_write, _trim])
def test_data_in_metadata_is_not_written(request_: Request, image: Path) -> None:
    for place in (0x1000, _number(image, 40), _l2(image), _number(image, _number(image, 48))):
        _poke_number(image, _l2(image), COPIED | place)
        _fails(image, "L2 table 0, entry 0 .*does not hold metadata", request_)
        _poke_number(image, _l2(image), place)
        _fails(image, "L2 table 0, entry 0 .*does not hold metadata", request_)


def test_data_outside_the_file_is_not_written(image: Path) -> None:
    _poke_number(image, _l2(image), COPIED | 1 << 45)
    _fails(image, "L2 table 0, entry 0 .*in the file")


def test_what_the_refcounts_do_not_count_is_not_freed(image: Path) -> None:
    place = _number(image, _l2(image)) & ~COPIED
    _poke_number(image, _number(image, _number(image, 48)) + place // CLUSTER * 2, 0, ">H")
    _fails(image, "refcount 0", _trim)


def test_metadata_is_not_handed_out_as_free(image: Path) -> None:
    """The refcounts say that every cluster is free."""
    block = _number(image, _number(image, 48))
    _poke(image, block, bytes(CLUSTER))
    with open_stack(Qcow2(File(str(image)))) as disk:
        with pytest.raises(RequestError, match="refcounts are wrong"):
            disk.write(MIB, b"x")
        assert disk.read(0, 4) == b"\1\1\1\1"
    assert _number(image, 72) == 2


def test_zero_clusters_in_version_2(tmp_path: Path) -> None:
    image = create(tmp_path / "image", MIB, compat="0.10", cluster_size=CLUSTER)
    qemu_io(image, "write -P 1 0 64k")
    _poke_number(image, _l2(image), _number(image, _l2(image)) | 1)
    _fails(image, "version 2")


@pytest.mark.parametrize(
    "bytes_",
    [b"\xff" * 512, zlib.compress(b"x" * CLUSTER)[2:-4][:8], b"", zlib.compress(b"x" * (CLUSTER - 1), wbits=-15)],
    ids=["garbage", "cut off", "nothing", "too little"],
)
def test_bad_compressed_data(bytes_: bytes, image: Path) -> None:
    entry = _number(image, _l2(image, 32))
    _poke(image, entry & 0x3FFFFFFFFFFFFFF, bytes_.ljust(512, b"\0"))
    with open_stack(Qcow2(File(str(image)))) as disk:
        with pytest.raises(RequestError, match=r"L2 table 0, entry 32 .*compressed data"):
            disk.read(32 * CLUSTER, 1)
        disk.write(32 * CLUSTER, b"z" * CLUSTER)
        assert disk.read(32 * CLUSTER, CLUSTER) == b"z" * CLUSTER


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_compressed_cluster_makes_one_cluster_whatever_it_contains(compression: str, tmp_path: Path) -> None:
    """A bomb: a few bytes that decompress to megabytes."""
    image = create(tmp_path / "image", MIB, cluster_size=65536, compression_type=compression)
    qemu_io(image, "write -c -P 1 0 64k")
    if compression == "zlib":
        compressor = zlib.compressobj(9, wbits=-15)
        bomb = compressor.compress(b"\7" * 64 * MIB) + compressor.flush()
    else:
        zstandard = pytest.importorskip("zstandard")
        bomb = zstandard.ZstdCompressor(write_content_size=False).compress(b"\7" * 64 * MIB)
    place = _number(image, _l2(image)) & (1 << 54) - 1
    sectors = min(-(-len(bomb) // 512), 128)
    _poke(image, place, bomb[: sectors * 512])
    _poke_number(image, _l2(image), 1 << 62 | (sectors - 1) << 54 | place)
    with open_stack(Qcow2(File(str(image))), read_only=True) as disk:
        assert disk.read(0, 65536) == b"\7" * 65536


def test_copied_flags_in_a_table_that_a_snapshot_shares_are_not_believed(image: Path) -> None:
    """The flags lie: the snapshot's data would be overwritten."""
    run("qemu-img", "snapshot", "-c", "s", image)
    for index in range(16):
        _poke_number(image, _l2(image, index), _number(image, _l2(image, index)) | COPIED)
    with open_stack(Qcow2(File(str(image)))) as disk:
        disk.write(0, b"x" * 3 * CLUSTER)
        disk.write(100, b"y" * CLUSTER)
        disk.zero(5 * CLUSTER + 1, 100)
    run("qemu-img", "snapshot", "-a", "s", image)
    assert content(image)[: 16 * CLUSTER] == b"\1" * 16 * CLUSTER


def test_a_cluster_that_two_entries_name_is_not_freed_twice(image: Path) -> None:
    """Both are let go of before either is free; then it is taken once, not twice."""
    _poke_number(image, _l2(image, 1), _number(image, _l2(image, 0)))
    layer = Qcow2(File(str(image)))
    with open_stack(layer) as disk:
        disk.write(50 * CLUSTER, b"x")  # the search for free clusters has come by
        order = layer.writer._order
        release = order._release

        def between(cut: Cut) -> None:
            disk.trim(CLUSTER, CLUSTER)
            release(cut)

        disk.trim(0, CLUSTER)
        order._release = between  # type: ignore[method-assign]
        disk.flush()
        order._release = release  # type: ignore[method-assign]
        disk.flush()
        for index in range(100, 110):
            disk.write(index * CLUSTER, bytes([index]) * CLUSTER)
        for index in range(100, 110):
            assert disk.read(index * CLUSTER, CLUSTER) == bytes([index]) * CLUSTER
