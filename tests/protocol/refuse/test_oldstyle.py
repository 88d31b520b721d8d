"""A client of the oldstyle handshake: nothing we send begins as that does, and its requests are no client flags
(proto.md, "Oldstyle negotiation")."""

from __future__ import annotations

import struct

import pytest

from tests.interop.wire import Wire
from tests.protocol.kit import READ, Client

OLDSTYLE = bytes.fromhex("00420281861253")


def test_the_magic_says_that_it_is_not_oldstyle(uri: str) -> None:
    wire = Wire(uri)
    assert OLDSTYLE not in wire.receive(18)


@pytest.mark.parametrize("magic", [0x25609513, 0x12560953], ids=["request", "historic"])
def test_a_request_ends_the_connection(uri: str, magic: int) -> None:
    client = Client(uri, flags=None)
    client.send(struct.pack(">IHHQQI", magic, 0, READ, 0, 0, 512))
    client.is_cut_off()
