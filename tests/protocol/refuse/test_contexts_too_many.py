"""More queries than there can be contexts: TOO_BIG (proto.md, "NBD_OPT_SET_META_CONTEXT")."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Option, ReplyType
from nbdserver.limits import QUERIES_COUNT_MAX
from tests.protocol.kit import Client, text


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize("count", [QUERIES_COUNT_MAX + 1, 0xFFFFFFFF])
def test_too_big(client: Client, option: int, count: int) -> None:
    assert client.ask(Option.STRUCTURED_REPLY)[-1][0] == ReplyType.ACK
    message = f"{count} queries; this server takes {QUERIES_COUNT_MAX}"
    client.refused(option, text("") + struct.pack(">I", count), ReplyType.ERR_TOO_BIG, message)
