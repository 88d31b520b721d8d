"""STARTTLS of a server without TLS: POLICY, and it goes on in plain text (proto.md, "NOTLS mode")."""

from __future__ import annotations

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import READ, Client


def test_policy(client: Client) -> None:
    client.refused(Option.STARTTLS, b"", ReplyType.ERR_POLICY, "this server does not use TLS")
    assert client.enter().do(READ, 0, 4).error == 0
