"""A server that demands TLS: every option before it gets TLS_REQD, also those that there are not; EXPORT_NAME ends
the connection (proto.md, "FORCEDTLS mode")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client


@pytest.mark.parametrize("option", [Option.LIST, Option.INFO, Option.GO, Option.SET_META_CONTEXT, 4, 99])
@pytest.mark.parametrize("data", [b"", bytes(6), bytes(70_000)], ids=len)
def test_tls_reqd(forced: str, option: int, data: bytes) -> None:
    [(kind, message)] = Client(forced).ask(option, data)
    assert (kind, b"send STARTTLS first" in message) == (ReplyType.ERR_TLS_REQD, True)


def test_export_name_ends_the_connection(forced: str) -> None:
    client = Client(forced)
    client.option(Option.EXPORT_NAME, b"disk")
    client.is_cut_off()


def test_abort_is_acknowledged(forced: str) -> None:
    client = Client(forced)
    assert client.ask(Option.ABORT) == [(ReplyType.ACK, b"")]
    client.is_cut_off()
