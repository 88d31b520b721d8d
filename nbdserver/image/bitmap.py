"""``image bitmap``: the persistent dirty bitmaps of an image. QAPI: ``Qcow2BitmapInfo``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import click

from nbdserver.errors import ImageError, RequestError
from nbdserver.format import Bitmap, HasBitmaps
from nbdserver.image import wording
from nbdserver.image.opening import ALONE, Images, layer_type
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import FORMAT, SIZE, Command, file_argument, format_option, output_option
from nbdserver.layer import Layer, finish

#: Where a context keeps what is to be done, in the order in which it was asked for.
ACTIONS: Final = f"{__name__}.actions"


class Action(NamedTuple):
    """One thing to do to a bitmap. ``source``: the bitmap that is merged."""

    name: str
    source: str = ""


def _note(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    assert param.name is not None
    noted = ctx.meta.setdefault(ACTIONS, [])
    if value is True:
        noted.append(Action(param.name.replace("_", "-")))
    elif value:
        noted.extend(Action(param.name, source) for source in value)


def _action(name: str, help: str) -> Callable[[Command], Command]:
    return click.option(f"--{name}", is_flag=True, callback=_note, expose_value=False, help=help)


@click.command("bitmap", short_help="Change persistent dirty bitmaps.")
@file_argument
@click.argument("bitmap", metavar="BITMAP", required=False)
@format_option
@_action("add", "Add BITMAP, which records writes from now on.")
@_action("remove", "Remove BITMAP.")
@_action("remove-all", "Remove all bitmaps; no BITMAP is named then.")
@_action("clear", "Mark nothing in BITMAP.")
@_action("enable", "Have BITMAP record writes.")
@_action("disable", "Have BITMAP stay as it is.")
@click.option(
    "--merge",
    "merge",
    multiple=True,
    metavar="SOURCE",
    callback=_note,
    expose_value=False,
    help="Mark in BITMAP what is marked in this bitmap.",
)
@click.option(
    "-g", "--granularity", type=SIZE, metavar="SIZE", help="What a bit of the bitmap that is added stands for."
)
@click.option("-b", "--source-file", metavar="FILE", help="The image that has SOURCE.  [default: the same]")
@click.option("-F", "--source-format", type=FORMAT, metavar="FMT", help="The format of that image.  [default: probed]")
@output_option
@access_options
@click.pass_context
def command(
    ctx: click.Context,
    *,
    path: str,
    bitmap: str | None,
    format: str | None,
    granularity: int | None,
    source_file: str | None,
    source_format: str | None,
    as_json: bool,
    access: Access,
) -> None:
    """Change the persistent dirty bitmap BITMAP of an image: one thing after the other, in the order given."""
    actions: list[Action] = ctx.meta.get(ACTIONS, [])
    kinds = {action.name for action in actions}
    wrong = {
        "nothing to do: say --add, --remove, --remove-all, --clear, --enable, --disable or --merge": not actions,
        "name the BITMAP": bitmap is None and kinds - {"remove-all"},
        "--remove-all takes no BITMAP": bitmap is not None and kinds == {"remove-all"},
        "--granularity is for --add": granularity is not None and "add" not in kinds,
        "--source-file is for --merge": source_file is not None and "merge" not in kinds,
        "--source-format is for --source-file": source_format is not None and source_file is None,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise click.UsageError(message)
    with access.images() as images:
        path, format = access.named(images, path, format)
        layer = _open(images, path, format, read_only=False)
        source = layer if source_file is None else _open(images, source_file, source_format, read_only=True)
        for action in actions:
            try:
                _do(layer, action, bitmap or "", granularity, source)
            except (RequestError, OSError) as error:
                subject = f"bitmap {bitmap!r}" if bitmap is not None else "bitmaps"
                raise ImageError(f"could not {action.name} {subject}: {error}", path=path) from error
        finish(layer.flush())
        assert isinstance(layer, HasBitmaps)
        found = [bitmap_info(each) for each in layer.bitmaps()]
    if as_json:
        click.echo(wording.as_json(found))


def _open(images: Images, path: str, format: str | None, *, read_only: bool) -> Layer:
    kind = images.format(path, format)
    if not isinstance(layer_type(kind), HasBitmaps):
        raise ImageError(f"cannot have bitmaps: it is a {kind!r} image", path=path)
    return images.open(path, kind, read_only=read_only, keys=ALONE)


def _do(layer: Layer, action: Action, bitmap: str, granularity: int | None, source: Layer) -> None:
    """Raises RequestError, OSError, ImageError."""
    assert isinstance(layer, HasBitmaps)
    if action.name == "add":
        layer.add_bitmap(bitmap, granularity=granularity)
    elif action.name == "merge":
        layer.merge_bitmap(bitmap, source, action.source)
    elif action.name == "remove-all":
        for each in layer.bitmaps():
            layer.remove_bitmap(each.name)
    else:
        change = {
            "remove": layer.remove_bitmap,
            "clear": layer.clear_bitmap,
            "enable": layer.enable_bitmap,
            "disable": layer.disable_bitmap,
        }
        change[action.name](bitmap)


def bitmap_info(bitmap: Bitmap) -> dict[str, Any]:
    """QAPI: ``Qcow2BitmapInfo``."""
    flags = [name for name, is_set in (("in-use", bitmap.in_use), ("auto", bitmap.auto)) if is_set]
    return {"name": bitmap.name, "granularity": bitmap.granularity, "flags": flags}
