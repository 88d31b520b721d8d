"""A string with a NUL in it: INVALID (proto.md, "Conventions")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Option, ReplyType
from tests.protocol.kit import Client, go


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_invalid(client: Client, option: int) -> None:
    client.refused(option, go("disk\0"), ReplyType.ERR_INVALID, "the export name contains a NUL character")


def test_export_name_ends_the_connection(client: Client) -> None:
    client.option(Option.EXPORT_NAME, b"disk\0")
    client.is_cut_off()
