"""``exports.toml``: what is served, where, and how; read into frozen dataclasses.

::

    listen = ["nbd://127.0.0.1:10809"]       addresses, as NBD URIs; or tables: [[listen]] uri = "...", and of Unix
                                             sockets mode, owner, group; tls, access
    control = "nbdserver.ctl"                a Unix socket for `nbdserver ctl`; control_mode = 0o600
    roots = ["/srv/images"]                  where images may name files (backing files)

    [tls]                                    mode, certificates, psk, verify_clients

    [limits]                                 what clients may have: the fields of `bounds.Bounds`

    [engine]                                 workers, pool, backend, fault_threads, record

    [exports.vm]                             one image
    image = "vm.qcow2"                       format, read_only, description, default, tls, access;
                                             cache, aio, discard, detect_zeroes;
                                             bitmaps, allocation_depth (meta contexts to offer)

    [exports.disk]                           or layers, from top to bottom
    layers = [{type = "raw", offset = "1M"}, {type = "file", path = "disk.img"}]

    [exports."sandbox-*"]                    or a pattern: an overlay for every name that is asked for
    template = {image = "golden.qcow2", directory = "sandboxes", ephemeral = true}

    [nodes.disk]                             layers that several exports share
    layers = [{type = "qcow2"}, {type = "file", path = "disk.qcow2"}]

Relative paths (also of sockets and in layers: the key ``path``) are relative to the directory of the file.

**Stacks.** A list of layers is a *stack*; each layer stands on the next one, which becomes its ``file`` child, or its
first child if none is called so. A child may instead be given by its role, as a stack of its own::

    layers = [{type = "qcow2", backing = [{type = "raw"}, {type = "file", path = "base.img"}]},
              {type = "file", path = "top.qcow2"}]

A layer with several children may also be followed by nested lists, one stack for each child, in the order of the
layer's keys (a key that holds a list of children takes all that are left)::

    layers = [{type = "qcow2"}, [{type = "file", path = "top.qcow2"}],
                                [{type = "raw"}, {type = "file", path = "base.img"}]]

**Nodes.** ``{node = "NAME"}`` stands for the layers of ``[nodes.NAME]``, which are there once, however many exports
and other nodes name them: what one export writes the others read. A node has all its layers, so nothing follows it.
It is read-only if all exports that name it are.

**Images.** An image with no ``format`` is probed. One probed as raw is served read-only: a guest that may write its
first bytes could make it look like another format the next time. ``format = "raw"`` says that raw is meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, TypeVar

from nbdserver import access, registry, uri
from nbdserver.access import ANYBODY, Rule
from nbdserver.bounds import DEFAULTS, Bounds
from nbdserver.errors import ConfigError, ImageError
from nbdserver.extent import AIOS, CACHES, FILE_MODE, FileMode
from nbdserver.files import Files
from nbdserver.handshake import TlsMode, encoded
from nbdserver.layer import Layer
from nbdserver.limits import (
    BITMAPS_OFFERED_MAX,
    CONFIG_FILE_MAX,
    CONNECTION_MEMORY_DEFAULT,
    CONNECTION_REQUESTS_DEFAULT,
    CONNECTION_REQUESTS_MAX,
    CONNECTIONS_COUNT_MAX,
    DISK_MAX,
    EXPORTS_COUNT_MAX,
    FAULT_THREADS,
    FAULT_THREADS_COUNT_MAX,
    FD_MAX,
    HANDSHAKE_TIMEOUT,
    LAYERS_COUNT_MAX,
    LISTEN_COUNT_MAX,
    NESTING_MAX,
    NODES_COUNT_MAX,
    POOL_DEFAULT,
    POOL_MAX,
    POOL_MIN,
    REPLY_MEMORY_DEFAULT,
    REPLY_MEMORY_MIN,
    ROOTS_COUNT_MAX,
    RULE_COUNT_MAX,
    SECONDS_MAX,
    SHOWN_COUNT_MAX,
    SOCKET_PATH_MAX,
    STRING_MAX,
    TEMPLATE_COUNT_DEFAULT,
    TEMPLATE_NAME_MAX,
    WORKERS_COUNT_MAX,
)
from nbdserver.listening import ListenConfig
from nbdserver.registry import NOWHERE, Where
from nbdserver.tls import NO_TLS, TlsConfig

Made = TypeVar("Made")

#: What an export says of TLS: as the server does, or that it is to be had with TLS alone.
EXPORT_TLS: Final = ("default", "required")

#: Keys of the file, and of the table of an export.
TOP_KEYS: Final = ("listen", "roots", "tls", "limits", "control", "control_mode", "engine", "nodes", "exports")
EXPORT_KEYS: Final = (
    *("image", "format", "layers", "read_only", "description", "default", "tls", "access", "template"),
    *("cache", "aio", "discard", "detect_zeroes", "bitmaps", "allocation_depth", "snapshot"),
    *("key_file", "key_env", "key_fd"),
)

#: Keys of an export that go with ``image``, and what they are in ``layers``.
IMAGE_KEYS: Final = {
    "format": 'the layer\'s type, as in {type = "qcow2"}',
    "cache": "a key of the layer file",
    "aio": "a key of the layer file",
    "detect_zeroes": 'a layer, {type = "detect-zeroes"}',
    "snapshot": 'a key of the layer qcow2, or a layer, {type = "snapshot"}',
    "key_file": "a key of the layers qcow2 and luks",
    "key_env": "a key of the layers qcow2 and luks",
    "key_fd": "a key of the layers qcow2 and luks",
}

#: Those that are keys of the image's layer, and what images are that have no use for them.
LAYER_KEYS: Final = {
    "snapshot": "has no internal snapshots",
    "key_file": "is not encrypted",
    "key_env": "is not encrypted",
    "key_fd": "is not encrypted",
}

#: Keys of an entry of ``listen`` that says more than where.
LISTEN_KEYS: Final = ("uri", "mode", "owner", "group", "tls", "access")

#: Keys of ``access``, of listeners and exports.
ACCESS_KEYS: Final = [field.name for field in dataclasses.fields(Rule)]

#: Keys of the template of a pattern.
TEMPLATE_KEYS: Final = ("image", "format", "directory", "ephemeral", "count_max", "size")

#: Whoever may use the control socket: its owner.
CONTROL_MODE_DEFAULT: Final = 0o600

#: What ``listen`` is.
LISTEN_WANTED: Final = "a list of strings, or of tables such as {uri = ...}"

#: Linux's MAX_TCP_KEEPIDLE.
KEEPALIVE_MAX: Final = 32767

BACKENDS: Final = ("auto", "io_uring", "threads")

#: QEMU's option of this name: whether clients may give storage back, by trimming or along with zeroing.
DISCARDS: Final = ("unmap", "ignore")

#: The keys of the layer ``detect-zeroes``.
DETECT_ZEROES: Final = ("off", "on", "unmap")

#: Where a server listens that is not told: this machine alone can reach it.
LISTEN_DEFAULT: Final = f"nbd://127.0.0.1:{uri.PORT_DEFAULT}"

#: Keys of layers that name files, relative to the configuration's directory.
PATH_KEYS: Final = frozenset({"path", "key_file", "key-file"})


@dataclass(frozen=True)
class EngineConfig:
    """The table ``[engine]``. ``pool`` is bytes; ``workers`` None: the engine decides; ``record``: a directory."""

    backend: str = "auto"
    workers: int | None = None
    pool: int = POOL_DEFAULT
    fault_threads: int = FAULT_THREADS
    record: str | None = None


@dataclass(frozen=True)
class NodeConfig:
    """Layers that several stacks share: ``layers`` is a stack. ``where``: for messages."""

    layers: Sequence[object]
    where: Where = NOWHERE


@dataclass(frozen=True)
class TemplateConfig:
    """What an export is made of whose name a client asks for: an overlay on ``image`` (``format`` None: probe), in
    ``directory``. ``ephemeral``: deleted after the last client. ``size``: the overlays'; None: the image's."""

    image: str
    format: str | None
    directory: str
    ephemeral: bool = False
    count_max: int = TEMPLATE_COUNT_DEFAULT
    size: int | None = None


@dataclass(frozen=True)
class ExportConfig:
    """One export: an ``image`` with its ``format`` (None: probe), or ``layers``, a checked stack; or, with a
    ``template``, those that the pattern ``name`` stands for.

    ``access``: whom it is for. ``read_only`` None: not said. ``default``: also served under the empty name.
    ``discard``: one of DISCARDS. Of an image: ``cache`` and ``aio``, as `FileMode` has them, and what ``detect_zeroes``
    (None: as those of the layers of these names are); the ``snapshot`` that is served instead of the disk, by its ID or
    name, read-only; and where its passphrase is, if it is encrypted (`layer.Opener.secret`). ``bitmaps``,
    ``allocation_depth``: meta contexts to offer (`contexts.Contexts`). ``where``: for messages. ``nodes``: what
    ``layers`` may name.
    """

    name: str
    image: str | None = None
    format: str | None = None
    layers: Sequence[object] | None = None
    read_only: bool | None = None
    description: str = ""
    default: bool = False
    tls_required: bool = False
    access: Rule = ANYBODY
    template: TemplateConfig | None = None
    cache: str | None = None
    aio: str | None = None
    detect_zeroes: str | None = None
    discard: str = "unmap"
    bitmaps: tuple[str, ...] | Literal[True] = ()
    allocation_depth: bool = False
    snapshot: str | None = None
    key_file: str | None = None
    key_env: str | None = None
    key_fd: int | None = None
    where: Where = NOWHERE
    nodes: Mapping[str, NodeConfig] = dataclasses.field(default_factory=dict, repr=False)

    def build(self, built: dict[str, Layer] | None = None) -> tuple[Layer, bool]:
        """New layers, not open yet, and whether to serve them read-only.

        ``built``: the nodes that there are already, by name; what is built here is entered. Exports that are given the
        same one share them.

        Probes an image that has no format, for which alone a file is opened. Of a template: its image, which is only
        read. Raises ConfigError, ImageError.
        """
        if self.template is not None:
            golden = self.template.image
            return registry.image(golden, self.template.format or Files().probe(golden)), True
        if self.layers is not None:
            stacks = _Stacks(self._directory, self.nodes, {} if built is None else built)
            return stacks.build(self.layers, self.where), bool(self.read_only)
        assert self.image is not None
        format, read_only = self.format, bool(self.read_only)
        if format is None:
            format = Files().probe(self.image)
            if format == "raw":
                self._check_probed_raw()
                read_only = True
        mode = FileMode(self.cache or FILE_MODE.cache, self.aio or FILE_MODE.aio)
        keys = {key: getattr(self, key) for key in LAYER_KEYS if getattr(self, key) is not None}
        for key in keys:
            if not registry.has_key(registry.layer_type(format), key):
                _refuse(self.where, key, f"{self.image} is a {format!r} image, which {LAYER_KEYS[key]}")
        layer = registry.image(self.image, format, mode, keys)
        if self.detect_zeroes not in (None, "off"):
            layer = registry.build("detect-zeroes", {"file": layer, "detect_zeroes": self.detect_zeroes})
        return layer, read_only

    def check(self, backend: str) -> None:
        """Hold to one another how it is used and what the engine does. Raises ConfigError."""
        if self.detect_zeroes == "unmap" and self.discard == "ignore":
            _refuse(self.where, "detect_zeroes", 'found "unmap", which goes with discard = "unmap" only')
        if self.aio == "io_uring" and backend == "threads":
            _refuse(self.where, "aio", 'found "io_uring", but the engine\'s backend is "threads"')

    @property
    def needs_tls(self) -> bool:
        """Whether it is to be had with TLS alone."""
        return self.tls_required or self.access.needs_tls

    def check_tls(self, tls: TlsConfig) -> None:
        """Hold it to what the server does about TLS. Raises ConfigError."""
        if tls.mode is TlsMode.OFF and self.tls_required:
            _refuse(self.where, "tls", 'found "required", but the server does not use TLS: see [tls]')
        if tls.mode is TlsMode.OFF and self.access.needs_tls:
            _refuse(self.where, "access", "has subjects or identities, but the server does not use TLS: see [tls]")

    def _check_probed_raw(self) -> None:
        if self.read_only is False:
            _refuse(
                self.where,
                "read_only",
                f"found false, but {self.image} has no format and was probed as raw, which is served read-only: "
                'a guest could make it look like another format. If it is a raw disk, say format = "raw"',
            )

    @property
    def named_nodes(self) -> set[str]:
        """The nodes that its layers name, and those that these name."""
        return _nodes_in(self.layers, self.nodes)

    @property
    def _directory(self) -> str:
        return os.path.dirname(self.where.file or "")


@dataclass(frozen=True)
class Config:
    """A whole configuration. ``listen`` may be empty: then LISTEN_DEFAULT is meant.

    ``exports`` are in the order to open them in: where they share nodes, those who may write come first.
    """

    exports: tuple[ExportConfig, ...]
    listen: tuple[str | ListenConfig, ...] = ()
    roots: tuple[str, ...] = ()
    engine: EngineConfig = EngineConfig()
    tls: TlsConfig = NO_TLS
    bounds: Bounds = DEFAULTS
    #: The path of the control socket, if there is to be one, and its permissions.
    control: str | None = None
    control_mode: int = CONTROL_MODE_DEFAULT


def load(path: str) -> Config:
    """Read and check ``path``; every layer is built once, to check its keys. Opens no image. Raises ConfigError."""
    top = _Table(_read(path), Where(path), TOP_KEYS)
    directory = os.path.dirname(path)
    nodes = _nodes(top.tables("nodes", NODES_COUNT_MAX), path)
    exports = list(_exports(top.tables("exports", EXPORTS_COUNT_MAX), path, nodes))
    if not exports:
        raise ConfigError(
            'exports nothing; an export is a table such as [exports.vm] with image = "vm.qcow2"', file=path
        )
    _check_names(exports)
    tls = _tls(top.table("tls", ("mode", "certificates", "psk", "verify_clients")), directory)
    listen = tuple(_listeners(top, directory, tls))
    for export in exports:
        export.check_tls(tls)
    engine = _engine(top.table("engine", ("backend", "workers", "pool", "fault_threads", "record")), directory)
    for export in exports:
        export.check(engine.backend)
    if nodes:
        exports.sort(key=lambda export: bool(export.read_only))
    return Config(
        tuple(exports),
        listen,
        tuple(os.path.join(directory, root) for root in top.texts("roots", ROOTS_COUNT_MAX)),
        engine,
        tls,
        _bounds(top.table("limits", [field.name for field in dataclasses.fields(Bounds)])),
        _control(top, directory),
        _mode(top),
    )


def _control(top: _Table, directory: str) -> str | None:
    path = top.text("control")
    if path is None:
        return None
    path = os.path.join(directory, path)
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_MAX:
        top.refuse("control", f"found a path of {length} bytes; a Unix socket's has at most {SOCKET_PATH_MAX}")
    return path


def _mode(top: _Table) -> int:
    mode = top.number("control_mode", 0, 0o777)
    return CONTROL_MODE_DEFAULT if mode is None else mode


def of_images(paths: Sequence[str], *, format: str | None = None, read_only: bool | None = None, **how: Any) -> Config:
    """Each image under its file name; a single one is the default export too. ``how``: what else `ExportConfig` has of
    an image. Raises ConfigError."""
    exports: dict[str, ExportConfig] = {}
    for path in paths:
        name = os.path.basename(path)
        if not name:
            raise ConfigError(f"{path!r} is no image: it ends with a slash")
        if name in exports:
            raise ConfigError(
                f"{exports[name].image} and {path} are both called {name}: export them under different names, "
                "in a configuration file"
            )
        if how.get("snapshot") is not None:
            read_only = True
        exports[name] = ExportConfig(name, path, format, read_only=read_only, default=len(paths) == 1, **how)
        _check_string(name, Where(path), "the file's name")
    _check_count(len(exports), EXPORTS_COUNT_MAX, NOWHERE, "images")
    return Config(tuple(exports.values()))


def one_export(
    name: str, values: Mapping[str, object], directory: str, built: Mapping[str, Layer] | None = None
) -> tuple[ExportConfig, Layer, bool]:
    """The export that a table [exports.NAME] with these values means, in a configuration in ``directory``, and what
    `ExportConfig.build` gives. ``built``: the nodes that it may name. Raises ConfigError, ImageError."""
    where = Where(os.path.join(directory, ""), f"exports.{_toml_key(name)}")
    _check_string(name, where, "the export's name")
    nodes = {node: NodeConfig(()) for node in built or {}}
    wanted = _export(name, _Table(values, where, EXPORT_KEYS), directory, nodes)
    wanted.check("auto")
    return wanted, *wanted.build(dict(built or {}))


def layer_over(below: Layer, values: object, directory: str) -> Layer:
    """The layer, not open, that a table {type = ...} means, standing on ``below``; paths are relative to ``directory``.
    Raises ConfigError."""
    return _Stacks(directory, {}, {}).over(below, values, Where(None, "layer"))


def _read(path: str) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            data = file.read(CONFIG_FILE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from error
    except ValueError as error:
        raise ConfigError(f"is no path: {error}", file=repr(path)) from error
    if len(data) > CONFIG_FILE_MAX:
        raise ConfigError(f"is longer than {CONFIG_FILE_MAX} bytes, which is no configuration", file=path)
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8: {error.reason} at byte {error.start}", file=path) from error
    except ValueError as error:  # TOMLDecodeError is one; an integer of 5,000 digits another.
        raise ConfigError(f"is not TOML: {error}", file=path) from error
    except RecursionError:
        raise ConfigError("is nested too deeply", file=path) from None


def _engine(table: _Table, directory: str) -> EngineConfig:
    record = table.text("record")
    return EngineConfig(
        table.choice("backend", BACKENDS, "auto"),
        table.number("workers", 1, WORKERS_COUNT_MAX),
        table.size("pool", POOL_MIN, POOL_MAX) or POOL_DEFAULT,
        table.number("fault_threads", 1, FAULT_THREADS_COUNT_MAX) or FAULT_THREADS,
        None if record is None else os.path.join(directory, record),
    )


def _tls(table: _Table, directory: str) -> TlsConfig:
    certificates, psk = table.text("certificates"), table.text("psk")
    verify = table.flag("verify_clients")
    given = certificates is not None or psk is not None
    tls = TlsConfig(
        TlsMode(table.choice("mode", list(TlsMode), TlsMode.REQUIRED if given else TlsMode.OFF)),
        None if certificates is None else os.path.join(directory, certificates),
        None if psk is None else os.path.join(directory, psk),
        verify is not False,
    )
    try:
        tls.check()
    except ConfigError as error:
        table.refuse(error.key, error.message)
    return tls


def _bounds(table: _Table) -> Bounds:
    return Bounds(
        table.number("connections", 1, CONNECTIONS_COUNT_MAX),
        table.number("connections_per_peer", 1, CONNECTIONS_COUNT_MAX),
        table.number("requests_per_connection", 1, CONNECTION_REQUESTS_MAX) or CONNECTION_REQUESTS_DEFAULT,
        table.size("memory_per_connection", 1, POOL_MAX) or CONNECTION_MEMORY_DEFAULT,
        table.size("reply_memory", REPLY_MEMORY_MIN, POOL_MAX) or REPLY_MEMORY_DEFAULT,
        table.seconds("handshake_timeout") or HANDSHAKE_TIMEOUT,
        table.seconds("idle_timeout"),
        table.number("keepalive", 1, KEEPALIVE_MAX),
    )


def _listeners(top: _Table, directory: str, tls: TlsConfig) -> Iterable[str | ListenConfig]:
    """The entries of ``listen``: addresses, or tables with an address and more."""
    values = top.get("listen")
    if values is None:
        return
    if not isinstance(values, list):
        top.refuse("listen", f"found {_shown(values)}, allowed is {LISTEN_WANTED}")
    if not values:
        top.refuse("listen", "found an empty list; leave the key out for the default")
    _check_count(len(values), LISTEN_COUNT_MAX, top.where, "listen")
    for index, value in enumerate(values):
        if isinstance(value, str) and value and "\0" not in value:
            yield str(_address(value, directory, Where(top.where.file), "listen"))
        elif isinstance(value, dict):
            where = Where(top.where.file, f"listen[{index}]")
            yield _listener(_Table(value, where, LISTEN_KEYS), directory, tls)
        else:
            top.refuse("listen", f"found {_shown(value)} in the list, allowed is {LISTEN_WANTED}")


def _listener(table: _Table, directory: str, tls: TlsConfig) -> ListenConfig:
    text = table.text("uri")
    if text is None:
        table.refuse("uri", "missing: where to listen, as an NBD URI")
    address = _address(text, directory, table.where, "uri")
    if address.socket is None:
        for key in ("mode", "owner", "group"):
            if table.get(key) is not None:
                table.refuse(key, "is for a Unix socket: nbd+unix:///?socket=PATH")
    mode = table.one_of("tls", list(TlsMode))
    listener = ListenConfig(
        address,
        table.number("mode", 0, 0o777),
        table.made("owner", access.user),
        table.made("group", access.group),
        None if mode is None else TlsMode(mode),
        _access(table),
    )
    try:
        listener.check(tls)
    except ConfigError as error:
        table.refuse(error.key, error.message)
    return listener


def _access(table: _Table) -> Rule:
    """Whom the table's key ``access`` admits."""
    if table.get("access") is None:
        return ANYBODY
    inner = table.inner("access", ACCESS_KEYS)
    return Rule(
        addresses=inner.all_made("addresses", access.network),
        deny=inner.all_made("deny", access.network),
        users=inner.all_made("users", access.user),
        groups=inner.all_made("groups", access.group),
        machines=inner.all_made("machines", access.machine),
        subjects=inner.all_made("subjects", access.pattern),
        identities=inner.all_made("identities", access.pattern),
    )


def _address(address: str, directory: str, where: Where, key: str) -> uri.NbdUri:
    """The address with its socket's path made relative to ``directory``."""
    try:
        parsed = uri.parse_listen(address)
        if parsed.socket is None:
            return parsed
        moved = dataclasses.replace(parsed, socket=os.path.join(directory, parsed.socket))
        return uri.parse_listen(str(moved))
    except ConfigError as error:
        _refuse(where, key, error.message)


def _nodes(tables: Mapping[str, object], file: str) -> Mapping[str, NodeConfig]:
    nodes = {}
    for name, values in tables.items():
        where = Where(file, f"nodes.{_toml_key(name)}")
        table = _Table(values, where, ("layers",))
        if table.get("layers") is None:
            table.refuse("layers", "missing: a node is a list of layers")
        nodes[name] = NodeConfig(_as_list(table.get("layers"), where, "layers", "a list of layers"), where)
    for name, node in nodes.items():
        _Stacks(os.path.dirname(file), nodes, {}).build([{"node": name}], node.where)
    return nodes


def _exports(tables: Mapping[str, object], file: str, nodes: Mapping[str, NodeConfig]) -> Iterable[ExportConfig]:
    for name, values in tables.items():
        where = Where(file, f"exports.{_toml_key(name)}")
        _check_string(name, where, "the export's name")
        export = _export(name, _Table(values, where, EXPORT_KEYS), os.path.dirname(file), nodes)
        _check_buildable(export)
        yield export


def _export(name: str, table: _Table, directory: str, nodes: Mapping[str, NodeConfig]) -> ExportConfig:
    if table.get("template") is not None:
        return _pattern(name, table, directory, nodes)
    if "*" in name:
        table.refuse(None, 'a name with a * is a pattern, and needs a template = {image = "...", directory = "..."}')
    image, format = table.text("image"), table.text("format")
    layers = table.get("layers")
    if (image is None) == (layers is None):
        found = "has neither image nor layers" if image is None else "has both image and layers"
        table.refuse(None, f"{found}; an export needs one of them")
    if image is None:
        for key, instead in IMAGE_KEYS.items():
            if table.get(key) is not None:
                table.refuse(key, f"goes with image; in layers it is {instead}")
    description = table.text("description") or ""
    _check_string(description, table.where, "its description")
    key_file, snapshot = table.text("key_file"), table.text("snapshot")
    if snapshot is not None and table.flag("read_only") is False:
        table.refuse("read_only", "found false, but a snapshot is served read-only")
    return ExportConfig(
        name,
        image if image is None else os.path.join(directory, image),
        format,
        None if layers is None else _as_list(layers, table.where, "layers", "a list of layers"),
        table.flag("read_only") if snapshot is None else True,
        description,
        bool(table.flag("default")) and name != "",
        table.choice("tls", EXPORT_TLS, "default") == "required",
        _access(table),
        cache=table.one_of("cache", CACHES),
        aio=table.one_of("aio", AIOS),
        detect_zeroes=table.one_of("detect_zeroes", DETECT_ZEROES),
        discard=table.choice("discard", DISCARDS, "unmap"),
        bitmaps=_bitmaps(table),
        allocation_depth=bool(table.flag("allocation_depth")),
        snapshot=snapshot,
        key_file=key_file if key_file is None else os.path.join(directory, key_file),
        key_env=table.text("key_env"),
        key_fd=table.number("key_fd", 0, FD_MAX),
        where=table.where,
        nodes=nodes,
    )


def _pattern(name: str, table: _Table, directory: str, nodes: Mapping[str, NodeConfig]) -> ExportConfig:
    """An export with a template."""
    if not is_lawful_pattern(name):
        table.refuse(
            "template", "goes with a name that has a * in it, and besides only letters, digits, and not first . _ -"
        )
    for key in ("layers", "read_only", "default", "discard", "bitmaps", "image", *IMAGE_KEYS):
        if table.get(key) is not None:
            table.refuse(key, "is not for a pattern; what its exports are is said in template")
    description = table.text("description") or ""
    _check_string(description, table.where, "its description")
    return ExportConfig(
        name,
        description=description,
        tls_required=table.choice("tls", EXPORT_TLS, "default") == "required",
        access=_access(table),
        template=_template(table.inner("template", TEMPLATE_KEYS), directory),
        allocation_depth=bool(table.flag("allocation_depth")),
        where=table.where,
        nodes=nodes,
    )


def _bitmaps(table: _Table) -> tuple[str, ...] | Literal[True]:
    if table.get("bitmaps") is True:
        return True
    return tuple(table.texts("bitmaps", BITMAPS_OFFERED_MAX, "true, or "))


def _template(table: _Table, directory: str) -> TemplateConfig:
    image, overlays = table.text("image"), table.text("directory")
    if image is None or overlays is None:
        table.refuse("image" if image is None else "directory", "missing")
    return TemplateConfig(
        os.path.join(directory, image),
        table.text("format"),
        os.path.join(directory, overlays),
        bool(table.flag("ephemeral")),
        table.number("count_max", 1, EXPORTS_COUNT_MAX) or TEMPLATE_COUNT_DEFAULT,
        table.size("size", 1, DISK_MAX),
    )


def is_lawful_pattern(name: str) -> bool:
    """Whether a name can be a pattern: one that has a ``*`` in it, and stands for single path components only."""
    return "*" in name and is_lawful_instance(name.replace("*", "x"))


def is_lawful_instance(name: str) -> bool:
    """Whether a pattern may stand for this name."""
    return len(name) <= TEMPLATE_NAME_MAX and re.fullmatch("[A-Za-z0-9_][A-Za-z0-9._-]*", name, re.ASCII) is not None


def _check_buildable(export: ExportConfig) -> None:
    """Hold format and layers to what there is, as far as that needs no file."""
    format = export.template.format if export.template is not None else export.format
    if export.layers is not None:
        export.build()
    elif format is not None:
        try:
            check_format(format)
        except ConfigError as error:
            _refuse(export.where, "format", f"found {_shown(format)}: {error.message}")


def check_format(format: str) -> None:
    """Raises ConfigError unless there is a layer that reads images of ``format``."""
    registry.layer_type(format)
    try:
        registry.image("", format)
    except ImageError as error:
        raise ConfigError(error.message) from error


def _check_names(exports: Sequence[ExportConfig]) -> None:
    """One export at most is served under the empty name."""
    first: ExportConfig | None = None
    for export in exports:
        if not export.default and export.name != "":
            continue
        if first is not None:
            key = "default" if export.default else None
            _refuse(export.where, key, f"[{first.where.table}] is the default export already, there can be one")
        first = export


# -- what has changed ----------------------------------------------------------------------------------------------


class Disks:
    """What the disks of a configuration are made of, and how they are served: equal for the same in two configurations.

    It has no say in what an export is told of besides: its description, whom it is for, and whether it is the default.
    """

    def __init__(self, config: Config) -> None:
        self._nodes = config.exports[0].nodes
        named = [export.named_nodes for export in config.exports if not export.read_only]
        #: A node is read-only if all exports that name it are.
        self._written = set().union(*named)

    def of(self, export: ExportConfig) -> object:
        told = {field.name: getattr(export, field.name) for field in dataclasses.fields(export)}
        for key in ("description", "default", "tls_required", "access", "where", "nodes"):
            del told[key]
        return told, [self.node(name) for name in sorted(export.named_nodes)]

    def node(self, name: str) -> object:
        """What a node is made of, those below it included; None if there is none such."""
        if name not in self._nodes:
            return None
        below = sorted({name, *_nodes_in(self._nodes[name].layers, self._nodes)})
        return [(node, self._nodes[node].layers, node in self._written) for node in below]


def _nodes_in(value: object, nodes: Mapping[str, NodeConfig]) -> set[str]:
    """The nodes that a stack names, and those that they name."""
    if isinstance(value, list):
        return {name for item in value for name in _nodes_in(item, nodes)}
    if not isinstance(value, dict):
        return set()
    name = value.get("node")
    if isinstance(name, str) and name in nodes:
        return {name, *_nodes_in(nodes[name].layers, nodes)}
    return {name for item in value.values() for name in _nodes_in(item, nodes)}


# -- stacks --------------------------------------------------------------------------------------------------------


class _Stacks:
    """Builds stacks, as the module's text defines them; paths in them are relative to ``directory``.

    Of ``nodes``, those that are not in ``built`` yet are entered there when they are first named.
    """

    def __init__(self, directory: str, nodes: Mapping[str, NodeConfig], built: dict[str, Layer]) -> None:
        self._directory, self._nodes, self._built = directory, nodes, built
        #: The nodes that are being built, each of them for the one before it.
        self._path: list[str] = []

    def build(self, layers: Sequence[object], where: Where) -> Layer:
        """The top layer of an export's or a node's ``layers``. Raises ConfigError."""
        return self._stack(layers, Where(where.file, f"{where.table}.layers"), 1)

    def over(self, below: Layer, item: object, where: Where) -> Layer:
        """One layer, standing on ``below``."""
        return self._layer(item, [below], where, 1)

    def _stack(self, layers: object, where: Where, depth: int) -> Layer:
        """The top layer of a list; ``depth`` counts the lists it lies in."""
        items = _as_list(layers, where, None, "a list of layers")
        if not items:
            _refuse(where, None, "is empty; a stack has at least one layer")
        if depth > NESTING_MAX:
            _refuse(where, None, f"lists nest deeper than {NESTING_MAX}")
        _check_count(len(items), LAYERS_COUNT_MAX, where, "layers")
        places = [Where(where.file, f"{where.table}[{index}]") for index in range(len(items))]
        count = next((index for index, item in enumerate(items) if isinstance(item, list)), len(items))
        if count == 0:
            _refuse(places[0], None, "a stack begins with a layer, not with a list")
        below = []
        for item, place in zip(items[count:], places[count:], strict=True):
            if not isinstance(item, list):
                _refuse(place, None, "a layer follows a nested list; the lists of a layer's children come last")
            below.append(self._stack(item, place, depth + 1))
        for index in reversed(range(count)):
            below = [self._layer(items[index], below, places[index], depth)]
        return below[0]

    def _layer(self, item: object, below: Sequence[Layer], where: Where, depth: int) -> Layer:
        """One layer, standing on ``below``."""
        keys = dict(_as_table(item, where))
        if "node" in keys:
            return self._node(keys, below, where, depth)
        kind = keys.pop("type", None)
        if not isinstance(kind, str):
            found = "missing" if kind is None else f"found {_shown(kind)}"
            _refuse(where, "type", f"{found}; allowed are {', '.join(registry.names())}")
        try:
            roles = _roles(registry.layer_type(kind))
        except ConfigError as error:
            _refuse(where, "type", error.message)
        values = {}
        for key, value in keys.items():
            name = key.replace("_", "-")  # The registry takes both.
            if name in values:
                _refuse(where, key, "is given twice")
            values[name] = self._value(name, value, roles, where, depth)
        _adopt(kind, values, roles, below, where)
        return registry.build(kind, values, where)

    def _node(self, keys: Mapping[str, object], below: Sequence[Layer], where: Where, depth: int) -> Layer:
        """The top layer of the node that is named, the same whenever it is."""
        name = keys["node"]
        if len(keys) > 1:
            _refuse(where, "node", "stands alone: the node's layers have their keys in its own table")
        if not isinstance(name, str) or name not in self._nodes:
            _refuse(where, "node", f"found {_shown(name)}; {_known_nodes(name, self._nodes)}")
        if below:
            _refuse(where, "node", f"the node {_shown(name)} has all its layers, but others follow it; it comes last")
        if name in self._path:
            circle = " -> ".join((*self._path[self._path.index(name) :], name))
            _refuse(where, "node", f"closes a circle: {circle}")
        if name not in self._built:
            node = self._nodes[name]
            self._path.append(name)
            self._built[name] = self._stack(
                node.layers, Where(node.where.file, f"{node.where.table}.layers"), depth + 1
            )
            self._path.pop()
        return self._built[name]

    def _value(self, key: str, value: object, roles: Mapping[str, bool], where: Where, depth: int) -> object:
        """What the registry takes for the key: layers for children, paths from where we are."""
        is_many = roles.get(key)
        place = Where(where.file, f"{where.table}.{key}")
        if is_many is None:
            is_path = key in PATH_KEYS and isinstance(value, str)
            return os.path.join(self._directory, str(value)) if is_path else value
        if not is_many:
            return self._stack(value, place, depth + 1)
        stacks = enumerate(_as_list(value, place, None, "a list of stacks"))
        return [self._stack(stack, Where(place.file, f"{place.table}[{index}]"), depth + 1) for index, stack in stacks]


def _adopt(kind: str, values: dict[str, Any], roles: Mapping[str, bool], below: Sequence[Layer], where: Where) -> None:
    """Give the layer's ``values`` the layers it stands on, by their roles."""
    if not below:
        return
    if not roles:
        _refuse(where, None, f"the layer {kind!r} has no children, but others follow it; it comes last")
    order = list(roles)
    if len(below) == 1 and "file" in roles:
        order = ["file"]
    left = list(below)
    for role in order:
        if not left:
            break
        if role in values:
            _refuse(where, role, "is given by its key and again by what follows the layer")
        if roles[role]:
            values[role], left = left, []
        else:
            values[role] = left.pop(0)
    if left:
        _refuse(
            where, None, f"the layer {kind!r} has {len(roles)} children ({', '.join(roles)}), {len(below)} follow it"
        )


def _known_nodes(name: object, nodes: Mapping[str, NodeConfig]) -> str:
    """Which nodes there are, and which of them may have been meant."""
    close = difflib.get_close_matches(str(name), nodes, 1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}There are: {', '.join(nodes) or 'none; a node is a table such as [nodes.disk]'}"


def _roles(cls: type[Layer]) -> dict[str, bool]:
    """The keys of a layer that hold children, in order, and whether they hold a list of them."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        choices = {hints[field.name], *typing.get_args(hints[field.name])}  # Layer | None is a choice of two.
        if field.init and choices & {Layer, list[Layer]}:
            found[registry.key_of(field)] = list[Layer] in choices
    return found


# -- tables --------------------------------------------------------------------------------------------------------


class _Table:
    """A table's values, each checked as it is taken. An unknown key is an error from the start."""

    def __init__(self, values: object, where: Where, allowed: Sequence[str]) -> None:
        self._values, self.where = _as_table(values, where), where
        for key, value in self._values.items():
            if key not in allowed:
                self.refuse(key, _unknown(key, value, allowed, where))

    def refuse(self, key: str | None, message: str) -> NoReturn:
        _refuse(self.where, key, message)

    def get(self, key: str) -> object:
        return self._values.get(key)

    def text(self, key: str) -> str | None:
        """A string, not empty."""
        value = self._take(key, lambda value: isinstance(value, str), "a string")
        if value is None:
            return None
        if not value or len(value) > STRING_MAX or "\0" in value:
            self.refuse(key, f"found {_shown(value)}, allowed are 1 to {STRING_MAX} characters, none of them NUL")
        return str(value)

    def texts(self, key: str, count_max: int, also: str = "") -> list[str]:
        """A list of strings; empty if the key is not there. ``also``: what else is allowed, for messages."""
        wanted = f"{also}a list of strings"
        value = self._take(key, lambda value: isinstance(value, list), wanted)
        if value is None:
            return []
        if not value:
            self.refuse(key, "found an empty list; leave the key out for the default")
        _check_count(len(value), count_max, self.where, key)
        for item in value:
            if not isinstance(item, str) or not item or "\0" in item:
                self.refuse(key, f"found {_shown(item)} in the list, allowed is {wanted}")
        return list(value)

    def flag(self, key: str) -> bool | None:
        value = self._take(key, lambda value: isinstance(value, bool), "true or false")
        return None if value is None else bool(value)

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        wanted = " or ".join(f'"{choice}"' for choice in choices)
        value = self._take(key, lambda value: value in choices, wanted)
        return default if value is None else str(value)

    def one_of(self, key: str, choices: Sequence[str]) -> str | None:
        """One of these strings; None if the key is not there."""
        return None if self.get(key) is None else self.choice(key, choices, "")

    def number(self, key: str, low: int, high: int) -> int | None:
        """An integer from ``low`` to ``high``."""
        wanted = f"an integer from {low} to {high}"
        value = self._take(key, lambda value: _is_integer(value) and low <= value <= high, wanted)
        return None if value is None else int(value)

    def seconds(self, key: str) -> float | None:
        """A time, in seconds."""
        wanted = f"a number of seconds, more than 0, at most {SECONDS_MAX}"

        def fits(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= SECONDS_MAX

        value = self._take(key, fits, wanted)
        return None if value is None else float(value)

    def made(self, key: str, make: Callable[[object], Made]) -> Made | None:
        """What ``make`` makes of the value; it raises ValueError, saying what is allowed."""
        value = self.get(key)
        return None if value is None else self._make(key, value, make)

    def all_made(self, key: str, make: Callable[[object], Made]) -> tuple[Made, ...]:
        """The same of each value of a list; empty if the key is not there."""
        value = self._take(key, lambda value: isinstance(value, list), "a list")
        if value is None:
            return ()
        if not value:
            self.refuse(key, "found an empty list, which nobody is in; leave the key out to ask nothing")
        _check_count(len(value), RULE_COUNT_MAX, self.where, key)
        return tuple(self._make(key, item, make) for item in value)

    def _make(self, key: str, value: object, make: Callable[[object], Made]) -> Made:
        try:
            return make(value)
        except ValueError as error:
            self.refuse(key, f"found {_shown(value)}, allowed is {error}")

    def size(self, key: str, low: int, high: int) -> int | None:
        """Bytes, from ``low`` to ``high``."""
        value = self._values.get(key)
        if value is None:
            return None
        try:
            return size(value, low, high)
        except ValueError as error:
            self.refuse(key, f"found {_shown(value)}, allowed is {error}")

    def inner(self, key: str, allowed: Sequence[str]) -> _Table:
        """The table that is the key's value."""
        return _Table(self._values.get(key), Where(self.where.file, f"{self.where.table}.{key}"), allowed)

    def table(self, key: str, allowed: Sequence[str]) -> _Table:
        """A table with the keys ``allowed``; empty if it is not there."""
        return _Table(self._values.get(key, {}), Where(self.where.file, key), allowed)

    def tables(self, key: str, count_max: int) -> Mapping[str, object]:
        """A table of tables, by their names; empty if it is not there."""
        values = _as_table(self._values.get(key, {}), Where(self.where.file, key))
        _check_count(len(values), count_max, self.where, key)
        return values

    def _take(self, key: str, fits: Callable[[Any], bool], wanted: str) -> Any:
        """The value, or None if the key is not there."""
        value = self._values.get(key)
        if value is not None and not fits(value):
            self.refuse(key, f"found {_shown(value)}, allowed is {wanted}")
        return value


def size(value: object, low: int, high: int) -> int:
    """Bytes, from an integer or a string such as "128M". ValueError, saying what is allowed."""
    found = registry.parse_size(value)
    if not low <= found <= high:
        raise ValueError(f"a size from {_in_units(low)} to {_in_units(high)}")
    return found


def _in_units(count: int) -> str:
    """A size as one writes it: 33554432 is 32M."""
    for unit in ("", "K", "M", "G"):
        if count % 1024:
            return f"{count}{unit}"
        count //= 1024
    return f"{count}T"


def _as_table(value: object, where: Where) -> Mapping[str, object]:
    if not isinstance(value, dict):
        _refuse(where, None, f"found {_shown(value)}, allowed is a table")
    return value


def _as_list(value: object, where: Where, key: str | None, wanted: str) -> list[object]:
    if not isinstance(value, list):
        _refuse(where, key, f"found {_shown(value)}, allowed is {wanted}")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_string(text: str, where: Where, what: str) -> None:
    try:
        encoded(text)
    except ValueError as error:
        _refuse(where, None, f"{what} {error}")


def _check_count(count: int, count_max: int, where: Where, what: str) -> None:
    if count > count_max:
        _refuse(where, None, f"has {count} {what}, allowed are {count_max}")


def _unknown(key: str, value: object, allowed: Sequence[str], where: Where) -> str:
    if isinstance(value, dict) and (where.table or "").startswith("exports."):
        return f"unknown table; a name with a dot in it is quoted, as in [exports.{json.dumps('vm.' + key)}]"
    close = difflib.get_close_matches(key, allowed, 1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {guess}Allowed are: {', '.join(allowed)}"


def _shown(value: object) -> str:
    """A value as TOML has it, more or less, and short."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    text = str(value).lower() if isinstance(value, bool) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN_COUNT_MAX else text[:SHOWN_COUNT_MAX] + "..."


def _toml_key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _refuse(where: Where, key: str | None, message: str) -> NoReturn:
    raise ConfigError(message, file=where.file, table=where.table, key=key)
