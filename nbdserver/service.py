"""A configuration, served: what ``exports.toml`` says is what the server does, also after it has been changed.

::

    exports.toml ──> Config ──────────────> Service ──────> Server
                        changed: reload()   who is what     exports, listeners

**Reload.** First everything new is made ready: images are opened, addresses bound. When any of that fails, all of it is
undone and nothing has changed. Then, in one step for clients, new exports appear and removed ones take no new clients;
they end after their last client, or with ``hard`` at once. An export whose disk is described as before is not touched:
its layers stay open, its clients notice nothing.

A changed export is a new one in the place of the old. Usually both can be open at once: new clients get the new one,
and old clients keep the old one until they leave. Where both need the same file and one of them writes it, that cannot
be: the new one *waits*, having been opened for trial (`explain.trial`), until the old one's clients have left, and its
name is not to be had till then. A renamed export is the same case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbdserver import listening
from nbdserver.config import Config, Disks, ExportConfig, layer_over, one_export
from nbdserver.errors import ConfigError, ImageError, NbdserverError
from nbdserver.explain import trial
from nbdserver.files import BusyError
from nbdserver.graph import Child, ExcludedError, walk
from nbdserver.handshake import TlsMode
from nbdserver.layer import Layer
from nbdserver.limits import STOP_TIMEOUT
from nbdserver.listening import ListenConfig, Listener
from nbdserver.live.chain import active
from nbdserver.offers import KEEP, Removal
from nbdserver.templates import Template

if TYPE_CHECKING:
    from nbdserver.server import Export, Server


class State(enum.Enum):
    """Of an export of the configuration."""

    SERVED = "served"
    #: Others have what it needs, and are to leave.
    WAITING = "waiting"
    #: It could not be opened; the next reload tries again.
    FAILED = "failed"


@dataclasses.dataclass(eq=False)
class Configured:
    """An export of the configuration. ``disk``: what its disk is made of; ``export`` (of a pattern: ``template``): None
    unless it is served, and then ``why`` says the reason."""

    config: ExportConfig
    disk: object
    export: Export | None = None
    template: Template | None = None
    why: str = ""
    state: State = State.SERVED

    @property
    def is_served(self) -> bool:
        return self.template is not None or (self.export is not None and not self.export.is_leaving)

    def wait(self, why: str) -> None:
        self.state, self.why = State.WAITING, why


@dataclasses.dataclass
class Reload:
    """What a reload has done, by the names of exports, addresses and keys."""

    added: list[str] = dataclasses.field(default_factory=list)
    removed: list[str] = dataclasses.field(default_factory=list)
    changed: list[str] = dataclasses.field(default_factory=list)
    unchanged: list[str] = dataclasses.field(default_factory=list)
    #: Of those added and changed: what waits for others to leave, and why; what could not be had after all, and why.
    waiting: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Removed exports and predecessors of changed ones that still have clients.
    leaving: list[str] = dataclasses.field(default_factory=list)
    listening: list[str] = dataclasses.field(default_factory=list)
    refusing: list[str] = dataclasses.field(default_factory=list)
    #: Exports, of those unchanged, and addresses that admit others than before.
    access: list[str] = dataclasses.field(default_factory=list)
    #: Files of certificates and keys that have been read again, for new connections.
    reread: list[str] = dataclasses.field(default_factory=list)
    #: Keys that have changed, and are taken up by a restart only.
    restart: list[str] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """In a line."""
        words = []
        for field in dataclasses.fields(self):
            names = list(getattr(self, field.name))
            if names and field.name == "restart":
                words.append(f"after a restart: {', '.join(names)}")
            elif names:
                words.append(f"{field.name}: {', '.join(names) if field.name != 'unchanged' else len(names)}")
        return "; ".join(words)


class Service:
    """``wanted``, served. ``reread`` gives the configuration as it is now, for `reload`; ``on_quit`` is called when
    a client wants the end; ``log`` is given each line of the log. ``ready``: see `Server`.

    One change at a time; thread-safe. Raises ConfigError, ImageError.
    """

    def __init__(
        self,
        wanted: Config,
        *,
        reread: Callable[[], Config] | None = None,
        on_quit: Callable[[], None] = lambda: None,
        log: Callable[[str], None],
        ready: Sequence[socket.socket] = (),
    ) -> None:
        from nbdserver.server import Server

        self._config, self._reread, self._on_quit, self._log = wanted, reread, on_quit, log
        engine = wanted.engine
        self.server: Server = Server(
            listen=wanted.listen,
            ready=ready,
            bounds=wanted.bounds,
            backend=engine.backend,
            workers=engine.workers,
            pool=engine.pool,
            fault_threads=engine.fault_threads,
            roots=wanted.roots,
            record=engine.record,
            tls=wanted.tls,
            log=log,
        )
        self._lock = threading.RLock()
        self._configured: dict[str, Configured] = {}
        #: The nodes that there are, and what they are made of.
        self._nodes: dict[str, Layer] = {}
        self._listeners: dict[str, Listener] = {}
        self._is_over = threading.Event()
        self.server.on_replace = self._replaced

    @property
    def roots(self) -> Sequence[str]:
        """Directories that images may name files in, and where new ones may be made."""
        return self._config.roots

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self, opened: Callable[[dict[str, Any]], None] = lambda row: None) -> None:
        """Open every export, telling ``opened`` of each, and serve. When it fails, `stop` has still to be called."""
        disks = Disks(self._config)
        for wanted in self._config.exports:
            if wanted.template is not None:
                with placed(wanted):
                    template = Template(wanted, self.server, roots=self._config.roots, log=self._log)
                self._configured[wanted.name] = Configured(wanted, disks.of(wanted), template=template)
                continue
            layer, read_only = wanted.build(self._nodes)
            self._say_probed(wanted, read_only)
            with placed(wanted):
                export = self.server.export(
                    wanted.name, layer, default=wanted.default, **self._options(wanted, read_only)
                )
            self._configured[wanted.name] = Configured(wanted, disks.of(wanted), export)
            tls = wanted.needs_tls or self._config.tls.mode is TlsMode.REQUIRED
            opened({**row_of(wanted, layer, read_only), "tls": tls})
        self._use_templates()
        self.server.start()
        addresses = [_address(wanted) for wanted in self._config.listen]
        self._listeners = dict(zip(addresses, self.server.listeners, strict=False))  # first come those of `listen`
        self.server.on_end = self._ended

    def stop(self) -> None:
        """`Server.stop`."""
        self._is_over.set()
        with contextlib.ExitStack() as ending:
            for configured in self._configured.values():
                if configured.template is not None:
                    ending.callback(configured.template.close)
            ending.callback(self.server.stop)

    def _options(self, wanted: ExportConfig, read_only: bool) -> dict[str, Any]:
        return {
            "read_only": read_only,
            "description": wanted.description,
            "tls_required": wanted.tls_required,
            "access": wanted.access,
            "discard": wanted.discard == "unmap",
            "bitmaps": wanted.bitmaps,
            "allocation_depth": wanted.allocation_depth,
        }

    def _say_probed(self, wanted: ExportConfig, read_only: bool) -> None:
        if read_only and wanted.read_only is None:
            self._log(
                f"{wanted.image} was probed as raw and is served read-only; if it is a raw disk, say so: format raw"
            )

    # -- reload ----------------------------------------------------------------------------------------------------

    def reload(self, mode: Removal = Removal.DRAIN) -> Reload:
        """Take up the configuration as it is now; ``mode`` is for clients of exports that it has no longer, or not as
        they were. Raises ConfigError, ImageError, OSError, TimeoutError, with nothing changed."""
        if self._reread is None:
            raise ConfigError("images were named to be served, and no configuration: there is nothing to reload")
        with self._lock:
            wanted = self._reread()
            plan = _Plan(self._config, wanted, self._configured)
            use_tls = self._prepared_tls(wanted)
            with self.server.changing(), contextlib.ExitStack() as undo:
                self._check_names(plan)
                bound = self._bind(wanted, undo)
                nodes = {name: layer for name, layer in self._nodes.items() if plan.keeps(name)}
                opened = self._open_all(plan, nodes, undo)
                self._permit(wanted, undo)
                undo.pop_all()
                self._nodes = nodes
                use_tls()
                self.server.use_bounds(wanted.bounds)
                self._switch(plan, opened, mode)
            return self._finish(plan, bound, mode)

    def _check_names(self, plan: _Plan) -> None:
        for export in plan.new:
            there = self.server.exports.get(export.name)
            if there is not None and export.name not in self._configured:
                where = export.where
                raise ConfigError(
                    f"there is an export {export.name!r} already, which was added while the server runs",
                    file=where.file,
                    table=where.table,
                )

    def _prepared_tls(self, wanted: Config) -> Callable[[], None]:
        """`Server.prepared_tls`: the files are read again, whether or not the table has changed. Raises ConfigError."""
        try:
            return self.server.prepared_tls(wanted.tls)
        except ConfigError as error:
            raise error if error.file is not None else error.at(wanted.exports[0].where.file, "tls") from error

    def _bind(self, wanted: Config, undo: contextlib.ExitStack) -> dict[str, Listener]:
        """Listeners for the addresses that nobody listens on yet."""
        bound = {}
        places = [ListenConfig.of(entry) for entry in wanted.listen]
        for place in places:
            address = _address(place)
            if address not in self._listeners and address not in bound:
                bound[address] = listening.bind(place, beside=places)
                undo.callback(bound[address].close)
        return bound

    def _permit(self, wanted: Config, undo: contextlib.ExitStack) -> None:
        """Give the sockets that stay their owners and permissions, where others are wanted. Raises ConfigError."""
        for place in map(ListenConfig.of, wanted.listen):
            listener = self._listeners.get(_address(place))
            if listener is None or listener.identity is None or listener.address.socket is None:
                continue
            owners = (place.owner, place.group)
            if (place.mode, owners) != (listener.wanted.mode, (listener.wanted.owner, listener.wanted.group)):
                path, before = listener.address.socket, os.stat(listener.address.socket)
                try:
                    listening.permit(path, place.mode, owners)
                except OSError as error:
                    raise ConfigError(f"{listener.address}: {error.strerror}", key="listen") from error
                undo.callback(listening.permit, path, stat.S_IMODE(before.st_mode), (before.st_uid, before.st_gid))

    def _open_all(self, plan: _Plan, nodes: dict[str, Layer], undo: contextlib.ExitStack) -> dict[str, Configured]:
        """The new exports, ready to be offered; or tried, and to wait."""
        opened: dict[str, Configured] = {}
        for wanted in plan.new:
            configured = Configured(wanted, plan.disks[wanted.name])
            ahead = _ahead(configured, opened.values())
            with _at_table(wanted):
                if ahead is not None:
                    trial(plan.wanted, wanted)
                    configured.wait(ahead)
                else:
                    try:
                        self._open(plan.wanted, configured, nodes)
                        undo.callback(self._close, configured)
                    except (BusyError, ExcludedError) as busy:
                        self._try(plan, wanted, busy)
                        configured.wait(str(busy))
            opened[wanted.name] = configured
        return opened

    def _open(self, config: Config, configured: Configured, nodes: dict[str, Layer]) -> None:
        """Open the export, and do not offer it yet; ``nodes`` are those that it may share, and gains those that it
        makes."""
        wanted = configured.config
        if wanted.template is not None:
            with placed(wanted):
                configured.template = Template(wanted, self.server, roots=config.roots, log=self._log)
            return
        known = {name: layer for name, layer in nodes.items() if self.server.is_open(layer)}
        layer, read_only = wanted.build(known)
        self._say_probed(wanted, read_only)
        with placed(wanted):
            configured.export = self.server.open(
                wanted.name, layer, roots=config.roots, **self._options(wanted, read_only)
            )
        nodes.update(known)

    def _close(self, configured: Configured) -> None:
        """End what has been opened, and not offered."""
        if configured.export is not None:
            self.server.end(configured.export)
        if configured.template is not None:
            configured.template.close()

    def _use_templates(self) -> None:
        templates = [configured.template for configured in self._configured.values()]
        self.server.use_makers([template for template in templates if template is not None])

    def _try(self, plan: _Plan, wanted: ExportConfig, busy: BusyError | ExcludedError) -> None:
        """See whether the export could be opened once those have ended that are to leave. Raises what opening would,
        and ``busy`` if others than those stand in the way."""
        holders = [export for export in self.server.opened if _holds(export, busy)]
        if not holders or any(not (export.is_leaving or export in plan.leaving) for export in holders):
            raise busy
        with contextlib.ExitStack() as still:
            for export in holders:
                still.enter_context(export.drained())  # what is on the disk is whole then
            trial(plan.wanted, wanted)

    def _switch(self, plan: _Plan, opened: dict[str, Configured], mode: Removal) -> None:
        """Make the plan so, for clients. Nothing fails here but the closing of images, which is logged."""
        kept = {name: self._configured[name] for name in plan.report.unchanged}
        self._config, self._configured = plan.wanted, {**kept, **opened}
        for wanted in plan.wanted.exports:
            configured = self._configured[wanted.name]
            configured.config, configured.disk = wanted, plan.disks[wanted.name]
            for told in (configured.export, configured.template):
                if told is not None:
                    told.describe(wanted.description, wanted.tls_required, wanted.access)
        self._use_templates()
        try:
            self.server.change(
                add=[configured.export for configured in opened.values() if configured.export is not None],
                remove=plan.leaving,
                default=next((wanted.name for wanted in plan.wanted.exports if self._is_default(wanted)), None),
                mode=mode,
            )
            for template in plan.leaving_templates:
                template.close()
        except (NbdserverError, OSError) as error:
            self._log(f"an export that was removed did not end well: {error}")

    def _finish(self, plan: _Plan, bound: dict[str, Listener], mode: Removal) -> Reload:
        """What comes after, and the report."""
        report = plan.report
        self._listen(bound, report)
        if mode is Removal.HARD:
            self._expel()
            leaving = self.server.leaving  # also those of earlier times
            self.server.disconnect_all(leaving)
            deadline = time.monotonic() + STOP_TIMEOUT
            for export in leaving:
                export.ended.wait(max(0.0, deadline - time.monotonic()))
        self._open_waiting()
        self._report(report)
        return report

    def _is_default(self, wanted: ExportConfig) -> bool:
        return wanted.default and self._configured[wanted.name].is_served

    def _listen(self, bound: dict[str, Listener], report: Reload) -> None:
        for address, listener in bound.items():
            self.server.accept(listener)
            self._listeners[address] = listener
            report.listening.append(str(listener.address))
        places = {_address(place): place for place in map(ListenConfig.of, self._config.listen)}
        for address, place in places.items():
            listener = self._listeners[address]
            if listener.wanted != place:
                report.access.append(str(listener.address))
            listener.wanted = place
        for address in set(self._listeners) - set(places):
            listener = self._listeners.pop(address)
            self.server.refuse(listener)
            report.refusing.append(str(listener.address))

    def _expel(self) -> None:
        """Disconnect the clients whom an export is not for any more."""
        for export in self.server.exports.values():
            for client in self.server.clients_of(export):
                if not export.info.access.admits(client.who):
                    client.connection.disconnect()

    def _report(self, report: Reload) -> None:
        report.leaving = sorted({export.name for export in self.server.leaving})
        for name, configured in self._configured.items():
            if configured.state is State.WAITING:
                report.waiting[name] = configured.why
            elif configured.state is State.FAILED:
                report.failed[name] = configured.why
        self._log(f"reloaded: {report.summary()}")

    # -- those that wait -------------------------------------------------------------------------------------------

    def _ended(self, export: Export) -> None:
        """An export is over: whoever has waited for its files may have them."""
        if not self._is_over.is_set() and export.made_by is None:
            self._log(f"export {export.name!r} has ended")
            self._open_waiting()

    def _open_waiting(self) -> None:
        with self._lock:
            earlier: list[Configured] = []
            for configured in self._configured.values():
                if configured.state is State.WAITING and _ahead(configured, earlier) is None:
                    self._open_one(configured)
                earlier.append(configured)

    def _open_one(self, configured: Configured) -> None:
        wanted = configured.config
        try:
            with self.server.changing():
                self._open(self._config, configured, self._nodes)
                if configured.export is not None:
                    self.server.change(add=[configured.export], default=wanted.name if wanted.default else KEEP)
                self._use_templates()
        except (BusyError, ExcludedError) as busy:
            configured.wait(str(busy))
            if not any(_holds(export, busy) for export in self.server.leaving):
                self._give_up(configured, busy)
        except (NbdserverError, OSError) as error:
            self._give_up(configured, error)
        else:
            configured.state, configured.why = State.SERVED, ""
            self._log(f"export {wanted.name!r} is served")

    def _give_up(self, configured: Configured, error: Exception) -> None:
        configured.state, configured.why = State.FAILED, str(error)
        self._log(f"export {configured.config.name!r} cannot be served: {error}")

    # -- while running ---------------------------------------------------------------------------------------------

    def add(self, name: str, values: Mapping[str, object], directory: str) -> Export:
        """Serve one more export, as a table [exports.NAME] in a configuration in ``directory`` describes it; no reload
        touches it. Its layers may stand on those of another export: {node = "@NAME"}.

        Raises ConfigError, ImageError; nothing has changed then.
        """
        with self._lock, self.server.changing():
            if name in self._configured:
                raise ConfigError(f"there is an export {name!r} in the configuration")
            there = {f"@{other}": export.root for other, export in self.server.exports.items()}
            wanted, layer, read_only = one_export(name, values, directory, there)
            wanted.check_tls(self._config.tls)
            self._say_probed(wanted, read_only)
            return self.server.export(wanted.name, layer, roots=self._config.roots, **self._options(wanted, read_only))

    def remove(self, name: str, mode: Removal) -> bool:
        """`Server.remove`; the next reload brings back what the configuration has."""
        with self._lock:
            is_over = self.server.remove(name, mode)
            self._open_waiting()
            return is_over

    def resize(self, name: str, size: int) -> None:
        """`Server.resize`."""
        with self._lock:
            self.server.resize(name, size)

    def add_filter(self, name: str, values: object, directory: str) -> None:
        """Put the filter that a table {type = ...} means above the layers of an export, with all who are connected.
        Raises ConfigError, ImageError, TimeoutError, with nothing changed."""
        with self._drained_alone(name) as export:
            layer = layer_over(export.root, values, directory)
            if not layer.is_filter:
                raise ConfigError(f"the layer {layer.type!r} is no filter", key="type")
            read_only = export.info.read_only
            with self.server.opened_layers(layer, read_only=read_only, roots=self._config.roots):
                if layer.size != export.root.size:
                    raise ConfigError(f"{layer.type} has {layer.size} bytes, and the export {export.root.size}")
                export.replace_root(layer)

    def remove_filter(self, name: str) -> str:
        """Take the topmost layer of an export away, which is a filter, with all who are connected; its type. Raises
        ConfigError, TimeoutError, with nothing changed; and what closing it raises."""
        with self._drained_alone(name) as export:
            layer = export.root
            for job in self.server.jobs.on([layer]):
                raise ConfigError(f"the topmost layer of export {name!r} is there for job {job.id!r}")
            if not layer.is_filter:
                raise ConfigError(f"the topmost layer of export {name!r} is {layer.type}, which is no filter")
            below = dict(layer.children())["file"]
            assert isinstance(below, Child)
            export.replace_root(below.layer)
            return layer.type

    def _replaced(self, old: Layer, new: Layer) -> None:
        """A layer stands in the place of another: nodes of that name mean it from now on."""
        for name, layer in self._nodes.items():
            if layer is old:
                self._nodes[name] = new

    @contextlib.contextmanager
    def _drained_alone(self, name: str) -> Iterator[Export]:
        """The export, in a drained section. Raises ConfigError if others use layers that it writes: what they did would
        pass a filter by."""
        with self._lock, self.server.changing():
            export = self.server.exports.get(name)
            if export is None:
                raise ConfigError(f"there is no export {name!r}")
            with self.server.drained(export.root) as exports:
                for other in {*self.server.sharing(export), *exports} - {export}:
                    raise ConfigError(f"export {other.name!r} uses layers of export {name!r}, too")
                yield export

    def say(self, line: str) -> None:
        """Write a line to the log."""
        self._log(line)

    def quit(self) -> None:
        """Have whoever runs this service stop it."""
        self._on_quit()

    def rows(self) -> list[dict[str, Any]]:
        """Every export, as JSON has it: those that are served, those that are leaving, those that wait or have
        failed."""
        exports = [*sorted(self.server.exports.values(), key=lambda export: export.name), *self.server.leaving]
        rows = [self._row(export) for export in exports]
        for configured in list(self._configured.values()):
            if configured.template is not None:
                count = len(configured.template.instances)
                rows.append({"name": configured.config.name, "state": "template", "instances": count})
            elif configured.export is None:
                wanted = configured.config
                rows.append({"name": wanted.name, "state": configured.state.value, "why": configured.why})
        return rows

    def _row(self, export: Export) -> dict[str, Any]:
        configured = self._configured.get(export.name)
        info = export.info
        return {
            "name": export.name,
            "state": "leaving" if export.is_leaving else State.SERVED.value,
            "size": info.size,
            "read_only": info.read_only,
            "description": info.description,
            "tls_required": info.needs_tls,
            "access": info.access.as_json(),
            "default": self.server.default == export.name and not export.is_leaving,
            "configured": configured is not None and configured.export is export,
            "template": None if export.made_by is None else getattr(export.made_by, "name", None),
            "layers": [
                {"path": path, "type": layer.type, "filename": layer.filename} for path, layer in walk(export.root)
            ],
            "clients": [client.describe() for client in self.server.clients_of(export)],
        }


class _Plan:
    """What a configuration changes of what is served. ``new``: what is to be opened; ``leaving``: what is to go."""

    def __init__(self, before: Config, wanted: Config, configured: Mapping[str, Configured]) -> None:
        self.wanted = wanted
        self._disks_before, self._disks = Disks(before), Disks(wanted)
        self.disks = {export.name: self._disks.of(export) for export in wanted.exports}
        self.new: list[ExportConfig] = []
        self.report = Reload(restart=list(_fixed(before, wanted)), reread=wanted.tls.sources())
        for export in wanted.exports:
            there = configured.get(export.name)
            if there is not None and there.is_served and self._is_same(there, export):
                self.report.unchanged.append(export.name)
                if _whom(there.config) != _whom(export):
                    self.report.access.append(export.name)
                continue
            self.new.append(export)
            (self.report.added if there is None else self.report.changed).append(export.name)
        self.report.removed = [name for name in configured if name not in self.disks]
        going = [there for name, there in configured.items() if name not in self.report.unchanged]
        self.leaving = [there.export for there in going if there.export is not None and there.is_served]
        self.leaving_templates = [there.template for there in going if there.template is not None]

    def _is_same(self, there: Configured, wanted: ExportConfig) -> bool:
        """Whether the disk is described as it was; or with the image that a snapshot or a commit has brought."""
        if there.disk == self.disks[wanted.name]:
            return True
        if there.export is None or wanted.image is None or there.config.image is None:
            return False
        image = active(there.export.root)
        if image.filename is None or os.path.realpath(image.filename) != os.path.realpath(wanted.image):
            return False
        is_format = wanted.format == image.type or (wanted.format is None and image.type != "raw")
        before = dataclasses.replace(wanted, image=there.config.image, format=there.config.format)
        return is_format and self._disks.of(before) == there.disk

    def keeps(self, node: str) -> bool:
        """Whether the node is made of what it was."""
        return self._disks_before.node(node) == self._disks.node(node)


def _whom(wanted: ExportConfig) -> object:
    """Whom an export is for."""
    return wanted.tls_required, wanted.access


def _address(wanted: str | ListenConfig) -> str:
    """What an entry of ``listen`` is known by."""
    return str(ListenConfig.of(wanted).address)


def _fixed(before: Config, wanted: Config) -> Iterator[str]:
    """The keys that have changed, and are for the start of a server only."""
    for field in dataclasses.fields(wanted.engine):
        if getattr(before.engine, field.name) != getattr(wanted.engine, field.name):
            yield f"engine.{field.name}"
    if before.bounds.keepalive != wanted.bounds.keepalive:
        yield "limits.keepalive"
    for key in ("control", "control_mode"):
        if getattr(before, key) != getattr(wanted, key):
            yield key


def _ahead(configured: Configured, others: Iterable[Configured]) -> str | None:
    """Why the export must wait for one of the others that waits: who is the first to open a node says whether it is
    written."""
    for other in others:
        if other.state is State.WAITING and other.config.named_nodes & configured.config.named_nodes:
            return f"shares a node with {other.config.name!r}, which waits: {other.why}"
    return None


def _holds(export: Export, busy: BusyError | ExcludedError) -> bool:
    """Whether a layer of the export is the one that is wanted, or has the file open that is."""
    if isinstance(busy, ExcludedError):
        return any(layer is busy.layer for _, layer in walk(export.root))
    return any(value is busy.file for _, layer in walk(export.root) for value in list(vars(layer).values()))


@contextlib.contextmanager
def placed(export: ExportConfig) -> Iterator[None]:
    """A ConfigError from opening layers is told where in the configuration the export is."""
    try:
        yield
    except ConfigError as error:
        if error.file is None and export.where.file is not None:
            where = export.where
            raise error.at(where.file, where.table) from error
        raise


@contextlib.contextmanager
def _at_table(export: ExportConfig) -> Iterator[None]:
    """An image that cannot be opened is told with the export that wants it."""
    try:
        with placed(export):
            yield
    except (ImageError, OSError) as error:
        raise ConfigError(str(error), file=export.where.file, table=export.where.table) from error


def row_of(wanted: ExportConfig, layer: Layer, read_only: bool) -> dict[str, Any]:
    """An export that is open as ``layer``, as JSON has it."""
    return {
        "name": wanted.name,
        "size": layer.size,
        "format": active(layer).type,
        "read_only": read_only or layer.read_only,
        "description": wanted.description,
        "default": wanted.default,
    }
