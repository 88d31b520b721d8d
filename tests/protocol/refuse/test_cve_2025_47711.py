"""CVE-2025-47711, nbdkit: the status of as much as a request can name, of a disk with a longer extent there, failed
an assertion by one byte. Extents are cut to what a descriptor holds."""

from __future__ import annotations

import struct

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import BLOCK_STATUS, HUGE, REQ_ONE, STATUS, STATUS_EXT, Enter


@pytest.mark.parametrize("flags", [0, REQ_ONE])
@pytest.mark.parametrize("offset", [0, 1, 512, 1 << 32, HUGE - 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFE, 0xFFFF0000, 0x80000000, 1])
def test_the_longest_question(enter: Enter, offset: int, length: int, flags: int) -> None:
    client = enter(Style.STRUCTURED, "huge", ["base:allocation"])
    answer = client.do(BLOCK_STATUS, offset, length, flags=flags)
    [(kind, payload)] = answer.chunks
    extents = list(struct.iter_unpack(">II", payload[4:]))
    assert (kind, answer.error) == (STATUS, 0)
    assert all(0 < extent for extent, _ in extents)
    assert sum(extent for extent, _ in extents[:-1]) < length
    assert not flags or (len(extents) == 1 and extents[0][0] <= length)


@pytest.mark.parametrize("length", [HUGE, 1 << 32, (1 << 32) + 1, HUGE - 1])
def test_the_longest_question_of_64_bits(enter: Enter, length: int) -> None:
    client = enter(Style.EXTENDED, "huge", ["base:allocation"])
    answer = client.do(BLOCK_STATUS, 0, length)
    [(kind, payload)] = answer.chunks
    assert (kind, answer.error) == (STATUS_EXT, 0)
    assert struct.unpack_from(">II", payload) == (1, (len(payload) - 8) // 16)
