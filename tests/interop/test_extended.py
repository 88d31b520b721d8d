"""Extended headers, byte by byte and with QEMU's client (proto.md on the branch extension-ext-header)."""

from __future__ import annotations

import errno
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.interop.wire import (
    BLOCK_STATUS,
    CACHE,
    CHUNK_DATA,
    CHUNK_ERROR,
    CHUNK_HOLE,
    CHUNK_NONE,
    CHUNK_STATUS_EXT,
    DF,
    DONE,
    FLUSH,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Wire,
)
from tests.serving import SEED, create, qemu_io

TIB = 1 << 40
SIZE = 8 * TIB
COOKIE = 0x0102030405060708


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, "write -P 1 0 64k", "write -P 2 5T 64k")
    return path


@pytest.fixture
def uri(nbd_server: NbdServers, disk: Path, backend: str) -> str:
    return nbd_server(disk, format="qcow2", backend=backend)


@pytest.fixture
def wire(uri: str) -> Iterator[Wire]:
    wire = Wire(uri)
    wire.go(contexts=["base:allocation"], extended=True)
    yield wire
    wire.close()


def done(wire: Wire, offset: int = 0) -> None:
    """The next reply is a success that says nothing else."""
    assert wire.chunk() == (DONE, CHUNK_NONE, 0, offset, b"")


def refused(wire: Wire, error: int) -> None:
    flags, kind, _, _, payload = wire.chunk()
    assert (flags, kind) == (DONE, CHUNK_ERROR)
    number, length = struct.unpack_from(">IH", payload)
    assert number == error
    assert len(payload) == 6 + length


def status(payload: bytes) -> tuple[int, list[tuple[int, int]]]:
    """The context, and (length, flags) of each extent, of a status chunk."""
    context, count = struct.unpack_from(">II", payload)
    assert len(payload) == 8 + 16 * count
    return context, list(struct.iter_unpack(">QQ", payload[8:]))


def test_every_chunk_repeats_cookie_and_offset_of_its_request(wire: Wire) -> None:
    wire.ask(READ, 32 << 10, 64 << 10, cookie=COOKIE)
    assert wire.chunk() == (0, CHUNK_DATA, COOKIE, 32 << 10, struct.pack(">Q", 32 << 10) + bytes([1]) * (32 << 10))
    hole = struct.pack(">QI", 64 << 10, 32 << 10)
    assert wire.chunk() == (DONE, CHUNK_HOLE, COOKIE, 32 << 10, hole)


def test_read_in_one_piece(wire: Wire) -> None:
    wire.ask(READ, 32 << 10, 64 << 10, flags=DF)
    flags, kind, _, _, payload = wire.chunk()
    assert (flags, kind, len(payload)) == (DONE, CHUNK_DATA, 8 + (64 << 10))


@pytest.mark.parametrize("length", [1, 511, 4096, 300_001, 32 << 20])
def test_write_and_read_back(wire: Wire, length: int) -> None:
    data = random.Random(SEED).randbytes(length)
    wire.ask(WRITE, TIB + 7, data=data)
    done(wire, TIB + 7)
    wire.ask(READ, TIB + 7, length, flags=DF)
    assert wire.chunk()[4] == struct.pack(">Q", TIB + 7) + data


def test_write_of_nothing(wire: Wire) -> None:
    wire.ask(WRITE, 4096, flags=PAYLOAD_LEN)
    done(wire, 4096)


def test_effects_longer_than_32_bits(wire: Wire) -> None:
    for command in (TRIM, WRITE_ZEROES, CACHE):
        wire.ask(command, 0, 6 * TIB if command != CACHE else 5 << 30)
        done(wire)
    wire.ask(READ, 5 * TIB, 4096)
    assert wire.chunk()[1] == CHUNK_HOLE


def test_status_of_everything_in_one_reply(wire: Wire) -> None:
    wire.ask(BLOCK_STATUS, 0, SIZE)
    flags, kind, _, _, payload = wire.chunk()
    assert (flags, kind) == (DONE, CHUNK_STATUS_EXT)
    context, extents = status(payload)
    assert context == 1
    cluster = 64 << 10
    assert extents == [(cluster, 0), (5 * TIB - cluster, 3), (cluster, 0), (3 * TIB - cluster, 3)]


def test_status_of_one_extent(wire: Wire) -> None:
    wire.ask(BLOCK_STATUS, 64 << 10, 3 * TIB, flags=REQ_ONE)
    assert status(wire.chunk()[4]) == (1, [(3 * TIB, 3)])


def test_status_of_named_contexts(wire: Wire) -> None:
    wire.ask(BLOCK_STATUS, 0, data=struct.pack(">QI", 6 << 30, 1))
    assert status(wire.chunk()[4]) == (1, [(64 << 10, 0), ((6 << 30) - (64 << 10), 3)])


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack(">QI", 4096, 2),
        struct.pack(">QII", 4096, 1, 1),
        struct.pack(">Q", 4096),
        struct.pack(">QIB", 4096, 1, 0),
        b"x",
        bytes(1 << 20),
    ],
    ids=["unknown", "twice", "none", "odd", "short", "long"],
)
def test_bad_list_of_contexts_is_consumed_and_refused(wire: Wire, payload: bytes) -> None:
    wire.ask(BLOCK_STATUS, 0, data=payload)
    refused(wire, errno.EINVAL)
    wire.ask(FLUSH)
    done(wire)


def test_write_has_a_payload_whether_or_not_its_flags_say_so(wire: Wire) -> None:
    """QEMU's client leaves the flag out, though proto.md demands it."""
    wire.ask(WRITE, 0, 4)
    wire.send(b"\4\3\2\1")
    done(wire)
    wire.ask(READ, 0, 4, flags=DF)
    assert wire.chunk()[4][8:] == b"\4\3\2\1"


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 9])
def test_payload_that_a_command_does_not_have_is_consumed_and_refused(wire: Wire, command: int) -> None:
    wire.ask(command, 0, data=bytes(5000))
    refused(wire, errno.EINVAL)
    wire.ask(FLUSH)
    done(wire)


@pytest.mark.parametrize("command", [READ, WRITE, BLOCK_STATUS])
def test_payload_beyond_the_maximum_ends_the_connection(wire: Wire, uri: str, command: int) -> None:
    wire.ask(command, 0, (32 << 20) + 1, flags=PAYLOAD_LEN)
    assert wire.rest() == b""
    again = Wire(uri)
    again.go(extended=True)
    again.close()


def test_read_longer_than_the_maximum_payload(wire: Wire) -> None:
    wire.ask(READ, 0, 1 << 33)
    refused(wire, errno.EOVERFLOW)


@pytest.mark.parametrize("change", [lambda head: b"\x25\x60\x95\x13" + head[4:], lambda head: bytes(32)])
def test_request_without_an_extended_header_ends_the_connection(wire: Wire, change: Callable[[bytes], bytes]) -> None:
    wire.send(change(bytes(32)))
    assert wire.rest() == b""


def test_requests_cut_anywhere(wire: Wire) -> None:
    """Header, list of contexts and payload arrive byte by byte."""
    named = struct.pack(">IHHQQQQI", 0x21E41C71, PAYLOAD_LEN, BLOCK_STATUS, 1, 0, 12, 4096, 1)
    write = struct.pack(">IHHQQQ", 0x21E41C71, PAYLOAD_LEN, WRITE, 2, 0, 3) + b"abc"
    for byte in named + write:
        wire.send(bytes([byte]))
    assert status(wire.chunk()[4]) == (1, [(4096, 0)])
    assert wire.chunk() == (DONE, CHUNK_NONE, 2, 0, b"")


def test_qemu_negotiates_them(uri: str, tmp_path: Path) -> None:
    """QEMU's own trace says that it zeroes more than 4 GiB with one request."""
    events, log = tmp_path / "events", tmp_path / "trace"
    events.write_text("nbd_send_request\n")
    work = ("write -z -n 1T 5G", "read -P 0 1T 1M", "map", "write -P 7 3T 64k", "read -P 7 3T 64k")
    commands = [argument for command in work for argument in ("-c", command)]
    trace = f"events={events},file={log}"
    subprocess.run(["qemu-io", "--trace", trace, "-f", "raw", uri, *commands], check=True, capture_output=True)
    assert f".from = {TIB}, .len = {5 << 30}," in log.read_text()
