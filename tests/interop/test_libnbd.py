"""Every command and flag through libnbd's Python bindings: what succeeds, what is refused, and with which error."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdserver.testing import NbdServers
from tests.serving import SEED, create, qemu_io, run_json

SIZE = 8 << 20
KIB = 1 << 10
STATE_HOLE, STATE_ZERO = 1, 2

Connect = Callable[..., Any]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, "write -P 1 0 128k", "write -z 256k 64k", "write -P 2 1M 64k")
    return path


@pytest.fixture
def connect(nbd_server: NbdServers, disk: Path, backend: str) -> Connect:
    """Connect to the disk (the same server each time); keywords: ``read_only``, and methods to call before."""
    uris: dict[bool, str] = {}

    def connect(*, read_only: bool = False, **settings: Any) -> Any:
        if read_only not in uris:
            uris[read_only] = nbd_server(disk, format="qcow2", read_only=read_only, backend=backend)
        handle = nbd.NBD()
        # The server's answers are what is tested, not libnbd's own checks.
        handle.set_strict_mode(0)
        for method, value in settings.items():
            getattr(handle, method)(value)
        handle.connect_uri(uris[read_only])
        return handle

    return connect


def refused(expected: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(nbd.Error) as caught:
        call(*arguments)
    assert caught.value.errnum == expected, caught.value


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
def test_read(connect: Connect, structured: bool) -> None:
    handle = connect(set_request_structured_replies=structured)
    assert handle.get_structured_replies_negotiated() == structured
    data = bytes(handle.pread(256 * KIB, 0))
    assert data == b"\1" * (128 * KIB) + bytes(128 * KIB)
    assert bytes(handle.pread(3, 128 * KIB - 1)) == b"\1\0\0"
    assert bytes(handle.pread(1, SIZE - 1)) == b"\0"


def _chunks(handle: Any, length: int, offset: int, flags: int = 0) -> list[tuple[str, int, int]]:
    """The chunks of a structured read: what, where, how long."""
    found = []
    names = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole", nbd.READ_ERROR: "error"}

    def chunk(buffer: Any, at: int, status: int, _error: object) -> int:
        found.append((names[status], at, len(buffer)))
        return 0

    handle.pread_structured(length, offset, chunk, flags)
    return sorted(found, key=lambda item: item[1])


def test_holes_are_sent_as_holes(connect: Connect) -> None:
    chunks = _chunks(connect(), 1 << 20, 0)
    assert sum(length for _, _, length in chunks) == 1 << 20
    assert sum(length for what, _, length in chunks if what == "hole") == (1 << 20) - 128 * KIB


def test_df_forbids_fragments(connect: Connect) -> None:
    assert _chunks(connect(), 256 * KIB, 64 * KIB, nbd.CMD_FLAG_DF) == [("data", 64 * KIB, 256 * KIB)]


def test_df_needs_structured_replies(connect: Connect) -> None:
    handle = connect(set_request_structured_replies=False)
    assert not handle.can_df()


def test_a_read_of_the_largest_payload(connect: Connect) -> None:
    assert len(connect(set_request_structured_replies=False).pread(SIZE, 0)) == SIZE


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, nbd.CMD_FLAG_FUA])
def test_write(connect: Connect, flags: int) -> None:
    handle = connect()
    handle.pwrite(b"abc", 4095, flags)
    assert bytes(handle.pread(5, 4094)) == b"\1abc\1"


@pytest.mark.parametrize("flags", [0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE])
def test_zero(connect: Connect, flags: int) -> None:
    handle = connect()
    handle.zero(100 * KIB, 1000, flags)
    assert bytes(handle.pread(102 * KIB, 999)) == b"\1" + bytes(100 * KIB) + b"\1" * (2 * KIB - 1)


def test_zero_with_no_hole_keeps_the_allocation(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    for flags in (nbd.CMD_FLAG_NO_HOLE, 0):
        with nbd_server.process(disk, "--format", "qcow2", "--backend", backend) as server:
            handle = nbd.NBD()
            handle.connect_uri(server.uri())
            handle.zero(64 * KIB, 0, flags)
            assert bytes(handle.pread(64 * KIB, 0)) == bytes(64 * KIB)
            handle.shutdown()
        first = run_json("qemu-img", "map", "--output=json", disk)[0]
        assert first["zero"]
        assert ("offset" in first) == bool(flags)


def test_fast_zero_is_fast_or_refused_and_then_does_nothing(connect: Connect) -> None:
    handle = connect()
    for offset, length in ((0, 64 * KIB), (70 * KIB, 10), (512 * KIB, 100 * KIB)):
        before = bytes(handle.pread(length, offset))
        try:
            handle.zero(length, offset, nbd.CMD_FLAG_FAST_ZERO)
        except nbd.Error as error:
            if error.errnum != errno.EOPNOTSUPP:
                raise
            assert bytes(handle.pread(length, offset)) == before
        else:
            assert bytes(handle.pread(length, offset)) == bytes(length)


@pytest.mark.parametrize("flags", [0, nbd.CMD_FLAG_FUA])
def test_trim(connect: Connect, flags: int) -> None:
    handle = connect(add_meta_context=nbd.CONTEXT_BASE_ALLOCATION)
    handle.trim(64 * KIB, 0, flags)
    assert bytes(handle.pread(64 * KIB, 0)) == bytes(64 * KIB)
    assert _status(handle, 64 * KIB, 0)[0][1] & STATE_ZERO
    assert bytes(handle.pread(1, 64 * KIB)) == b"\1"


def test_zero_and_trim_longer_than_any_payload(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    size = 6 << 30
    handle = nbd.NBD()
    handle.connect_uri(nbd_server(create(tmp_path / "large.qcow2", size), format="qcow2", backend=backend))
    handle.pwrite(b"x" * 4096, 3 << 30)
    handle.zero((4 << 30) - 4096, 0)
    assert bytes(handle.pread(4096, 3 << 30)) == bytes(4096)
    handle.pwrite(b"x" * 4096, 3 << 30)
    handle.trim((4 << 30) - 4096, 1 << 30)
    assert bytes(handle.pread(4096, 3 << 30)) == bytes(4096)


def test_flush_and_cache(connect: Connect) -> None:
    handle = connect()
    handle.pwrite(b"x", 0)
    handle.flush()
    handle.cache(SIZE, 0)
    assert bytes(handle.pread(1, 0)) == b"x"


# -- block status ----------------------------------------------------------------------------------------------------


def _status(handle: Any, length: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def extents(_context: str, at: int, entries: list[int], _error: object) -> int:
        assert at == offset
        found.extend(zip(entries[::2], entries[1::2], strict=True))
        return 0

    handle.block_status(length, offset, extents, flags)
    return found


def test_status(connect: Connect) -> None:
    handle = connect(add_meta_context=nbd.CONTEXT_BASE_ALLOCATION)
    states = []
    at = 0
    while at < SIZE:
        for length, state in _status(handle, SIZE - at, at):
            states += [state] * (length // (64 * KIB))
            at += length
    zero = STATE_ZERO | STATE_HOLE
    expected = [zero] * (SIZE // (64 * KIB))
    expected[0] = expected[1] = expected[16] = 0
    assert [state & STATE_ZERO for state in states] == [state & STATE_ZERO for state in expected]
    assert [i for i, state in enumerate(states) if state == 0] == [0, 1, 16]


def test_status_req_one(connect: Connect) -> None:
    handle = connect(add_meta_context=nbd.CONTEXT_BASE_ALLOCATION)
    ((length, state),) = _status(handle, 256 * KIB, 32 * KIB, nbd.CMD_FLAG_REQ_ONE)
    assert (length, state) == (96 * KIB, 0)
    ((length, state),) = _status(handle, 32 * KIB, 32 * KIB, nbd.CMD_FLAG_REQ_ONE)
    assert (length, state) == (32 * KIB, 0), "REQ_ONE may not say more than was asked"


def test_status_needs_the_context(connect: Connect) -> None:
    refused(errno.EINVAL, connect().block_status, 4096, 0, lambda *_: 0)


def test_an_unknown_context_is_not_given(connect: Connect) -> None:
    handle = connect(add_meta_context="example:nonsense")
    assert not handle.can_meta_context("example:nonsense")


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [SIZE, SIZE - 1, 1 << 40, (1 << 63) - 4096])
def test_out_of_bounds(connect: Connect, offset: int) -> None:
    handle = connect(add_meta_context=nbd.CONTEXT_BASE_ALLOCATION)
    refused(errno.EINVAL, handle.pread, 4096, offset)
    refused(errno.ENOSPC, handle.pwrite, bytes(4096), offset)
    refused(errno.ENOSPC, handle.zero, 4096, offset)
    refused(errno.EINVAL, handle.trim, 4096, offset)
    refused(errno.EINVAL, handle.cache, 4096, offset)
    refused(errno.EINVAL, handle.block_status, 4096, offset, lambda *_: 0)
    assert bytes(handle.pread(1, 0)) == b"\1", "the connection lives"


def test_read_only(connect: Connect) -> None:
    handle = connect(read_only=True)
    assert handle.is_read_only()
    refused(errno.EPERM, handle.pwrite, b"x", 0)
    refused(errno.EPERM, handle.zero, 4096, 0)
    refused(errno.EPERM, handle.trim, 4096, 0)
    handle.flush()
    assert bytes(handle.pread(1, 0)) == b"\1"


def test_unknown_flags(connect: Connect) -> None:
    handle = connect()
    refused(errno.EINVAL, handle.pread, 4096, 0, nbd.CMD_FLAG_NO_HOLE)
    refused(errno.EINVAL, handle.pwrite, b"x", 0, nbd.CMD_FLAG_DF)
    refused(errno.EINVAL, handle.flush, nbd.CMD_FLAG_REQ_ONE)
    assert bytes(handle.pread(1, 0)) == b"\1"


def test_a_write_larger_than_any_payload_ends_at_most_its_connection(connect: Connect) -> None:
    handle = connect()
    with pytest.raises(nbd.Error):
        handle.pwrite(bytes((32 << 20) + 1), 0)
    assert bytes(connect().pread(1, 0)) == b"\1"


def test_an_unknown_export(connect: Connect) -> None:
    uri = connect().get_uri()
    other = nbd.NBD()
    with pytest.raises(nbd.Error):
        other.connect_uri(uri.replace("///", "///missing"))
    assert bytes(connect().pread(1, 0)) == b"\1"


# -- several connections -----------------------------------------------------------------------------------------------


def test_a_write_is_seen_by_every_connection_at_once(connect: Connect) -> None:
    handles = [connect() for _ in range(4)]
    assert all(handle.can_multi_conn() for handle in handles)
    pick = random.Random(SEED)
    for number in range(500):
        writer, reader = pick.sample(handles, 2)
        offset = pick.randrange(SIZE - 8)
        writer.pwrite(number.to_bytes(8, "big"), offset)
        assert bytes(reader.pread(8, offset)) == number.to_bytes(8, "big")


# -- negotiation -------------------------------------------------------------------------------------------------------


def test_options_by_hand(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    uri = nbd_server(disk, name="disk", backend=backend)
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.connect_uri(uri)
    listed: list[str] = []
    handle.opt_list(lambda name, _description: listed.append(name))
    assert listed == ["disk"]
    handle.opt_info()
    assert handle.get_size() == SIZE
    assert handle.get_canonical_export_name() == "disk"
    contexts: list[str] = []
    handle.add_meta_context("base:")
    handle.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation"]
    handle.set_export_name("missing")
    with pytest.raises(nbd.Error):
        handle.opt_go()
    handle.set_export_name("disk")
    handle.opt_go()
    assert bytes(handle.pread(1, 0)) == b"\1"
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20


def test_abort(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    uri = nbd_server(disk, backend=backend)
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.opt_abort()
    again = nbd.NBD()
    again.connect_uri(uri)
    assert bytes(again.pread(1, 0)) == b"\1"


def test_export_name(nbd_server: NbdServers, disk: Path, backend: str) -> None:
    """NBD_OPT_EXPORT_NAME, the oldest way in, with and without the 124 zeroes."""
    uri = nbd_server(disk, backend=backend)
    for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_NO_ZEROES):
        handle = nbd.NBD()
        handle.set_handshake_flags(flags)
        handle.connect_uri(uri)
        assert handle.get_size() == SIZE
        assert bytes(handle.pread(1, 0)) == b"\1"
        handle.shutdown()
