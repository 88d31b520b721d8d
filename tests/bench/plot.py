"""The comparison as a picture: a line a row, rate and CPU time over the best peer's on a logarithmic scale. SVG 1.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from tests.bench.contest import Ratio
from tests.bench.report import Compared

WIDTH, LABELS, MARGIN = 900, 190, 20
LINE, HEAD, FOOT = 20, 50, 30
LOW, HIGH = 1 / 16, 16
RATE, CPU, TEXT, GRID = "#1f77b4", "#d95f02", "#333", "#ddd"


def svg(rows: Sequence[Compared]) -> str:
    """The picture of the rows."""
    height = HEAD + LINE * len(rows) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _legend(RATE, LABELS, "rate: the further right, the faster"),
        _legend(CPU, LABELS + 300, "server CPU per request: the further left, the cheaper"),
        *_grid(height),
    ]
    for number, row in enumerate(rows):
        y = HEAD + LINE * number + LINE / 2
        parts.append(_text(LABELS - 10, y + 4, row.name, "end"))
        parts += _mark(row.rate, y - 3, RATE) + _mark(row.cpu, y + 3, CPU)
    return "\n".join([*parts, "</svg>"]) + "\n"


def x_of(value: float) -> float:
    """Where a ratio stands; what is beyond the scale stands at its end."""
    part = math.log(min(max(value, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
    return LABELS + part * (WIDTH - LABELS - MARGIN)


def _grid(height: int) -> list[str]:
    parts = []
    for power in range(round(math.log2(LOW)), round(math.log2(HIGH)) + 1):
        x = x_of(2.0**power)
        stroke = TEXT if power == 0 else GRID
        parts.append(f'<line x1="{x:.1f}" y1="{HEAD}" x2="{x:.1f}" y2="{height - FOOT}" stroke="{stroke}"/>')
        label = "best peer" if power == 0 else f"1/{2**-power}" if power < 0 else f"{2**power}x"
        parts.append(_text(x, height - 10, label, "middle"))
    return parts


def _mark(found: Ratio, y: float, colour: str) -> list[str]:
    low, high = x_of(found.low), x_of(found.high)
    return [
        f'<line x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="{x_of(found.median):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>',
    ]


def _legend(colour: str, x: float, text: str) -> str:
    return f'<circle cx="{x}" cy="20" r="4" fill="{colour}"/>{_text(x + 10, 24, text, "start")}'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{TEXT}">{escape(text)}</text>'
