"""Flags at a layer: every flag on every operation, at a layer that has it and at one that has not."""

from __future__ import annotations

import dataclasses
import errno
import itertools
from collections.abc import Iterable
from typing import Final

import pytest

from layers.file import File
from layers.memory import Memory
from layers.raw import Raw
from nbdserver import flags, registry
from nbdserver.errors import RequestError
from nbdserver.extent import CODE, Extent, Intent
from nbdserver.graph import execute
from nbdserver.layer import Layer
from nbdserver.reference import open_stack
from nbdserver.request import Flag, Operation, Request, Vector
from tests.registered import registered

READ, WRITE, ZERO, TRIM = Operation.READ, Operation.WRITE, Operation.ZERO, Operation.TRIM
SIZE: Final = 4096

ASKABLE: Final = [flag for flag in Flag if flag and flag is not Flag.REGISTERED_BUF]


@dataclasses.dataclass(eq=False)
class Noting(Layer):
    """A layer of code that has the flags it is given, and notes what it is called for."""

    has: Flag = Flag.NONE
    size: int = SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supported_read_flags = self.supported_write_flags = self.has  # type: ignore[misc]
        self.calls: list[tuple[str, Flag]] = []

    def read(self, request: Request) -> None:
        self.calls.append((request.operation.value, request.flags))

    write = zero = trim = read

    def flush(self) -> None:
        self.calls.append(("flush", Flag.NONE))


def make(operation: Operation, asked: Flag = Flag.NONE, memory: Vector | None = None) -> Request:
    vector = memory if memory is not None else Vector.of(16)
    return Request(operation, 0, 16, vector if operation in (READ, WRITE) else Vector(()), asked)


# -- one flag -------------------------------------------------------------------------------------------------------

#: What becomes of a flag that the layer lacks, by operation: "dropped", "flush" (and dropped), or the errno it is
#: refused with. A layer that has it is given it, but for NO_FALLBACK where nothing has a fallback.
LACKING: Final[dict[Flag, dict[Operation, str | int]]] = {
    Flag.COPY_ON_READ: dict.fromkeys(Operation, errno.EINVAL),
    Flag.ZERO_WRITE: {READ: errno.EINVAL, WRITE: errno.EINVAL, ZERO: "dropped", TRIM: errno.EINVAL},
    Flag.MAY_UNMAP: dict.fromkeys(Operation, "dropped"),
    Flag.FUA: {READ: "dropped", WRITE: "flush", ZERO: "flush", TRIM: "flush"},
    Flag.WRITE_COMPRESSED: dict.fromkeys(Operation, errno.ENOTSUP),
    Flag.WRITE_UNCHANGED: dict.fromkeys(Operation, "dropped"),
    Flag.SERIALISING: dict.fromkeys(Operation, errno.EINVAL),
    Flag.NO_FALLBACK: {READ: "dropped", WRITE: "dropped", ZERO: errno.ENOTSUP, TRIM: "dropped"},
    Flag.PREFETCH: dict.fromkeys(Operation, "dropped"),
    Flag.NO_WAIT: dict.fromkeys(Operation, errno.EINVAL),
    Flag.NO_QUEUE: dict.fromkeys(Operation, errno.EINVAL),
}


def test_the_table_has_every_flag() -> None:
    assert list(LACKING) == ASKABLE


@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.value)
@pytest.mark.parametrize("flag", ASKABLE, ids=lambda flag: flag.name)
def test_a_layer_that_has_the_flag_is_given_it(flag: Flag, operation: Operation) -> None:
    layer = Noting(flag)
    execute(layer, make(operation, flag))
    given = Flag.NONE if flag is Flag.NO_FALLBACK and operation is not ZERO else flag
    assert layer.calls == [(operation.value, given)]


@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.value)
@pytest.mark.parametrize("flag", ASKABLE, ids=lambda flag: flag.name)
def test_of_a_layer_that_lacks_the_flag(flag: Flag, operation: Operation) -> None:
    layer = Noting(~flag & ~Flag.REGISTERED_BUF)
    becomes = LACKING[flag][operation]
    if isinstance(becomes, int):
        with pytest.raises(RequestError) as refused:
            execute(layer, make(operation, flag))
        assert refused.value.errno == becomes
        assert layer.calls == []
        if becomes == errno.EINVAL:
            assert str(refused.value) == f"noting does not have the flag {flag.name} for {operation.value} requests"
        return
    execute(layer, make(operation, flag))
    flush = [("flush", Flag.NONE)] if becomes == "flush" else []
    assert layer.calls == [(operation.value, Flag.NONE), *flush]


def test_bits_that_are_no_flag_are_refused_by_their_number() -> None:
    with pytest.raises(RequestError, match="does not have the flag NO_QUEUE, 0x8000 for read requests"):
        execute(Noting(), make(READ, Flag(0x8800)))


# -- the registered buffer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [READ, WRITE], ids=lambda operation: operation.value)
def test_registered_buf_survives_any_combination(operation: Operation) -> None:
    """Whatever is asked for and whatever the layer has: it is there exactly if the memory is registered."""
    everything = Noting(~Flag.REGISTERED_BUF)
    nothing = Noting(Flag.NONE)
    harmless = flags.PERMISSIONS | flags.EMULATED
    for asked in subsets(ASKABLE):
        for memory, expected in ((registered(16), Flag.REGISTERED_BUF), (Vector.of(16), Flag.NONE)):
            for layer in (everything, nothing) if asked in harmless else (everything,):
                execute(layer, make(operation, asked, memory))
                assert {given & Flag.REGISTERED_BUF for what, given in layer.calls if what != "flush"} == {expected}
                layer.calls.clear()


def subsets(of: list[Flag]) -> Iterable[Flag]:
    for count in range(len(of) + 1):
        for some in itertools.combinations(of, count):
            yield Flag(sum(some))


@pytest.mark.parametrize("operation", [ZERO, TRIM], ids=lambda operation: operation.value)
def test_a_request_with_no_memory_never_has_it(operation: Operation) -> None:
    layer = Noting(~Flag.NONE)
    execute(layer, make(operation))
    assert layer.calls == [(operation.value, Flag.NONE)]


# -- where code and mappings meet -----------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Half(Noting):
    """Its first half is mapped onto ``file``, the rest is code."""

    file: Layer = dataclasses.field(default_factory=Noting)

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        if offset < SIZE // 2:
            yield Extent(SIZE // 2 - offset, self.file, offset, True)
            offset = SIZE // 2
        yield Extent(SIZE - offset, CODE)


def whole(operation: Operation, asked: Flag) -> Request:
    vector = Vector.of(SIZE) if operation is WRITE else Vector(())
    return Request(operation, 0, SIZE, vector, asked)


@pytest.mark.parametrize("operation", [WRITE, ZERO, TRIM], ids=lambda operation: operation.value)
def test_fua_is_flushed_once_where_not_all_went_through_code_that_has_it(operation: Operation) -> None:
    below = Noting(Flag.NONE)
    layer = Half(Flag.FUA, file=below)
    execute(layer, whole(operation, Flag.FUA))
    assert below.calls == [(operation.value, Flag.NONE)]
    assert layer.calls == [(operation.value, Flag.FUA), ("flush", Flag.NONE)]


def test_a_flush_stays_above_a_lower_layer_that_has_fua() -> None:
    """The lower layer's data is durable then, the upper one's metadata need not be."""
    below = Noting(Flag.FUA)
    layer = Half(Flag.NONE, file=below)
    execute(layer, Request.write(0, Vector.of(16), Flag.FUA))
    assert below.calls == [("write", Flag.FUA)]
    assert layer.calls == [("flush", Flag.NONE)]


def test_what_only_code_honours_is_done_by_code_also_where_it_is_mapped() -> None:
    below = Noting(Flag.NONE)
    layer = Half(Flag.WRITE_COMPRESSED, file=below)
    execute(layer, whole(WRITE, Flag.WRITE_COMPRESSED))
    assert (layer.calls, below.calls) == ([("write", Flag.WRITE_COMPRESSED)], [])


@pytest.mark.parametrize("flag", [Flag.WRITE_COMPRESSED, Flag.SERIALISING, Flag.COPY_ON_READ])
def test_a_mapping_does_not_take_on_what_only_code_honours(flag: Flag) -> None:
    with (
        open_stack(Raw(Memory(SIZE))) as export,
        pytest.raises(RequestError, match=f"raw does not have the flag {flag.name} for write requests"),
    ):
        export.write(0, b"x", flag)


def test_each_part_of_a_request_has_its_flags() -> None:
    below = Noting(Flag.MAY_UNMAP | Flag.NO_FALLBACK)
    layer = Half(Flag.MAY_UNMAP | Flag.NO_FALLBACK, file=below)
    execute(layer, whole(ZERO, Flag.MAY_UNMAP | Flag.NO_FALLBACK))
    assert layer.calls == below.calls == [("zero", Flag.MAY_UNMAP | Flag.NO_FALLBACK)]


# -- zeroing by data ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Unable(Noting):
    """Finds out that it cannot zero only when it is asked to."""

    def zero(self, request: Request) -> None:
        raise RequestError(errno.ENOTSUP)


def test_a_layer_that_finds_it_cannot_zero_is_given_the_zeroes() -> None:
    layer = Unable(Flag.FUA | Flag.MAY_UNMAP | Flag.WRITE_UNCHANGED | Flag.NO_FALLBACK)
    execute(layer, make(ZERO, Flag.FUA | Flag.MAY_UNMAP | Flag.WRITE_UNCHANGED))
    assert layer.calls == [("write", Flag.FUA | Flag.WRITE_UNCHANGED)]


def test_but_not_without_a_fallback() -> None:
    layer = Unable(Flag.NO_FALLBACK)
    with pytest.raises(RequestError) as refused:
        execute(layer, make(ZERO, Flag.NO_FALLBACK))
    assert refused.value.errno == errno.ENOTSUP
    assert layer.calls == []


# -- the layers there are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names())
def test_what_the_layers_declare(name: str) -> None:
    cls = registry.layer_type(name)
    declared = cls.supported_read_flags | cls.supported_write_flags
    assert not declared & Flag.REGISTERED_BUF, "exempt"
    assert declared in flags.ALL
    if Flag.NO_FALLBACK in cls.supported_write_flags:
        assert cls.zero is not Layer.zero, "the inherited way to zero is the fallback"
    assert not (cls.supported_write_flags and cls in (File, Memory, Raw)), "these have no code"
