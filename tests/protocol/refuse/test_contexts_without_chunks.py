"""SET_META_CONTEXT of a client that could not read a status: INVALID (proto.md, "NBD_OPT_SET_META_CONTEXT")."""

from __future__ import annotations

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, meta


def test_invalid(client: Client) -> None:
    client.refused(
        Option.SET_META_CONTEXT, meta("", "base:allocation"), ReplyType.ERR_INVALID, "must be negotiated before"
    )
