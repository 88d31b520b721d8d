"""``image resize``: another size for a disk."""

from __future__ import annotations

import re

import click

from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.format import GrowsPreallocated, HasClusters, Progress, no_progress, preallocate
from nbdserver.graph import reach
from nbdserver.image import wording
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import (
    file_argument,
    format_option,
    output_option,
    parse_size,
    progress_option,
    quiet_option,
    warn,
)
from nbdserver.image.progress import progress
from nbdserver.layer import Layer, finish


class _Command(click.Command):
    """Takes "-1G" for a size, not for options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        sizes = [arg for arg in args if re.match(r"-\d", arg)]
        return super().parse_args(ctx, [arg for arg in args if arg not in sizes] + (["--", *sizes] if sizes else []))


@click.command("resize", cls=_Command, short_help="Change the size of a disk.")
@file_argument
@click.argument("size", metavar="[+|-]SIZE")
@format_option
@click.option("--shrink", is_flag=True, help="Allow the disk to become smaller: what is behind its new end is lost.")
@click.option(
    "--preallocation",
    type=click.Choice(["off", "metadata", "falloc", "full"]),
    default="off",
    show_default=True,
    help="What is there of the new part from the beginning.",
)
@output_option
@progress_option
@quiet_option
@access_options
def command(
    *,
    path: str,
    size: str,
    format: str | None,
    shrink: bool,
    preallocation: str,
    as_json: bool,
    wants_progress: bool,
    quiet: bool,
    access: Access,
) -> None:
    """Make a disk as large as SIZE, or larger (+SIZE) or smaller (-SIZE) by that much. What is new reads as zeroes."""
    try:
        number = parse_size(size[1:] if size.startswith(("+", "-")) else size)
    except ValueError as error:
        raise click.BadParameter(f"{size!r} is not {error}", param_hint="SIZE") from error
    with access.images() as images:
        path, format = access.named(images, path, format)
        layer = images.open(path, format, read_only=False)
        if format is None and not isinstance(layer, HasClusters):
            warn(f"{path} was probed as {layer.type}; better say so: -f {layer.type}")
        wanted = layer.size + number if size[0] == "+" else layer.size - number if size[0] == "-" else number
        _check(layer, path, wanted, shrink=shrink, preallocation=preallocation)
        with progress("preallocating", wanted=wants_progress, quiet=quiet) as tell:
            try:
                resize(layer, wanted, preallocation, tell)
            except (RequestError, OSError) as error:
                raise ImageError(f"cannot be resized: {error}", path=path) from error
        found = layer.size
    if as_json:
        click.echo(wording.as_json({"filename": path, "virtual-size": found}))
    elif not quiet:
        click.echo("Image resized.")


def _check(layer: Layer, path: str, size: int, *, shrink: bool, preallocation: str) -> None:
    if size <= 0:
        raise ImageError("the new size must be positive", path=path)
    if size <= layer.size and preallocation != "off":
        raise ConfigError("only what a disk grows by can be preallocated", file=path, key="preallocation")
    if preallocation == "metadata" and not isinstance(layer, GrowsPreallocated):
        raise ConfigError("tables cannot be made for what a disk grows by: try falloc", file=path, key="preallocation")
    if size < layer.size and not shrink:
        raise ImageError(
            f"would become smaller, and what is behind byte {size} would be lost; if that is meant, say --shrink",
            path=path,
        )


def resize(layer: Layer, size: int, preallocation: str = "off", progress: Progress = no_progress) -> None:
    """Resize an open image, durably. Raises RequestError, OSError, ImageError."""
    before = layer.size
    if isinstance(layer, GrowsPreallocated) and size > before:
        layer.grow(size, preallocation, progress)
    else:
        layer.resize(size)
        if preallocation != "off":
            # A format with clusters would only note that they are zeroes: for it to have them they must be written.
            written = preallocation == "full" or isinstance(layer, HasClusters)
            preallocate(reach(layer), before, size - before, written=written, progress=progress)
    finish(layer.flush())
