"""Data that is longer than any option needs: thrown away, TOO_BIG; gigabytes are an attack and end the connection
(proto.md, "Termination of the session during option haggling")."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import MIB, Client


@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_too_big(client: Client, option: int) -> None:
    client.refused(option, bytes(70_000), ReplyType.ERR_TOO_BIG, "70000 bytes of data; this server takes 65536")


@pytest.mark.parametrize("length", [5 * MIB, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("option", [Option.GO, Option.ABORT, 99])
def test_gigabytes_are_not_waited_for(client: Client, option: int, length: int) -> None:
    client.send(struct.pack(">8sII", b"IHAVEOPT", option, length))
    client.is_cut_off()
