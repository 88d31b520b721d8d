"""A list of information requests that is cut off, or goes on after its end: INVALID (proto.md, "NBD_OPT_INFO and
NBD_OPT_GO")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, go, text

CAUSES = {
    b"": "the length of the export name has 4 bytes, but only 0 are left",
    text(""): "the number of information requests has 2 bytes, but only 0 are left",
    go("", 0)[:-1]: "the information request has 2 bytes, but only 1 are left",
    text("") + b"\xff\xff": "the information request has 2 bytes, but only 0 are left",
    go("", 0) + b"x": "1 bytes too many",
}


@pytest.mark.parametrize("data", CAUSES)
@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_invalid(client: Client, option: int, data: bytes) -> None:
    client.refused(option, data, ReplyType.ERR_INVALID, CAUSES[data])
