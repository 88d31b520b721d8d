"""The meta contexts that an export offers besides ``base:allocation``: QEMU's, by the names that it gives them.

=========================== ==================================================================================
qemu:allocation-depth       which image of a chain holds a range: 1 the topmost, 2 the one below, 0 none
qemu:dirty-bitmap:NAME      bit 0: the range is marked in the dirty bitmap NAME
=========================== ==================================================================================

They are offered where they are asked for (as ``qemu-nbd -A`` and ``-B NAME``). A bitmap may be the root's or a lower
layer's: filters show the disk below them, images the one of their backing file; the nearest of a name is meant. While
it is offered it cannot be removed, cleared or switched on or off; one that records goes on doing so. Such a one is not
offered read-only while others write to its disk: what a client copies by it would change under its hands. So it is in
QEMU (nbd/server.c, nbd_export_create; docs/interop/nbd.rst).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from typing import Literal, cast

from nbdserver.errors import ConfigError, RequestError
from nbdserver.format import HasBitmaps
from nbdserver.graph import bare
from nbdserver.layer import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, Layer
from nbdserver.limits import BITMAPS_OFFERED_MAX

#: Bitmaps by their names, or all that can be offered.
Bitmaps = Sequence[str] | Literal[True]


def offered(allocation_depth: bool) -> tuple[str, ...]:
    """The names of the contexts but for bitmaps."""
    return (BASE_ALLOCATION, ALLOCATION_DEPTH) if allocation_depth else (BASE_ALLOCATION,)


class Contexts:
    """The contexts of an export of ``root``, which is open; its bitmaps are kept for it until `close`.

    ``read_only``: whether the export is. Raises ConfigError for bitmaps that cannot be offered, ImageError, OSError.
    """

    def __init__(self, root: Layer, bitmaps: Bitmaps = (), *, allocation_depth: bool = False, read_only: bool) -> None:
        self._read_only = read_only
        self._keeping = contextlib.ExitStack()
        #: Whose bitmaps they are.
        self._layers: dict[str, Layer] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for name in _all(root) if bitmaps is True else bitmaps:
                if name not in self._layers and (bitmaps is not True or self._why_not(root, name) is None):
                    self._offer(root, name)
            undo.pop_all()
        #: All names, in the order in which they are listed.
        self.names = (*offered(allocation_depth), *(DIRTY_BITMAP + name for name in self._layers))

    def check(self, root: Layer, context: str) -> None:
        """Raise RequestError if the export, which has the root ``root`` now, cannot speak of a context any more."""
        name = context.removeprefix(DIRTY_BITMAP)
        if name == context:
            return
        for layer in _showing(root):
            if layer is self._layers.get(name):
                return
            if isinstance(layer, HasBitmaps) and any(bitmap.name == name for bitmap in layer.bitmaps()):
                break  # a nearer one, which was not there before
        raise RequestError(errno.EIO, f"bitmap {name!r} is no longer what the export shows")

    def renewed(self, root: Layer) -> Contexts:
        """The contexts of the export when its layers have changed, with the bitmaps of these that can still be offered.
        Raises ImageError, OSError."""
        there = [name for name in self._layers if _find(root, name) and not self._why_not(root, name)]
        return Contexts(root, there, allocation_depth=ALLOCATION_DEPTH in self.names, read_only=self._read_only)

    def close(self) -> None:
        """Let the bitmaps go."""
        self._keeping.close()

    def _offer(self, root: Layer, name: str) -> None:
        if len(self._layers) >= BITMAPS_OFFERED_MAX:
            raise ConfigError(f"an export offers at most {BITMAPS_OFFERED_MAX} bitmaps", key="bitmaps")
        why_not = self._why_not(root, name)
        if why_not is not None:
            raise ConfigError(why_not, key="bitmaps")
        layer = _find(root, name)
        assert layer is not None
        try:
            self._keeping.enter_context(cast(HasBitmaps, layer).use_bitmap(name))
        except RequestError as error:
            raise ConfigError(str(error), key="bitmaps") from error
        self._layers[name] = layer

    def _why_not(self, root: Layer, name: str) -> str | None:
        """Why a bitmap cannot be offered, if that is known before it is looked at."""
        layer = _find(root, name)
        if layer is None:
            known = ", ".join(map(repr, _all(root))) or "none"
            return f"there is no bitmap {name!r}; there are: {known}"
        bitmap = next(found for found in cast(HasBitmaps, layer).bitmaps() if found.name == name)
        if bitmap.in_use:
            return f"bitmap {name!r} is inconsistent: who used it last went away without storing it"
        if bitmap.auto and self._read_only and not layer.read_only:
            return f"bitmap {name!r} records what is written to the disk, which this export shows read-only: disable it"
        return None


def keeper(root: Layer, name: str | None = None) -> HasBitmaps:
    """The nearest layer, of those whose disk ``root`` shows, that has a bitmap of this name; None: that can have any.
    Raises ConfigError."""
    found = _find(root, name) if name is not None else next((each for each in _showing(root) if _can_keep(each)), None)
    if found is None:
        what = f"there is no bitmap {name!r}" if name is not None else f"{root.type} cannot keep bitmaps"
        raise ConfigError(f"{what}; there are: {', '.join(map(repr, _all(root))) or 'none'}")
    return cast(HasBitmaps, found)


def _can_keep(layer: Layer) -> bool:
    return isinstance(layer, HasBitmaps)


def _showing(root: Layer) -> Iterator[Layer]:
    """``root``, and the layers below it whose disk it shows."""
    layer: object = root
    while isinstance(layer, Layer):
        layer = bare(layer)
        yield layer
        layer = getattr(layer, "backing" if isinstance(layer, HasBitmaps) else "file", None)


def _find(root: Layer, name: str) -> Layer | None:
    """The nearest layer that has a bitmap of this name."""
    with_bitmaps = (layer for layer in _showing(root) if isinstance(layer, HasBitmaps))
    return next((layer for layer in with_bitmaps if any(bitmap.name == name for bitmap in layer.bitmaps())), None)


def _all(root: Layer) -> list[str]:
    """The names of all bitmaps there are."""
    found = (layer.bitmaps() for layer in _showing(root) if isinstance(layer, HasBitmaps))
    return list(dict.fromkeys(bitmap.name for bitmaps in found for bitmap in bitmaps))
