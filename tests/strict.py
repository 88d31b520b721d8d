"""A pytest plugin for scripts/test: nothing is skipped, the seed is shown, and a full run leaves its result behind.

Loaded with ``-p tests.strict``; a plain ``pytest`` run still shows a missing tool as a skip with its reason.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.serving import BACKENDS

#: What comes before the recorded result in the file; kept when a new result is written.
RESULT_HEADING = "## The last full run\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-result", metavar="FILE", help="write date, commit and counts of this run into FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Run(config.getoption("--record-result")))


def pytest_report_header() -> str:
    amount = "full" if os.environ.get("NBDSERVER_FULL") else "short"
    return (
        f"nbdserver: seed {os.environ.get('NBDSERVER_SEED', '1')}, {amount} run, skips are failures, "
        f"backends: {', '.join(BACKENDS)}"
    )


class _Run:
    """Counts the outcomes of one run and turns skips into failures."""

    def __init__(self, record: str | None) -> None:
        self._record = record
        self._begin = time.monotonic()
        self._counts = {"passed": 0, "failed": 0}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.skipped and not hasattr(report, "wasxfail"):
            report.outcome = "failed"
            report.longrepr = f"skipped, and here nothing may be: {report.longrepr}"
        if report.failed:
            self._counts["failed"] += 1
        elif report.when == "call":
            self._counts["passed"] += 1
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        if report.skipped:
            report.outcome = "failed"
            report.longrepr = f"skipped, and here nothing may be: {report.longrepr}"
        return report

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self._record is None:
            return
        path = Path(self._record)
        text = path.read_text() if path.exists() else ""
        head = text.partition(RESULT_HEADING)[0]
        path.write_text(f"{head}{RESULT_HEADING}\n{self._result(exitstatus)}")

    def _result(self, exitstatus: int) -> str:
        minutes = (time.monotonic() - self._begin) / 60
        lines = (
            f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            f"- commit: {_commit()}",
            f"- outcome: {'passed' if exitstatus == 0 else 'FAILED'}: "
            + ", ".join(f"{count} {name}" for name, count in self._counts.items()),
            f"- seed: {os.environ.get('NBDSERVER_SEED', '1')}",
            f"- took: {minutes:.0f} minutes on {os.cpu_count()} CPUs, Linux {platform.release()}, "
            f"Python {platform.python_version()}",
        )
        return "\n".join(lines) + "\n"


def _commit() -> str:
    """The commit of the tree, and whether files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "none"
