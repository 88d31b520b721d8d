"""Requests cut and padded to fit: a source that takes nothing else, held against plain bytes."""

from __future__ import annotations

import dataclasses
import errno
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nbd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.raw import Raw
from nbdserver.errors import RequestError
from nbdserver.extent import NO_LIMITS, BlockLimits
from nbdserver.graph import execute
from nbdserver.layer import Layer
from nbdserver.reference import Reference
from nbdserver.request import Flag, Operation, Request, Vector
from nbdserver.testing import NbdServers
from tests.registered import open_registered, registered
from tests.serving import SEED, amount, backend

__all__ = ["backend"]

KIB, MIB = 1 << 10, 1 << 20
READ, WRITE, ZERO, TRIM = Operation.READ, Operation.WRITE, Operation.ZERO, Operation.TRIM


@dataclasses.dataclass(eq=False)
class Strict(Layer):
    """Memory that takes only what fits its limits; notes what it was called for."""

    size: int = MIB
    held_to: BlockLimits = NO_LIMITS
    flags: Flag = Flag.MAY_UNMAP | Flag.NO_FALLBACK

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supported_write_flags = self.flags  # type: ignore[misc]
        self.data = bytearray(b"\xee" * self.size)
        self.calls: list[tuple[Operation, int, int, Flag]] = []

    @property
    def limits(self) -> BlockLimits:
        return self.held_to

    def read(self, request: Request) -> None:
        self._take(request, self.held_to.max_transfer)
        request.vector.fill(self.data[request.offset : request.end])

    def write(self, request: Request) -> None:
        self._take(request, self.held_to.max_transfer)
        self.data[request.offset : request.end] = request.vector.tobytes()

    def zero(self, request: Request) -> None:
        self._take(request, self.held_to.max_pwrite_zeroes)
        self.data[request.offset : request.end] = bytes(request.length)

    def trim(self, request: Request) -> None:
        self._take(request, self.held_to.max_pdiscard)

    def _take(self, request: Request, length_max: int) -> None:
        block = self.held_to.request_alignment
        assert request.length > 0
        assert request.offset % block == 0, request
        assert request.end % block == 0 or request.end == self.size, request
        assert not length_max or request.length <= length_max, request
        self.calls.append((request.operation, request.offset, request.length, request.flags))

    def take(self) -> list[tuple[Operation, int, int, Flag]]:
        calls, self.calls = self.calls, []
        return calls

    def ranges(self) -> list[tuple[str, int, int]]:
        return [(operation.value, offset, length) for operation, offset, length, _ in self.take()]


# -- by example -----------------------------------------------------------------------------------------------------


@contextmanager
def opened(size: int = 64 * KIB, **limits: int) -> Iterator[tuple[Reference, Strict]]:
    layer = Strict(size, BlockLimits(**limits))
    with open_registered(layer) as export:
        yield export, layer


def test_nothing_is_done_to_what_fits() -> None:
    with opened(request_alignment=512, max_transfer=4096) as (export, layer):
        vector = registered(4096)
        export.execute(Request.read(512, vector))
        assert layer.ranges() == [("read", 512, 4096)]


def test_a_transfer_is_cut_at_the_maximum() -> None:
    with opened(max_transfer=10) as (export, layer):
        assert export.read(5, 25) == b"\xee" * 25
        export.write(1, b"abcdefghijklmno")
        assert layer.ranges() == [
            ("read", 5, 10),
            ("read", 15, 10),
            ("read", 25, 5),
            ("write", 1, 10),
            ("write", 11, 5),
        ]
        assert layer.data[:17] == b"\xeeabcdefghijklmno\xee"


def test_a_read_is_padded() -> None:
    with opened(request_alignment=512) as (export, layer):
        layer.data[:] = random.Random(SEED).randbytes(layer.size)
        assert export.read(700, 2000) == layer.data[700:2700]
        assert export.read(513, 1) == layer.data[513:514]
        assert layer.ranges() == [("read", 512, 2560), ("read", 512, 512)]


@pytest.mark.parametrize(
    ("offset", "length", "calls"),
    [
        (700, 2000, [("read", 512, 512), ("read", 2560, 512), ("write", 512, 2560)]),
        (700, 10, [("read", 512, 512), ("write", 512, 512)]),
        (512, 10, [("read", 512, 512), ("write", 512, 512)]),
        (1000, 24, [("read", 512, 512), ("write", 512, 512)]),
        (1000, 100, [("read", 512, 512), ("read", 1024, 512), ("write", 512, 1024)]),
        (1000, 536, [("read", 512, 512), ("write", 512, 1024)]),
        (1024, 600, [("read", 1536, 512), ("write", 1024, 1024)]),
        (1024, 1024, [("write", 1024, 1024)]),
    ],
)
def test_a_write_reads_the_blocks_at_its_ends(offset: int, length: int, calls: list[tuple[str, int, int]]) -> None:
    with opened(request_alignment=512) as (export, layer):
        export.write(offset, b"w" * length)
        assert layer.ranges() == calls
        assert layer.data == b"\xee" * offset + b"w" * length + b"\xee" * (layer.size - offset - length)


def test_the_end_of_the_disk_need_not_be_a_whole_block() -> None:
    with opened(size=1100, request_alignment=512) as (export, layer):
        assert export.read(1030, 70) == b"\xee" * 70
        export.write(1099, b"w")
        export.zero(1030, 70)
        export.trim(1025, 75)
        assert layer.ranges() == [
            ("read", 1024, 76),
            ("read", 1024, 76),
            ("write", 1024, 76),
            ("read", 1024, 76),
            ("write", 1024, 76),
        ]
        export.zero(1024, 76)
        export.trim(1024, 76)
        assert layer.ranges() == [("zero", 1024, 76), ("trim", 1024, 76)]


def test_zeroing_writes_what_is_no_whole_block() -> None:
    with opened(request_alignment=512) as (export, layer):
        export.zero(1000, 2000, Flag.MAY_UNMAP | Flag.NO_FALLBACK)
        assert layer.take() == [
            (READ, 512, 512, Flag.REGISTERED_BUF),
            (WRITE, 512, 512, Flag.REGISTERED_BUF),
            (READ, 2560, 512, Flag.REGISTERED_BUF),
            (WRITE, 2560, 512, Flag.REGISTERED_BUF),
            (ZERO, 1024, 1536, Flag.MAY_UNMAP | Flag.NO_FALLBACK),
        ]
        assert layer.data == b"\xee" * 1000 + bytes(2000) + b"\xee" * (layer.size - 3000)


def test_trimming_leaves_what_is_no_whole_block() -> None:
    with opened(request_alignment=512) as (export, layer):
        export.trim(1000, 2000)
        export.trim(1000, 100)
        assert layer.ranges() == [("trim", 1024, 1536)]


@pytest.mark.parametrize("operation", [ZERO, TRIM], ids=lambda operation: operation.value)
def test_zeroing_and_trimming_are_cut_where_it_suits(operation: Operation) -> None:
    """At the alignment that is wished for, and at the maximum; nothing is rounded."""
    zero = {"pwrite_zeroes_alignment": 4096, "max_pwrite_zeroes": 10_000}
    trim = {"pdiscard_alignment": 4096, "max_pdiscard": 10_000}
    with opened(**(zero if operation is ZERO else trim)) as (export, layer):
        export.execute(Request(operation, 100, 30_000))
        export.execute(Request(operation, 5000, 10))
        assert [(offset, length) for _, offset, length in layer.ranges()] == [
            (100, 3996),
            (4096, 8192),
            (12288, 8192),
            (20480, 8192),
            (28672, 1428),
            (5000, 10),
        ]


def test_zeroes_that_are_written_out_are_cut_as_writes_are() -> None:
    class Unable(Strict):
        def zero(self, request: Request) -> None:
            raise RequestError(errno.ENOTSUP)

    layer = Unable(64 * KIB, BlockLimits(request_alignment=512, max_transfer=1024))
    execute(layer, Request.zero(512, 2560))
    assert layer.ranges() == [("write", 512, 1024), ("write", 1536, 1024), ("write", 2560, 512)]
    assert layer.data[:3584] == b"\xee" * 512 + bytes(2560) + b"\xee" * 512


def test_a_fast_zero_that_cannot_be_writes_nothing() -> None:
    with opened(request_alignment=512) as (export, layer):
        layer.supported_write_flags = Flag.NONE  # type: ignore[misc]
        with pytest.raises(RequestError) as caught:
            export.zero(100, 2000, Flag.NO_FALLBACK)
        assert caught.value.errno == errno.ENOTSUP
        assert layer.take() == []


# -- the flag -------------------------------------------------------------------------------------------------------


def test_every_part_keeps_its_flags() -> None:
    """Cut, padded, merged: registered memory stays registered, and what else was asked for is asked of each part."""
    layer = Strict(64 * KIB, BlockLimits(request_alignment=512, max_transfer=1024), Flag.FUA | Flag.WRITE_UNCHANGED)
    with open_registered(layer) as export:
        asked = Flag.FUA | Flag.WRITE_UNCHANGED
        export.execute(Request.read(100, registered(3000)))
        assert {flags for *_, flags in layer.take()} == {Flag.REGISTERED_BUF}
        export.execute(Request.write(100, registered(3000), asked))
        calls = layer.take()
        assert {flags for operation, *_, flags in calls if operation is READ} == {Flag.REGISTERED_BUF}
        writes = [flags for operation, *_, flags in calls if operation is WRITE]
        assert writes == [asked | Flag.REGISTERED_BUF] * 4
        export.execute(Request.write(100, Vector.of(3000)))
        assert not any(flags for operation, *_, flags in layer.take() if operation is WRITE)


# -- serialised -----------------------------------------------------------------------------------------------------


class Held(Strict):
    """Whose next write waits, having been read for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reached, self.go_on = threading.Event(), threading.Event()

    def write(self, request: Request) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(20)
        super().write(request)


@pytest.mark.parametrize(
    ("second", "waits"),
    [
        (Request.write(600, Vector.of(b"2")), True),
        (Request.write(512, Vector.of(b"2" * 512)), True),
        (Request.zero(512, 512), True),
        (Request.trim(512, 512), True),
        (Request.write(1024, Vector.of(b"2" * 512)), False),
        (Request.write(1030, Vector.of(b"2")), False),
        (Request.read(512, Vector.of(512)), False),
    ],
)
def test_who_merges_a_block_is_alone_on_it(second: Request, waits: bool) -> None:
    """Else the merge would bring back what the block held before the other."""
    layer = Held(4096, BlockLimits(request_alignment=512))
    first = threading.Thread(target=execute, args=(layer, Request.write(700, Vector.of(b"1"))))
    other = threading.Thread(target=execute, args=(layer, second))
    first.start()
    assert layer.reached.wait(20)
    other.start()
    other.join(0.2 if waits else 20)
    assert other.is_alive() == waits
    layer.go_on.set()
    first.join()
    other.join()
    after = bytearray(b"\xee" * 4096)
    after[700:701] = b"1"
    if second.operation is WRITE:
        after[second.offset : second.end] = second.vector.tobytes()
    elif second.operation is ZERO:
        after[second.offset : second.end] = bytes(second.length)
    assert layer.data == after


def test_writers_of_whole_blocks_do_not_wait_for_one_another() -> None:
    layer = Held(4096, BlockLimits(request_alignment=512))
    first = threading.Thread(target=execute, args=(layer, Request.write(512, Vector.of(b"1" * 512))))
    first.start()
    assert layer.reached.wait(20)
    execute(layer, Request.write(512, Vector.of(b"2" * 1024)))
    layer.go_on.set()
    first.join()


# -- held against plain bytes ---------------------------------------------------------------------------------------


@st.composite
def limits(draw: st.DrawFn) -> BlockLimits:
    block = draw(st.sampled_from([1, 1, 2, 8, 64, 512]))

    def multiple() -> int:
        return block * draw(st.integers(0, 12))

    zeroes, discards = multiple(), multiple()
    return BlockLimits(
        request_alignment=block,
        max_transfer=multiple(),
        max_pwrite_zeroes=draw(st.sampled_from([0, zeroes * 3 or block])),
        pwrite_zeroes_alignment=zeroes,
        max_pdiscard=draw(st.sampled_from([0, discards * 2 or block])),
        pdiscard_alignment=discards,
    )


@given(limits(), st.integers(1, 3000), st.integers(0, 1 << 30))
def test_equal_to_plain_bytes(held_to: BlockLimits, size: int, seed: int) -> None:
    dice = random.Random(seed)
    layer = Strict(size, held_to)
    model = bytearray(layer.data)
    with open_registered(layer) as export:
        for _ in range(20):
            offset = dice.randrange(size)
            length = dice.randrange(1, size - offset + 1)
            match dice.choice("rwzt"):
                case "r":
                    assert export.read(offset, length) == model[offset : offset + length]
                case "w":
                    data = dice.randbytes(length)
                    export.write(offset, data)
                    model[offset : offset + length] = data
                case "z":
                    export.zero(offset, length, dice.choice([Flag.NONE, Flag.MAY_UNMAP, Flag.NO_FALLBACK]))
                    model[offset : offset + length] = bytes(length)
                case "t":
                    export.trim(offset, length)
            assert layer.data == model


# -- served ---------------------------------------------------------------------------------------------------------


def drive(uri: str, size: int, dice: random.Random, count: int, length_max: int) -> None:
    """Random requests over a connection, held against plain bytes."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    model = bytearray(handle.pread(size, 0))
    for _ in range(count):
        length = dice.choice([1, 511, 512, 4096, dice.randrange(1, length_max)])
        offset = dice.randrange(size - length + 1)
        match dice.choice("rrwwz"):
            case "r":
                assert bytes(handle.pread(length, offset)) == model[offset : offset + length]
            case "w":
                data = dice.randbytes(length)
                handle.pwrite(data, offset)
                model[offset : offset + length] = data
            case "z":
                handle.zero(length, offset)
                model[offset : offset + length] = bytes(length)
    assert bytes(handle.pread(size, 0)) == model
    handle.shutdown()


@pytest.mark.parametrize("wrap", [lambda below: below, Raw], ids=["root", "below a mapping"])
def test_a_source_that_takes_blocks_of_64k_at_most(nbd_server: NbdServers, backend: str, wrap: Any) -> None:
    layer = Strict(2 * MIB, BlockLimits(request_alignment=4096, max_transfer=64 * KIB, max_pwrite_zeroes=128 * KIB))
    uri = nbd_server(wrap(layer), backend=backend)
    drive(uri, layer.size, random.Random(SEED), amount(150, 3000), 400_000)
    flags = {flags for operation, *_, flags in layer.take() if operation is not ZERO}
    assert flags == {Flag.REGISTERED_BUF if backend == "io_uring" else Flag.NONE}


def test_the_blocks_of_a_source_are_told_to_clients(nbd_server: NbdServers) -> None:
    """They are made to fit here, so there is no minimum; but whole blocks are cheaper."""
    for limits, preferred in (
        (NO_LIMITS, 4096),
        (BlockLimits(request_alignment=16 * KIB), 16 * KIB),
        (BlockLimits(request_alignment=512, opt_transfer=64 * KIB, max_transfer=128 * KIB), 64 * KIB),
        (BlockLimits(opt_transfer=64 * MIB), 32 * MIB),
    ):
        handle = nbd.NBD()
        handle.connect_uri(nbd_server(Raw(Strict(MIB, limits))))
        sizes = [handle.get_block_size(kind) for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
        assert sizes == [1, preferred, 32 * MIB]
        handle.shutdown()
