"""``image rebase``: another backing file for an image, which goes on showing what it did.

::

    old backing   [ A ][ B ][ C ]        image   [   ][ X ][   ]      shows A X C
    new backing   [ A ][ D ][ E ]   ──>  image   [   ][ X ][ C ]      what differs is copied, made durable;
                                                                      only then the name is changed

Killed at any moment, the image shows what it did, over its old backing file or over the new one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import click

from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.files import own_roots, resolve_name, within
from nbdserver.format import Compresses, HasBacking, HasClusters, Progress, no_progress
from nbdserver.graph import execute
from nbdserver.image import wording
from nbdserver.image.ahead import run_ahead
from nbdserver.image.allocation import chain, runs
from nbdserver.image.commit import warn_of_snapshots
from nbdserver.image.copying import PIECE, read_still
from nbdserver.image.opening import ALONE, Images, layer_type
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import (
    FORMAT,
    cache_option,
    file_argument,
    force_share_option,
    format_option,
    output_option,
    progress_option,
    quiet_option,
)
from nbdserver.image.progress import progress
from nbdserver.layer import Layer, finish
from nbdserver.limits import KIB
from nbdserver.request import Flag, Request, Vector

#: The unit of comparison where the format has none.
UNIT_DEFAULT: Final = 64 * KIB


@click.command("rebase", short_help="Give an image another backing file.")
@file_argument
@format_option
@click.option("-b", "--backing", metavar="FILE", help='The new backing file; "" for none.')
@click.option("-F", "-B", "--backing-format", type=FORMAT, metavar="FMT", help="Its format; it must be said.")
@click.option(
    "-u", "--backing-unsafe", "is_unsafe", is_flag=True, help="Only change the name: what the image shows may change."
)
@click.option("-c", "--compress", is_flag=True, help="Compress what is copied, if the format can.")
@cache_option("-t", "--cache")
@cache_option("-T", "--backing-cache")
@force_share_option
@output_option
@progress_option
@quiet_option
@access_options
def command(
    *,
    path: str,
    format: str | None,
    backing: str | None,
    backing_format: str | None,
    is_unsafe: bool,
    compress: bool,
    force_share: bool,
    as_json: bool,
    wants_progress: bool,
    quiet: bool,
    access: Access,
) -> None:
    """Give an image another backing file, or none.

    What the two backing files have not in common is copied into the image first, so that it shows what it did. With
    --backing-unsafe nothing is: to tell of a backing file that has been moved. A relative name is relative to the
    directory of the image.
    """
    if backing is None and not is_unsafe:
        raise click.UsageError("name the new backing file (-b), or say -u")
    if backing and backing_format is None:
        raise ConfigError("the format of the backing file must be said (-F)", file=path)
    with access.images(force_share=force_share) as images:
        path, format = access.named(images, path, format)
        if is_unsafe:
            image = images.open(path, format, read_only=False, keys=ALONE)
            _rename(image, path, backing, backing_format)
        else:
            rebasing = open_rebasing(images, path, format, backing, backing_format, compress=compress)
            warn_of_snapshots(rebasing.image, path)
            with progress("rebasing", wanted=wants_progress, quiet=quiet) as tell:
                rebasing.copy(tell)
            _rename(rebasing.image, path, backing, backing_format)
    if as_json:
        told = {"filename": path}
        if backing:
            told |= {"backing-filename": backing, "backing-filename-format": backing_format or ""}
        click.echo(wording.as_json(told))


def open_rebasing(
    images: Images, path: str, format: str | None, backing: str | None, backing_format: str | None, *, compress: bool
) -> Rebasing:
    """Open all that a safe rebase needs. Raises ImageError, ConfigError, OSError."""
    name = images.format(path, format)
    if compress and not isinstance(layer_type(name), Compresses):
        raise ConfigError(f"images of the format {name!r} cannot be compressed", file=path)
    old, new = _old(images, path, name), None
    if backing:
        below = resolve_name(backing, path)
        found = (layer for layer in chain(old) if _is_at(layer, below)) if old is not None else iter(())
        new = next(found, None) or images.open(below, backing_format)
    image = images.open(path, name, read_only=False, keys={"backing": new or False})
    if compress and isinstance(image, Compresses) and image.why_uncompressed is not None:
        raise ImageError(image.why_uncompressed, path=path)
    return Rebasing(image, old, new, Flag.WRITE_COMPRESSED if compress else Flag.NONE)


def _old(images: Images, path: str, format: str) -> Layer | None:
    """The backing file that an image has now, with its chain."""
    image = images.open(path, format, keys=ALONE)
    try:
        if not isinstance(image, HasBacking):
            raise ImageError(f"cannot have a backing file: it is a {format!r} image", path=path)
        if image.backing_name is None:
            return None
        below = resolve_name(image.backing_name, path)
        within(below, (*images.roots, *own_roots(path)), image.backing_name, path)
        return images.open(below, image.backing_format)
    finally:
        images.close(image)


def _is_at(layer: Layer, path: str) -> bool:
    return layer.filename is not None and os.path.exists(path) and os.path.samefile(layer.filename, path)


def _rename(image: Layer, path: str, backing: str | None, backing_format: str | None) -> None:
    """Write the new name into the image, durably."""
    if not isinstance(image, HasBacking):
        raise ImageError(f"cannot have a backing file: it is a {image.type!r} image", path=path)
    try:
        image.set_backing(backing or None, backing_format if backing else None)
        finish(image.flush())
    except (RequestError, OSError) as error:
        raise ImageError(f"cannot be told of its backing file {backing!r}: {error}", path=path) from error


class Difference(NamedTuple):
    """A range of the image that must be written: with ``data``, or with zeroes if that is empty."""

    start: int
    length: int
    data: memoryview


class Rebasing(NamedTuple):
    """``image`` is open for writing, over ``new`` already (None: over nothing), which its file does not know yet. So
    what is zeroed here is zero in the end, whatever the old backing file's size. What is written is whole clusters, so
    that none is filled up with what the new backing file has.
    """

    image: Layer
    old: Layer | None
    new: Layer | None
    flags: Flag

    def copy(self, progress: Progress = no_progress) -> None:
        """Write into the image what it shows of the old backing file and the new one has not, and make it durable.
        Raises ImageError, RequestError, OSError."""
        size = self.image.size
        for end, differences in run_ahead(self._tasks()):
            for start, length, data in differences:
                if len(data):
                    execute(self.image, Request.write(start, Vector.of(data), self._flags(start, length)))
                else:
                    execute(self.image, Request.zero(start, length, Flag.MAY_UNMAP))
            progress(end, size)
        finish(self.image.flush())

    def _flags(self, start: int, length: int) -> Flag:
        """Those for data: what is no whole cluster is not compressed."""
        unit, end = _unit(self.image), start + length
        is_whole = start % unit == 0 and (end % unit == 0 or end == self.image.size)
        return self.flags if is_whole else Flag.NONE

    def _tasks(self) -> Iterator[Callable[[], tuple[int, list[Difference]]]]:
        for run in runs([self.image], 0, self.image.size):
            if run.present:
                continue
            start = run.start
            while start < run.end:
                stop = min((start // PIECE + 1) * PIECE, run.end)
                if not self._is_alike(start, stop):
                    yield functools.partial(self._compare, start, stop)
                start = stop

    def _is_alike(self, start: int, stop: int) -> bool:
        """Whether the allocation alone shows that both backing files have the same in a range."""
        if all(layer is None or _is_zero(layer, start, stop) for layer in (self.old, self.new)):
            return True
        if self.old is None or self.new is None:
            return False
        above = chain(self.old)
        if self.new not in above:
            return False
        end = min(stop, self.old.size)
        depth = above.index(self.new)
        return end == stop and all(
            run.depth >= depth for run in (runs(above[: depth + 1], start, end) if start < end else ())
        )

    def _compare(self, start: int, stop: int) -> tuple[int, list[Difference]]:
        """Where the range ends, and what must be written in it."""
        unit = _unit(self.image)
        old, new = _read(self.old, start, stop), _read(self.new, start, stop)
        differences: list[Difference] = []
        for at in range(0, stop - start, unit):
            here = bytes(old[at : at + unit])
            if here == new[at : at + unit]:
                continue
            data = old[at : at + unit] if any(here) else old[:0]
            last = differences[-1] if differences else None
            if last is not None and last.start + last.length == start + at and bool(len(last.data)) == bool(len(data)):
                whole = old[last.start - start : at + len(here)] if len(data) else data
                differences[-1] = Difference(last.start, last.length + len(here), whole)
            else:
                differences.append(Difference(start + at, len(here), data))
        return stop, differences


def _unit(image: Layer) -> int:
    return image.cluster_size if isinstance(image, HasClusters) else UNIT_DEFAULT


def _is_zero(layer: Layer, start: int, stop: int) -> bool:
    end = min(stop, layer.size)
    return start >= end or all(run.entry.zero for run in runs(chain(layer), start, end))


def _read(layer: Layer | None, start: int, stop: int) -> memoryview:
    """The bytes [start, stop) of a disk; behind its end, zeroes."""
    data = memoryview(bytearray(stop - start))
    there = min(stop, layer.size) - start if layer is not None else 0
    if layer is not None and there > 0:
        read_still(layer, start, data[:there])
    return data
