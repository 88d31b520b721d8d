"""A flush has no range: EINVAL (proto.md, "NBD_CMD_FLUSH")."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import EINVAL, FLUSH, Enter


@pytest.mark.parametrize(("offset", "length"), [(512, 0), (0, 512), (1 << 63, 1)])
def test_einval(enter: Enter, style: Style, offset: int, length: int) -> None:
    enter(style).errs(EINVAL, "offset and length of a flush must be 0", FLUSH, offset, length)
