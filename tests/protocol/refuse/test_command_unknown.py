"""A command that there is not: EINVAL, and its payload, if it has one, is thrown away (proto.md, "Error values")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import EINVAL, RESIZE, Enter


@pytest.mark.parametrize("command", [RESIZE, 9, 0x100, 0xFFFF])
def test_einval(enter: Enter, style: Style, command: int) -> None:
    enter(style).errs(EINVAL, "unknown command", command, 0, 512)


def test_its_payload_is_no_request(enter: Enter) -> None:
    enter(Style.EXTENDED).errs(EINVAL, "unknown command", RESIZE, data=b"\x21\xe4\x1c\x71" * 1000)
