"""An export that there is not: UNKNOWN, with no information; EXPORT_NAME, which has no error, ends the connection
(proto.md, "NBD_REP_ERR_UNKNOWN", "NBD_OPT_EXPORT_NAME")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, go, meta


@pytest.mark.parametrize("name", ["nobody", "dis", "disk ", "Disk", "x" * 4096, "../disk"])
@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_unknown(client: Client, option: int, name: str) -> None:
    client.refused(option, go(name), ReplyType.ERR_UNKNOWN, f"no export is named '{name[:60]}")


@pytest.mark.parametrize("option", [Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT])
def test_unknown_to_ask_for_its_contexts(client: Client, option: int) -> None:
    assert client.ask(Option.STRUCTURED_REPLY)[-1][0] == ReplyType.ACK
    client.refused(option, meta("nobody"), ReplyType.ERR_UNKNOWN, "no export is named 'nobody'")


def test_export_name_ends_the_connection(client: Client) -> None:
    client.option(Option.EXPORT_NAME, b"nobody")
    client.is_cut_off()
