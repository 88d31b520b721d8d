"""Zeroing, end to end: what a client's flags become below, the fallback to data, and who may hear of ENOTSUP."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Final

import nbd
import pytest

from layers.copy_on_read import CopyOnRead
from layers.detect_zeroes import DetectZeroes
from layers.file import File
from layers.memory import Memory
from layers.quorum import Quorum
from nbdserver.errors import RequestError
from nbdserver.layer import Layer
from nbdserver.request import Flag, Operation, Request
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.layers.flag_kit import Invert
from tests.registered import Seen, Spy
from tests.serving import backend

__all__ = ["backend"]

MIB: Final = 1 << 20
NO_HOLE, FAST_ZERO, FUA = nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA


def connect(uri: str) -> nbd.NBD:
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def number(call: Callable[..., object], *arguments: object) -> int:
    """The errno that the call fails with; 0 if it does not."""
    try:
        call(*arguments)
    except nbd.Error as error:
        return int(error.errnum)
    return 0


# -- the flags ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "below"),
    [
        (0, Flag.MAY_UNMAP),
        (NO_HOLE, Flag.NONE),
        (FAST_ZERO, Flag.MAY_UNMAP | Flag.NO_FALLBACK),
        (NO_HOLE | FAST_ZERO, Flag.NO_FALLBACK),
        (FUA, Flag.MAY_UNMAP),
    ],
)
def test_a_zero_request_has_its_flags_at_every_hop(nbd_server: NbdServers, disk: Path, wire: int, below: Flag) -> None:
    spies = [Spy(File(str(disk)))]
    for wrap in (CopyOnRead, DetectZeroes):
        spies.append(Spy(wrap(spies[-1])))
    handle = connect(nbd_server(spies[-1]))
    # Not every file system can zero in place: what a hop is asked for is looked at here, not what becomes of it.
    assert number(handle.zero, 70_000, 4096, wire) in (0, errno.ENOTSUP)
    handle.shutdown()
    for spy in spies:
        assert spy.take() == [Seen(Operation.ZERO, 4096, 70_000, below)]
        assert spy.flushes == bool(wire & FUA)


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
@pytest.mark.parametrize("is_zero", [True, False], ids=["zeroes", "data"])
def test_a_write_of_zeroes_at_every_hop(nbd_server: NbdServers, backend: str, mode: str, is_zero: bool) -> None:
    """Two filters above the one that detects, one below; data and zero requests, and the registered memory."""
    bottom = Spy(Memory(MIB))
    below = Spy(CopyOnRead(bottom))
    above = Spy(DetectZeroes(below, mode))  # type: ignore[arg-type]
    handle = connect(nbd_server(above, backend=backend))
    handle.pwrite(bytes(8192) if is_zero else b"d" * 8192, 4096)
    handle.shutdown()
    registered = Flag.REGISTERED_BUF if backend == "io_uring" else Flag.NONE
    write = Seen(Operation.WRITE, 4096, 8192, registered)
    zero = Seen(Operation.ZERO, 4096, 8192, Flag.MAY_UNMAP if mode == "unmap" else Flag.NONE)
    assert above.take() == [write]
    assert below.take() == bottom.take() == [zero if is_zero and mode != "off" else write]


@pytest.mark.parametrize(("wire", "is_sparse"), [(0, True), (NO_HOLE, False)])
def test_a_hole_is_made_only_if_it_may_be(
    nbd_server: NbdServers, tmp_path: Path, backend: str, wire: int, is_sparse: bool
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"d" * MIB)
    handle = connect(nbd_server(File(str(disk)), backend=backend))
    handle.zero(MIB, 0, wire)
    handle.flush()
    assert disk.read_bytes() == bytes(MIB)
    assert (disk.stat().st_blocks == 0) == is_sparse


def test_discards_that_are_ignored(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    """As in QEMU with discard=ignore: nothing is given back, and zeroes are written where they are."""
    spy = Spy(File(str(tmp_path / "disk.raw")))
    (tmp_path / "disk.raw").write_bytes(b"d" * MIB)
    with Server(listen=[f"nbd+unix:///?socket={tmp_path / 'socket'}"], backend=backend) as server:
        server.export("disk", spy, default=True, discard=False)
        handle = nbd.NBD()
        handle.connect_unix(str(tmp_path / "socket"))
        assert handle.can_trim()
        handle.trim(MIB, 0)
        assert bytes(handle.pread(MIB, 0)) == b"d" * MIB
        handle.zero(MIB // 2, 0)
        handle.shutdown()
    assert [seen for seen in spy.take() if seen.operation is not Operation.READ] == [
        Seen(Operation.ZERO, 0, MIB // 2, Flag.NONE)
    ]


# -- the fallback ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Invert, lambda below: Quorum([below], 1)], ids=["inherited", "its own"])
def test_what_cannot_zero_fast_writes_data_unless_it_is_to_be_fast(
    nbd_server: NbdServers, backend: str, kind: Callable[[Layer], Layer]
) -> None:
    handle = connect(nbd_server(kind(Memory(MIB)), backend=backend))
    handle.pwrite(b"d" * 70_000, 1000)
    assert number(handle.zero, 70_000, 1000, FAST_ZERO) == errno.ENOTSUP
    assert bytes(handle.pread(70_000, 1000)) == b"d" * 70_000
    handle.zero(70_000 - 2, 1001)
    assert bytes(handle.pread(70_000, 1000)) == b"d" + bytes(70_000 - 2) + b"d"


class Unable(Spy):
    """A source that finds out that it cannot do what it is asked to."""

    unable: frozenset[str] = frozenset()

    def zero(self, request: Request) -> None:
        self.read(request)

    def read(self, request: Request) -> None:
        if request.operation.value in self.unable:
            raise RequestError(errno.ENOTSUP, "not here")
        super().read(request)

    write = trim = read

    def flush(self) -> None:
        if "flush" in self.unable:
            raise OSError(errno.ENOTTY, "not here")
        super().flush()


def test_a_source_that_refuses_to_zero_is_given_data(nbd_server: NbdServers, backend: str) -> None:
    layer = Unable(Memory(4 * MIB))
    layer.unable = frozenset({"zero"})
    handle = connect(nbd_server(layer, backend=backend))
    handle.pwrite(b"d" * 3 * MIB, 0)
    layer.take()
    assert number(handle.zero, MIB, 0, FAST_ZERO) == errno.ENOTSUP
    assert layer.take() == []
    handle.zero(2 * MIB + 10, 100, NO_HOLE)
    assert [(seen.operation, seen.length) for seen in layer.take()] == [
        (Operation.WRITE, MIB),
        (Operation.WRITE, MIB),
        (Operation.WRITE, 10),
    ]
    assert bytes(handle.pread(3 * MIB, 0)) == b"d" * 100 + bytes(2 * MIB + 10) + b"d" * (MIB - 110)


# -- ENOTSUP --------------------------------------------------------------------------------------------------------


def test_only_a_fast_zero_may_fail_with_enotsup(nbd_server: NbdServers, backend: str) -> None:
    """proto.md, "Error values". What else is not supported, clients would take for EINVAL anyway."""
    layer = Unable(Memory(MIB))
    layer.unable = frozenset({"read", "write", "zero", "trim", "flush"})
    handle = connect(nbd_server(layer, backend=backend))
    assert number(handle.pread, 512, 0) == errno.EINVAL
    assert number(handle.pwrite, b"d" * 512, 0) == errno.EINVAL
    assert number(handle.pwrite, b"d" * 512, 0, FUA) == errno.EINVAL
    assert number(handle.trim, 512, 0) == errno.EINVAL
    assert number(handle.flush) == errno.EINVAL
    for flags in (0, NO_HOLE, FUA):
        assert number(handle.zero, 512, 0, flags) == errno.EINVAL
    assert number(handle.zero, 512, 0, FAST_ZERO) == errno.ENOTSUP
    assert number(handle.zero, 512, 0, FAST_ZERO | NO_HOLE) == errno.ENOTSUP
    handle.shutdown()
