"""STARTTLS with data: INVALID, and TLS does not begin (proto.md, "NBD_OPT_STARTTLS")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import READ, Client


@pytest.mark.parametrize("data", [b"\0", bytes(70_000)], ids=len)
def test_invalid(selective: str, data: bytes) -> None:
    client = Client(selective)
    client.refused(Option.STARTTLS, data, ReplyType.ERR_INVALID, "bytes")
    assert client.enter().do(READ, 0, 4).error == 0
