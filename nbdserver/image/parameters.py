"""Options and values that the commands share, spelled as qemu-img spells them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final, TypeVar

import click

from nbdserver.errors import ConfigError
from nbdserver.limits import DISK_MAX

Command = TypeVar("Command", bound=Callable[..., Any])

#: The suffixes of sizes, and the powers of 1024 they stand for.
_POWERS: Final = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}


def parse_size(text: str) -> int:
    """Bytes, from "1048576", "0x100000", "1024k", "1M" or "1.5G". ValueError says what is allowed."""
    text = text.strip().lower()
    found = re.fullmatch(r"(0x[0-9a-f]{1,16})|(\d{1,20}(?:\.\d{1,20})?)([bkmgtpe]?)", text, re.ASCII)
    if found is None:
        raise ValueError("a number of bytes, with a suffix k, M, G, T, P or E for powers of 1024 if need be")
    power = _POWERS[found[3] or ""]
    size = Fraction(int(found[1], 16)) if found[1] else Fraction(found[2]) * 1024**power
    if power == 0 and size.denominator != 1:
        raise ValueError("a whole number of bytes")
    if size > DISK_MAX:
        raise ValueError(f"at most {DISK_MAX} bytes")
    return int(size)


def words(text: str) -> list[str]:
    """What commas separate; two of them are one that does not."""
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",") if word]


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(f"{value!r} is not {error}", param, ctx)


class Format(click.ParamType):  # type: ignore[type-arg]
    """The name of an image format."""

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from nbdserver.image.opening import layer_type

        try:
            layer_type(str(value))
        except ConfigError as error:
            self.fail(error.message, param, ctx)
        return str(value)


SIZE: Final = Size()
FORMAT: Final = Format()

#: How files are used: `nbdserver.extent.FileMode`.
CACHE: Final = click.Choice(["writeback", "writethrough", "none", "directsync", "unsafe"])

file_argument = click.argument("path", metavar="FILE")

format_option = click.option(
    "-f", "--format", type=FORMAT, metavar="FMT", help="The format of FILE.  [default: what its first bytes say]"
)

force_share_option = click.option(
    "-U", "--force-share", is_flag=True, help="Open images even if another process is writing them."
)

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")

progress_option = click.option(
    "-p", "--progress", "wants_progress", is_flag=True, help="Show progress on stderr, even if that is no terminal."
)


def cache_option(*names: str) -> Callable[[Command], Command]:
    """Take qemu-img's cache modes, of what is read and of what is synced all the same."""
    words = "Taken for qemu-img's sake: files are read through the page cache, and synced as it does by default."
    return click.option(*names, type=CACHE, help=words, expose_value=False)


rate_option = click.option("-r", "--rate-limit", type=SIZE, metavar="RATE", help="Bytes a second, at most.")

roots_option = click.option(
    "--root",
    "roots",
    multiple=True,
    metavar="DIR",
    help="A directory in which images may name files (their backing files), besides their own. May be given several "
    "times.",
)


def warn(message: str) -> None:
    """Say something on stderr that is no error."""
    click.echo(f"nbdserver: warning: {message}", err=True)


def output_option(command: Command) -> Command:
    """Give a command ``--json`` and its other spelling, ``--output json``, as the keyword ``as_json``."""

    @click.option("--json", "is_json", is_flag=True, help="Print JSON, with QEMU's field names.")
    @click.option("--output", type=click.Choice(["human", "json"]), default="human", help="The same as --json, or not.")
    @functools.wraps(command)
    def wrapped(*args: Any, is_json: bool, output: str, **kwargs: Any) -> Any:
        return command(*args, as_json=is_json or output == "json", **kwargs)

    return wrapped  # type: ignore[return-value]
