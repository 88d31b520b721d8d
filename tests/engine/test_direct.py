"""Direct I/O: padding, read-modify-write, fixed buffers; on a file, and on a device of 4096-byte sectors."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import nbd
import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from nbdserver import _engine
from nbdserver.layer import Layer, finish
from nbdserver.request import Request, Vector
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.coherence.pages import SOON, Background, stopped_at
from tests.faults import replay
from tests.serving import SEED, amount, backend, check, create, loop_device, run

__all__ = ["backend"]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB


@pytest.fixture(params=["file", "loop"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(SEED).randbytes(SIZE))
    if request.param == "file":
        yield str(path)
        return
    with loop_device(path) as device:
        yield device


def connect(uri: str) -> nbd.NBD:
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def engine_file(server: Server) -> _engine.File:
    """The file that the stack of the only export ends at."""
    return engine_file_of(server._exports[""].root)


def engine_file_of(layer: Layer) -> _engine.File:
    while not isinstance(layer, File):
        layer = layer.file.layer  # type: ignore[attr-defined]
    assert isinstance(layer.open_file, _engine.File)
    return layer.open_file


def test_a_range_of_any_offset_and_length(nbd_server: NbdServers, disk: str, backend: str) -> None:
    dice = random.Random(SEED)
    server, uri = nbd_server.start(File(path=disk, cache="none"), backend=backend)
    alignment = engine_file(server).alignment
    assert alignment is not None
    handle = connect(uri)
    model = bytearray(handle.pread(SIZE, 0))
    assert bytes(model) == random.Random(SEED).randbytes(SIZE)
    for _ in range(amount(150, 2000)):
        length = min(SIZE, max(1, int(MIB ** dice.random())))
        offset = dice.randrange(SIZE - length + 1)
        kind = dice.random()
        if kind < 0.4:
            assert handle.pread(length, offset) == model[offset : offset + length]
        elif kind < 0.8:
            data = dice.randbytes(length)
            handle.pwrite(data, offset)
            model[offset : offset + length] = data
        else:
            handle.zero(length, offset, dice.choice([0, nbd.CMD_FLAG_NO_HOLE]))
            model[offset : offset + length] = bytes(length)
    assert handle.pread(SIZE, 0) == model
    handle.flush()


def test_neighbours_in_one_block_do_not_undo_each_other(nbd_server: NbdServers, disk: str, backend: str) -> None:
    """Clients that write every fourth part of a block each, whole blocks now and then, and zeroes."""
    uri = nbd_server(File(path=disk, cache="none"), backend=backend)
    span, part = MIB, 100
    expected = bytearray(connect(uri).pread(span, 0))

    def client(number: int) -> None:
        dice = random.Random(SEED + number)
        handle = connect(uri)
        for _ in range(amount(150, 1500)):
            offset = dice.randrange(span // (4 * part)) * 4 * part + number * part
            if dice.random() < 0.2:
                handle.zero(part, offset)
                expected[offset : offset + part] = bytes(part)
            else:
                data = dice.randbytes(part)
                handle.pwrite(data, offset)
                expected[offset : offset + part] = data

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert connect(uri).pread(span, 0) == expected


def test_a_file_of_odd_size_keeps_it(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(b"o" * 10001)
    handle = connect(nbd_server(File(path=str(path), cache="none"), backend=backend))
    assert handle.get_size() == 10001
    assert handle.pread(10001, 0) == b"o" * 10001
    handle.pwrite(b"x" * 3, 9998)
    handle.pwrite(b"y" * 5000, 5000)
    assert path.stat().st_size == 10001
    expected = bytearray(b"o" * 10001)
    expected[9998:] = b"xxx"
    expected[5000:10000] = b"y" * 5000
    assert handle.pread(10001, 0) == bytes(expected)


def test_what_is_padded_at_the_end_of_a_file_makes_it_no_longer_for_a_moment(
    nbd_server: NbdServers, tmp_path: Path, backend: str
) -> None:
    """Killed in between, the file would be longer than the disk: a raw disk would have grown, a footer be lost."""
    path = tmp_path / "odd.raw"
    path.write_bytes(b"o" * 10001)
    layer, record = File(path=str(path), cache="none"), tmp_path / "record"
    server, uri = nbd_server.start(layer, backend=backend, record=record)
    handle = connect(uri)
    handle.pwrite(b"x" * 3, 9998)
    handle.pwrite(b"y" * 6000, 4000)
    handle.zero(2000, 8001)
    handle.flush()
    assert handle.pread(10001, 0) == b"o" * 4000 + b"y" * 4001 + bytes(2000)
    handle.shutdown()
    server.stop()
    operations = replay.load(record / "record.bin")
    assert any(operation.action is replay.Action.WRITE for operation in operations)
    for operation in operations:
        assert operation.action is not replay.Action.RESIZE
        assert operation.offset + operation.length <= 10001
    assert path.stat().st_size == 10001


def test_a_file_is_not_resized_under_a_read_modify_write(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    """Which would write back what it has read, past the new end."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"d" * MIB)
    server, _ = nbd_server.start(File(path=str(path), cache="none"), backend=backend)
    file = engine_file(server)
    with stopped_at("file.alone") as stop:
        writing = Background(file.write, MIB - 5000, Vector.of(b"w" * 1000))
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        resizing = Background(file.resize, MIB // 2)
        assert not resizing.is_done()
        assert path.stat().st_size == MIB
    writing.finish()
    resizing.finish()
    assert path.stat().st_size == MIB // 2


def test_nothing_is_brought_into_the_page_cache_for_direct_io(
    nbd_server: NbdServers, tmp_path: Path, backend: str
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"d" * MIB)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        handle = connect(nbd_server(File(path=str(path), cache="none"), backend=backend))
        handle.cache(MIB, 0)
        handle.pread(MIB, 0)
        with pytest.raises(BlockingIOError):
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)


def test_aligned_requests_are_fixed_buffer_io(nbd_server: NbdServers, tmp_path: Path) -> None:
    """On a qcow2 chain, on the hot path: every operation on the file is on registered memory."""
    base = create(tmp_path / "base.qcow2", 4 * MIB)
    run("qemu-io", "-c", "write -P 7 0 4M", base)
    top = create(tmp_path / "top.qcow2", 4 * MIB, backing=base)
    run("qemu-io", "-c", "write -P 9 0 2M", top)
    server, uri = nbd_server.start(Qcow2(file=File(path=str(top), cache="none")), backend="io_uring")
    handle = connect(uri)
    for offset in range(0, 2 * MIB, 256 * KIB):
        assert handle.pread(256 * KIB, offset) == b"\x09" * (256 * KIB)
        handle.pwrite(b"w" * (256 * KIB), offset)
    assert handle.pread(256 * KIB, 3 * MIB) == b"\x07" * (256 * KIB)
    backing = engine_file_of(server._exports[""].root.backing.layer)  # type: ignore[attr-defined]
    assert backing.alignment is not None, "a backing file is used as the image that names it"
    counted = backing.counters()
    assert handle.pread(256 * KIB, 3 * MIB) == b"\x07" * (256 * KIB)
    assert backing.counters()["fixed"] == counted["fixed"] + 1
    assert backing.counters()["plain"] == counted["plain"]
    before, calls = engine_file(server).counters(), server.stats()["exports"][""]["write_calls"]
    for offset in range(0, 2 * MIB, 256 * KIB):
        assert handle.pread(256 * KIB, offset) == b"w" * (256 * KIB)
        handle.pwrite(b"v" * (256 * KIB), offset)
        assert handle.pread(4 * KIB, offset) == b"v" * (4 * KIB)
        handle.pwrite(b"u" * (4 * KIB), offset + 8 * KIB)
    after = engine_file(server).counters()
    assert server.stats()["exports"][""]["write_calls"] == calls
    assert after["plain"] == before["plain"]
    assert after["fixed"] - before["fixed"] == 4 * 8
    handle.shutdown()
    server.stop()
    check(top)


@dataclasses.dataclass(eq=False)
class Stamped(Layer):
    """Its child, with the first byte of every request changed where it lies: the way of every data layer in Python."""

    file: Layer
    stamp: ClassVar[bytes] = b"S"

    def __post_init__(self) -> None:
        super().__post_init__()
        #: (address, length) of all memory that has come.
        self.memory: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return self.file.size

    def _stamp(self, request: Request) -> None:
        for view in request.vector.views():
            assert not view.readonly
            self.memory.append((ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view)))
        request.vector.views()[0][:1] = self.stamp

    def read(self, request: Request) -> None:
        finish(self.file.read(request))
        self._stamp(request)

    def write(self, request: Request) -> None:
        self._stamp(request)
        finish(self.file.write(request))


def test_what_python_forwards_is_fixed_buffer_io_too(nbd_server: NbdServers, disk: str) -> None:
    """A layer's code gets the slot itself, which the file is then written from and read to with nothing copied."""
    stamped = Stamped(file=File(path=disk, cache="none"))
    server, uri = nbd_server.start(stamped, backend="io_uring")
    handle = connect(uri)
    before = engine_file(server).counters()
    handle.pwrite(b"w" * (64 * KIB), 0)
    handle.pwrite(b"w" * (3 * MIB), MIB)
    assert handle.pread(64 * KIB, 0) == b"S" + b"w" * (64 * KIB - 1)
    assert handle.pread(64 * KIB, MIB + 64 * KIB) == b"S" + b"w" * (64 * KIB - 1)
    after = engine_file(server).counters()
    counted = {key: after[key] - before[key] for key in after}
    # The write of 3 MiB is in two slots, or more.
    assert counted["reads"] == 2 and counted["writes"] >= 3
    assert (counted["fixed"], counted["plain"]) == (counted["reads"] + counted["writes"], 0)
    assert counted["bounce_bytes"] == 0
    start, length = server.registered_region
    assert all(start <= address and address + count <= start + length for address, count in stamped.memory)
    layer = server.stats()["exports"][""]["layers"]["/"]
    assert (layer["registered"], layer["kept"], layer["lost"], layer["bounce_bytes"]) == (4, 4, {}, 0)


def test_aio_threads_leaves_the_ring_alone(nbd_server: NbdServers, disk: str) -> None:
    server, uri = nbd_server.start(File(path=disk, cache="none", aio="threads"), backend="io_uring")
    connect(uri).pread(64 * KIB, 0)
    assert engine_file(server).counters()["fixed"] == 0


def test_writethrough_syncs_before_it_answers(nbd_server: NbdServers, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    server, uri = nbd_server.start(File(path=str(path), cache="writethrough"))
    handle = connect(uri)
    with stopped_at("file.sync") as stop:
        writing = Background(handle.pwrite, b"w" * 512, 0)
        assert stop.wait_reached(SOON)  # type: ignore[attr-defined]
        assert not writing.is_done()
    writing.finish()
    syncs = engine_file(server).counters()["syncs"]
    handle.zero(512, 0)
    assert engine_file(server).counters()["syncs"] > syncs


def test_unsafe_never_syncs(nbd_server: NbdServers, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    server, uri = nbd_server.start(File(path=str(path), cache="unsafe"))
    handle = connect(uri)
    handle.pwrite(b"w" * 512, 0, nbd.CMD_FLAG_FUA)
    handle.flush()
    assert engine_file(server).counters()["syncs"] == 0


def test_direct_io_that_the_file_system_refuses_is_an_image_error(tmp_path: Path) -> None:
    from nbdserver.errors import ImageError

    server = Server()
    with pytest.raises(ImageError, match="cannot be used with direct I/O"):
        server.export("proc", File(path="/proc/self/status", cache="none"), read_only=True)
    server.stop()
