"""``snapshot``: an internal snapshot of an image, read-only, beside the disk that goes on being written.

::

    export "vm" ──────────────────────────┐
    export "before-update" ─> snapshot ─file─> qcow2 ─file─> ...     the image, as a node that both exports name
                                 └──────view─> qcow2 ─file──┘        the same file through the snapshot's own tables

For as long as it is exported the snapshot cannot be deleted; all else can be done, other snapshots made and applied
included. What the two share is the file: where the bytes of a snapshot are never changes, and they are never written.
So it is read at the speed of a raw file, and nobody waits for anybody.

An image that nobody writes needs no such layer: ``{type = "qcow2", snapshot = "NAME"}`` shows it by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar, Protocol, runtime_checkable

from nbdserver.errors import ConfigError
from nbdserver.extent import Extent, Intent
from nbdserver.graph import bare, open_child
from nbdserver.layer import Buffers, Layer, Opener
from nbdserver.permissions import READER, Grant


@runtime_checkable
class ShowsSnapshots(Protocol):
    """An image that can show what its snapshots hold while it is being written."""

    def show_snapshot(self, id_or_name: str) -> Layer:
        """A layer, not open yet, that shows a snapshot, and keeps it from being deleted while it is open. Opening it
        raises ConfigError if there is no such snapshot."""


@dataclasses.dataclass(eq=False)
class Snapshot(Layer):
    #: The image that has the snapshot.
    file: Layer
    #: Its ID, or else its name.
    snapshot: str

    buffers: ClassVar[Buffers] = Buffers(read="none: always mapped", write="none: read-only", zero="none: read-only")

    def open(self, opener: Opener) -> None:
        image = bare(self.file)
        if not isinstance(image, ShowsSnapshots):
            raise ConfigError(f"found {image.type}, which has no internal snapshots; allowed is qcow2", key="file")
        self.view: Layer
        open_child(self, "view", image.show_snapshot(self.snapshot), opener)

    def child_grant(self, role: str, own: Grant) -> Grant:
        return READER  # whatever happens to the disk

    @property
    def size(self) -> int:
        return self.view.size

    @property
    def read_only(self) -> bool:
        return True

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        assert intent is Intent.READ, "read-only"
        return (Extent(self.size - offset, self.view, offset),)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return () if child is self.file else ((offset, length),)

    def flush(self) -> None:
        """Nothing is written here."""

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self.view.status(context, offset, length)
