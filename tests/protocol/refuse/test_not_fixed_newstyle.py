"""An option other than EXPORT_NAME of a client without FIXED_NEWSTYLE: it could not read the answer, so the
connection ends (proto.md, "Newstyle negotiation")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option
from tests.protocol.kit import Client, go


@pytest.mark.parametrize("option", [Option.LIST, Option.ABORT, Option.STARTTLS, Option.GO, Option.STRUCTURED_REPLY, 99])
def test_the_connection_ends(uri: str, option: int) -> None:
    client = Client(uri, flags=2)
    client.option(option, go())
    client.is_cut_off()
