"""The status of no bytes has no extents: EINVAL (proto.md, "NBD_CMD_BLOCK_STATUS")."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import BLOCK_STATUS, EINVAL, Enter


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_einval(enter: Enter, style: Style) -> None:
    enter(style, contexts=["base:allocation"]).errs(EINVAL, "the status of no bytes", BLOCK_STATUS, 4096, 0)


def test_einval_with_a_payload(enter: Enter) -> None:
    client = enter(Style.EXTENDED, contexts=["base:allocation"])
    client.errs(EINVAL, "the status of no bytes", BLOCK_STATUS, data=struct.pack(">QI", 0, 1))
