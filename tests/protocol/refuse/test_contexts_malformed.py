"""A list of queries that is cut off, or goes on after its end: INVALID, and nothing is selected any more (proto.md,
"NBD_OPT_LIST_META_CONTEXT")."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Option, ReplyType, Style
from tests.protocol.kit import BLOCK_STATUS, EINVAL, Client, go, meta, text

ALLOCATION = "base:allocation"
CAUSES = {
    b"": "the length of the export name has 4 bytes, but only 0 are left",
    text(""): "the number of queries has 4 bytes, but only 0 are left",
    text("") + struct.pack(">I", 1): "the length of the query has 4 bytes, but only 0 are left",
    meta("", ALLOCATION)[:-1]: "the query has 15 bytes, but only 14 are left",
    meta("", ALLOCATION) + b"x": "1 bytes too many",
    meta("", "base:\0"): "the query contains a NUL character",
    meta("", b"base:\xff"): "the query is not valid UTF-8",
    meta("", "base:" + "x" * 4092): "the query is 4097 bytes long; the protocol allows 4096",
}


@pytest.mark.parametrize("data", CAUSES, ids=range(len(CAUSES)))
def test_invalid(client: Client, data: bytes) -> None:
    assert client.ask(Option.STRUCTURED_REPLY)[-1][0] == ReplyType.ACK
    client.refused(Option.LIST_META_CONTEXT, data, ReplyType.ERR_INVALID, CAUSES[data])
    assert len(client.ask(Option.SET_META_CONTEXT, meta("", ALLOCATION))) == 2
    client.refused(Option.SET_META_CONTEXT, data, ReplyType.ERR_INVALID, CAUSES[data])
    assert client.ask(Option.GO, go())[-1][0] == ReplyType.ACK
    client.style = Style.STRUCTURED
    assert client.do(BLOCK_STATUS, 0, 4096).error == EINVAL
