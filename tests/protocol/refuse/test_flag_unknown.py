"""A flag that nobody has: EINVAL (proto.md, "Error values")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import CACHE, EINVAL, PAYLOAD_LEN, READ, TRIM, WRITE, WRITE_ZEROES, Enter


@pytest.mark.parametrize("bit", range(6, 16))
def test_einval(enter: Enter, style: Style, bit: int) -> None:
    client = enter(style)
    for command in (READ, WRITE, TRIM, CACHE, WRITE_ZEROES):
        data = bytes(512) if command == WRITE else b""
        client.errs(EINVAL, "a flag that this command does not have", command, 0, 512, flags=1 << bit, data=data)


@pytest.mark.parametrize("command", [READ, WRITE, TRIM])
def test_payload_len_is_one_where_headers_are_compact(enter: Enter, command: int) -> None:
    data = bytes(512) if command == WRITE else b""
    enter(Style.STRUCTURED).errs(
        EINVAL, "a flag that this command does not have", command, 0, 512, flags=PAYLOAD_LEN, data=data
    )
