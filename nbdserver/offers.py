"""Which exports are offered under which names, and which clients each has: who may come, who is there, who was last.

::

                 change(add)          change(remove)             the last client leaves
    (opened) ─────────────> offered ───────────────> leaving ───────────────────────────> given back, to be ended
                           │ enter()                                                          ↑
                           └── no client ─────────────────────────────────────────────────────┘

A change is one step for clients: whoever looks sees all of it or nothing. Nothing here waits, closes or disconnects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from nbdserver.access import UNKNOWN, Peer
from nbdserver.errors import ConfigError
from nbdserver.handshake import ExportInfo, Handshake, Unavailable
from nbdserver.limits import EXPORTS_COUNT_MAX
from nbdserver.listening import Listener


class Connection(Protocol):
    """The engine's side of a client: `_engine.Client`."""

    @property
    def peer(self) -> str: ...
    @property
    def process(self) -> tuple[int, int, list[int]] | None: ...
    def counters(self) -> dict[str, int]: ...
    def disconnect(self) -> None: ...


class Maker(Protocol):
    """Whoever makes exports when their names are asked for: `templates.Template`."""

    def info(self, name: str) -> ExportInfo | None:
        """What a client is told of the export of that name, which is not there yet; None: it is not this maker's."""

    def make(self, name: str) -> Any:
        """The export, not offered yet. May block. Raises Unavailable."""


class Offered(Protocol):
    """What an export is, here. ``made_by``: it goes when its last client does. The last three belong to `Offers`."""

    name: str
    info: ExportInfo
    made_by: Maker | None
    clients: set[Client]
    is_leaving: bool
    is_ending: bool


AnyExport = TypeVar("AnyExport", bound=Offered)


@dataclasses.dataclass(eq=False)
class Client:
    """One connection. ``since``: when it was made, seconds since 1970. ``handshake``: None once that is over. ``who``:
    as far as is known by now. ``listener``, ``tls``: where it came by, and what it may begin TLS with."""

    id: int
    connection: Connection
    since: float
    handshake: Handshake | None = None
    export: Offered | None = None
    is_gone: bool = False
    who: Peer = UNKNOWN
    listener: Listener | None = None
    tls: Any = None
    #: How its requests are framed, once it has begun transmission (`handshake.Style`).
    style: str | None = None

    def describe(self) -> dict[str, Any]:
        """What there is to tell, as JSON has it."""
        export = None if self.export is None else self.export.name
        process = self.connection.process
        pid, uid = (None, None) if process is None else process[:2]
        about = {
            "id": self.id,
            "address": self.connection.peer if process is None else "unix",
            "pid": pid,
            "uid": uid,
            "subject": self.who.subject,
            "identity": self.who.identity,
            "since": self.since,
            "export": export,
            "style": self.style,
        }
        return {**about, **self.connection.counters()}


class Removal(enum.Enum):
    """What becomes of an export's clients when it is removed: QEMU's ``BlockExportRemoveMode``, and DRAIN."""

    #: There are none, or it is not removed.
    SAFE = "safe"
    #: They are disconnected.
    HARD = "hard"
    #: They stay; no new ones are taken, and the export ends after the last of them.
    DRAIN = "drain"


class Keep:
    """No change."""


KEEP: Final = Keep()


class Offers(Mapping[str, ExportInfo], Generic[AnyExport]):
    """The exports of a server. As a mapping: what clients are told, by the names that they may ask for. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: By name, those that take clients. Read only.
        self.exports: dict[str, AnyExport] = {}
        self._leaving: set[AnyExport] = set()
        #: Who makes more, when they are asked for: the first that knows a name.
        self.makers: Sequence[Maker] = ()
        #: The export that the empty name stands for.
        self._default: str | None = None

    @property
    def default(self) -> str | None:
        """The name of the default export."""
        return self._default

    @property
    def leaving(self) -> list[AnyExport]:
        """Those that take no clients any more, and are not over."""
        with self._lock:
            return sorted(self._leaving, key=lambda export: export.name)

    # -- what clients see ------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> ExportInfo:
        with self._lock, contextlib.suppress(KeyError):
            return self._find(name).info
        for maker in self.makers:
            info = maker.info(name)
            if info is not None:
                return info
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            names = list(self.exports)
            if self._default is not None:
                names.append("")
        return iter(names)

    def __len__(self) -> int:
        with self._lock:
            return len(self.exports) + (self._default is not None)

    def _find(self, name: str) -> AnyExport:
        if name == "" and self._default is not None:
            name = self._default
        return self.exports[name]

    def maker_of(self, name: str) -> Maker | None:
        """Who would make the export of that name; None: it is there, or nobody."""
        with self._lock, contextlib.suppress(KeyError):
            self._find(name)
            return None
        return next((maker for maker in self.makers if maker.info(name) is not None), None)

    # -- what there is ---------------------------------------------------------------------------------------------

    def change(
        self,
        *,
        add: Sequence[AnyExport] = (),
        remove: Iterable[AnyExport] = (),
        default: str | Keep | None = KEEP,
        if_idle: bool = False,
    ) -> list[AnyExport]:
        """Offer some exports, and no longer others, in one step; those that have no clients are the caller's to end.

        ``default``: which is the default export from now on; by default the same, if it is still there. ``if_idle``:
        refuse to remove what has clients. Raises ConfigError, with nothing changed.
        """
        with self._lock:
            leaving = [export for export in remove if self.exports.get(export.name) is export]
            for export in leaving:
                if if_idle and export.clients:
                    count = len(export.clients)
                    raise ConfigError(f"export {export.name!r} has {count} client{'s' if count > 1 else ''}")
            exports = {name: export for name, export in self.exports.items() if export not in leaving}
            for export in add:
                _add(exports, export)
            self._set_default(exports, default)
            for name in set(self.exports) - set(exports):
                del self.exports[name]
            self.exports.update(exports)  # who looks without the lock never misses what stays
            for export in leaving:
                export.is_leaving = True
                self._leaving.add(export)
            return [export for export in leaving if self._take_idle(export)]

    def _set_default(self, exports: Mapping[str, AnyExport], wanted: str | Keep | None) -> None:
        kept = self._default if self._default in exports else None
        default = kept if isinstance(wanted, Keep) else wanted
        if default is not None and "" in exports:
            raise ConfigError('the empty name "" is taken: only one export can be the default')
        assert default is None or default in exports
        self._default = default

    def check_free(self, name: str, default: bool) -> None:
        """Raises ConfigError if there cannot be another export of this name, or another default."""
        with self._lock:
            if name in self.exports:
                raise ConfigError(f"there is an export {name!r} already")
            if default and self._default is not None:
                raise ConfigError(f"export {name!r} cannot be the default: {self._default!r} is")
            if (default and "" in self.exports) or (name == "" and self._default is not None):
                raise ConfigError('the empty name "" is taken: only one export can be the default')

    # -- who is there ----------------------------------------------------------------------------------------------

    def enter(self, client: Client, name: str) -> AnyExport:
        """Make ``client`` one of the clients of the export that is offered under ``name``. Raises Unavailable."""
        with self._lock:
            try:
                export = self._find(name)
            except KeyError:
                raise Unavailable("the export has just been removed") from None
            _admit(client, export)
            return export

    def offer_to(self, client: Client, export: AnyExport) -> None:
        """Offer one more export, whose first client is there: in one step, as it would be gone with the last. Raises
        Unavailable, ConfigError; it is not offered then."""
        with self._lock:
            exports = dict(self.exports)
            _add(exports, export)
            _admit(client, export)
            self.exports.update(exports)

    def leave(self, client: Client) -> AnyExport | None:
        """The client has gone; an export that takes no others and has no more clients is the caller's to end."""
        with self._lock:
            client.is_gone = True
            if client.export is None:
                return None
            client.export.clients.discard(client)
            export: AnyExport = client.export  # type: ignore[assignment]
            if export.made_by is not None and not export.clients and not export.is_leaving:
                del self.exports[export.name]
                export.is_leaving = True
                self._leaving.add(export)
            return export if self._take_idle(export) else None

    def clients_of(self, export: AnyExport) -> list[Client]:
        with self._lock:
            return sorted(export.clients, key=lambda client: client.id)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _take_idle(self, export: AnyExport) -> bool:
        """Whether to end an export that is leaving: told once."""
        if not export.is_leaving or export.clients or export.is_ending:
            return False
        export.is_ending = True
        return True

    def take_all(self) -> list[AnyExport]:
        """Everything that nobody has been told to end yet, for the caller to end."""
        with self._lock:
            left = [export for export in (*self.exports.values(), *self._leaving) if not export.is_ending]
            for export in left:
                export.is_leaving = export.is_ending = True
            self._leaving.update(left)
            self.exports.clear()
            self._default = None
            return left

    def forget(self, export: AnyExport) -> None:
        """It is over."""
        with self._lock:
            self._leaving.discard(export)


def _add(exports: dict[str, AnyExport], export: AnyExport) -> None:
    if export.name in exports:
        raise ConfigError(f"there is an export {export.name!r} already")
    if len(exports) >= EXPORTS_COUNT_MAX:
        raise ConfigError(f"there are {EXPORTS_COUNT_MAX} exports already")
    exports[export.name] = export


def _admit(client: Client, export: Offered) -> None:
    if client.is_gone:
        raise Unavailable("the client has gone")
    if not export.info.access.admits(client.who):
        raise Unavailable("the export has just been closed to you")
    client.export = export
    export.clients.add(client)
