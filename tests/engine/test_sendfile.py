"""Replies that leave straight from the page cache: which do, and that the pages' later fate never shows.

A reply that waits for its client is pages of a file, which go on changing. That may show only what the same bytes of
the same disk became meanwhile, which a client whose request had not ended may see anyway.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from layers.copy_before_write import CopyBeforeWrite
from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.raw import Raw
from layers.snapshot_access import SnapshotAccess
from layers.throttle import Throttle
from nbdserver.layer import Layer
from nbdserver.limits import KIB, MIB
from nbdserver.server import Server
from nbdserver.testing import NbdServers, ServerProcess
from tests.interop.wire import READ, Wire
from tests.serving import SEED, backend, create, eventually, run

__all__ = ["backend"]

SIZE = 4 * MIB
#: More than a socket holds, so that the last of the replies are pages in the server still when the first are read.
PIECE, COUNT = 256 * KIB, 16


@pytest.fixture
def data() -> bytes:
    return random.Random(SEED).randbytes(SIZE)


@pytest.fixture
def disk(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(data)
    return path


def sent(server: Server, export: str = "") -> int:
    """Bytes that have left from the page cache, of all files of an export."""
    files = server.stats()["exports"][export]["files"]
    return sum(file["sent_bytes"] for file in files.values())


def counted(server: Server, handle: nbd.NBD) -> int:
    """The same when all is counted that the client has received: a worker counts before it goes on."""
    handle.pread(1, 0)
    return sent(server)


def sent_by(server: ServerProcess) -> int:
    """The same, of a server with one export."""
    (export,) = server.stats()["exports"].values()
    return sum(file["sent_bytes"] for file in export["files"].values())


def connected(uri: str, prepare: Callable[[nbd.NBD], None] = lambda handle: None) -> nbd.NBD:
    handle = nbd.NBD()
    prepare(handle)
    handle.connect_uri(uri)
    return handle


STYLES: dict[str, Callable[[nbd.NBD], None]] = {
    "simple": lambda handle: handle.set_request_structured_replies(False),
    "structured": lambda handle: None,
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_large_warm_reads_of_raw_disks_are_sent_from_the_page_cache(
    nbd_server: NbdServers, disk: Path, data: bytes, backend: str, tcp: bool, style: str
) -> None:
    server, uri = nbd_server.start(Raw(File(str(disk)), offset=MIB), backend=backend, tcp=tcp)
    handle = connected(uri, STYLES[style])

    def is_sent(offset: int, length: int) -> bool:
        """The first read is not: nobody knows yet where the bytes are."""
        before = counted(server, handle)
        assert handle.pread(length, offset) == data[MIB + offset : MIB + offset + length]
        after = counted(server, handle)
        assert after - before in (0, length)
        return after > before

    for offset, length in [(0, 32 * KIB), (7, 256 * KIB), (513, 2 * MIB), (0, 3 * MIB), (3 * MIB - 40_000, 40_000)]:
        eventually(lambda offset=offset, length=length: is_sent(offset, length))  # type: ignore[misc]
    assert not is_sent(5, 32 * KIB - 1)


def test_with_extended_headers_too(nbd_server: NbdServers, disk: Path, data: bytes) -> None:
    server, uri = nbd_server.start(Raw(File(str(disk))))
    run("qemu-img", "convert", "-O", "raw", uri, disk.with_name("copy.raw"))
    assert disk.with_name("copy.raw").read_bytes() == data
    assert sent(server) > 0


def test_what_is_not_in_the_page_cache_is_not(nbd_server: NbdServers, disk: Path, data: bytes, backend: str) -> None:
    server, uri = nbd_server.start(Raw(File(str(disk))), backend=backend)
    handle = connected(uri)
    handle.pread(1, 0)
    with disk.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert handle.pread(MIB, MIB) == data[MIB : 2 * MIB]
    assert sent(server) == 0


OTHERS: dict[str, Callable[[Path], Layer]] = {
    "direct I/O": lambda path: Raw(File(str(path), cache="none")),
    "a filter that could keep other bytes there": lambda path: CopyBeforeWrite(File(str(path)), Memory(SIZE)),
    "a meter": lambda path: Throttle(Raw(File(str(path))), bps_total=1 << 40),
}


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_else_is(nbd_server: NbdServers, disk: Path, data: bytes, other: str) -> None:
    server, uri = nbd_server.start(OTHERS[other](disk))
    handle = connected(uri)
    for _ in range(2):
        assert handle.pread(MIB, 0) == data[:MIB]
    assert sent(server) == 0


def test_nor_is_it_past_tls(nbd_server: NbdServers, tmp_path: Path, disk: Path, data: bytes) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text("alice:" + "0123456789abcdef" * 4 + "\n")
    keys.chmod(0o600)
    with nbd_server.process(disk, "--format", "raw", "--tls-psk", keys, "--tls", "required") as server:

        def secure(handle: nbd.NBD) -> None:
            handle.set_tls(nbd.TLS_REQUIRE)
            handle.set_tls_psk_file(str(keys))
            handle.set_tls_username("alice")

        handle = connected(server.uri(), secure)
        for _ in range(2):
            assert handle.pread(MIB, 0) == data[:MIB]
        assert sent_by(server) == 0


class Waiting:
    """A client with more replies on their way than its socket takes."""

    def __init__(self, uri: str) -> None:
        self.wire = Wire(uri)
        self.wire.go()
        # A first round, so that everything is known and in the page cache.
        self.ask()
        self.replies()

    def ask(self) -> None:
        with self.wire.together():
            for number in range(COUNT):
                self.wire.request(READ, number * PIECE, PIECE, cookie=number)

    def replies(self) -> bytes:
        """All of the disk, whose parts may be answered in any order."""
        pieces = [b""] * COUNT
        for _ in range(COUNT):
            cookie, error = self.wire.reply()
            assert error == 0
            pieces[cookie] = self.wire.receive(PIECE)
        return b"".join(pieces)


def _asked(server: Server, client: Waiting, export: str = "") -> None:
    """Ask, and wait until the server has done what it can without the client."""
    client.ask()
    counts = [-1, -2]
    while counts[-1] != counts[-2]:
        time.sleep(0.05)
        stats = server.stats()["exports"][export]
        counts.append(stats["bytes_read"] + sent(server, export))


def test_a_file_that_is_cut_off_underneath_reads_as_zeroes(
    nbd_server: NbdServers, disk: Path, data: bytes, backend: str
) -> None:
    server, uri = nbd_server.start(Raw(File(str(disk))), backend=backend)
    client = Waiting(uri)
    _asked(server, client)
    os.truncate(disk, 100_000)
    found = client.replies()
    assert found[:100_000] == data[:100_000]
    is_zero = [found[at : at + 512] == bytes(512) for at in range(100_352, SIZE, 512)]
    is_kept = [found[at : at + 512] == data[at : at + 512] for at in range(100_352, SIZE, 512)]
    assert all(zero or kept for zero, kept in zip(is_zero, is_kept, strict=True))
    assert any(is_zero), "nothing had waited for the client"


def test_a_write_shows_in_full_or_not_at_all_once_it_is_answered(
    nbd_server: NbdServers, disk: Path, data: bytes, backend: str
) -> None:
    server, uri = nbd_server.start(Raw(File(str(disk))), backend=backend)
    client, writer = Waiting(uri), connected(uri)
    _asked(server, client)
    new = random.Random(SEED + 1).randbytes(SIZE)
    for at in range(0, SIZE, MIB):
        writer.pwrite(new[at : at + MIB], at)
    found = client.replies()
    strangers = [at for at, three in enumerate(zip(found, data, new, strict=True)) if three[0] not in three[1:]]
    assert not strangers
    client.ask()
    assert client.replies() == new


def test_a_snapshot_never_shows_what_the_disk_becomes(nbd_server: NbdServers, disk: Path, data: bytes) -> None:
    live = CopyBeforeWrite(File(str(disk)), Memory(SIZE))
    server, uri = nbd_server.start(live, name="live")
    server.export("snap", SnapshotAccess(live))
    client = Waiting(uri.replace("live", "snap"))
    _asked(server, client, "snap")
    connected(uri).pwrite(bytes(SIZE), 0)
    assert client.replies() == data


def test_a_cluster_that_is_used_again_never_shows_for_the_one_before(
    nbd_server: NbdServers, tmp_path: Path, data: bytes
) -> None:
    image = create(tmp_path / "disk.qcow2", 2 * SIZE)
    server, uri = nbd_server.start(Qcow2(File(str(image))))
    handle = connected(uri)
    handle.pwrite(data, 0)
    client = Waiting(uri)
    _asked(server, client)
    handle.trim(SIZE, 0)
    handle.flush()
    handle.pwrite(b"x" * SIZE, SIZE)
    assert b"x" * 512 not in client.replies()


def test_a_live_snapshot_ends_it(nbd_server: NbdServers, disk: Path, data: bytes) -> None:
    """The disk is an overlay from then on, whose clusters come and go."""
    control = disk.with_name("control")
    server = nbd_server.process(disk, "--format", "raw", "--control", control)
    (export,) = server.stats()["exports"]
    handle = connected(server.uri())

    def is_sent() -> bool:
        assert handle.pread(MIB, 0) == data[:MIB]
        return sent_by(server) > 0

    eventually(is_sent)
    command = [sys.executable, "-m", "nbdserver", "ctl", "--socket", control, "snapshot", "overlay"]
    run(*command, export, disk.with_name("top.qcow2"))
    before = sent_by(server)
    handle.pwrite(b"y" * 4096, 0)
    for _ in range(2):
        assert handle.pread(MIB, 0) == b"y" * 4096 + data[4096:MIB]
    assert sent_by(server) == before


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_client_that_goes_meanwhile_ends_nobody_else(disk: Path, tmp_path: Path, tcp: bool) -> None:
    """Nor the process, where SIGPIPE would: in a program of somebody else's that has the server in it."""
    listen = "nbd://127.0.0.1:0" if tcp else f"nbd+unix:///?socket={tmp_path}/s"
    program = (
        "import signal, sys, time; from layers.file import File; from layers.raw import Raw\n"
        "from nbdserver.server import Server\n"
        f"server = Server(listen=[{listen!r}])\n"
        f"server.export('', Raw(File({str(disk)!r})))\n"
        "with server:\n"
        "    signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "    print(server.listening[0], flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        uri = process.stdout.readline().strip()
        for _ in range(10):
            client = Waiting(uri)
            client.ask()
            client.wire.socket.close()
        assert len(connected(uri).pread(MIB, 0)) == MIB
        process.stdin.close()
        assert process.wait(20) == 0
