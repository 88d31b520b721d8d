"""An option that is not known: UNSUP, its data is skipped, and the next one is answered (proto.md, "Baseline")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import ReplyType
from tests.protocol.kit import MIB, Client


@pytest.mark.parametrize("option", [0, 4, 12, 1000, 0x80000001, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 5000, 65536, 65537, MIB])
def test_unsup(client: Client, option: int, length: int) -> None:
    client.refused(option, b"IHAVEOPT" * (length // 8) + bytes(length % 8), ReplyType.ERR_UNSUP, f"option {option}")
