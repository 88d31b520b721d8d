"""A payload of more than the maximum: EINVAL if it is worth reading, else the connection ends (proto.md, "Size
constraints")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import BLOCK_STATUS, EINVAL, PAYLOAD_LEN, READ, SIZE, WRITE, Enter


def test_the_connection_ends(enter: Enter, style: Style) -> None:
    client = enter(style)
    client.issue(WRITE, 0, (32 << 20) + 1, flags=PAYLOAD_LEN if style is Style.EXTENDED else 0)
    client.is_cut_off()


@pytest.mark.parametrize("length", [1 << 32, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("command", [READ, WRITE, BLOCK_STATUS, 99])
def test_payloads_of_64_bits_end_it(enter: Enter, command: int, length: int) -> None:
    client = enter(Style.EXTENDED)
    client.issue(command, 0, length, flags=PAYLOAD_LEN)
    client.is_cut_off()


def test_a_smaller_maximum_is_enforced(enter: Enter, style: Style) -> None:
    client = enter(style, "sectors")
    answer = client.do(WRITE, 0, data=bytes(SIZE + 512))
    assert answer.error == EINVAL
    assert client.do(READ, 0, 512).error == 0
