"""GO without a word on block sizes, of an export that has a minimum: BLOCK_SIZE_REQD, after the sizes; by EXPORT_NAME
they are enforced (proto.md, "Size constraints")."""

from __future__ import annotations

import struct

from nbdserver.handshake import Info, Option, ReplyType, Style
from tests.protocol.kit import EINVAL, READ, SIZE, Client, go


def test_block_size_reqd(client: Client) -> None:
    [told, (kind, message)] = client.ask(Option.GO, go("sectors"))
    assert told == (ReplyType.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, 512, 4096, SIZE))
    assert (kind, b"takes blocks of 512 bytes" in message) == (ReplyType.ERR_BLOCK_SIZE_REQD, True)
    assert client.enter(name="sectors").do(READ, 0, 512).error == 0


def test_export_name(client: Client) -> None:
    client.option(Option.EXPORT_NAME, b"sectors")
    client.receive(10)
    client.style = Style.SIMPLE
    assert client.do(READ, 1, 512).error == EINVAL
    assert client.do(READ, 512, 512).error == 0
