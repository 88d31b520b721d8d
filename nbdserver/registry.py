"""Layers by name: ``layers/copy_on_read.py`` is the layer ``copy-on-read``, and there is no list to keep.

A layer's *type* is the name of its file (or folder) in ``layers``, with hyphens for underscores; its class is the
`Layer` subclass in there that is called so too, case and separators aside: ``CopyOnRead``. Other packages add layers
through the entry-point group ``nbdserver.layers``, whose entries name the class: ``mine = "package.module:Mine"``.
Modules are imported when their layer is first asked for.

A class's fields are its keys in ``exports.toml``; `build` makes a layer of such keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, NoReturn

import layers
from nbdserver.errors import ConfigError, ImageError
from nbdserver.extent import FILE_MODE, FileMode, Size
from nbdserver.layer import Layer
from nbdserver.limits import SHOWN_COUNT_MAX, SIZE_DIGITS_COUNT_MAX

#: The entry-point group of other packages' layers.
GROUP: Final = "nbdserver.layers"

#: No keys but those a layer needs.
NO_KEYS: Final[Mapping[str, object]] = types.MappingProxyType({})

#: What lies in ``layers`` and is no layer.
NOT_LAYERS: Final = frozenset({"ondisk"})


def names() -> list[str]:
    """The types of all layers there are, in order; imports none of them."""
    own = (module.name for module in pkgutil.iter_modules(layers.__path__))
    here = {_hyphens(name) for name in own if not name.startswith("_") and name not in NOT_LAYERS}
    return sorted(here | {entry.name for entry in entry_points(group=GROUP)})


@functools.cache
def layer_type(name: str) -> type[Layer]:
    """The class of the layer called ``name``. Raises ConfigError."""
    if name not in names():
        raise ConfigError(f"there is no layer {name!r}; {_suggest(name, names())}")
    cls = _check(_find(name), name)
    cls.type = name
    return cls


def _find(name: str) -> Any:
    """What claims to be the layer's class: in this tree first, then in other packages."""
    module_name = f"{layers.__name__}.{name.replace('-', '_')}"
    if importlib.util.find_spec(module_name) is None:
        return next(entry for entry in entry_points(group=GROUP) if entry.name == name).load()
    wanted = name.replace("-", "")
    for key, value in vars(importlib.import_module(module_name)).items():
        if key.lower() == wanted and isinstance(value, type) and issubclass(value, Layer):
            return value
    raise ConfigError(f"{module_name} has no class {_camel(name)!r} derived from Layer")


def _check(cls: Any, name: str) -> type[Layer]:
    """Hold a layer's class to the contract, with words that say how to mend it."""
    if not (isinstance(cls, type) and issubclass(cls, Layer)):
        raise ConfigError(f"the layer {name!r} is {cls!r}, no class derived from nbdserver.layer.Layer")
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or parameters.eq:
        # With eq a layer would equal its twin and have no hash; the graph tells layers apart by identity.
        raise ConfigError(
            f"the layer {name!r}: decorate the class {cls.__name__} with @dataclasses.dataclass(eq=False)"
        )
    return cls


# -- building ------------------------------------------------------------------------------------------------------


class Where(NamedTuple):
    """Where in the configuration keys come from, for error messages."""

    file: str | None = None
    table: str | None = None


NOWHERE: Final = Where()


def build(type: str, keys: Mapping[str, object], where: Where = NOWHERE) -> Layer:
    """Make the layer ``type`` of its keys, children among them being layers already.

    Raises ConfigError naming table and key, what was found and what is allowed.
    """
    try:
        cls = layer_type(type)
    except ConfigError as error:
        raise ConfigError(error.message, file=where.file, table=where.table) from error
    fields = {key_of(field): field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in keys.items():
        field = fields.get(_hyphens(key))
        if field is None:
            _refuse(where, key, f"the layer {type!r} has no such key; {_suggest(key, list(fields))}")
        try:
            values[field.name] = convert(value, hints[field.name])
        except _Unfit as unfit:
            _refuse(where, key, f"found {_shown(value)}, allowed is {unfit}")
    for key, field in fields.items():
        if field.name not in values and _required(field):
            _refuse(where, key, f"missing: the layer {type!r} needs {_allowed(hints[field.name])}")
    return cls(**values)


def key_of(field: dataclasses.Field[Any]) -> str:
    """What a layer's field is called in configuration. A name that Python or `Layer` needs for something else has an
    underscore after it in the class (PEP 8), which is no part of the key: ``children_`` is ``children``."""
    return _hyphens(field.name.removesuffix("_"))


def field_docs(cls: type[Any]) -> dict[str, str]:
    """What the ``#:`` comments above the fields of a dataclass say."""
    try:
        lines = inspect.getsource(cls).splitlines()
    except (OSError, TypeError):
        return {}
    docs: dict[str, str] = {}
    comment: list[str] = []
    for line in map(str.strip, lines):
        if line.startswith("#:"):
            comment.append(line[2:].strip())
            continue
        field = re.match(r"(\w+)\s*:", line)
        if field and comment:
            docs[field[1]] = " ".join(comment)
        comment = []
    return docs


def image(path: str, format: str, mode: FileMode = FILE_MODE, keys: Mapping[str, object] = NO_KEYS) -> Layer:
    """The layers that read the image file at ``path`` of ``format``, used as ``mode`` says. ``keys``: more keys of the
    layer's. Raises ImageError, and ConfigError for the keys."""
    try:
        cls = layer_type(format)
    except ConfigError as error:
        raise ImageError(f"is a {format!r} image: {error.message}", path=path) from error
    required = [field.name for field in dataclasses.fields(cls) if field.init and _required(field)]
    if required != ["file"]:
        raise ImageError(f"the layer {format!r} is no image format (one needs a file and nothing else)", path=path)
    file = build("file", {"path": path, "cache": mode.cache, "aio": mode.aio})
    return build(format, {"file": file, **keys})


def has_key(cls: type[Layer], key: str) -> bool:
    """Whether a layer can be told ``key``."""
    return any(field.name == key for field in dataclasses.fields(cls) if field.init)


def convert(value: object, hint: Any) -> object:
    """``value`` as what a field annotated ``hint`` holds. ValueError says what is allowed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint == Size:
        return parse_size(value)
    if origin is typing.Annotated:
        return convert(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _convert_to_one_of(value, hint)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
    elif origin is list:
        if isinstance(value, list):
            return [convert(item, arguments[0]) for item in value]
        fits = False
    elif hint is Path:
        return Path(value) if isinstance(value, str) else _fit(isinstance(value, Path), value, hint)
    elif hint is str and isinstance(value, Path):
        return str(value)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, hint)
    return _fit(fits, value, hint)


_SIZE: Final = rf"(\d{{1,{SIZE_DIGITS_COUNT_MAX}}})(?:([KMGTPE])(?:iB)?)?"


def parse_size(value: object) -> int:
    """Bytes, from an int or from "4096", "64K", "64KiB", "1G": powers of 1024. ValueError says what is allowed."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(_SIZE, value, re.IGNORECASE | re.ASCII) if isinstance(value, str) else None
    if found is None:
        raise _Unfit(_allowed(Size))
    return int(found[1]) << 10 * " KMGTPE".index((found[2] or " ").upper())


class _Unfit(ValueError):
    """A value is not what a field holds; says what it does hold."""


def _fit(fits: bool, value: object, hint: Any) -> object:
    if not fits:
        raise _Unfit(_allowed(hint))
    return value


def _convert_to_one_of(value: object, hint: Any) -> object:
    for choice in typing.get_args(hint):
        try:
            return convert(value, choice)
        except _Unfit:
            pass
    raise _Unfit(_allowed(hint))


_WORDS: Final = {int: "an integer", str: "a string", bool: "true or false", float: "a number", Path: "a path"}


def _allowed(hint: Any) -> str:
    """A field's type in words."""
    if hint == Size:
        return 'a size in bytes (an integer from 0, or a string such as "64K", "1G")'
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _allowed(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_allowed(choice) for choice in arguments if choice is not type(None))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin is list:
        return f"a list, each {_allowed(arguments[0])}"
    if hint in _WORDS:
        return _WORDS[hint]
    return "a layer" if isinstance(hint, type) and issubclass(hint, Layer) else str(hint)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _refuse(where: Where, key: str, message: str) -> NoReturn:
    raise ConfigError(message, file=where.file, table=where.table, key=key)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_COUNT_MAX else text[:SHOWN_COUNT_MAX] + "..."


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 3)
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}There are: {', '.join(known) or 'none'}"


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-"))
