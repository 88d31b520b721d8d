"""A four-deep chain of qemu-img's making: cluster sizes, virtual sizes and compression all differ."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.serving import SEED, check, content, create, run, run_json

MIB = 1 << 20


def _patches(path: Path, size: int, tag: int, count: int, longest: int) -> None:
    """Random writes and zeroes all over the image."""
    pick = random.Random(f"{SEED} {tag}")
    commands = []
    for _ in range(count):
        length = pick.randrange(1, longest)
        offset = pick.randrange(size - length)
        kind = pick.choice(("-z", "-z -u", *2 * [f"-P {pick.randrange(1, 256)}"]))
        commands += ["-c", f"write {kind} {offset} {length}"]
    output = run("qemu-io", "-f", "qcow2", *commands, path)
    assert "failed" not in output, output


def _compress(raw: Path, path: Path, **options: object) -> None:
    """``raw`` as an image of compressed clusters."""
    chosen = ",".join(f"{key}={value}" for key, value in options.items())
    run("qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", chosen, raw, path)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The top of the chain; below it lie 64k (zstd), 4k, and 512 (zlib) clusters; each disk has its own size."""
    directory = tmp_path_factory.mktemp("chain")
    pick = random.Random(SEED)
    raw = directory / "base.raw"
    with raw.open("wb") as file:
        for _ in range(40):
            # Data that compresses, some that does not, and holes.
            chunk = pick.choice((pick.randbytes(300) * 200, pick.randbytes(50_000), bytes(40_000)))
            file.write(chunk)
            file.seek(pick.choice((0, 0, 123_456)), os.SEEK_CUR)
        file.truncate(7 * MIB + 1536)
    base = directory / "base.qcow2"
    _compress(raw, base, cluster_size=512, compression_type="zlib")
    _patches(base, 7 * MIB, 1, 30, 9_000)

    second = create(directory / "second.qcow2", 12 * MIB, backing=base, cluster_size=4096)
    _patches(second, 12 * MIB, 2, 40, 60_000)

    # A compressed overlay: what is written through the compressed chain of one more image is committed into it.
    third = create(directory / "third.qcow2", 9 * MIB, backing=second, cluster_size=65536, compression_type="zstd")
    compressed = ["-c", "write -c -P 77 1M 64k", "-c", "write -c -P 78 4M 64k", "-c", "write -c -P 79 8M 64k"]
    assert "failed" not in run("qemu-io", "-f", "qcow2", *compressed, third)
    _patches(third, 9 * MIB, 3, 12, 100_000)

    top = create(directory / "top.qcow2", 20 * MIB + 512, backing=third, cluster_size=2 * MIB)
    _patches(top, 20 * MIB, 4, 4, 500_000)
    return top


def test_reads_byte_for_byte(nbd_server: NbdServers, chain: Path, tmp_path: Path, backend: str, tcp: bool) -> None:
    uri = nbd_server(chain, read_only=True, tcp=tcp, backend=backend)
    run("nbdcopy", uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content(chain)


def test_each_image_of_the_chain(nbd_server: NbdServers, chain: Path, tmp_path: Path, backend: str) -> None:
    for name in ("base", "second", "third"):
        image = chain.with_name(f"{name}.qcow2")
        run("nbdcopy", nbd_server(image, read_only=True, backend=backend), tmp_path / name)
        assert (tmp_path / name).read_bytes() == content(image), name


def test_random_reads(nbd_server: NbdServers, chain: Path, backend: str) -> None:
    """Odd offsets and lengths, across the borders of clusters and of disks."""
    import nbd

    expected = content(chain)
    handle = nbd.NBD()
    handle.connect_uri(nbd_server(chain, read_only=True, backend=backend))
    pick = random.Random(SEED)
    for _ in range(3_000):
        length = min(len(expected), int(2 ** pick.uniform(0, 22)))
        offset = pick.randrange(len(expected) - length + 1)
        assert bytes(handle.pread(length, offset)) == expected[offset : offset + length], (offset, length)
    handle.shutdown()


def _runs(size: int, extents: list[tuple[int, int, object]]) -> list[tuple[int, int, object]]:
    """(start, length, what) with neighbours that say the same joined; covers the disk."""
    joined: list[tuple[int, int, object]] = []
    for start, length, what in extents:
        if joined and joined[-1][2] == what:
            joined[-1] = (joined[-1][0], joined[-1][1] + length, what)
        else:
            joined.append((start, length, what))
    assert sum(length for _, length, _ in joined) == size
    return joined


def test_map_agrees_with_qemu_img_map(nbd_server: NbdServers, chain: Path, backend: str, tcp: bool) -> None:
    size = len(content(chain))
    ours = run_json("nbdinfo", "--map", "--json", nbd_server(chain, read_only=True, tcp=tcp, backend=backend))
    theirs = run_json("qemu-img", "map", "--output=json", chain)
    # Ours: bit 0 hole, bit 1 zero. Theirs: "data" and "zero". Both say: is it stored, does it read as zeroes?
    ours = _runs(size, [(e["offset"], e["length"], (not e["type"] & 1, bool(e["type"] & 2))) for e in ours])
    theirs = _runs(size, [(e["start"], e["length"], (e["data"], e["zero"])) for e in theirs])
    assert ours == theirs


def test_qemu_nbd_says_the_same(nbd_server: NbdServers, chain: Path, backend: str) -> None:
    """The same question put to qemu-nbd, over the same protocol."""
    size = len(content(chain))
    ours = run_json("nbdinfo", "--map", "--json", nbd_server(chain, read_only=True, backend=backend))
    theirs = run_json("nbdinfo", "--map", "--json", "--", "[", "qemu-nbd", "-r", "-f", "qcow2", chain, "]")
    ours, theirs = (_runs(size, [(e["offset"], e["length"], e["type"]) for e in m]) for m in (ours, theirs))
    assert ours == theirs


def test_writes_into_the_top_leave_the_rest_alone(
    nbd_server: NbdServers, chain: Path, tmp_path: Path, backend: str
) -> None:
    """Copy-on-write from compressed, zero and unallocated clusters of all sizes below."""
    import nbd

    directory = shutil.copytree(chain.parent, tmp_path / "chain")
    below = {image: image.read_bytes() for image in directory.glob("*.qcow2")}
    overlay = create(directory / "overlay.qcow2", 20 * MIB + 512, backing=directory / chain.name, cluster_size=16384)
    expected = bytearray(content(overlay))
    pick = random.Random(SEED)
    with nbd_server.process(overlay, "--format", "qcow2", "--backend", backend) as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri())
        for _ in range(600):
            length = int(2 ** pick.uniform(0, 18))
            offset = pick.randrange(len(expected) - length + 1)
            if pick.random() < 0.7:
                data = pick.randbytes(length)
                handle.pwrite(data, offset)
            else:
                data = bytes(length)
                handle.zero(length, offset, pick.choice((0, nbd.CMD_FLAG_NO_HOLE)))
            expected[offset : offset + length] = data
        handle.shutdown()
    check(overlay)
    assert content(overlay) == expected
    for image, before in below.items():
        assert image.read_bytes() == before, image
