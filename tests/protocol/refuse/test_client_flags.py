"""Client flags that nobody offered: the connection ends (proto.md, "Client flags")."""

from __future__ import annotations

import pytest

from tests.protocol.kit import Client


@pytest.mark.parametrize("flags", [4, 7, 1 << 16, 1 << 31, 0xFFFFFFFF])
def test_the_connection_ends(uri: str, flags: int) -> None:
    Client(uri, flags=flags).is_cut_off()
