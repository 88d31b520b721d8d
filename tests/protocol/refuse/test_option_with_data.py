"""Data of an option that takes none: INVALID, and what it asked for does not happen (proto.md, "Option types")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import READ, Client


@pytest.mark.parametrize("data", [b"\0", bytes(70_000)], ids=["short", "long"])
@pytest.mark.parametrize("option", [Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
def test_invalid(client: Client, option: int, data: bytes) -> None:
    client.refused(option, data, ReplyType.ERR_INVALID, "bytes")
    assert client.enter().do(READ, 0, 4).error == 0, "simple replies, as before"
