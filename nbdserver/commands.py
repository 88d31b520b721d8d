"""The commands of the control socket: what each does, and what it returns. docs/CONTROL.md describes them.

Names are those of QEMU's QMP where it has a command of that kind. A command's arguments are those of its function, with
their types; it raises what `control.error_object` can tell.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from nbdserver import explain
from nbdserver.bitmap_commands import BitmapCommands
from nbdserver.chain_commands import ChainCommands
from nbdserver.control import Command, CommandError
from nbdserver.errors import ConfigError
from nbdserver.extent import Size
from nbdserver.jobs import Jobs
from nbdserver.offers import Removal
from nbdserver.service import Service


class Commands:
    """The commands of a server, whose configuration is ``directory``'s: relative paths mean files there."""

    def __init__(self, service: Service, directory: str) -> None:
        self._service, self._directory = service, directory

    def table(self) -> Mapping[str, Command]:
        """The commands by their names."""
        return {
            "query-commands": self.query_commands,
            "query-block-exports": self._service.rows,
            "query-stats": self._service.server.stats,
            "query-listeners": self.query_listeners,
            "explain": self.explain,
            "reload": self.reload,
            "block-export-add": self.block_export_add,
            "block-export-del": self.block_export_del,
            "block_resize": self.block_resize,
            "disconnect": self.disconnect,
            "filter-add": self.filter_add,
            "filter-remove": self.filter_remove,
            "query-jobs": self.query_jobs,
            "job-pause": self.job_pause,
            "job-resume": self.job_resume,
            "job-cancel": self.job_cancel,
            "job-complete": self.job_complete,
            "job-dismiss": self.job_dismiss,
            "block-job-set-speed": self.block_job_set_speed,
            "quit": self.quit,
            **BitmapCommands(self._service.server).table(),
            **ChainCommands(self._service, self._directory).table(),
        }

    # -- questions -------------------------------------------------------------------------------------------------

    def query_commands(self) -> list[dict[str, str]]:
        return [{"name": name} for name in sorted(self.table())]

    def query_listeners(self) -> list[str]:
        return self._service.server.listening

    def explain(
        self, export: str, operation: Literal["read", "write", "zero"], offset: Size, length: Size
    ) -> dict[str, Any]:
        """The way of a request through the layers that are open, and whether it would fault now."""
        server = self._service.server
        found = server.exports.get(server.default if export == "" and server.default is not None else export)
        if found is None:
            raise ConfigError(f"there is no export {export!r}")
        with found.running():
            try:
                return explain.explain_layers(
                    found.name,
                    found.root,
                    found.info.read_only,
                    explain.OPERATIONS[operation],
                    offset,
                    length,
                    found.engine_export.known,
                ).as_json()
            except ValueError as error:
                raise CommandError("GenericError", str(error)) from error

    # -- changes ---------------------------------------------------------------------------------------------------

    def reload(self, hard: bool = False) -> dict[str, Any]:
        return dataclasses.asdict(self._service.reload(Removal.HARD if hard else Removal.DRAIN))

    def block_export_add(
        self,
        name: str,
        image: str | None = None,
        format: str | None = None,
        layers: list | None = None,  # type: ignore[type-arg]
        read_only: bool | None = None,
        description: str | None = None,
        tls: str | None = None,
        access: dict | None = None,  # type: ignore[type-arg]
        bitmaps: list | bool | None = None,  # type: ignore[type-arg]
        allocation_depth: bool | None = None,
        directory: str | None = None,
    ) -> dict[str, Any]:
        keys = {
            "image": image,
            "format": format,
            "layers": layers,
            "read_only": read_only,
            "description": description,
            "tls": tls,
            "access": access,
            "bitmaps": bitmaps,
            "allocation_depth": allocation_depth,
        }
        values = {key: value for key, value in keys.items() if value is not None}
        export = self._service.add(name, values, os.path.join(self._directory, directory or ""))
        return {"name": export.name, "size": export.info.size, "read_only": export.info.read_only}

    def block_export_del(self, name: str, mode: Literal["safe", "hard", "drain"] = "safe") -> dict[str, Any]:
        return {"ended": self._service.remove(name, Removal(mode))}

    def block_resize(self, export: str, size: Size) -> dict[str, Any]:
        self._service.resize(export, size)
        return {}

    def disconnect(self, client: int) -> dict[str, Any]:
        self._service.server.disconnect(client)
        return {}

    def filter_add(self, export: str, filter: dict, directory: str | None = None) -> dict[str, Any]:  # type: ignore[type-arg]
        self._service.add_filter(export, filter, os.path.join(self._directory, directory or ""))
        return {}

    def filter_remove(self, export: str) -> dict[str, Any]:
        return {"type": self._service.remove_filter(export)}

    # -- jobs ------------------------------------------------------------------------------------------------------

    @property
    def _jobs(self) -> Jobs:
        return self._service.server.jobs

    def query_jobs(self) -> list[dict[str, Any]]:
        return [job.describe() for job in self._jobs.all]

    def job_pause(self, id: str) -> dict[str, Any]:
        self._jobs.get(id).pause()
        return {}

    def job_resume(self, id: str) -> dict[str, Any]:
        self._jobs.get(id).resume()
        return {}

    def job_cancel(self, id: str) -> dict[str, Any]:
        self._jobs.get(id).cancel()
        return {}

    def job_complete(self, id: str) -> dict[str, Any]:
        self._jobs.get(id).complete()
        return {}

    def job_dismiss(self, id: str) -> dict[str, Any]:
        self._jobs.dismiss(id)
        return {}

    def block_job_set_speed(self, id: str, speed: Size) -> dict[str, Any]:
        self._jobs.get(id).set_speed(speed)
        return {}

    # -- the end ---------------------------------------------------------------------------------------------------

    def quit(self) -> dict[str, Any]:
        self._service.quit()
        return {}
