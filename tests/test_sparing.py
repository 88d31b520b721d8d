"""A log that clients cannot flood."""

from __future__ import annotations

from nbdserver.limits import CLIENT_LINES_COUNT_MAX, CLIENT_LINES_PERIOD
from nbdserver.sparing import Sparing


def test_lines_beyond_a_number_in_a_time_are_left_out_and_counted() -> None:
    now = 0.0
    lines: list[str] = []
    log = Sparing(lines.append, clock=lambda: now)
    for number in range(CLIENT_LINES_COUNT_MAX + 7):
        log(str(number))
    assert lines == [str(number) for number in range(CLIENT_LINES_COUNT_MAX)]
    now = CLIENT_LINES_PERIOD
    log("again")
    assert lines[CLIENT_LINES_COUNT_MAX:] == ["7 more lines about clients were left out", "again"]
    now *= 3
    log("and again")
    assert lines[-1] == "and again"
    assert len(lines) == CLIENT_LINES_COUNT_MAX + 3
