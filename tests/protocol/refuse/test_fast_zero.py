"""A fast zero that would not be fast: ENOTSUP, with nothing changed (proto.md, "NBD_CMD_WRITE_ZEROES")."""

from __future__ import annotations

from nbdserver.handshake import Style
from tests.protocol.kit import ENOTSUP, FAST_ZERO, READ, WRITE_ZEROES, Enter


def test_enotsup(enter: Enter, style: Style) -> None:
    enter(style, "slow").errs(ENOTSUP, "", WRITE_ZEROES, 8192, 4096, flags=FAST_ZERO)
    assert enter(style, "slow").do(READ, 8192, 4).data == b"slow"


def test_without_the_flag_it_is_done(enter: Enter, style: Style) -> None:
    client = enter(style, "slow")
    assert client.do(WRITE_ZEROES, 8192, 4096).error == 0
    assert client.do(READ, 8192, 4).data == bytes(4)
