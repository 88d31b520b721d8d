"""``image snapshot``: the internal snapshots of an image. QAPI: ``SnapshotInfo``."""

from __future__ import annotations

import click

from nbdserver.errors import ImageError, RequestError
from nbdserver.format import HasSnapshots
from nbdserver.image import wording
from nbdserver.image.opening import layer_type
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import (
    file_argument,
    force_share_option,
    format_option,
    output_option,
    quiet_option,
)
from nbdserver.layer import finish


@click.command("snapshot", short_help="List, make, apply and delete internal snapshots.")
@file_argument
@format_option
@click.option("-l", "--list", "is_list", is_flag=True, help="List them: what is done if nothing else is asked for.")
@click.option("-c", "--create", metavar="NAME", help="Make one.")
@click.option("-a", "--apply", metavar="SNAPSHOT", help="Make the disk what it was then (an id, or a name).")
@click.option("-d", "--delete", metavar="SNAPSHOT", help="Delete one (an id, or a name).")
@force_share_option
@output_option
@quiet_option
@access_options
def command(
    *,
    path: str,
    format: str | None,
    is_list: bool,
    create: str | None,
    apply: str | None,
    delete: str | None,
    force_share: bool,
    as_json: bool,
    quiet: bool,
    access: Access,
) -> None:
    """List, make, apply or delete the internal snapshots of an image. Nobody else may write the image meanwhile."""
    asked = {"create": create, "apply": apply, "delete": delete}
    actions = {action: name for action, name in asked.items() if name is not None}
    if len(actions) + is_list > 1:
        raise click.UsageError("one at a time: --list, --create, --apply or --delete")
    with access.images(force_share=force_share) as images:
        path, format = access.named(images, path, format)
        kind = images.format(path, format)
        if not isinstance(layer_type(kind), HasSnapshots):
            raise ImageError(f"cannot have internal snapshots: it is a {kind!r} image", path=path)
        layer = images.open(path, kind, read_only=not actions)
        assert isinstance(layer, HasSnapshots)
        for action, name in actions.items():
            change = {"create": layer.create_snapshot, "apply": layer.apply_snapshot, "delete": layer.delete_snapshot}
            try:
                change[action](name)
                finish(layer.flush())
            except (RequestError, OSError) as error:
                raise ImageError(f"could not {action} snapshot {name!r}: {error}", path=path) from error
        found = [wording.snapshot_info(snapshot) for snapshot in layer.snapshots()]
    if as_json:
        click.echo(wording.as_json(found))
    elif found and not actions and not quiet:
        click.echo("\n".join(wording.snapshot_list(found)))
