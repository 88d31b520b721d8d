"""A name whose length says that it goes on after its option's data: INVALID (proto.md, "NBD_OPT_INFO and
NBD_OPT_GO")."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client


@pytest.mark.parametrize("length", [1, 5, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT])
def test_invalid(client: Client, option: int, length: int) -> None:
    message = f"the export name has {length} bytes, but only 0 are left in the option"
    client.refused(option, struct.pack(">I", length), ReplyType.ERR_INVALID, message)
