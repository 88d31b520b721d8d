"""Name patterns: a disk of its own for every name that clients ask for, made when it is first asked for.

::

    [exports."sandbox-*"]                     golden.qcow2                 read-only, open once for all
    template = {image = "golden.qcow2",            ↑ backing
                directory = "sandboxes"}      sandboxes/sandbox-7.qcow2    made for the first client of "sandbox-7"

An overlay is open while it has clients. It stays for the next who asks for its name; one that is *ephemeral* is deleted
after its last client. The file's name is the export's, of which no more is allowed than makes a single path component.
An ephemeral overlay's has an ``@`` in it, which no client can ask for: nothing is ever deleted that was not made here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from nbdserver import registry
from nbdserver.access import Rule
from nbdserver.config import ExportConfig, TemplateConfig, is_lawful_instance
from nbdserver.contexts import offered
from nbdserver.errors import ConfigError, ImageError, NbdserverError
from nbdserver.files import Files
from nbdserver.handshake import ExportInfo, Unavailable
from nbdserver.image import creation
from nbdserver.image.allocation import SECTOR
from nbdserver.image.creation import OVERLAY, UNFINISHED_SUFFIX

if TYPE_CHECKING:
    from nbdserver.server import Export, Server

#: How the files of overlays end, after the export's name.
SUFFIX: Final = f".{OVERLAY}"
EPHEMERAL_SUFFIX: Final = f"@ephemeral.{OVERLAY}"


class Template:
    """The exports that a pattern stands for. Raises ConfigError, ImageError when the golden image cannot be used.

    ``roots``: where images may name files, besides the directories of the overlays and of the golden image. ``log`` is
    given each line of the log. Thread-safe.
    """

    def __init__(
        self, wanted: ExportConfig, server: Server, *, roots: Sequence[str], log: Callable[[str], None]
    ) -> None:
        assert wanted.template is not None
        self.config: TemplateConfig = wanted.template
        self.name = wanted.name
        #: What its exports are told, from the next on.
        self.description, self.tls_required, self.access = wanted.description, wanted.tls_required, wanted.access
        self._allocation_depth = wanted.allocation_depth
        self._server, self._log = server, log
        self._image = os.path.abspath(self.config.image)
        self._format = self.config.format or Files().probe(self._image)
        self._roots = (*roots, os.path.dirname(self._image), os.path.dirname(os.path.realpath(self._image)))
        self._names = re.compile(".+".join(map(re.escape, self.name.split("*"))))
        self._suffix = EPHEMERAL_SUFFIX if self.config.ephemeral else SUFFIX
        #: Holds the golden image open, also while there are no overlays.
        self._golden = server.open(self.name, registry.image(self._image, self._format), read_only=True, roots=roots)
        try:
            self._size = -(-(self.config.size or self._golden.info.size) // SECTOR) * SECTOR
            self._prepare_directory()
        except BaseException:
            server.end(self._golden)
            raise

    def close(self) -> None:
        """Make no more. Those that there are stay. Raises what closing the golden image raises."""
        self._server.end(self._golden)

    @property
    def instances(self) -> list[Export]:
        """Those that have clients now."""
        return [export for export in list(self._server.exports.values()) if export.made_by is self]

    def _prepare_directory(self) -> None:
        """Have the directory, without ephemeral overlays that a server which was killed has left there."""
        try:
            os.makedirs(self.config.directory, exist_ok=True)
            for name in os.listdir(self.config.directory):
                if self._stem(name.removesuffix(UNFINISHED_SUFFIX)) is not None and self.config.ephemeral:
                    self._remove_left(os.path.join(self.config.directory, name))
        except OSError as error:
            raise ConfigError(f"{self.config.directory}: {error.strerror}", key="template") from error

    def _remove_left(self, path: str) -> None:
        files = Files()
        try:
            file = files.open(path, read_only=False)
        except ImageError:
            return  # it is in use, by another server
        try:
            os.unlink(path)
            self._log(f"{path}: left by a server that was killed, and deleted")
        finally:
            files.close(file)

    def describe(self, description: str, tls_required: bool, access: Rule) -> None:
        """Have clients told another description, and new ones held to other rules."""
        self.description, self.tls_required, self.access = description, tls_required, access
        for export in self.instances:
            export.describe(description, tls_required, access)

    # -- offers.Maker ----------------------------------------------------------------------------------------------

    def info(self, name: str) -> ExportInfo | None:
        """What a client is told of a name that is not there yet; None if the pattern does not stand for it."""
        if not self._is_mine(name):
            return None
        return ExportInfo(
            name=name,
            size=self._size,
            description=self.description,
            tls_required=self.tls_required,
            access=self.access,
            contexts=offered(self._allocation_depth),
        )

    def make(self, name: str) -> Export:
        """The export of that name, not offered yet; its overlay is made if there is none. Raises Unavailable."""
        path = os.path.join(self.config.directory, name + self._suffix)
        try:
            if self.config.ephemeral and os.path.lexists(path):
                self._remove_left(path)
            if os.path.lexists(path):
                return self._open(name, path)
            self._check_count()
            self._make_overlay(path)
            with self._undone(path):
                return self._open(name, path)
        except (NbdserverError, OSError) as error:
            self._log(f"export {name!r} cannot be made: {error}")
            raise Unavailable(f"export {name!r} cannot be made now") from error

    def _check_count(self) -> None:
        """One more is not one too many."""
        count = sum(self._stem(file) is not None for file in os.listdir(self.config.directory))
        if count >= self.config.count_max:
            raise ConfigError(f"there are {count} already, allowed are {self.config.count_max}", key="count_max")

    def _stem(self, file: str) -> str | None:
        """The export's name, if an overlay's file of this template is called so."""
        stem = file.removesuffix(self._suffix)
        return stem if stem != file and self._is_mine(stem) else None

    def _is_mine(self, name: str) -> bool:
        return is_lawful_instance(name) and self._names.fullmatch(name) is not None

    def _make_overlay(self, path: str) -> None:
        """A new overlay at ``path``, where it appears when it is whole, and replaces nothing."""
        cache = "unsafe" if self.config.ephemeral else "writeback"
        creation.make_overlay(path, self._size, self._image, self._format, cache=cache)

    def _open(self, name: str, path: str) -> Export:
        layer = registry.image(path, OVERLAY)
        options: dict[str, Any] = {
            "description": self.description,
            "tls_required": self.tls_required,
            "access": self.access,
            "allocation_depth": self._allocation_depth,
        }
        export = self._server.open(name, layer, roots=self._roots, **options)
        export.made_by = self
        if self.config.ephemeral:
            export.after_end = lambda: _delete(path)
        return export

    @contextlib.contextmanager
    def _undone(self, path: str) -> Iterator[None]:
        """What was made at ``path`` goes again if it is ephemeral and the block fails."""
        try:
            yield
        except BaseException:
            if self.config.ephemeral:
                _delete(path)
            raise


def _delete(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
