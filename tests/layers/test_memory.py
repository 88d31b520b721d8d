"""The layer ``memory``."""

from __future__ import annotations

import pytest

from layers.memory import Memory
from nbdserver.errors import ConfigError
from nbdserver.reference import open_stack


def test_memory_is_zeroes_until_it_is_written() -> None:
    with open_stack(Memory(1 << 40)) as export:
        assert export.size == 1 << 40
        assert export.status(0, 1 << 40) == [(1 << 40, 3)]
        export.write((1 << 40) - 5, b"hello")
        assert export.read((1 << 40) - 7, 7) == b"\0\0hello"
        export.flush()


def test_trimmed_memory_is_given_back() -> None:
    with open_stack(Memory(1 << 20)) as export:
        export.write(0, b"d" * (1 << 20))
        export.trim(0, 1 << 19)
        assert export.status(0, 1 << 20) == [(1 << 19, 3), (1 << 19, 0)]


@pytest.mark.parametrize("size", [0, -1])
def test_memory_needs_a_size(size: int) -> None:
    with pytest.raises(ConfigError, match="needs a size"), open_stack(Memory(size)):
        pass


def test_memory_that_is_larger_than_any_file() -> None:
    with pytest.raises(ConfigError, match="no memory of"), open_stack(Memory(1 << 63)):
        pass


def test_resize() -> None:
    layer = Memory(4)
    with open_stack(layer) as export:
        export.write(0, b"abcd")
        layer.resize(2)
        assert layer.changes == 1
        layer.resize(6)
        assert export.size == 6
        assert export.read(0, 6) == b"ab\0\0\0\0"


def test_memory_is_gone_when_it_is_closed() -> None:
    layer = Memory(4)
    with open_stack(layer) as export:
        export.write(0, b"abcd")
    with open_stack(Memory(4)) as export:
        assert export.read(0, 4) == bytes(4)
