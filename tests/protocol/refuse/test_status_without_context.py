"""The status of an export for which no context was selected: EINVAL (proto.md, "Metadata querying")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType, Style
from tests.protocol.kit import BLOCK_STATUS, EINVAL, Client, Enter, meta


def test_none_was_selected(enter: Enter, style: Style) -> None:
    enter(style).errs(EINVAL, "no meta context was negotiated", BLOCK_STATUS, 0, 4096)


@pytest.mark.parametrize("query", ["base:", "base:nothing", "nobody:allocation", "allocation", ""])
def test_what_was_asked_for_is_none(client: Client, query: str) -> None:
    assert client.ask(Option.STRUCTURED_REPLY)[-1][0] == ReplyType.ACK
    assert client.ask(Option.SET_META_CONTEXT, meta("", query)) == [(ReplyType.ACK, b"")]
    client.enter()
    client.style = Style.STRUCTURED
    client.errs(EINVAL, "no meta context was negotiated", BLOCK_STATUS, 0, 4096)


def test_they_were_selected_for_another_export(client: Client) -> None:
    assert client.ask(Option.STRUCTURED_REPLY)[-1][0] == ReplyType.ACK
    assert len(client.ask(Option.SET_META_CONTEXT, meta("golden", "base:allocation"))) == 2
    client.enter()
    client.style = Style.STRUCTURED
    client.errs(EINVAL, "no meta context was negotiated", BLOCK_STATUS, 0, 4096)
