"""Writing to an export that is read-only: EPERM (proto.md, "Error values")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import EPERM, TRIM, WRITE, WRITE_ZEROES, Enter


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
def test_eperm(enter: Enter, style: Style, command: int) -> None:
    data = bytes(512) if command == WRITE else b""
    enter(style, "golden").errs(EPERM, "the export is read-only", command, 0, 512, data=data)
