"""The control commands for dirty bitmaps of exports that are being served, named as in QMP. docs/CONTROL.md.

A command means the nearest bitmap of that name that the export shows; a new one is added to the nearest layer that can
keep one. Changes happen in a drained section: no write is half before and half after one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from nbdserver.contexts import keeper
from nbdserver.control import Command
from nbdserver.extent import Size
from nbdserver.format import Bitmap, HasBitmaps
from nbdserver.layer import Layer
from nbdserver.live.chain import export_of
from nbdserver.server import Export, Server


class BitmapCommands:
    """The commands of a server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def table(self) -> Mapping[str, Command]:
        """The commands by their names."""
        return {
            "query-dirty-bitmaps": self.query,
            "block-dirty-bitmap-add": self.add,
            "block-dirty-bitmap-remove": self.remove,
            "block-dirty-bitmap-clear": self.clear,
            "block-dirty-bitmap-enable": self.enable,
            "block-dirty-bitmap-disable": self.disable,
            "block-dirty-bitmap-merge": self.merge,
            "block-export-offer": self.offer,
        }

    def query(self, export: str) -> list[dict[str, Any]]:
        found = self._export(export)
        with found.running():
            return [described(bitmap) for bitmap in keeper(found.root).bitmaps()]

    def add(self, export: str, name: str, granularity: Size | None = None, disabled: bool = False) -> dict[str, Any]:
        with self._changing(export) as (layer, _):
            layer.add_bitmap(name, granularity=granularity, enabled=not disabled)
        return {}

    def remove(self, export: str, name: str) -> dict[str, Any]:
        with self._changing(export, name) as (layer, _):
            layer.remove_bitmap(name)
        return {}

    def clear(self, export: str, name: str) -> dict[str, Any]:
        with self._changing(export, name) as (layer, _):
            layer.clear_bitmap(name)
        return {}

    def enable(self, export: str, name: str) -> dict[str, Any]:
        with self._changing(export, name) as (layer, _):
            layer.enable_bitmap(name)
        return {}

    def disable(self, export: str, name: str) -> dict[str, Any]:
        with self._changing(export, name) as (layer, _):
            layer.disable_bitmap(name)
        return {}

    def merge(self, export: str, target: str, bitmaps: list[str]) -> dict[str, Any]:
        with self._changing(export, target) as (layer, root):
            for name in bitmaps:
                source = keeper(root, name)
                assert isinstance(source, Layer)
                layer.merge_bitmap(target, source, name)
        return {}

    def offer(self, export: str, bitmaps: list[str] | bool) -> dict[str, Any]:
        found = self._export(export)
        with self._server.changing():
            found.offer(True if bitmaps is True else bitmaps or ())
        return {"contexts": list(found.info.contexts)}

    def _export(self, name: str) -> Export:
        return export_of(self._server, name, writable=False)

    @contextlib.contextmanager
    def _changing(self, export: str, name: str | None = None) -> Iterator[tuple[HasBitmaps, Layer]]:
        """The layer that keeps the bitmap, and the export's root, with nobody at them."""
        root = self._export(export).root
        with self._server.drained(root):
            yield keeper(root, name), root


def described(bitmap: Bitmap) -> dict[str, Any]:
    """A bitmap as QAPI's ``BlockDirtyInfo`` has it."""
    return {
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "recording": bitmap.auto and not bitmap.in_use,
        "inconsistent": bitmap.in_use,
        "persistent": True,
        "count": bitmap.count,
    }
