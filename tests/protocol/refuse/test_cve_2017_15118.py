"""CVE-2017-15118, QEMU: the name in INFO and GO was copied into 256 bytes on the stack, and may have 4096. Every
length is looked up or refused."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, go


@pytest.mark.parametrize("length", [255, 256, 257, 3000, 4095, 4096])
@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_a_long_name_is_looked_up(client: Client, option: int, length: int) -> None:
    client.refused(option, go("a" * length), ReplyType.ERR_UNKNOWN, "no export is named 'aaaa")
