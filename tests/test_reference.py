"""The reference: an export as a client sees it, errno by errno."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.file import File
from layers.memory import Memory
from layers.raw import Raw
from nbdserver.errors import ImageError, RequestError
from nbdserver.files import Files
from nbdserver.layer import Layer
from nbdserver.reference import Reference, open_stack, wire_errno
from nbdserver.request import Flag, Request, Vector

SIZE = 1 << 16


@pytest.fixture
def memory() -> Iterator[Reference]:
    with open_stack(Memory(SIZE)) as export:
        yield export


def test_what_is_written_is_read(memory: Reference) -> None:
    memory.write(100, b"hello", Flag.FUA)
    memory.flush()
    assert memory.size == SIZE
    assert memory.read(98, 9) == b"\0\0hello\0\0"


def test_nothing_can_be_done_anywhere_up_to_the_end(memory: Reference) -> None:
    for offset in 0, SIZE:
        assert memory.read(offset, 0) == b""
        memory.write(offset, b"")
        memory.zero(offset, 0)
        memory.trim(offset, 0)
        assert memory.status(offset, 0) == []


@pytest.mark.parametrize(("offset", "length"), [(SIZE - 1, 2), (SIZE, 1), (SIZE + 1, 0), (1 << 63, 1)])
def test_past_the_end(memory: Reference, offset: int, length: int) -> None:
    for operation, number in (
        (lambda: memory.read(offset, length), errno.EINVAL),
        (lambda: memory.write(offset, bytes(length)), errno.ENOSPC),
        (lambda: memory.zero(offset, length), errno.ENOSPC),
        (lambda: memory.trim(offset, length), errno.EINVAL),
        (lambda: memory.status(offset, length), errno.EINVAL),
    ):
        with pytest.raises(RequestError) as caught:
            operation()
        assert caught.value.errno == number


def test_a_read_only_export(disk: Path) -> None:
    with open_stack(Raw(File(str(disk))), read_only=True) as export:
        assert export.read(0, 2) == b"dd"
        for request in Request.write(0, Vector.of(b"x")), Request.zero(0, 1), Request.trim(0, 1):
            with pytest.raises(RequestError) as caught:
                export.execute(request)
            assert caught.value.errno == errno.EPERM
        export.flush()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EIO, ""), errno.EIO),
        (OSError(errno.EDQUOT, ""), errno.ENOSPC),
        (OSError(errno.EFBIG, ""), errno.ENOSPC),
        (OSError(errno.EROFS, ""), errno.EPERM),
        (OSError(errno.ESTALE, ""), errno.EIO),
        (OSError(), errno.EIO),
        (RequestError(errno.ENOTSUP), errno.EINVAL),
        (OSError(errno.ENOTTY, ""), errno.EINVAL),
        (RequestError(errno.EBADF), errno.EIO),
        (ImageError("broken"), errno.EIO),
    ],
)
def test_errors_of_layers_become_errnos_of_nbd(error: Exception, number: int) -> None:
    class Failing(Layer):
        size = SIZE

        def read(self, request: Request) -> None:
            raise error

    with pytest.raises(RequestError) as caught:
        Reference(Failing()).read(0, 1)
    assert caught.value.errno == number


def test_only_errnos_of_nbd_go_over_the_wire() -> None:
    known = {errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ENOTSUP, 108}
    assert {wire_errno(number, is_fast_zero=True) for number in range(200)} == known
    assert {wire_errno(number) for number in range(200)} == known - {errno.ENOTSUP}


def test_status_joins_equal_neighbours(disk: Path) -> None:
    with open_stack(File(str(disk))) as export:
        assert export.status(0, 1 << 20) == [(1 << 19, 0), (1 << 19, 3)]
        assert export.status(1000, 10) == [(10, 0)]


def test_status_of_a_layer_that_stops_early_is_asked_again() -> None:
    class Early(Layer):
        size = 100

        def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
            yield 7, 0 if offset < 50 else 3

    assert Reference(Early()).status(0, 100) == [(56, 0), (44, 3)]


def test_a_failed_open_leaves_nothing_open(disk: Path) -> None:
    files = Files()
    with pytest.raises(ImageError), open_stack(Raw(File(str(disk.with_name("missing")))), files=files):
        pass
    files.close(files.open(str(disk), read_only=False))


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["write", "zero", "unmap", "trim"]), st.integers(0, SIZE), st.integers(0, 9000)),
    max_size=20,
)


@given(OPERATIONS)
def test_any_requests_leave_what_a_bytearray_holds(operations: list[tuple[str, int, int]]) -> None:
    model = bytearray(SIZE)
    with open_stack(Raw(Memory(SIZE + 7), offset=7)) as export:
        for number, (operation, offset, length) in enumerate(operations):
            length = min(length, SIZE - offset)
            data = bytes([number + 1]) * length if operation == "write" else bytes(length)
            model[offset : offset + length] = data
            if operation == "write":
                export.write(offset, data)
            elif operation == "trim":  # whose result is undefined in general: zeroes, for memory
                export.trim(offset, length)
            else:
                export.zero(offset, length, Flag.MAY_UNMAP if operation == "unmap" else Flag.NONE)
        assert export.read(0, SIZE) == model
