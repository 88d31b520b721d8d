"""The control commands for the images under exports that are being served: snapshots, commit, stream; named as in QMP.
docs/CONTROL.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from nbdserver.control import Command
from nbdserver.errors import ConfigError
from nbdserver.extent import Size
from nbdserver.format import HasSnapshots, Snapshot
from nbdserver.image import wording
from nbdserver.layer import Layer
from nbdserver.live import chain, commit, snapshot, stream
from nbdserver.permissions import ALL, CHANGING, Grant
from nbdserver.server import Export
from nbdserver.service import Service

#: What giving a disk its content of another time does to it.
APPLIES = Grant(CHANGING, ALL)


class ChainCommands:
    """The commands of a server, whose configuration is ``directory``'s: relative paths mean files there."""

    def __init__(self, service: Service, directory: str) -> None:
        self._service, self._server, self._directory = service, service.server, directory

    def table(self) -> Mapping[str, Command]:
        """The commands by their names."""
        return {
            "blockdev-snapshot-sync": self.snapshot,
            "block-commit": self.commit,
            "block-stream": self.stream,
            "query-snapshots": self.query_snapshots,
            "blockdev-snapshot-internal-sync": self.create_internal,
            "blockdev-snapshot-apply-internal-sync": self.apply_internal,
            "blockdev-snapshot-delete-internal-sync": self.delete_internal,
        }

    # -- chains ----------------------------------------------------------------------------------------------------

    def snapshot(self, export: str, snapshot_file: str, directory: str | None = None) -> dict[str, Any]:
        path = os.path.abspath(os.path.join(self._directory, directory or "", snapshot_file))
        with self._server.changing():
            found = chain.export_of(self._server, export)
            self._check_lasting(found)
            old = chain.active(found.root)
            snapshot.insert_overlay(self._server, found, path, self._service.roots)
            self._service.say(f"export {found.name!r} writes {path} now; {old.filename} is its backing file")
        return {"file": path, "backing": old.filename}

    def commit(
        self,
        export: str,
        top: str | None = None,
        base: str | None = None,
        job_id: str | None = None,
        speed: Size = 0,
        directory: str | None = None,
    ) -> dict[str, Any]:
        with self._server.changing():
            found = chain.export_of(self._server, export)
            images = chain.images(found.root)
            first = 0 if top is None else self._find(images, top, directory)
            last = len(images) - 1 if base is None else self._find(images, base, directory)
            if first >= last:
                lower, upper = images[last].filename, images[first].filename
                raise ConfigError(f"{lower} is not below {upper}, so that nothing of that can be committed to it")
            if first == 0:
                self._check_lasting(found)
            job = commit.start(self._server, found, first, last, id=job_id, speed=speed)
        return {"id": job.id, "active": first == 0}

    def stream(
        self,
        export: str,
        base: str | None = None,
        job_id: str | None = None,
        speed: Size = 0,
        directory: str | None = None,
    ) -> dict[str, Any]:
        with self._server.changing():
            found = chain.export_of(self._server, export)
            images = chain.images(found.root)
            last = len(images) if base is None else self._find(images, base, directory)
            if last < 2:
                what = "it has no backing file" if len(images) < 2 else "that is its backing file already"
                raise ConfigError(f"there is nothing to stream into {images[0].filename}: {what}")
            job = stream.start(self._server, found, last if base is not None else None, id=job_id, speed=speed)
        return {"id": job.id}

    def _find(self, images: list[Layer], path: str, directory: str | None) -> int:
        return chain.find(images, path, os.path.join(self._directory, directory or ""))

    def _check_lasting(self, export: Export) -> None:
        """Raise ConfigError if the export is opened by the name of its image whenever it is asked for."""
        if export.made_by is not None:
            raise ConfigError(f"export {export.name!r} is made anew, of the same file, for whoever asks for it next")

    # -- internal snapshots ----------------------------------------------------------------------------------------

    def query_snapshots(self, export: str) -> list[dict[str, Any]]:
        found = chain.export_of(self._server, export, writable=False)
        with found.running():
            image = chain.active(found.root)
            return (
                [wording.snapshot_info(entry) for entry in image.snapshots()] if isinstance(image, HasSnapshots) else []
            )

    def create_internal(self, export: str, name: str) -> dict[str, Any]:
        with self._changing(export) as (image, _):
            return wording.snapshot_info(image.create_snapshot(name))

    def delete_internal(self, export: str, name: str) -> dict[str, Any]:
        with self._changing(export) as (image, _):
            entry = _entry(image, name)
            image.delete_snapshot(entry.id)
            return wording.snapshot_info(entry)

    def apply_internal(self, export: str, name: str, force: bool = False) -> dict[str, Any]:
        with self._changing(export) as (image, exports):
            entry = _entry(image, name)
            for other in exports:
                if self._server.clients_of(other) and not force:
                    raise ConfigError(
                        f"export {other.name!r} has clients, under whose hands the disk would become another; "
                        "disconnect them, or force it"
                    )
            assert isinstance(image, Layer)
            with self._server.claimed(image, APPLIES, user="applying a snapshot"):
                image.apply_snapshot(entry.id)
            for other in exports:
                other.renew()
            return wording.snapshot_info(entry)

    @contextlib.contextmanager
    def _changing(self, export: str) -> Iterator[tuple[HasSnapshots, list[Export]]]:
        """The active image, and its exports, with nobody at them."""
        with self._server.changing():
            found = chain.export_of(self._server, export)
            chain.check_idle(self._server, found)
            image = chain.active(found.root)
            if not isinstance(image, HasSnapshots):
                raise ConfigError(f"{image.filename}: an image of the format {image.type} has no internal snapshots")
            with self._server.drained(image) as exports:
                yield image, exports


def _entry(image: HasSnapshots, name: str) -> Snapshot:
    entries = image.snapshots()
    for found in (
        *(entry for entry in entries if entry.id == name),
        *(entry for entry in entries if entry.name == name),
    ):
        return found
    raise ConfigError(f"there is no snapshot {name!r}; there are: {', '.join(repr(e.name) for e in entries) or 'none'}")
