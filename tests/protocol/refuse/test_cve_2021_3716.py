"""CVE-2021-3716, nbdkit: what somebody in between had negotiated in plain text before STARTTLS, or sent along with
it, still counted within TLS. Nothing of it does."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import READ, Client, Secure, meta


def test_what_was_negotiated_before_is_forgotten(forced: str, selective: str, secure: Secure) -> None:
    for before in ([], [Option.STRUCTURED_REPLY], [Option.EXTENDED_HEADERS]):
        client = secure(selective, before)
        assert client.ask(Option.SET_META_CONTEXT, meta("", "base:allocation"))[0][0] == ReplyType.ERR_INVALID
        assert client.enter().do(READ, 0, 4).error == 0, "simple replies"


@pytest.mark.parametrize("option", [Option.STRUCTURED_REPLY, Option.LIST, Option.GO])
def test_what_is_sent_along_ends_the_connection(forced: str, option: int) -> None:
    client = Client(forced)
    header = struct.Struct(">8sII")
    client.send(header.pack(b"IHAVEOPT", Option.STARTTLS, 0) + header.pack(b"IHAVEOPT", option, 0))
    assert client.rest() == b""
