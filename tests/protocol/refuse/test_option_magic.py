"""What begins with another magic is no option, and where the next one begins nobody knows: the connection ends
(proto.md, "Newstyle negotiation")."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Option
from tests.protocol.kit import Client


@pytest.mark.parametrize("magic", [b"IHAVEOPU", b"NBDMAGIC", bytes(8)])
def test_the_connection_ends(client: Client, magic: bytes) -> None:
    client.send(struct.pack(">8sII", magic, Option.LIST, 0))
    client.is_cut_off()
