"""What was measured, told: a table in Markdown, and JSON."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.amounts import Amount
from tests.bench.contest import Measured, Ratio, cpu_over_best, rate_over_best, ratio
from tests.bench.rows import Wanted


@dataclass(frozen=True)
class Compared:
    """A row of the comparison: ours, and the peers that were best."""

    name: str
    ours: Measured
    peers: Sequence[Measured]
    wanted: Wanted | None = None

    @property
    def rate(self) -> Ratio:
        return rate_over_best(self.ours, self.peers)

    @property
    def cpu(self) -> Ratio:
        return cpu_over_best(self.ours, self.peers)

    def is_met(self) -> bool:
        return self.wanted is None or (self.rate.median >= self.wanted.rate and self.cpu.median <= self.wanted.cpu)


@dataclass(frozen=True)
class Grown:
    """A row of growth: the points, the first of which the others are held against."""

    name: str
    points: Sequence[Measured]
    rate_min: float | None = None

    def rates(self) -> list[Ratio]:
        return [ratio(point, self.points[0], lambda sample: sample.rate) for point in self.points]

    def cpus(self) -> list[Ratio]:
        return [ratio(point, self.points[0], lambda sample: sample.cpu) for point in self.points]

    def is_met(self) -> bool:
        return self.rate_min is None or all(ratio.median >= self.rate_min for ratio in self.rates())


@dataclass
class Results:
    """All of one run."""

    rounds: int
    seconds: float
    compared: list[Compared] = field(default_factory=list)
    grown: list[Grown] = field(default_factory=list)
    amounts: list[Amount] = field(default_factory=list)

    def are_met(self) -> bool:
        rows = [row.is_met() for row in self.compared] + [row.is_met() for row in self.grown]
        return all([*rows, *(amount.is_met() for amount in self.amounts)])


def markdown(results: Results) -> str:
    """The tables. What is wanted stands beside what was found, in bold where it is not met."""
    parts = [f"{machine()}. Medians of {results.rounds} alternating rounds (least and greatest in brackets)."]
    if results.compared:
        head = ("row", "rate", "wanted", "CPU per request", "wanted", "over", "ours", "CPU per request")
        parts.append(_table(head, map(_compared_line, results.compared)))
    if results.grown:
        columns = ("growth", "point", "rate", "wanted", "CPU per request", "ours", "CPU per request")
        parts.append(_table(columns, (line for grown in results.grown for line in _grown_lines(grown))))
    if results.amounts:
        parts.append(_table(("amount", "found", "at most"), map(_amount_line, results.amounts)))
    return "\n\n".join(parts) + "\n"


def summary(row: Compared) -> str:
    """A row in a line, for who watches."""
    verdict = "" if row.is_met() else "; not what is wanted"
    return f"rate {_ratio(row.rate)}, CPU {_ratio(row.cpu)}, over {row.rate.to}{verdict}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _compared_line(row: Compared) -> list[str]:
    rate, cpu, wanted = row.rate, row.cpu, row.wanted
    over = rate.to if rate.to == cpu.to else f"{rate.to}; CPU: {cpu.to}"
    return [
        row.name,
        _bold(_ratio(rate), wanted is not None and rate.median < wanted.rate),
        f">= {wanted.rate:g}" if wanted else "",
        _bold(_ratio(cpu), wanted is not None and cpu.median > wanted.cpu),
        f"<= {wanted.cpu:g}" if wanted else "",
        over,
        *_absolute(row.ours),
    ]


def _grown_lines(grown: Grown) -> Iterable[list[str]]:
    for point, rate, cpu in zip(grown.points, grown.rates(), grown.cpus(), strict=True):
        is_first = point is grown.points[0]
        is_short = grown.rate_min is not None and rate.median < grown.rate_min
        yield [
            grown.name if is_first else "",
            point.name,
            "1" if is_first else _bold(_ratio(rate), is_short),
            f">= {grown.rate_min:.2f}" if grown.rate_min and not is_first else "",
            "1" if is_first else _ratio(cpu),
            *_absolute(point),
        ]


def _amount_line(amount: Amount) -> list[str]:
    found = f"{amount.value:.3g} {amount.unit}"
    return [
        amount.name,
        _bold(found, not amount.is_met()),
        f"{amount.maximum:g} {amount.unit}" if amount.maximum else "",
    ]


def _absolute(measured: Measured) -> tuple[str, str]:
    return f"{measured.rate:,.0f}/s", f"{measured.cpu * 1e6:.1f} us"


def _ratio(found: Ratio) -> str:
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def _bold(text: str, whether: bool) -> str:
    return f"**{text}**" if whether else text


def as_json(results: Results) -> dict[str, Any]:
    """The same, with every sample: rates in requests a second, CPU in seconds a request."""
    return {
        "machine": machine(),
        "rounds": results.rounds,
        "seconds": results.seconds,
        "compared": [
            {
                **asdict(row),
                "rate_over_best": asdict(row.rate),
                "cpu_over_best": asdict(row.cpu),
                "met": row.is_met(),
            }
            for row in results.compared
        ],
        "grown": [{**asdict(row), "met": row.is_met()} for row in results.grown],
        "amounts": [asdict(amount) for amount in results.amounts],
    }


#: How each tool is asked for its version, which is the first thing it says that looks like one.
_VERSIONS = {"qemu-nbd": "--version", "nbdkit": "--version", "nbd-server": "-V", "fio": "--version"}


def machine() -> str:
    """The kind of machine, and the versions of what ran on it."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    tools = [f"{tool} {_version(tool, option)}" for tool, option in _VERSIONS.items() if shutil.which(tool)]
    cpus = len(os.sched_getaffinity(0))
    name = model[1] if model else platform.machine()
    return f"{cpus} CPUs ({name}), Linux {platform.release().partition('-')[0]}; {', '.join(tools)}"


def _version(tool: str, option: str) -> str:
    done = subprocess.run([tool, option], capture_output=True, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "?"
