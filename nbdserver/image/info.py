"""``image info``: what there is to know of an image without reading its data. QAPI: ``ImageInfo``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import click

from nbdserver.errors import ImageError
from nbdserver.files import own_roots, resolve_name, within
from nbdserver.format import Describes, HasBacking, HasClusters, HasDirtyFlag, HasEncryption, HasSnapshots
from nbdserver.image import wording
from nbdserver.image.allocation import SECTOR, bare
from nbdserver.image.opening import UNREAD, Images, is_device
from nbdserver.image.options import Access, access_options
from nbdserver.image.parameters import (
    cache_option,
    file_argument,
    force_share_option,
    format_option,
    output_option,
)
from nbdserver.layer import Layer
from nbdserver.limits import DEPTH_MAX


@click.command("info", short_help="Describe an image.")
@file_argument
@format_option
@click.option("--backing-chain", "is_chain", is_flag=True, help="Describe its backing files too.")
@cache_option("-t", "--cache")
@force_share_option
@output_option
@access_options
def command(*, path: str, format: str | None, is_chain: bool, force_share: bool, as_json: bool, access: Access) -> None:
    """Describe an image: its format, sizes, backing file, snapshots, and what its format says of it.

    The backing file is opened only for --backing-chain, an external data file not at all.
    """
    with access.images(force_share=force_share) as images:
        path, format = access.named(images, path, format)
        found = chain_info(images, path, format) if is_chain else [image_info(images, path, format)]
    if as_json:
        click.echo(wording.as_json(found if is_chain else found[0]))
    else:
        click.echo("\n\n".join("\n".join(in_words(info)) for info in found))


def print_json(path: str, format: str, roots: Sequence[str]) -> None:
    """What a command that has made an image prints with --json. Raises ImageError, OSError."""
    with Images(roots) as images:
        click.echo(wording.as_json(image_info(images, path, format)))


def chain_info(images: Images, path: str, format: str | None) -> list[dict[str, Any]]:
    """`image_info` of an image and of its backing files. Raises ImageError, OSError."""
    chain = [image_info(images, path, format)]
    roots, seen = (*images.roots, *own_roots(path)), {os.path.realpath(path)}
    while (name := chain[-1].get("backing-filename")) is not None:
        named_by = chain[-1]["filename"]
        below = resolve_name(name, named_by)
        within(below, roots, name, named_by)
        if os.path.realpath(below) in seen or len(chain) >= DEPTH_MAX:
            raise ImageError(f"names {name!r}, which closes a loop in its chain", path=named_by)
        seen.add(os.path.realpath(below))
        chain.append(image_info(images, below, chain[-1].get("backing-filename-format")))
    return chain


def image_info(images: Images, path: str, format: str | None) -> dict[str, Any]:
    """What qemu-img says of one image, under its names. Raises ImageError, OSError."""
    layer = images.open(path, format, keys=UNREAD)
    info = {"filename": path, "format": layer.type, **_sizes(layer)}
    info["dirty-flag"] = isinstance(layer, HasDirtyFlag) and layer.dirty_flag
    if isinstance(layer, HasClusters):
        info["cluster-size"] = layer.cluster_size
    if isinstance(layer, HasBacking) and layer.backing_name is not None:
        info["backing-filename"] = layer.backing_name
        info["full-backing-filename"] = _full_name(layer.backing_name, path)
        if layer.backing_format is not None:
            info["backing-filename-format"] = layer.backing_format
    if isinstance(layer, HasSnapshots) and (snapshots := layer.snapshots()):
        info["snapshots"] = [wording.snapshot_info(snapshot) for snapshot in snapshots]
    if isinstance(layer, Describes):
        info["format-specific"] = layer.info()
    if isinstance(layer, HasEncryption) and layer.is_encrypted:
        info["encrypted"] = True
    info["children"] = [{"name": role, "info": _child_info(bare(child))} for role, child in _files(layer)]
    return info


def _sizes(layer: Layer) -> dict[str, Any]:
    """In whole sectors, as QEMU counts."""
    sizes = {"virtual-size": -(-layer.size // SECTOR) * SECTOR}
    return sizes if layer.stored is None else {**sizes, "actual-size": layer.stored}


def _full_name(backing_name: str, path: str) -> str:
    """Where QEMU would look for a backing file; a name of another protocol is all that there is to it."""
    try:
        return resolve_name(backing_name, path)
    except ImageError:
        return backing_name


def _files(layer: Layer) -> Iterator[tuple[str, Layer]]:
    """The files that an image is in."""
    return ((role.replace("_", "-"), child) for role, child in layer.children() if child.filename is not None)


def _child_info(file: Layer) -> dict[str, Any]:
    """A file, as QEMU describes its node."""
    name = file.filename
    assert name is not None
    kind = "host_device" if is_device(name) else "file"
    specific = {"type": "file", "data": {}}
    return {"filename": name, "format": kind, **_sizes(file), "dirty-flag": False, "format-specific": specific} | {
        "children": []
    }


# -- in words ------------------------------------------------------------------------------------------------------


def in_words(info: dict[str, Any]) -> list[str]:
    """The lines that qemu-img prints of one image."""
    lines = [f"image: {info['filename']}", f"file format: {info['format']}", *_sizes_in_words(info, "virtual size")]
    if info.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if info["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "backing-filename" in info:
        name, full = info["backing-filename"], info["full-backing-filename"]
        lines.append(f"backing file: {name}" + (f" (actual path: {full})" if full != name else ""))
        if "backing-filename-format" in info:
            lines.append(f"backing file format: {info['backing-filename-format']}")
    if "snapshots" in info:
        lines += wording.snapshot_list(info["snapshots"])
    if info.get("format-specific", {}).get("data"):
        lines += ["Format specific information:", *wording.in_words(info["format-specific"]["data"], 1)]
    for child in info["children"]:
        below = child["info"]
        words = [f"filename: {below['filename']}", f"protocol type: {below['format']}"]
        lines.append(f"Child node '/{child['name']}':")
        lines += [f"    {line}" for line in (*words, *_sizes_in_words(below, "file length"))]
    return lines


def _sizes_in_words(info: dict[str, Any], name: str) -> list[str]:
    size, stored = info["virtual-size"], info.get("actual-size")
    disk_size = "unavailable" if stored is None else wording.size_in_words(stored)
    return [f"{name}: {wording.size_in_words(size)} ({size} bytes)", f"disk size: {disk_size}"]
