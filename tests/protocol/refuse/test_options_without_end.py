"""A client that only ever asks: after some hundred options it is hung up on (proto.md, "Termination of the session
during option haggling": a denial of service)."""

from __future__ import annotations

from nbdserver.handshake import Option, ReplyType
from nbdserver.limits import OPTIONS_COUNT_MAX
from tests.protocol.kit import Client


def test_the_connection_ends(client: Client) -> None:
    for _ in range(OPTIONS_COUNT_MAX):
        assert client.ask(Option.LIST)[-1][0] == ReplyType.ACK
    client.option(Option.LIST)
    client.is_cut_off()
