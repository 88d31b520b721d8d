"""``docs/PROTOCOL.md``: the tests that it names exist, and it names every refusal."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = (TESTS.parent / "docs" / "PROTOCOL.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", DOCUMENT)))


def test_every_test_that_is_named_exists() -> None:
    assert len(NAMED) > 100
    for file, function in NAMED:
        source = (TESTS.parent if file.startswith("tests/") else TESTS) / file
        assert source.is_file(), f"there is no {file}"
        assert not function or re.search(rf"^def {function}\(", source.read_text(), re.MULTILINE), f"{file}::{function}"


def test_every_statement_is_held_by_a_test() -> None:
    rows = [row for row in DOCUMENT.splitlines() if row.startswith("| ") and not row.startswith(("| | ", "| ---"))]
    assert len(rows) > 80
    for row in rows:
        assert re.search(r"\.py(::\w+)?`[^|]*\|$", row), row


def test_every_refusal_is_named() -> None:
    files = {f"protocol/refuse/{path.name}" for path in (TESTS / "protocol" / "refuse").glob("test_*.py")}
    assert files - {file for file, _ in NAMED} == set()
