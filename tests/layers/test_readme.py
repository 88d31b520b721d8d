"""The layers that ``layers/README.md`` teaches by: taken out of it and run."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import layers
from layers.memory import Memory
from nbdserver import registry
from nbdserver.layer import Layer
from nbdserver.reference import Reference, open_stack

README = Path(layers.__path__[0]) / "README.md"


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tree with the README's files in it, whose layers are found."""
    for name, source in re.findall(r"```python\n# (\S+)\n(.*?)```", README.read_text(), re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(layers, "__path__", [*layers.__path__, str(tmp_path / "layers")])
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        del sys.modules[module]
    registry.layer_type.cache_clear()


def test_a_layer_is_written_in_40_lines(examples: Path) -> None:
    for path in sorted((examples / "layers").iterdir()):
        code = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(code) <= 40, path.name


def test_the_test_of_the_data_layer_passes(examples: Path) -> None:
    tests = runpy.run_path(str(examples / "tests/layers/test_xor.py"))
    test: Callable[[], None] = tests["test_what_is_written_is_read_and_lies_below_changed"]
    test()


def test_the_data_layer_zeroes_by_writing(examples: Path) -> None:
    below = Memory(100)
    with open_stack(registry.build("xor", {"file": below, "key": 1})) as export:
        export.zero(10, 5)
        assert export.read(10, 5) == bytes(5)
        assert Reference(below).read(9, 7) == b"\0\1\1\1\1\1\0"


def test_the_mapping_layer(examples: Path) -> None:
    parts: list[Layer] = [Memory(10), Memory(20), Memory(30)]
    layer = registry.build("join", {"parts": list(parts)})
    with open_stack(layer) as export:
        assert export.size == 60
        export.write(5, b"0123456789" * 3)
        assert export.read(4, 32) == b"\0" + b"0123456789" * 3 + b"\0"
        assert export.read(60, 0) == b""
        assert Reference(parts[1]).read(0, 20) == b"56789012345678901234"
        roots = [edge for _, edge in layer.children()]
        assert list(layer.translate(roots[1], 5, 10)) == [(15, 10)]
