"""A name of more than 4096 bytes: INVALID; one of 4096 is looked up (proto.md, "Conventions")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.interop.wire import IHAVEOPT, OPTION
from tests.protocol.kit import MIB, Client, go


@pytest.mark.parametrize("length", [4097, 60_000])
@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_invalid(client: Client, option: int, length: int) -> None:
    message = f"the export name is {length} bytes long; the protocol allows 4096"
    client.refused(option, go("x" * length), ReplyType.ERR_INVALID, message)


@pytest.mark.parametrize("length", [4097, 65536, MIB])
def test_export_name_ends_the_connection(client: Client, length: int) -> None:
    client.tries(OPTION.pack(IHAVEOPT, Option.EXPORT_NAME, length) + b"x" * length)
    client.is_cut_off()
