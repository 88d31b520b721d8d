"""``image check``: the metadata of an image, checked and mended. QAPI: ``ImageCheck``."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Final

import click

from nbdserver.format import Checks, ImageCheck, Progress, Repair, no_progress
from nbdserver.image import wording
from nbdserver.image.opening import Images, layer_type
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import (
    cache_option,
    file_argument,
    force_share_option,
    format_option,
    output_option,
    progress_option,
    quiet_option,
)
from nbdserver.image.progress import progress

#: qemu-img's exit statuses.
SOUND, FAILED, CORRUPT, LEAKS, CANNOT_CHECK = 0, 1, 2, 3, 63

#: What QAPI leaves out when it is 0.
OPTIONAL: Final = frozenset(
    {
        "corruptions",
        "leaks",
        "corruptions-fixed",
        "leaks-fixed",
        "image-end-offset",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
    }
)


@click.command("check", short_help="Check the metadata of an image, and repair it.")
@file_argument
@format_option
@click.option(
    "-r",
    "--repair",
    type=click.Choice([repair.value for repair in Repair if repair is not Repair.NONE]),
    help="Mend what is wrong: space that is lost, or everything.",
)
@cache_option("-T", "--cache")
@force_share_option
@output_option
@progress_option
@quiet_option
@access_options
def command(
    *,
    path: str,
    format: str | None,
    repair: str | None,
    force_share: bool,
    as_json: bool,
    wants_progress: bool,
    quiet: bool,
    access: Access,
) -> None:
    """Check the metadata of an image, and repair it if so wished.

    Exit status: 0 if it is sound, 1 if it could not be checked, 2 if it is corrupt, 3 if space is lost (leaked
    clusters) and nothing else is wrong, 63 if the format has nothing to check.
    """
    if repair is not None and force_share:
        raise click.UsageError("what others may be writing cannot be repaired: --repair or --force-share, not both")
    wanted = Repair(repair) if repair is not None else Repair.NONE
    with access.images(force_share=force_share) as images:
        path, format = access.named(images, path, format)
        name = images.format(path, format)
        if not isinstance(layer_type(name), Checks):
            click.echo(f"nbdserver: {path}: images of the format {name!r} cannot be checked", err=True)
            sys.exit(CANNOT_CHECK)
        with progress("checking", wanted=wants_progress, quiet=quiet) as tell:
            found = check(images, path, name, wanted, tell)
    if as_json:
        click.echo(wording.as_json(as_dict(found, path, name)))
    elif not quiet:
        _print(found)
    if found.check_errors:
        click.echo(f"nbdserver: {path}: check failed", err=True)
    sys.exit(status(found))


def check(images: Images, path: str, format: str, repair: Repair, progress: Progress = no_progress) -> ImageCheck:
    """Check an image, and again after a repair: what is left counts, and what was mended is told too.

    Raises ImageError, OSError.
    """
    cls = layer_type(format)
    assert isinstance(cls, Checks)
    file = images.file(path, read_only=repair is Repair.NONE)
    opener = images.opener(read_only=repair is Repair.NONE)
    found = cls.check(file, repair=repair, opener=opener, progress=progress)
    if not (found.corruptions_fixed or found.leaks_fixed):
        return found
    again = cls.check(file, opener=opener, progress=progress)
    again.corruptions_fixed, again.leaks_fixed = found.corruptions_fixed, found.leaks_fixed
    again.messages = found.messages + again.messages
    return again


def status(found: ImageCheck) -> int:
    """The exit status for what was found."""
    if found.check_errors:
        return FAILED
    if found.corruptions:
        return CORRUPT
    return LEAKS if found.leaks else SOUND


def as_dict(found: ImageCheck, path: str, format: str) -> dict[str, Any]:
    """QAPI: ``ImageCheck``."""
    counts = dataclasses.asdict(found)
    del counts["messages"]
    named = {key.replace("_", "-"): value for key, value in counts.items()}
    return {"filename": path, "format": format} | {
        key: value for key, value in named.items() if value or key not in OPTIONAL
    }


def _print(found: ImageCheck) -> None:
    """What qemu-img prints; the findings themselves on stderr."""
    for message in found.messages:
        click.echo(message, err=True)
    if found.corruptions_fixed or found.leaks_fixed:
        click.echo(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {found.leaks_fixed} leaked clusters\n"
            f"    {found.corruptions_fixed} corruptions\n\n"
            "Double checking the fixed image now..."
        )
    if found.corruptions:
        click.echo(
            f"\n{found.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if found.leaks:
        click.echo(
            f"\n{found.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if found.check_errors:
        click.echo(f"\n{found.check_errors} internal errors have occurred during the check.")
    if not (found.corruptions or found.leaks or found.check_errors):
        click.echo("No errors were found on the image.")
    if found.total_clusters and found.allocated_clusters:
        allocated = found.allocated_clusters
        click.echo(
            f"{allocated}/{found.total_clusters} = {allocated * 100 / found.total_clusters:.2f}% allocated, "
            f"{found.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{found.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if found.image_end_offset:
        click.echo(f"Image end offset: {found.image_end_offset}")
