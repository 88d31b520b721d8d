"""CVE-2020-10761, QEMU: an error that repeated a name of nearly 4096 bytes was longer than a message may be, which
failed an assertion. Messages repeat no more than the beginning of what a client wrote."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, go, meta


@pytest.mark.parametrize("character", ["a", "é", "\u20ac", "\U0001f600", "\x01", "'", "\\"])
@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT])
def test_messages_stay_short(client: Client, option: int, character: str) -> None:
    for length in (4096, 4095, 4090, 4000):
        name = character * (length // len(character.encode()))
        [(kind, message)] = client.ask(option, go(name) if option != Option.LIST_META_CONTEXT else meta(name))
        assert kind == ReplyType.ERR_UNKNOWN
        assert len(message) <= 1024
        assert message.decode().isprintable()
