"""A read of more than the maximum payload: EOVERFLOW to those who may know it, EINVAL with simple replies (proto.md,
"Error values", "NBD_CMD_READ")."""

from __future__ import annotations

from nbdserver.handshake import Style
from tests.protocol.kit import EINVAL, EOVERFLOW, READ, SIZE, Enter


def test_structured(enter: Enter) -> None:
    enter(Style.STRUCTURED, "sectors").do(READ, 0, SIZE)
    for style in (Style.STRUCTURED, Style.EXTENDED):
        answer = enter(style, "large").do(READ, 0, (32 << 20) + 1)
        assert (answer.error, answer.message) == (EOVERFLOW, "longer than the maximum payload size")


def test_simple(enter: Enter) -> None:
    assert enter(Style.SIMPLE, "large").do(READ, 0, (32 << 20) + 1).error == EINVAL


def test_more_than_there_are_bytes_at_all(enter: Enter) -> None:
    enter(Style.EXTENDED, "large").errs(EINVAL, "past the end", READ, 0, (1 << 64) - 1)
