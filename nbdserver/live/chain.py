"""The chain of images under an export: which there are, how they are called, and whether they may be changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nbdserver.errors import ConfigError
from nbdserver.extent import FILE_MODE, FileMode
from nbdserver.format import HasBacking, HasSnapshots
from nbdserver.graph import bare, execute
from nbdserver.image import allocation
from nbdserver.image.allocation import Run
from nbdserver.layer import Layer, finish
from nbdserver.permissions import ONLOOKER
from nbdserver.request import Flag, Request

if TYPE_CHECKING:
    from nbdserver.server import Export, Server


class Name(NamedTuple):
    """What an image is called by another that names it as its backing file."""

    path: str
    format: str


def active(root: Layer) -> Layer:
    """The image that an export's writes go to: below the filters at the top."""
    while root.is_filter:
        root = bare(dict(root.children())["file"])
    return root


def images(root: Layer) -> list[Layer]:
    """The active image and those below it, topmost first."""
    return allocation.chain(active(root))


def export_of(server: Server, name: str, *, writable: bool = True) -> Export:
    """The export, "" being the default one. Raises ConfigError, also if it is not writable."""
    default = server.default
    export = server.exports.get(default if name == "" and default is not None else name)
    if export is None:
        raise ConfigError(f"there is no export {name!r}")
    if writable and (export.info.read_only or active(export.root).read_only):
        raise ConfigError(f"export {export.name!r} is read-only")
    return export


def check_idle(server: Server, export: Export) -> None:
    """Raise ConfigError if a job works on one of the export's images."""
    for job in server.jobs.on(images(export.root)):
        raise ConfigError(f"job {job.id!r} works on the images of export {export.name!r}")


def name_of(image: Layer) -> Name:
    """How other images name this one. Raises ConfigError if a path and a format do not say what it is."""
    file = dict(image.children()).get("file", image)
    is_file = bare(file).type == "file" and file.filename is not None
    if image.type == "file" and image.filename is not None:
        return Name(os.path.abspath(image.filename), "raw")
    if is_file and (isinstance(image, HasBacking) or (image.type == "raw" and image.size == file.size)):
        return Name(os.path.abspath(str(file.filename)), image.type)
    raise ConfigError(f"{image.type} {image.filename or ''} is more than a file and its format: no image can name it")


def mode_of(image: Layer) -> FileMode:
    """How the file of an image is used."""
    file = bare(dict(image.children()).get("file", image))
    return FileMode(getattr(file, "cache", FILE_MODE.cache), getattr(file, "aio", FILE_MODE.aio))


def find(chain: Sequence[Layer], path: str, directory: str) -> int:
    """Which image of the chain is the file ``path``; a name that another image has for it will do. Raises
    ConfigError."""
    wanted = os.path.realpath(os.path.join(directory, path))
    for index, image in enumerate(chain):
        above = chain[index - 1] if index else None
        if image.filename is not None and os.path.realpath(image.filename) == wanted:
            return index
        if isinstance(above, HasBacking) and above.backing_name == path:
            return index
    known = ", ".join(str(image.filename) for image in chain)
    raise ConfigError(f"{path} is not in the chain of images, which is {known}")


def spelled(target: Layer, above: Layer, namer: Layer) -> str:
    """How ``namer`` is to name ``target``, of which ``above`` is the one that has named it so far: as that does, if it
    means the same there, or by its path. Raises ConfigError."""
    path = name_of(target).path
    name = above.backing_name if isinstance(above, HasBacking) else None
    if name is None or namer.filename is None or above.filename is None:
        return path
    directories = {os.path.dirname(os.path.abspath(image.filename)) for image in (namer, above) if image.filename}
    return name if os.path.isabs(name) or len(directories) == 1 else path


def check_no_snapshots(layers: Sequence[Layer]) -> None:
    """Raise ConfigError if what is shown of a backing file that is about to change is shown by internal snapshots."""
    for layer in layers:
        if isinstance(layer, HasSnapshots) and layer.snapshots():
            raise ConfigError(
                f"{layer.filename} has internal snapshots, which show some of its backing file; delete them"
            )


def held(above: Sequence[Layer], start: int, end: int) -> Iterator[Run]:
    """The parts of the bytes [start, end) that ``above``, images of which each stands on the next, decide: what lies
    below the last of them does not show there. Zeroes behind the end of a shorter one are among them."""
    end = min(end, above[0].size)
    for run in allocation.runs(above, start, end):
        if run.present or run.depth < len(above) - 1:
            yield run


def rebase(server: Server, image: Layer, old: Layer, base: Layer, name: str) -> None:
    """Have an image, which is open for writing, stand on ``base`` rather than ``old``, and call it ``name``: both show
    the same through it, but for what lies behind the end of ``old``, and is zeroes. In a drained section of both.

    Killed at any instant, the image shows what it did, whichever of the two it names. Raises ConfigError, RequestError,
    OSError, ImageError, with nothing changed that shows.
    """
    assert isinstance(image, HasBacking)
    with server.claimed(old, ONLOOKER):
        server.redirect(image, old, base)
        try:
            # Only now are they zeroes that must be said to be some.
            for run in allocation.runs([image], old.size, max(min(image.size, base.size), old.size)):
                if not run.present:
                    execute(image, Request.zero(run.start, run.length, Flag.WRITE_UNCHANGED))
            finish(image.flush())
            image.set_backing(name, name_of(base).format)
        except BaseException:
            server.redirect(image, base, old)
            raise
