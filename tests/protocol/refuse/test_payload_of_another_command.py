"""A payload of a command that has none: consumed, EINVAL (proto.md, "Command flags")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import CACHE, EINVAL, FLUSH, MIB, READ, TRIM, WRITE_ZEROES, Enter


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES])
@pytest.mark.parametrize("length", [1, 5000, 2 * MIB])
def test_einval(enter: Enter, command: int, length: int) -> None:
    offset = 0 if length <= MIB else None
    client = enter(Style.EXTENDED)
    answer = client.do(command, 0, data=b"\x21\xe4\x1c\x71" * (length // 4) + bytes(length % 4))
    assert answer.error == EINVAL
    assert client.do(READ, offset or 0, 4).error == 0
