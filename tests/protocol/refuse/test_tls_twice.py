"""A second STARTTLS, within TLS: INVALID, and nothing but TLS goes on (proto.md, "FORCEDTLS mode")."""

from __future__ import annotations

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import READ, Secure


def test_invalid(forced: str, secure: Secure) -> None:
    client = secure(forced)
    client.refused(Option.STARTTLS, b"", ReplyType.ERR_INVALID, "TLS has begun already")
    assert client.enter().do(READ, 0, 4).error == 0
