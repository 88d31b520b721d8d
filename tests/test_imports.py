"""Imports go one way: layers -> contract -> standard library; only the server imports the engine."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdserver

ROOT = Path(nbdserver.__path__[0]).parent

#: What layers may import of ``nbdserver``. Of the graph: ``attach``.
CONTRACT = {"layer", "extent", "request", "graph", "format"}
CONTRACT |= {"blocks", "copier", "flags", "permissions", "errors", "limits", "ranges"}

#: What may lie inside images of other formats, whose layers so need it.
EMBEDDED = ("layers.luks",)

#: What layers may import besides: the decompressor that qcow2 needs.
PACKAGES = {"cryptography", "zstandard"}

ENGINE = "nbdserver._engine"
ENGINE_USERS = {"nbdserver.server"}


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "engine" not in path.parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it; names from a package count as its modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            if node.module in {"nbdserver", "layers"}:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("path", modules("layers"), ids=module_name)
def test_layers_import_the_contract_and_their_own_folder(path: Path) -> None:
    folder = ".".join(module_name(path).split(".")[:2])
    for module in imports(path):
        package, _, rest = module.partition(".")
        assert (
            is_standard(module)
            or package in PACKAGES
            or (package == "nbdserver" and rest.partition(".")[0] in CONTRACT)
            or module == folder
            or module.startswith((f"{folder}.", "layers.ondisk", *EMBEDDED))
        ), f"{path.name} imports {module}"


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_the_contract_imports_the_contract_and_the_standard_library(name: str) -> None:
    path = ROOT / "nbdserver" / f"{name}.py"
    for module in imports(path) if path.exists() else ():
        package, _, rest = module.partition(".")
        assert is_standard(module) or (package == "nbdserver" and rest in CONTRACT), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", modules("nbdserver"), ids=module_name)
def test_only_the_server_imports_the_engine(path: Path) -> None:
    if module_name(path) not in ENGINE_USERS:
        assert ENGINE not in set(imports(path))
