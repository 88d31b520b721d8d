"""Opening images: layers over plain files, locked as QEMU locks them, all closed when a command ends."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Final

from nbdserver import registry
from nbdserver.errors import ConfigError, ImageError
from nbdserver.extent import FileMode
from nbdserver.files import FileOpener, Files, Keys, Source, make
from nbdserver.format import snapshot_named
from nbdserver.graph import Graph, execute
from nbdserver.image.remote import Remote, is_remote
from nbdserver.layer import Layer
from nbdserver.probe import HEAD_LENGTH
from nbdserver.registry import NO_KEYS, has_key
from nbdserver.request import Request

NO_SECRETS: Final[Mapping[str, Source]] = MappingProxyType({})

#: Who opens images here, in errors.
USER: Final = "this command"

#: For `Images.open`: leave an encrypted image locked.
LOCKED: Final[Mapping[str, object]] = {"key_file": False}

#: Leave the backing file alone.
ALONE: Final[Mapping[str, object]] = {"backing": False}

#: And an external data file, too, and an encrypted image locked: for what only describes it, which may be anybody's.
UNREAD: Final[Mapping[str, object]] = {**ALONE, "data_file": False, **LOCKED}

#: For images that are written here: allocate what is written and nothing beside it.
EXACT: Final[Mapping[str, object]] = {"allocation_ahead": 0}


class Images:
    """The images that one command uses. A context manager: its end closes them, and raises what closing raises.

    ``roots``: directories in which images may name files, besides their own. ``secrets``: where the keys of encrypted
    images are, by name. ``force_share``: images that are opened for reading may be in use by a process that writes
    them.
    """

    def __init__(
        self, roots: Sequence[str] = (), *, secrets: Mapping[str, Source] = NO_SECRETS, force_share: bool = False
    ) -> None:
        self.roots, self.keys = roots, Keys(secrets)
        self._files = Files(force_share=force_share)
        self._graph = Graph()
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Images:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.__exit__(kind, error, trace)

    def format(self, path: str, format: str | None) -> str:
        """The image's format: the one given, or else what its first bytes say; a disk that a server exports is raw.

        Raises ImageError.
        """
        if format is None and is_remote(path):
            return "raw"
        return format if format is not None else self._files.probe(path)

    def open(
        self,
        path: str,
        format: str | None = None,
        *,
        read_only: bool = True,
        cache: str = "writeback",
        keys: Mapping[str, object] = NO_KEYS,
    ) -> Layer:
        """Open the image at ``path`` (or an NBD URI), and the chain below it.

        ``keys``: more keys of its layer's; those that the format has no use for are left out, if they are in `UNREAD`.
        Raises ImageError, ConfigError, OSError.
        """
        name = self.format(path, format)
        if "key_file" not in keys:
            keys = {**keys, **self.keys.of(path)}
        wanted = fitting(name, {**keys, **EXACT})
        if is_remote(path):
            return self.enter(registry.build(name, {"file": Remote(path), **wanted}), read_only=read_only)
        return self.enter(registry.image(path, name, FileMode(cache), wanted), read_only=read_only)

    def open_snapshot(self, path: str, format: str | None, snapshot: str | None) -> Layer:
        """Open an image for reading, or an internal snapshot of it, as qemu-img's ``-l`` names it: by id or name,
        ``snapshot.id=ID`` or ``snapshot.name=NAME``. Raises as `open` does."""
        if snapshot is None:
            return self.open(path, format)
        name = self.format(path, format)
        if not has_key(layer_type(name), "snapshot"):
            raise ImageError(f"has no internal snapshots: it is a {name!r} image", path=path)
        return self.open(path, name, keys={"snapshot": snapshot_named(snapshot)})

    def file(self, path: str, *, read_only: bool, cache: str = "writeback") -> Layer:
        """Open the file at ``path`` as what it is: an image's bytes. Raises as `open` does."""
        if is_remote(path):
            return self.enter(Remote(path), read_only=read_only)
        return self.enter(registry.build("file", {"path": path, "cache": cache}), read_only=read_only)

    def empty_file(self, path: str, *, cache: str = "writeback") -> Layer:
        """An empty file at ``path``, locked: made, or else emptied. Of a block device only what images are known by is
        zeroed. Raises as `open` does."""
        if is_remote(path):
            raise ImageError("is there already, and is what it is: write into it, with --no-create", path=path)
        make(path)
        file = self.file(path, read_only=False, cache=cache)
        if is_device(path):
            execute(file, Request.zero(0, min(HEAD_LENGTH, file.size)))
            file.flush()
        else:
            file.resize(0)
        return file

    def enter(self, layer: Layer, *, read_only: bool) -> Layer:
        """Open a stack of layers, which may stand on some that are open here."""
        self._graph.open(layer, self.opener(read_only=read_only), user=USER)
        self._ending.callback(self._graph.close, layer)
        return layer

    def hand_over(self, file: Layer) -> None:
        """Keep the file open, and leave it to a layer that is to be opened on it."""
        self._graph.hold(file)

    def close(self, layer: Layer) -> None:
        """Close what `open`, `file` or `enter` gave, before the end."""
        self._graph.close(layer)

    def opener(self, *, read_only: bool) -> FileOpener:
        """What layers are opened with here."""
        return FileOpener(self._graph, self._files, roots=self.roots, read_only=read_only, user=USER, keys=self.keys)


def fitting(format: str, keys: Mapping[str, object]) -> dict[str, object]:
    """The keys without those of `UNREAD` and `EXACT` that images of ``format`` have no use for."""
    cls = layer_type(format)
    return {key: value for key, value in keys.items() if key not in {**UNREAD, **EXACT} or has_key(cls, key)}


def layer_type(format: str) -> type[Layer]:
    """The class of the layer for images of ``format``. Raises ConfigError."""
    cls = registry.layer_type(format)
    try:
        registry.image("", format)
    except ImageError as error:
        raise ConfigError(error.message) from error
    return cls


def is_device(path: str) -> bool:
    """Whether there is a block device at ``path``, whose size is what it is. Raises OSError."""
    return stat.S_ISBLK(os.stat(path).st_mode)
