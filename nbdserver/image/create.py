"""``image create``: a new, empty image."""

from __future__ import annotations

import click

from nbdserver.errors import ConfigError, ImageError
from nbdserver.image import creation
from nbdserver.image.info import print_json
from nbdserver.image.opening import LOCKED
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import FORMAT, SIZE, output_option, progress_option, quiet_option
from nbdserver.image.progress import progress


@click.command("create", short_help="Make an empty image.")
@click.argument("path", metavar="FILE", required=False)
@click.argument("size", type=SIZE, required=False)
@click.option("-f", "--format", default="raw", show_default=True, type=FORMAT, metavar="FMT", help="Its format.")
@click.option(
    "-o",
    "--options",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="What the format lets choose; may be given several times. See: -f FMT -o help",
)
@click.option("-b", "--backing", metavar="FILE", help="The image to show where nothing has been written.")
@click.option("-F", "-B", "--backing-format", type=FORMAT, metavar="FMT", help="Its format; it must be said.")
@click.option("-u", "--backing-unsafe", "is_unsafe", is_flag=True, help="Do not open it; so SIZE must be given.")
@output_option
@progress_option
@quiet_option
@access_options
def command(
    *,
    path: str | None,
    size: int | None,
    format: str,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    is_unsafe: bool,
    as_json: bool,
    wants_progress: bool,
    quiet: bool,
    access: Access,
) -> None:
    """Make an empty image of SIZE, such as 10G; of its backing file's size, if there is one and no SIZE.

    A file that is there already is overwritten, unless somebody uses it. A relative BACKING is relative to the
    directory of FILE.
    """
    if creation.wants_help(options):
        click.echo("\n".join(creation.in_words(format)))
        return
    if path is None:
        raise click.UsageError("Missing argument 'FILE'.")
    try:
        chosen = creation.parse_options(format, options, {"backing_file": backing, "backing_fmt": backing_format})
    except ConfigError as error:
        raise ConfigError(error.message, file=path, key=error.key) from error
    with access.images() as images:
        backing_file = creation.backing_of(path, chosen)
        if backing_file is not None and not is_unsafe:
            found = images.open(*backing_file, keys=LOCKED).size
            size = found if size is None else size
        if size is None:
            raise ImageError("needs a size", path=path)
        if not (quiet or as_json):
            click.echo(f"Formatting '{path}', fmt={format} {creation.shown(chosen, size)}")
        with progress("preallocating", wanted=wants_progress, quiet=quiet) as tell:
            creation.make(images, path, format, size, chosen, progress=tell)
    if as_json:
        print_json(path, format, access.roots)
