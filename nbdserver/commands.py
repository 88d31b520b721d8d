"""The commands of the control socket: what each does, and what it returns. docs/CONTROL.md describes them.

Names are those of QEMU's QMP where it has a command of that kind. A command's arguments are those of its function, with
their types; it raises what `control.error_object` can tell.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from nbdserver import config, explain
from nbdserver.control import Command, CommandError
from nbdserver.errors import ConfigError
from nbdserver.extent import Size
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
            "quit": self.quit,
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
        directory: str | None = None,
    ) -> dict[str, Any]:
        keys = {"image": image, "format": format, "layers": layers, "read_only": read_only, "description": description}
        values = {key: value for key, value in keys.items() if value is not None}
        wanted = config.one_export(name, values, os.path.join(self._directory, directory or ""))
        export = self._service.add(wanted)
        return {"name": export.name, "size": export.info.size, "read_only": export.info.read_only}

    def block_export_del(self, name: str, mode: Literal["safe", "hard", "drain"] = "safe") -> dict[str, Any]:
        return {"ended": self._service.remove(name, Removal(mode))}

    def block_resize(self, export: str, size: Size) -> dict[str, Any]:
        self._service.resize(export, size)
        return {}

    def disconnect(self, client: int) -> dict[str, Any]:
        self._service.server.disconnect(client)
        return {}

    def quit(self) -> dict[str, Any]:
        self._service.quit()
        return {}
