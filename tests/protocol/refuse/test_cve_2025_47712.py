"""CVE-2025-47712, nbdkit: rounding the length of a status request to blocks went past 32 bits, near 4 GiB, and became
none. Through filters and whatever the blocks are, every question gets extents, whole numbers of them."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from layers.detect_zeroes import DetectZeroes
from layers.memory import Memory
from layers.raw import Raw
from layers.throttle import Throttle
from nbdserver.handshake import Style
from nbdserver.testing import NbdServers
from tests.protocol.kit import BLOCK_STATUS, HUGE, REQ_ONE, STATUS, Client


@pytest.mark.parametrize("block", [1, 512, 4096, 65536])
@pytest.mark.parametrize("flags", [0, REQ_ONE])
def test_questions_near_4_gib(nbd_server: NbdServers, block: int, flags: int) -> None:
    stack = Throttle(file=DetectZeroes(file=Raw(file=Memory(HUGE), offset=4096, size=8 << 32)))
    server, uri = nbd_server.start(stack)
    export = server.exports[""]
    export.info = dataclasses.replace(export.info, minimum_block=block, preferred_block=65536)
    for style in (Style.STRUCTURED, Style.EXTENDED):
        client = Client(uri).enter(style, contexts=["base:allocation"])
        for length in ((1 << 32) - block, (1 << 32) - 65536, (1 << 31) + block, block):
            for offset in (0, block, (1 << 32) - block, (8 << 32) - length):
                answer = client.do(BLOCK_STATUS, offset, length & 0xFFFFFFFF, flags=flags)
                [(kind, payload)] = answer.chunks
                skip, layout = (4, ">II") if kind == STATUS else (8, ">QQ")
                extents = [extent for extent, _ in struct.iter_unpack(layout, payload[skip:])]
                assert extents and all(extent > 0 and extent % block == 0 for extent in extents)
                assert not flags or extents[0] <= length
