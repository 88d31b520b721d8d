"""What begins with another magic is no request: the connection ends (proto.md, "Request message")."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import READ, Enter, request


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x12560953, 0x67446698])
def test_the_connection_ends(enter: Enter, style: Style, magic: int) -> None:
    client = enter(style)
    client.send(struct.pack(">I", magic) + request(style, READ, 0, 512)[4:])
    client.is_cut_off()


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_that_of_the_other_style_ends_it_too(enter: Enter, style: Style) -> None:
    client = enter(style)
    other = Style.SIMPLE if style is Style.EXTENDED else Style.EXTENDED
    client.send(request(other, READ, 0, 512) + bytes(8))
    client.is_cut_off()
