"""A flag that the command does not have: EINVAL (proto.md, "Command flags")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EINVAL,
    FAST_ZERO,
    FLUSH,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Enter,
)

OWNERS = {NO_HOLE: WRITE_ZEROES, DF: READ, REQ_ONE: BLOCK_STATUS, FAST_ZERO: WRITE_ZEROES}
COMMANDS = (READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS)


@pytest.mark.parametrize("flag", OWNERS)
def test_einval(enter: Enter, style: Style, flag: int) -> None:
    client = enter(style)
    for command in COMMANDS:
        if command != OWNERS[flag]:
            data = bytes(512) if command == WRITE else b""
            client.errs(EINVAL, "a flag that this command does not have", command, 0, 512, flags=flag, data=data)
    client.errs(EINVAL, "a flag that this command does not have", FLUSH, 0, 0, flags=flag)


def test_df_belongs_to_nobody_where_replies_are_simple(enter: Enter) -> None:
    enter().errs(EINVAL, "", READ, 0, 512, flags=DF)
