"""A range that ends past the disk: ENOSPC of what would make it longer, else EINVAL (proto.md, "Error values")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import BLOCK_STATUS, CACHE, EINVAL, ENOSPC, READ, SIZE, TRIM, WRITE, WRITE_ZEROES, Enter

RANGES = [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (1 << 63, 512), ((1 << 64) - 1, 1), ((1 << 64) - 512, 1024)]


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_nothing_is_there(enter: Enter, style: Style, offset: int, length: int) -> None:
    client = enter(style)
    for command in (READ, TRIM, CACHE, BLOCK_STATUS):
        client.errs(EINVAL, "ends past the end of the export", command, offset, length)


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_there_is_no_space(enter: Enter, style: Style, offset: int, length: int) -> None:
    client = enter(style)
    client.errs(ENOSPC, "ends past the end of the export", WRITE_ZEROES, offset, length)
    client.errs(ENOSPC, "ends past the end of the export", WRITE, offset, length, data=bytes(length))
