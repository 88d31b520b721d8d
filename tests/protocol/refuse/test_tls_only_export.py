"""An export to be had with TLS alone, asked for without: TLS_REQD of INFO and GO, POLICY of other options, and
EXPORT_NAME ends the connection (proto.md, "SELECTIVETLS mode")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, go, meta


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_tls_reqd(selective: str, option: int) -> None:
    Client(selective).refused(option, go("secret"), ReplyType.ERR_TLS_REQD, "to be had with TLS alone")


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_policy(selective: str, option: int) -> None:
    client = Client(selective)
    assert client.ask(Option.STRUCTURED_REPLY)[-1][0] == ReplyType.ACK
    client.refused(option, meta("secret"), ReplyType.ERR_POLICY, "to be had with TLS alone")


def test_export_name_ends_the_connection(selective: str) -> None:
    client = Client(selective)
    client.option(Option.EXPORT_NAME, b"secret")
    client.is_cut_off()


def test_it_is_not_listed(selective: str) -> None:
    assert [data[4:] for kind, data in Client(selective).ask(Option.LIST)] == [b"disk", b""]
