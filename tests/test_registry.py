"""Layers by name: finding them, and making them of keys."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest

import layers
from layers.file import File
from layers.memory import Memory
from layers.raw import Raw
from nbdserver import registry
from nbdserver.errors import ConfigError
from nbdserver.extent import Size
from nbdserver.layer import Layer
from nbdserver.reference import open_stack
from nbdserver.registry import Where, build, layer_type, names

Drop = Callable[[str, str], None]


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drop]:
    """``drop(name, source)``: one more file among the layers."""
    monkeypatch.setattr(layers, "__path__", [*layers.__path__, str(tmp_path)])
    before = set(sys.modules)

    def drop(name: str, source: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    yield drop
    for module in set(sys.modules) - before:
        del sys.modules[module]
    layer_type.cache_clear()


def test_a_layer_is_called_as_its_file_is() -> None:
    assert {"file", "memory", "raw"} <= set(names())
    assert (layer_type("file"), layer_type("memory"), layer_type("raw")) == (File, Memory, Raw)
    assert (File.type, Memory.type, Raw.type) == ("file", "memory", "raw")


def test_what_is_no_layer_is_not_listed() -> None:
    assert "ondisk" not in names()
    assert not [name for name in names() if name.startswith("_")]


def test_every_layer_of_the_tree_keeps_the_contract() -> None:
    for name in names():
        assert issubclass(layer_type(name), Layer)


def test_an_unknown_layer_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"there is no layer 'memmory'; did you mean 'memory'\? There are: .*file, "):
        layer_type("memmory")


@pytest.mark.parametrize("name", ["", "ondisk", "../raw", "raw.Raw", "_x", "RAW"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no layer"):
        layer_type(name)


SHOUT = """
    import dataclasses
    from nbdserver.layer import Layer
    from nbdserver.request import Request

    @dataclasses.dataclass(eq=False)
    class {name}(Layer):
        file: Layer

        @property
        def size(self):
            return self.file.size

        def read(self, request: Request) -> None:
            self.file.read(request)
            request.vector.fill(request.vector.tobytes().upper())
"""


def test_a_new_layer_is_a_new_file_and_no_edit(drop: Drop, disk: Path) -> None:
    drop("shout_loud.py", SHOUT.format(name="ShoutLoud"))
    assert "shout-loud" in names()
    layer = build("shout-loud", {"file": build("file", {"path": str(disk)})})
    with open_stack(layer) as export:
        assert export.read(0, 4) == b"DDDD"
    assert layer.type == "shout-loud"


def test_a_large_layer_is_a_folder(drop: Drop) -> None:
    drop("loud/layer.py", SHOUT.format(name="Loud"))
    drop("loud/__init__.py", "from layers.loud.layer import Loud as Loud")
    assert layer_type("loud").__name__ == "Loud"


def test_importing_is_left_until_a_layer_is_asked_for(drop: Drop) -> None:
    drop("broken.py", "raise RuntimeError('imported')")
    assert "broken" in names()
    with pytest.raises(RuntimeError, match="imported"):
        layer_type("broken")


def test_a_file_without_its_class_is_refused(drop: Drop) -> None:
    drop("some_layer.py", "from nbdserver.layer import Layer")
    with pytest.raises(ConfigError, match=r"layers.some_layer has no class 'SomeLayer' derived from Layer"):
        layer_type("some-layer")


@pytest.mark.parametrize("decorator", ["", "@dataclasses.dataclass", "@dataclasses.dataclass(order=True)"])
def test_a_class_that_is_no_dataclass_without_eq_is_told_how_to_mend_it(drop: Drop, decorator: str) -> None:
    drop("odd.py", f"import dataclasses\nfrom nbdserver.layer import Layer\n{decorator}\nclass Odd(Layer):\n    pass\n")
    with pytest.raises(ConfigError, match=r"decorate the class Odd with @dataclasses.dataclass\(eq=False\)"):
        layer_type("odd")


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``entry("mine = package.module:Mine")``: another package's entry point."""

    def entry(line: str) -> None:
        name, _, value = line.partition(" = ")
        points = (EntryPoint(name, value, registry.GROUP),)
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else ())

    return entry


@dataclasses.dataclass(eq=False)
class Foreign(Layer):
    """Another package's layer, with a key of every kind."""

    file: Layer
    path: Path = Path(".")
    count: int = 0
    rate: float = 0.0
    big_size: Size | None = None
    mode: Literal["fast", "safe"] = "fast"
    others: list[Layer] = dataclasses.field(default_factory=list)
    on: bool = False


def test_other_packages_add_layers(entry: Callable[[str], None]) -> None:
    entry(f"my-own = {__name__}:Foreign")
    assert "my-own" in names()
    assert layer_type("my-own") is Foreign
    assert Foreign.type == "my-own"
    layer_type.cache_clear()


def test_an_entry_point_that_is_no_layer_is_refused(entry: Callable[[str], None]) -> None:
    entry(f"my-own = {__name__}:names")
    with pytest.raises(ConfigError, match=r"no class derived from nbdserver.layer.Layer"):
        layer_type("my-own")


# -- keys ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(entry: Callable[[str], None]) -> Iterator[Callable[..., Foreign]]:
    entry(f"foreign = {__name__}:Foreign")

    def make(**keys: object) -> Foreign:
        layer = build("foreign", {"file": Memory(1), **keys}, Where("exports.toml", "export.disk"))
        assert isinstance(layer, Foreign)
        return layer

    yield make
    layer_type.cache_clear()


def test_keys_become_fields(foreign: Callable[..., Foreign]) -> None:
    other = Memory(2)
    layer = foreign(path="/x", count=3, rate=2, mode="safe", others=[other], on=True, **{"big-size": "2M"})
    assert (layer.path, layer.count, layer.rate, layer.mode) == (Path("/x"), 3, 2, "safe")
    assert (layer.others, layer.on, layer.big_size) == ([other], True, 2 << 20)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("file", "disk.raw", "a layer"),
        ("path", 3, "a path"),
        ("count", "3", "an integer"),
        ("count", True, "an integer"),
        ("rate", "fast", "a number"),
        ("rate", False, "a number"),
        ("big-size", "2Q", 'a size in bytes (an integer from 0, or a string such as "64K", "1G")'),
        ("mode", "slow", "'fast' or 'safe'"),
        ("others", Memory(1), "a list, each a layer"),
        ("others", ["x"], "a layer"),
        ("on", 1, "true or false"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(
    foreign: Callable[..., Foreign], key: str, value: object, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        foreign(**{key: value})
    assert str(caught.value) == f"exports.toml: [export.disk]: {key}: found {value!r}, allowed is {allowed}"


def test_an_unknown_key_is_refused_with_those_there_are(foreign: Callable[..., Foreign]) -> None:
    with pytest.raises(ConfigError, match=r"\[export.disk\]: pth: .* did you mean 'path'\? There are: .*file, path, "):
        foreign(pth="x")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="path: missing: the layer 'file' needs a string") as caught:
        build("file", {}, Where("exports.toml", "export.disk"))
    assert (caught.value.file, caught.value.table, caught.value.key) == ("exports.toml", "export.disk", "path")


@dataclasses.dataclass(eq=False)
class Taken(Layer):
    """A layer with a key whose name is taken in its class."""

    children_: list[Layer]
    size_limit_: int = 0


def test_an_underscore_after_a_field_is_no_part_of_its_key(entry: Callable[[str], None]) -> None:
    entry(f"taken = {__name__}:Taken")
    child = Memory(1)
    layer = build("taken", {"children": [child], "size-limit": 3})
    assert isinstance(layer, Taken) and (layer.children_, layer.size_limit_) == ([child], 3)
    assert list(layer.children()) == [("children_.0", child)]
    with pytest.raises(ConfigError, match="children: missing"):
        build("taken", {})
    layer_type.cache_clear()


def test_an_unknown_type_names_the_table() -> None:
    with pytest.raises(ConfigError, match=r"exports.toml: \[export.disk\]: there is no layer 'x'"):
        build("x", {}, Where("exports.toml", "export.disk"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (512, 512),
        ("512", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("1KiB", 1024),
        ("1M", 1 << 20),
        ("3G", 3 << 30),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("1E", 1 << 60),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert registry.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", -1, "1.5G", "1 G", "1KB", "0x10", 1.5, True, None, "1G\n", "\u0661", "9" * 21, "9" * 5000]
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="a size in bytes"):
        registry.parse_size(text)
