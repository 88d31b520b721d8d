"""What is no TLS after STARTTLS: the connection ends, for it is too late to go on without (proto.md, "FORCEDTLS
mode")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, half_close


@pytest.mark.parametrize("garbage", [bytes(64), b"\x16\x03\x01\xff\xff" + b"a" * 300, b"IHAVEOPT" + bytes(8)])
def test_the_connection_ends(forced: str, garbage: bytes) -> None:
    client = Client(forced)
    assert client.ask(Option.STARTTLS) == [(ReplyType.ACK, b"")]
    client.send(garbage)
    half_close(client)
    answer = client.rest()
    assert b"IHAVEOPT" not in answer and len(answer) < 16, "an alert at most"
