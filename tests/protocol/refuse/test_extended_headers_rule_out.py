"""What extended headers rule out: structured replies (EXT_HEADER_REQD), and EXPORT_NAME, which ends the connection
(proto.md, "NBD_OPT_EXTENDED_HEADERS")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client


@pytest.fixture
def extended(client: Client) -> Client:
    assert client.ask(Option.EXTENDED_HEADERS) == [(ReplyType.ACK, b"")]
    return client


def test_structured_replies(extended: Client) -> None:
    extended.refused(Option.STRUCTURED_REPLY, b"", ReplyType.ERR_EXT_HEADER_REQD, "extended headers")


def test_export_name(extended: Client) -> None:
    extended.option(Option.EXPORT_NAME, b"disk")
    extended.is_cut_off()
