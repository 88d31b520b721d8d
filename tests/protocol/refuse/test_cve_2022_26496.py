"""CVE-2022-26496, nbd-server: a name in INFO or GO was read into a buffer on the stack by the length that it claimed,
which may be more than its option has. Nothing of the next option is taken for a name."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client


@pytest.mark.parametrize("beyond", [1, 4, 100, 1024, 4000])
@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_a_name_does_not_reach_into_the_next_option(client: Client, option: int, beyond: int) -> None:
    name = b"a" * 90
    data = struct.pack(">I", len(name) + 6 + beyond) + name + bytes(6)
    message = f"the export name has {len(name) + 6 + beyond} bytes, but only {len(name) + 6} are left"
    client.refused(option, data, ReplyType.ERR_INVALID, message)
