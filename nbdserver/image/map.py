"""``image map``: which file of a chain holds which range of the disk, and where in it. QAPI: ``MapEntry``."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from nbdserver.errors import ImageError
from nbdserver.image.allocation import SECTOR, Run, chain, runs
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import (
    SIZE,
    file_argument,
    force_share_option,
    format_option,
    output_option,
)
from nbdserver.layer import Layer


@click.command("map", short_help="Show where the ranges of a disk are stored.")
@file_argument
@format_option
@click.option("-s", "--start-offset", type=SIZE, default=0, metavar="OFFSET", help="Where to begin.")
@click.option("-l", "--max-length", type=SIZE, metavar="LENGTH", help="How much to look at.")
@force_share_option
@output_option
@access_options
def command(
    *,
    path: str,
    format: str | None,
    start_offset: int,
    max_length: int | None,
    force_share: bool,
    as_json: bool,
    access: Access,
) -> None:
    """Show which file of the chain holds which range of the disk, and where in it.

    Without --json only what is data is shown, and every bit of it must be in some place of a file as it is: compressed
    and encrypted data is not, and is an error, as is qemu-img's way.
    """
    with access.images(force_share=force_share) as images:
        path, format = access.named(images, path, format)
        layer = images.open(path, format)
        end = layer.size if max_length is None else min(start_offset + max_length, layer.size)
        found = entries(layer, start_offset, end)
        if as_json:
            _print_json(found)
        else:
            _print_words(found, path)


def entries(layer: Layer, start: int, end: int) -> Iterator[Run]:
    """The runs of an open image and its chain, those joined whose bytes also follow one another. Raises ImageError,
    OSError."""
    last: Run | None = None
    for run in _whole_sectors(layer, runs(chain(layer), start, end)) if start < end else ():
        if last is not None and _continues(last, run):
            last = last._replace(length=last.length + run.length)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _whole_sectors(layer: Layer, found: Iterator[Run]) -> Iterator[Run]:
    """QEMU measures disks in sectors: what of the last one lies behind the end of the disk is zeroes."""
    for run in found:
        yield run
        rest = -run.end % SECTOR
        if rest and run.end == layer.size:
            entry = run.entry._replace(length=rest, zero=True, data=False, offset=run.entry.offset + run.length)
            yield run._replace(start=run.end, length=rest, entry=entry)


def _continues(last: Run, run: Run) -> bool:
    return (
        (last.state, last.depth, last.entry.compressed) == (run.state, run.depth, run.entry.compressed)
        and last.entry.child is run.entry.child
        and (run.entry.child is None or last.entry.offset + last.length == run.entry.offset)
    )


def _print_json(found: Iterator[Run]) -> None:
    click.echo("[", nl=False)
    for index, run in enumerate(found):
        entry = run.entry
        told = {"start": run.start, "length": run.length, "depth": run.depth, "present": run.present}
        told |= {"zero": entry.zero, "data": entry.data, "compressed": entry.compressed}
        if entry.child is not None:
            told["offset"] = entry.offset
        click.echo((",\n" if index else "") + "{ " + json.dumps(told)[1:], nl=False)
    click.echo("]")


def _print_words(found: Iterator[Run], path: str) -> None:
    click.echo(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for run in found:
        entry = run.entry
        if entry.zero or not entry.data:
            continue
        if entry.child is None:
            raise ImageError("contains external, encrypted or compressed clusters: see --json", path=path)
        numbers = (run.start, run.length, entry.offset)
        click.echo("".join(f"{_hexadecimal(number):<16}" for number in numbers) + (entry.child.filename or ""))


def _hexadecimal(number: int) -> str:
    return f"{number:#x}" if number else "0"
