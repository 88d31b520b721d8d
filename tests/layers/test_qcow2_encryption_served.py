"""Encrypted qcow2 images, served: on the fast path and off it, many requests at once, and never in plaintext."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbd
import pytest
from click.testing import CliRunner

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver.cli import main
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.layers.luks_kit import KIB, MIB, check_qcow2, content, make_qcow2, qcow2, qemu_io, secret
from tests.oracle.model import Model
from tests.oracle.storm import Storm, Weather
from tests.serving import SEED, amount, backend, create
from tests.serving import qemu_io as qemu_io_plain

__all__ = ["backend"]

SIZE = 2 * MIB

#: (options, unit of offsets and lengths).
DISKS: dict[str, tuple[dict[str, Any], int]] = {
    "sectors": ({"cluster_size": 4096}, 512),
    "parts of sectors": ({"cluster_size": 4096}, 64),
    "small clusters": ({"cluster_size": 512}, 512),
    "no transform": ({"cluster_size": 4096, "encrypt_cipher_mode": "cbc"}, 64),
    "subclusters": ({"cluster_size": 16384, "extended_l2": True, "backing_file": "base"}, 512),
    "data file": ({"cluster_size": 4096, "data_file": "data"}, 64),
}


def opened(path: Path, **keys: Any) -> Qcow2:
    return Qcow2(File(str(path)), **{"key_file": str(secret(path.parent)), **keys})


@pytest.mark.parametrize("name", DISKS)
def test_storm(nbd_server: NbdServers, tmp_path: Path, backend: str, name: str) -> None:
    """Overlapping requests on several connections, with trims that free clusters under the writes of others."""
    options, grain = DISKS[name]
    if "backing_file" in options:
        qemu_io_plain(create(tmp_path / "base", MIB), "write -P 7 0 600k")
        options = {**options, "backing_fmt": "qcow2"}
    if "data_file" in options:
        options = {**options, "data_file": str(tmp_path / "data")}
    path = make_qcow2(tmp_path / "image", SIZE, **options)
    model = Model(SIZE, grain=grain, initial=content(path, qcow2(path)))
    server, uri = nbd_server.start(opened(path), backend=backend)
    weather = Weather(length_max=24 * KIB)
    with Storm(uri, model, seed=SEED, weather=weather) as storm:
        storm.run(seconds=amount(6, 200) / 10)
        data = storm.verify()
    server.stop()
    assert content(path, qcow2(path)) == data
    check_qcow2(path)


def test_whole_sectors_need_no_python(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    path = make_qcow2(tmp_path / "image", SIZE)
    server, uri = nbd_server.start(opened(path), backend=backend)
    disk = nbd.NBD()
    disk.connect_uri(uri)
    before = 0
    for _ in range(3):
        before = calls(server)
        for offset in range(0, SIZE, 8 * KIB):
            disk.pwrite(b"d" * 8 * KIB, offset)
            assert disk.pread(4 * KIB, offset + 512) == b"d" * 4 * KIB
    assert calls(server) == before, "when all is allocated and known"
    disk.shutdown()
    server.stop()
    assert b"dddddddd" not in path.read_bytes()
    assert content(path, qcow2(path)) == b"d" * SIZE


def calls(server: Server) -> int:
    """How often the export has needed Python."""
    counters = server.stats()["exports"][""]
    return sum(count for name, count in counters.items() if name == "faults" or name.endswith("_calls"))


def test_no_plaintext_reaches_the_file(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    """By either path: bounced, copied around, in parts of sectors, discarded and written anew."""
    marker = b"plaintext of the guest!!"
    base = tmp_path / "base"
    base.write_bytes((marker * SIZE)[: SIZE // 2])
    path = make_qcow2(tmp_path / "image", SIZE, backing_file="base", backing_fmt="raw")
    server, uri = nbd_server.start(opened(path), backend=backend)
    disk = nbd.NBD()
    disk.connect_uri(uri)
    for turn in range(3):
        for offset, length in (
            (0, 100 * KIB),
            (200_001, 24),
            (SIZE // 2 - 96, 192),
            (MIB + 512, 4096),
            (SIZE - 48, 48),
        ):
            disk.pwrite((marker * 5000)[:length], offset)
            assert marker[:10] not in path.read_bytes()
        disk.trim(64 * KIB, 64 * KIB * turn)
        disk.zero(30_000, 300_000)
        disk.flush()
        assert marker[:10] not in path.read_bytes()
    disk.shutdown()
    server.stop()
    assert marker[:10] not in path.read_bytes()
    assert marker in content(path, qcow2(path))


def test_explain_shows_the_transform(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "image", SIZE)
    qemu_io(path, "write -P 1 0 64k", options=qcow2(path))
    config = tmp_path / "exports.toml"
    config.write_text(f'[exports.disk]\nimage = "{path}"\nformat = "qcow2"\nkey_file = "{secret(tmp_path)}"')
    for operation in ("read", "write"):
        done = CliRunner().invoke(main, ["explain", str(config), "disk", operation, "4K+4K", "--json"])
        assert done.exit_code == 0, done.output
        hops = json.loads(done.stdout)["hops"]
        assert [hop["layer"] for hop in hops] == ["qcow2", "luks", "file"]
        (step,) = hops[1]["steps"]
        assert step["through"] == "aes-xts-plain64"
        assert step["target"] == "file" and step["target_offset"] == hops[1]["offset"], "the same place"
    (part,) = json.loads(done.stdout)["engine"]
    assert not part["faults"]
    done = CliRunner().invoke(main, ["explain", str(config), "disk", "read", "5+10"])
    assert "part of a sector of 512 bytes" in done.stdout


@pytest.mark.parametrize("source", ["file", "env"])
def test_served_from_the_command_line(
    nbd_server: NbdServers, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_qcow2(tmp_path / "image", SIZE)
    monkeypatch.setenv("DISK_KEY", secret(tmp_path).read_text())
    words = ("--key-file", secret(tmp_path)) if source == "file" else ("--key-env", "DISK_KEY")
    with nbd_server.process(path, *words) as server:
        disk = nbd.NBD()
        disk.connect_uri(server.uri())
        disk.pwrite(b"served", 1000)
        disk.shutdown()
    assert content(path, qcow2(path))[1000:1006] == b"served"


def test_without_a_key_nothing_is_served(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "image", SIZE)
    config = tmp_path / "exports.toml"
    config.write_text(f'[exports.disk]\nimage = "{path}"')
    done = CliRunner().invoke(main, ["check-config", "--open", str(config)])
    assert done.exit_code == 1
    assert f"{path} is encrypted, and there is no key for it: name one of key-file, key-env, key-fd" in done.output


def test_each_image_of_a_chain_has_a_key_of_its_own(nbd_server: NbdServers, tmp_path: Path) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", SIZE)
    qemu_io(base, "write -P 5 0 1M", options=qcow2(base))
    (tmp_path / "other").mkdir()
    top = make_qcow2(tmp_path / "other" / "top.qcow2", SIZE)
    key = secret(tmp_path / "other", b"another", "another")
    uri = nbd_server(Qcow2(File(str(top)), key_file=str(secret(top.parent)), backing=opened(base)))
    assert key.exists()
    disk = nbd.NBD()
    disk.connect_uri(uri)
    disk.pwrite(b"new", 100)
    assert disk.pread(4, 99) == b"\5new"
    disk.shutdown()
