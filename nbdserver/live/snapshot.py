"""A live snapshot: an overlay is put in above the active image, which stays what it is at this moment.

::

    flush old │ replace(old, overlay) │ reopen(old, read-only)         all of it in one drained section

Before the first of these the overlay is there, durable; before the second it is not used, and killed by then the old
image is the disk. From the third on the old image is not written, so its bitmaps are stored, and other readers let in.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

from nbdserver import registry
from nbdserver.errors import ConfigError, NbdserverError
from nbdserver.files import own_roots, within
from nbdserver.format import HasEncryption
from nbdserver.graph import walk
from nbdserver.image import creation
from nbdserver.layer import Layer, finish
from nbdserver.live.chain import active, check_idle, mode_of, name_of
from nbdserver.server import Export, Server

_log = logging.getLogger("nbdserver")


def insert_overlay(server: Server, export: Export, path: str, roots: Sequence[str]) -> Layer:
    """Put a new overlay at ``path``, where there is nothing, above the active image of an export, for all exports of
    it. It is made in the directory of that image, or below it, or in ``roots``, from where it can name the images of
    the chain. Returns it. Raises ConfigError, ImageError, RequestError, OSError, TimeoutError, with nothing changed."""
    with server.changing():
        check_idle(server, export)
        old = active(export.root)
        if isinstance(old, HasEncryption) and old.is_encrypted:
            raise ConfigError(
                f"{old.filename} is encrypted, and an overlay that is made here is not: what is written would be there "
                "for all to read (internal snapshots are encrypted)"
            )
        name = name_of(old)
        _check_place(path, old, roots)
        creation.make_overlay(path, old.size, name.path, name.format)
        with contextlib.ExitStack() as undo:
            undo.callback(os.unlink, path)
            overlay = registry.image(path, creation.OVERLAY, mode_of(old), {"backing": old})
            finish(old.flush())  # most of it: guests will wait for the rest
            with server.opened_layers(overlay, roots=roots), server.drained(old):
                finish(old.flush())
                server.replace(old, overlay)
                undo.pop_all()
                _retire(server, old)
        return overlay


def _check_place(path: str, old: Layer, roots: Sequence[str]) -> None:
    """The overlay may be made there, and can be opened by its own name afterwards. Raises ConfigError, ImageError."""
    if os.path.lexists(path):
        raise ConfigError(f"there is something at {path} already; a snapshot makes a new file", key="snapshot-file")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(f"there is no directory {os.path.dirname(path)}", key="snapshot-file")
    allowed = [os.path.realpath(root) for root in roots]
    within(path, (*allowed, *own_roots(old.filename)), path, old.filename)
    for _, below in walk(old):
        if below.filename is not None:
            within(below.filename, (*allowed, *own_roots(path)), below.filename, path)


def _retire(server: Server, old: Layer) -> None:
    """Have the old image open for reading only. If that fails, it stays as it is, which harms nobody."""
    try:
        server.reopen(old, read_only=True)
    except (NbdserverError, OSError) as error:
        _log.warning("%s stays open for writing, though nobody writes it: %s", old.filename, error)
