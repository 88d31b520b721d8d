"""CVE-2005-3534, nbd-server: a request as long as the buffer for replies left no room for the reply's header, which
was written past its end. Lengths around every size that a buffer might have are answered, refused, or end the
connection."""

from __future__ import annotations

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import EINVAL, MIB, READ, WRITE, Enter

LENGTHS = [size + more for size in (1 << 12, 1 << 16, MIB, 32 << 20) for more in (-28, -16, -1, 0, 1, 16, 28)]


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_reads_as_long_as_a_buffer(enter: Enter, style: Style) -> None:
    client = enter(style, "large")
    for length in LENGTHS:
        answer = client.do(READ, 0, length)
        assert (answer.error == 0) == (length <= 32 << 20)
        assert len(answer.data) == (0 if answer.error else length)


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_writes_as_long_as_a_buffer(enter: Enter, style: Style) -> None:
    client = enter(style, "large")
    for length in LENGTHS:
        if length <= 32 << 20:
            assert client.do(WRITE, 0, data=bytes(length)).error == 0


@pytest.mark.parametrize("command", [READ, WRITE])
def test_the_longest_length_there_is(enter: Enter, command: int) -> None:
    client = enter(name="large")
    client.issue(command, 0, 0xFFFFFFFF)
    assert command == WRITE or client.answer().error == EINVAL
    if command == WRITE:
        client.is_cut_off()
