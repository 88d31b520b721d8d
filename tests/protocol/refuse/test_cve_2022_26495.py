"""CVE-2022-26495, nbd-server: a name of 0xffffffff bytes, plus one for its end, took no memory at all, and was then
read into that. Lengths are held against what the option has before memory is taken."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, text


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFF0, 0x80000000, 0x7FFFFFFF])
@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT])
def test_the_name(client: Client, option: int, length: int) -> None:
    data = struct.pack(">I", length) + b"disk" + bytes(6)
    message = f"the export name has {length} bytes, but only 10 are left in the option"
    client.refused(option, data, ReplyType.ERR_INVALID, message)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x80000000])
def test_a_query(client: Client, length: int) -> None:
    assert client.ask(Option.STRUCTURED_REPLY)[-1][0] == ReplyType.ACK
    data = text("") + struct.pack(">II", 1, length) + b"base:"
    message = f"the query has {length} bytes, but only 5 are left in the option"
    client.refused(Option.SET_META_CONTEXT, data, ReplyType.ERR_INVALID, message)
