"""New images: ``-o`` options into what a format's `Creates` takes, and the making itself."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from nbdserver import registry
from nbdserver.errors import ConfigError
from nbdserver.extent import Size
from nbdserver.files import resolve_name
from nbdserver.format import Creates, Progress, grow, no_progress, preallocate
from nbdserver.graph import reach
from nbdserver.image.allocation import SECTOR
from nbdserver.image.opening import EXACT, Images, fitting, layer_type
from nbdserver.image.parameters import parse_size, words
from nbdserver.layer import Layer

#: QEMU's words for yes and no.
BOOLEANS: Final = {
    "on": True,
    "yes": True,
    "true": True,
    "y": True,
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}

HELP: Final = ("help", "?")

#: What overlays are, and how their files end while they are being made.
OVERLAY: Final = "qcow2"
UNFINISHED_SUFFIX: Final = ".new"


def creator(format: str) -> Creates:
    """What makes images of ``format``. Raises ConfigError."""
    cls = layer_type(format)
    if not isinstance(cls, Creates):
        raise ConfigError(f"images of the format {format!r} cannot be made")
    return cls


def wants_help(texts: Sequence[str]) -> bool:
    """Whether ``-o help`` was given."""
    return any(key in HELP and value is None for text in texts for key, value in _split(text))


def parse_options(format: str, texts: Sequence[str], given: Mapping[str, str | None]) -> Any:
    """The creation options of a format, from ``-o`` texts ("key=value,key=value", a comma in a value being doubled)
    and from ``given``, options that other letters stand for (None: not given). Raises ConfigError: key, found, allowed.
    """
    options = creator(format).CreateOptions
    fields = dict(_fields(options))
    hints = typing.get_type_hints(options, include_extras=True)
    values: dict[str, object] = {}
    words = [(key, value) for text in texts for key, value in _split(text)]
    words += [(key, value) for key, value in given.items() if value is not None]
    for key, value in words:
        field = fields.get(key)
        if field is None:
            near = difflib.get_close_matches(key, fields, 3)
            guess = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"{format} has no such option; {guess}There are: {', '.join(sorted(fields))}", key=key)
        values[field.name] = _convert(key, value, hints[field.name])
    return options(**values)


def in_words(format: str) -> list[str]:
    """The options of a format, as ``-o help`` prints them."""
    options = creator(format).CreateOptions
    hints = typing.get_type_hints(options, include_extras=True)
    docs = registry.field_docs(options)
    rows = {f"{name}=<{_kind(hints[field.name])}>": docs.get(field.name, "") for name, field in _fields(options)}
    rows["size=<size>"] = "The size of the disk."
    width = max(map(len, rows))
    return [f"Supported {format} options:", *(f"  {name:<{width}} - {rows[name]}" for name in sorted(rows))]


def shown(options: Any, size: int) -> str:
    """The options of a new image as "key=value key=value", as qemu-img shows them."""
    words = {}
    if not any(name == "compat" for name, _ in _fields(type(options))):
        words["size"] = str(size)
    for name, field in _fields(type(options)):
        if name == "compat":
            words["size"] = str(size)
        value = getattr(options, field.name)
        if value is not None and not (field.metadata.get("tacit") and value == field.default):
            words[name] = ("off", "on")[value] if isinstance(value, bool) else str(value)
    return " ".join(f"{name}={word}" for name, word in words.items())


def backing_of(path: str, options: Any) -> tuple[str, str] | None:
    """(path, format) of the backing file that a new image at ``path`` is to name, if it is. Raises ConfigError,
    ImageError."""
    name: str | None = getattr(options, "backing_file", None)
    if name is None:
        return None
    if options.backing_fmt is None:
        raise ConfigError("the format of the backing file must be said (-F)", file=path, key="backing_fmt")
    return resolve_name(name, path), options.backing_fmt


class Made(NamedTuple):
    """The files of a new image, open and locked. ``data_file``: the external one, if there is."""

    file: Layer
    data_file: Layer | None


def make(
    images: Images,
    path: str,
    format: str,
    size: int,
    options: Any,
    *,
    cache: str = "writeback",
    progress: Progress = no_progress,
) -> Made:
    """Make an image; what was at ``path`` is gone. Raises ImageError, ConfigError, OSError."""
    make_image = creator(format)
    make_image.measure(size, options, ())  # which refuses what is too large, before anything is lost
    key: str | None = getattr(options, "encrypt_key_secret", None)
    if key is not None:
        images.opener(read_only=False).named_secret(key)  # and so do secrets that are not there
        images.keys.set(path, key)
    data_file = _data_file(images, size, options, cache, progress)
    file = images.empty_file(path, cache=cache)
    make_image.create(file, size, options, opener=images.opener(read_only=False), progress=progress)
    return Made(file, data_file)


def _data_file(images: Images, size: int, options: Any, cache: str, progress: Progress) -> Layer | None:
    """The external data file that the options ask for; its name is relative to the working directory, as in QEMU."""
    name: str | None = getattr(options, "data_file", None)
    if name is None:
        return None
    file = images.empty_file(resolve_name(name, None, beside=False), cache=cache)
    grow(file, size)
    if options.preallocation in ("falloc", "full"):
        preallocate(reach(file), 0, size, written=options.preallocation == "full", progress=progress)
    return file


def make_overlay(path: str, size: int, backing: str, backing_format: str, *, cache: str = "writeback") -> None:
    """Make an empty overlay of ``size`` bytes (which are rounded up to sectors) on the image ``backing``, a path. It
    appears at ``path`` when it is whole, and durable unless ``cache`` is "unsafe", and replaces nothing. Raises
    ImageError, ConfigError, OSError: FileExistsError."""
    unfinished = path + UNFINISHED_SUFFIX
    options = creator(OVERLAY).CreateOptions(backing_file=backing, backing_fmt=backing_format)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(unfinished)  # left by one who was killed; not emptied, for it may have got its other name
    with Images() as images:
        make(images, unfinished, OVERLAY, -(-size // SECTOR) * SECTOR, options, cache=cache)
        try:
            os.link(unfinished, path)
        finally:
            os.unlink(unfinished)
    if cache != "unsafe":
        sync_directory(os.path.dirname(path) or ".")


def sync_directory(path: str) -> None:
    """Make what is in the directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_new(images: Images, made: Made, format: str, keys: Mapping[str, object]) -> Layer:
    """Open the image that `make` has made, for writing."""
    images.hand_over(made.file)
    if made.data_file is not None:
        images.hand_over(made.data_file)
        keys = {"data_file": made.data_file, **keys}
    if made.file.filename is not None:
        keys = {**images.keys.of(made.file.filename), **keys}
    wanted = fitting(format, {**keys, **EXACT})
    return images.enter(registry.build(format, {"file": made.file, **wanted}), read_only=False)


# -- the options ---------------------------------------------------------------------------------------------------


def _split(text: str) -> Iterator[tuple[str, str | None]]:
    for word in words(text):
        key, equals, value = word.partition("=")
        yield key, value if equals else None


def _fields(options: type[Any]) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(name as of an option, field) pairs."""
    return ((field.metadata.get("option", field.name), field) for field in dataclasses.fields(options))


def _convert(key: str, value: str | None, hint: Any) -> object:
    kind = _bare(hint)
    if value is None:
        if kind is not bool:
            raise ConfigError("a value is missing", key=key)
        return True
    if kind is bool:
        if value.lower() not in BOOLEANS:
            raise ConfigError(f"found {value!r}, allowed is on or off", key=key)
        return BOOLEANS[value.lower()]
    try:
        if kind == Size:
            return parse_size(value)
        if kind is int:
            return int(value)
    except ValueError as error:
        wanted = error if kind == Size else "an integer"
        raise ConfigError(f"found {value!r}, allowed is {wanted}", key=key) from error
    if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
        raise ConfigError(f"found {value!r}, allowed is {' or '.join(typing.get_args(kind))}", key=key)
    return value


def _bare(hint: Any) -> Any:
    """What an option is if it is given: its type, without None."""
    if hint == Size or typing.get_origin(hint) is Literal:
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if kinds else hint


def _kind(hint: Any) -> str:
    kind = _bare(hint)
    if kind == Size:
        return "size"
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return {bool: "on|off", int: "num"}.get(kind, "str")
