"""A list of contexts that is none, or names what was not negotiated, or twice: consumed, EINVAL (proto.md,
"NBD_CMD_BLOCK_STATUS")."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import BLOCK_STATUS, EINVAL, MIB, Enter

PAYLOADS = {
    "unknown": struct.pack(">QI", 4096, 2),
    "twice": struct.pack(">QII", 4096, 1, 1),
    "none": struct.pack(">Q", 4096),
    "odd": struct.pack(">QIB", 4096, 1, 0),
    "short": b"x",
    "long": bytes(MIB),
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_einval(enter: Enter, payload: bytes) -> None:
    client = enter(Style.EXTENDED, contexts=["base:allocation"])
    client.errs(EINVAL, "a list of meta contexts that makes no sense", BLOCK_STATUS, data=payload)


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_einval_where_none_was_negotiated(enter: Enter, payload: bytes) -> None:
    enter(Style.EXTENDED).errs(EINVAL, "no meta context was negotiated", BLOCK_STATUS, data=payload)
