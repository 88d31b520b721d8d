"""``snapshot-access``: a disk as it was, while it goes on being written.

::

    export "live" ────────────────────┐
    export "snap" ─> snapshot-access ─file─> copy-before-write ──file───> the live disk
                                                            └────target─> what was overwritten since

Read-only; stands on the very `copy-before-write` layer that the live disk is exported through. QEMU's driver of this
name. Where nothing is compressed or otherwise made by code, it is read with no code either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar, Protocol, runtime_checkable

from nbdserver.errors import ConfigError
from nbdserver.extent import Extent, Intent
from nbdserver.graph import Child
from nbdserver.layer import Buffers, Layer, Opener
from nbdserver.permissions import READER, Grant
from nbdserver.request import Request


@runtime_checkable
class Snapshot(Protocol):
    """What a layer that keeps a snapshot offers besides the disk that it is itself."""

    def resolve_snapshot(self, offset: int, length: int) -> Iterable[Extent]:
        """`Layer.resolve` of the snapshot, for READ; CODE means `read_snapshot`."""

    def read_snapshot(self, request: Request) -> None:
        """`Layer.read` of the snapshot, for any range."""

    def status_snapshot(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """`Layer.status` of the snapshot."""


@dataclasses.dataclass(eq=False)
class SnapshotAccess(Layer):
    #: The copy-before-write layer.
    file: Layer

    buffers: ClassVar[Buffers] = Buffers(
        read="keeps: filled from the disk or from the target",
        write="none: read-only",
        zero="none: read-only",
    )

    def open(self, opener: Opener) -> None:
        below = self.file.layer if isinstance(self.file, Child) else self.file
        if not isinstance(below, Snapshot):
            raise ConfigError(f"found {below.type}, which keeps no snapshot; allowed is copy-before-write", key="file")
        self._snapshot: Snapshot = below

    def child_grant(self, role: str, own: Grant) -> Grant:
        return READER  # whatever happens to the disk: what it was is read

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def read_only(self) -> bool:
        return True

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        assert intent is Intent.READ, "read-only"
        return self._snapshot.resolve_snapshot(offset, length)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def read(self, request: Request) -> None:
        self._snapshot.read_snapshot(request)

    def flush(self) -> None:
        """Nothing is written here."""

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self._snapshot.status_snapshot(context, offset, length)
