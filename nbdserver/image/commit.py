"""``image commit``: what an overlay holds, written into an image below it.

::

    overlay  [  B ][   ][ C ]           overlay  [    ][   ][   ]     emptied when what follows is durable
    backing  [ A      ]           ──>   backing  [A][B][A ][ C ]      grown if it is shorter

Killed at any moment, the overlay shows what it did: until all of the backing file is durable it holds everything
itself, and from then on what it gives up is there.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import NamedTuple

import click

from nbdserver.errors import ImageError, RequestError
from nbdserver.files import own_roots, resolve_name, within
from nbdserver.format import Empties, HasBacking, HasClusters, HasSnapshots, Progress, no_progress
from nbdserver.image import wording
from nbdserver.image.allocation import Run, runs
from nbdserver.image.copying import Copy, Range
from nbdserver.image.opening import ALONE, Images
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import (
    cache_option,
    file_argument,
    format_option,
    output_option,
    progress_option,
    quiet_option,
    rate_option,
    warn,
)
from nbdserver.image.progress import progress
from nbdserver.layer import Layer, finish
from nbdserver.limits import DEPTH_MAX


@click.command("commit", short_help="Write what an overlay holds into its backing file.")
@file_argument
@format_option
@click.option("-b", "--base", metavar="FILE", help="The image of the chain to write into; FILE is not emptied then.")
@click.option("-d", "--drop", is_flag=True, help="Do not empty FILE afterwards: faster, if it is to be deleted.")
@cache_option("-t", "--cache")
@rate_option
@output_option
@progress_option
@quiet_option
@access_options
def command(
    *,
    path: str,
    format: str | None,
    base: str | None,
    drop: bool,
    rate_limit: int | None,
    as_json: bool,
    wants_progress: bool,
    quiet: bool,
    access: Access,
) -> None:
    """Write what an overlay holds into its backing file, or into --base further down, and empty the overlay.

    Nobody else may use either meanwhile. Other overlays of the backing file become worthless, as do internal snapshots
    of this one: what they show through it has changed.
    """
    with access.images() as images:
        path, format = access.named(images, path, format)
        chain = open_chain(images, path, format, base, read_only=drop or base is not None)
        for layer, name in zip(chain.images, chain.names, strict=True):
            warn_of_snapshots(layer, name)
        with progress("committing", wanted=wants_progress, quiet=quiet) as tell:
            commit(chain, drop=drop or base is not None, rate=rate_limit, progress=tell)
    if as_json:
        click.echo(wording.as_json({"filename": path, "base": chain.base_name, "emptied": not (drop or base)}))
    elif not quiet:
        click.echo("Image committed.")


class Chain(NamedTuple):
    """The images above a base, topmost first, each open by itself; and the base, open for writing, with its chain."""

    images: list[Layer]
    names: list[str]
    base: Layer
    base_name: str


def open_chain(images: Images, path: str, format: str | None, base: str | None, *, read_only: bool) -> Chain:
    """Open an image and what is below it down to ``base``; without one, to the backing file. ``read_only``: the topmost
    image is. Raises ImageError, ConfigError, OSError."""
    top = images.open(path, format, read_only=read_only, keys=ALONE)
    layers, names, roots = [top], [path], (*images.roots, *own_roots(path))
    while len(layers) < DEPTH_MAX:
        layer, name = layers[-1], names[-1]
        if not isinstance(layer, HasBacking) or layer.backing_name is None:
            if base is None:
                raise ImageError("does not have a backing file", path=path)
            raise ImageError(f"has no image {base!r} in its chain", path=path)
        below = resolve_name(layer.backing_name, name)
        within(below, roots, layer.backing_name, name)
        if base is None or base == layer.backing_name or os.path.realpath(base) == os.path.realpath(below):
            if layer.backing_format is None:
                raise ImageError(
                    f"does not say what format {layer.backing_name!r} is of, and what is written is not probed; "
                    f"to say it: image rebase -u -b {layer.backing_name} -F FMT",
                    path=name,
                )
            return Chain(layers, names, images.open(below, layer.backing_format, read_only=False), below)
        layers.append(images.open(below, layer.backing_format, keys=ALONE))
        names.append(below)
    raise ImageError(f"has a chain deeper than {DEPTH_MAX}", path=path)


def warn_of_snapshots(layer: Layer, path: str) -> None:
    """Say so on stderr if an image whose backing file is about to change has internal snapshots."""
    if isinstance(layer, HasSnapshots) and layer.snapshots():
        warn(f"{path} has internal snapshots: what they show of its backing file changes")


def commit(chain: Chain, *, drop: bool, rate: int | None = None, progress: Progress = no_progress) -> None:
    """Write what the images above the base hold into it, make that durable, and then, unless they are to be dropped,
    empty the topmost one. Raises ImageError, RequestError, OSError."""
    images, base = chain.images, chain.base
    size = images[0].size
    if base.size < size:
        base.resize(size)
    for depth, layer in enumerate(images):
        ranges = (
            Range(run.start, run.length, run.entry.zero)
            for run in runs(images, 0, size)
            if run.depth == depth and _is_above(run, images)
        )
        tell = functools.partial(_tell, progress, depth, len(images))
        Copy(layer, base, sparse=0, rate=rate, in_order=isinstance(base, HasClusters)).run(ranges, size, tell)
    finish(base.flush())
    top = images[0]
    if not drop and isinstance(top, Empties):
        try:
            top.make_empty()
        except RequestError as error:
            if error.errno != errno.ENOTSUP:
                raise
        finish(top.flush())


def _tell(progress: Progress, part: int, parts: int, done: int, total: int) -> None:
    """Tell of the progress of one of several parts."""
    progress(part * total + done, parts * total)


def _is_above(run: Run, images: list[Layer]) -> bool:
    """Whether a range is what one of the images says; which includes zeroes behind the end of one of them."""
    return run.present or run.depth < len(images) - 1
