"""``image measure``: how large the file of an image would be. QAPI: ``BlockMeasureInfo``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from nbdserver.format import HasBitmaps
from nbdserver.image import creation, wording
from nbdserver.image.allocation import chain, joined, runs
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import FORMAT, SIZE, force_share_option, output_option
from nbdserver.layer import Layer


@click.command("measure", short_help="Say how large the file of an image would be.")
@click.argument("path", metavar="FILE", required=False)
@click.option("-s", "--size", type=SIZE, metavar="SIZE", help="Of an empty disk of this size, rather than of FILE.")
@click.option("-f", "--format", type=FORMAT, metavar="FMT", help="The format of FILE.  [default: probed]")
@click.option(
    "-O", "--target-format", type=FORMAT, default="raw", show_default=True, metavar="FMT", help="Of the image."
)
@click.option("-o", "--options", multiple=True, metavar="KEY=VALUE,...", help="As of create: see -f FMT -o help there.")
@click.option("-l", "--snapshot", metavar="SNAPSHOT", help="Measure this internal snapshot of FILE.")
@force_share_option
@output_option
@access_options
def command(
    *,
    path: str | None,
    size: int | None,
    format: str | None,
    target_format: str,
    options: tuple[str, ...],
    snapshot: str | None,
    force_share: bool,
    as_json: bool,
    access: Access,
) -> None:
    """Say how large the file would be of an image of format --target-format with the disk in FILE in it: now, and with
    all of the disk written."""
    if creation.wants_help(options):
        click.echo("\n".join(creation.in_words(target_format)))
        return
    if (path is None) == (size is None):
        raise click.UsageError("name an image, or give a --size; one of the two")
    if path is None and (format is not None or snapshot is not None):
        raise click.UsageError("-f and -l are about an image, of which none is named")
    chosen = creation.parse_options(target_format, options, {})
    if not path:
        assert size is not None
        found = creation.creator(target_format).measure(size, chosen, ())
    else:
        with access.images(force_share=force_share) as images:
            path, format = access.named(images, path, format)
            layer = images.open_snapshot(path, format, snapshot)
            bitmaps = layer.bitmaps() if isinstance(layer, HasBitmaps) else None
            found = creation.creator(target_format).measure(layer.size, chosen, _data(layer), bitmaps)
    told = {"required": found.required, "fully-allocated": found.fully_allocated}
    if found.bitmaps is not None:
        told["bitmaps"] = found.bitmaps
    if as_json:
        click.echo(wording.as_json(told))
    else:
        for key, value in told.items():
            click.echo(f"{key.replace('-', ' ')} size: {value}")


def _data(layer: Layer) -> Iterator[tuple[int, int]]:
    """The (offset, length) ranges of a disk that are to be stored."""
    for run in joined(runs(chain(layer), 0, layer.size)):
        if not run.entry.zero:
            yield run.start, run.length
