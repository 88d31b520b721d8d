"""No metadata is written over, whatever refcounts say: the overlap check."""

from __future__ import annotations

import struct

import pytest

from layers.qcow2 import Qcow2
from nbdserver.errors import RequestError
from nbdserver.reference import open_stack
from tests.layers.qcow2_broken import PLACE, Anatomy
from tests.layers.qcow2_kit import open_recorded
from tests.serving import create, qemu_io, run

MIB = 1 << 20
CLUSTER = 4096


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """With everything that can be in an image."""
    path = create(tmp_path_factory.mktemp("image") / "image", 8 * MIB, cluster_size=CLUSTER)
    qemu_io(path, "write -P 1 0 64k")
    run("qemu-img", "snapshot", "-c", "s", path)
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "b")
    qemu_io(path, "write -P 2 0 8k", "write -P 3 2M 64k")
    return path.read_bytes()


def kinds(data: bytes) -> dict[str, list[int]]:
    """Clusters of metadata, by their kind."""
    anatomy = Anatomy(data)
    word, header = anatomy.word, struct.unpack_from(">IIQIIQIIQQIIQ", data)
    table, l1, snapshots = header[9], header[8], header[12]
    extension = data.index(struct.pack(">II", 0x23852875, 24))
    size, directory = struct.unpack_from(">QQ", data, extension + 16)
    bitmap_table, count = struct.unpack_from(">QI", data, directory)
    places = {
        "header": [0],
        "L1 table": [l1],
        "L2 tables": [word(l1 + 8 * index) & PLACE for index in range(header[7]) if word(l1 + 8 * index)],
        "refcount table": [table],
        "refcount blocks": [word(table)],
        "snapshot table": [snapshots],
        "L1 table of a snapshot": [word(snapshots)],
        "bitmap directory": [directory],
        "bitmap table": [bitmap_table],
        "bitmap": [word(bitmap_table + 8 * index) for index in range(count) if word(bitmap_table + 8 * index) > 1],
    }
    assert size and all(places.values()), places
    return {kind: [place // CLUSTER for place in found] for kind, found in places.items()}


KINDS = (
    "header", "L1 table", "L2 tables", "refcount table", "refcount blocks", "snapshot table", "L1 table of a snapshot",
    "bitmap directory", "bitmap table", "bitmap",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_that_counts_as_free_is_not_written_over(kind: str, image: bytes) -> None:
    data = bytearray(image)
    known = kinds(image)
    assert set(known) == set(KINDS)
    for cluster in known[kind]:
        struct.pack_into(">H", data, known["refcount blocks"][0] * CLUSTER + 2 * cluster, 0)
    file, layer = open_recorded(data)
    with open_stack(layer) as disk:
        assert isinstance(disk.root, Qcow2)
        begun = bytes(file.data)  # opening has marked the bitmap as in use
        with pytest.raises(RequestError, match="refcounts are wrong"):
            for number in range(200):
                disk.write(4 * MIB + number * CLUSTER, b"x" * CLUSTER)
    for cluster in known[kind]:
        before, after = (each[cluster * CLUSTER : (cluster + 1) * CLUSTER] for each in (begun, file.data))
        if kind == "header":
            assert after[79] == before[79] | 2, "corrupt"
            before, after = before[80:], after[80:]
        assert after == before
