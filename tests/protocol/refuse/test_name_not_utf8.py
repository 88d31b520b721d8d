"""A string that is no UTF-8: INVALID (proto.md, "Conventions")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, go


@pytest.mark.parametrize("name", [b"\xff", b"disk\xc3", b"\xed\xa0\x80", b"\xc0\xaf"])
def test_invalid(client: Client, name: bytes) -> None:
    client.refused(Option.GO, go(name), ReplyType.ERR_INVALID, "the export name is not valid UTF-8")
