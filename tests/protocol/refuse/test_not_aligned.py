"""A range that is not a multiple of the minimum block size: EINVAL (proto.md, "Size constraints")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import BLOCK_STATUS, CACHE, EINVAL, READ, SIZE, TRIM, WRITE, WRITE_ZEROES, Enter


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (512, 1), (SIZE - 256, 256)])
def test_einval(enter: Enter, style: Style, offset: int, length: int) -> None:
    client = enter(style, "sectors", contexts=["base:allocation"] if style is not Style.SIMPLE else [])
    for command in (READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
        data = bytes(length) if command == WRITE else b""
        answer = client.do(command, offset, length, data=data)
        assert answer.error == EINVAL
        assert style is Style.SIMPLE or "not aligned to the minimum block size" in answer.message
    assert client.do(READ, 512, 1024).error == 0
