"""The tools people use, against a qcow2 image and a raw one: nbdinfo, nbdcopy, qemu-img, qemu-io, fio."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.serving import SEED, check, content, create, qemu_io, run, run_json

SIZE = 24 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image with data, zeroes and holes in it."""
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, "write -P 1 0 1M", "write -P 2 3M 100k", "write -z 2M 256k", f"write -P 3 {SIZE - 5000} 5000")
    return path


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return create(tmp_path / "empty.qcow2", SIZE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A raw file of random data with a hole and a block of zeroes."""
    path = tmp_path / "data.raw"
    pick = random.Random(SEED)
    with path.open("wb") as file:
        file.write(pick.randbytes(5 << 20))
        file.seek(4 << 20, os.SEEK_CUR)
        file.write(pick.randbytes(1 << 20) + bytes(1 << 20) + pick.randbytes(123456))
        file.truncate(SIZE)
    return path


def test_nbdinfo_describes_the_export(nbd_server: NbdServers, disk: Path, backend: str, tcp: bool) -> None:
    uri = nbd_server(disk, name="disk", tcp=tcp, backend=backend)
    (export,) = run_json("nbdinfo", "--json", uri)["exports"]
    assert export["export-name"] == "disk"
    assert export["export-size"] == SIZE
    expected = {
        "is_read_only": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
    }
    assert {key: export[key] for key in expected} == expected
    assert export["contexts"] == ["base:allocation"]
    assert export["block_size_minimum"] == 1
    assert export["block_size_maximum"] == 32 << 20


def test_nbdinfo_lists_exports(nbd_server: NbdServers, disk: Path, backend: str, tcp: bool) -> None:
    uri = nbd_server(disk, name="", tcp=tcp, backend=backend)
    listed = json.loads(run("nbdinfo", "--list", "--json", uri))
    assert [export["export-name"] for export in listed["exports"]] == [""]


def test_nbdcopy_reads(nbd_server: NbdServers, disk: Path, tmp_path: Path, backend: str, tcp: bool) -> None:
    run("nbdcopy", nbd_server(disk, tcp=tcp, backend=backend), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content(disk)


def test_nbdcopy_writes(nbd_server: NbdServers, empty: Path, data: Path, backend: str, tcp: bool) -> None:
    uri = nbd_server(empty, format="qcow2", tcp=tcp, backend=backend)
    run("nbdcopy", "--flush", data, uri)
    run("nbdcopy", uri, data.with_suffix(".back"))
    assert data.with_suffix(".back").read_bytes() == data.read_bytes()


def test_what_nbdcopy_wrote_qemu_reads(
    nbd_server: NbdServers, empty: Path, data: Path, backend: str, tcp: bool
) -> None:
    with nbd_server.process(empty, "--format", "qcow2", "--backend", backend, tcp=tcp) as server:
        run("nbdcopy", data, server.uri())
    check(empty)
    assert content(empty) == data.read_bytes()


def test_qemu_img_converts_from_us(nbd_server: NbdServers, disk: Path, tmp_path: Path, backend: str, tcp: bool) -> None:
    uri = nbd_server(disk, tcp=tcp, backend=backend)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "copy.qcow2")
    assert content(tmp_path / "copy.qcow2") == content(disk)


@pytest.mark.parametrize("options", [(), ("-W", "-m", "8"), ("-S", "0"), ("--target-is-zero",)])
def test_qemu_img_converts_to_us(
    nbd_server: NbdServers, empty: Path, data: Path, *, backend: str, tcp: bool, options: tuple[str, ...]
) -> None:
    with nbd_server.process(empty, "--format", "qcow2", "--backend", backend, tcp=tcp) as server:
        run("qemu-img", "convert", "-n", *options, "-f", "raw", "-O", "raw", data, server.uri())
    check(empty)
    assert content(empty) == data.read_bytes()


def test_qemu_img_compares_us(nbd_server: NbdServers, disk: Path, backend: str, tcp: bool) -> None:
    uri = nbd_server(disk, read_only=True, tcp=tcp, backend=backend)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, disk)


def test_qemu_io_verifies_patterns(nbd_server: NbdServers, empty: Path, backend: str, tcp: bool) -> None:
    uri = nbd_server(empty, format="qcow2", tcp=tcp, backend=backend)
    commands = (
        "write -P 0xaa 0 3M",
        "write -f -P 0xbb 1000000 77777",
        "write -z 65536 131072",
        "write -z -u 262144 65536",
        "discard 2M 512k",
        "flush",
        "read -P 0xaa 0 64k",
        "read -P 0 65536 131072",
        "read -P 0 262144 65536",
        "read -P 0xbb 1000000 77777",
        "read -P 0xaa 2621440 512k",
        "aio_write -P 0xcc 8M 1M",
        "aio_write -P 0xdd 9M 1M",
        "aio_flush",
        "read -P 0xcc 8M 1M",
        "read -P 0xdd 9M 1M",
    )
    output = run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri)
    assert "failed" not in output and "rror" not in output, output


@pytest.mark.parametrize("pattern", ["randwrite", "randrw", "write", "trimwrite"])
def test_fio_verifies(
    nbd_server: NbdServers, empty: Path, tmp_path: Path, *, backend: str, tcp: bool, pattern: str
) -> None:
    uri = nbd_server(empty, format="qcow2", tcp=tcp, backend=backend)
    verify = [] if pattern == "trimwrite" else ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]
    output = run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", f"--randseed={SEED}"),
        *("--bsrange=512-128k", "--blockalign=512", "--iodepth=16", "--size=16M", *verify),
        cwd=tmp_path,
    )
    assert "err= 0" in output, output


def test_raw_image_both_ways(nbd_server: NbdServers, data: Path, tmp_path: Path, backend: str, tcp: bool) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(os.urandom(SIZE))
    source = nbd_server(data, tcp=tcp, backend=backend)
    destination = nbd_server(target, format="raw", tcp=tcp, backend=backend)
    run("nbdcopy", source, destination)
    assert target.read_bytes() == data.read_bytes()
