"""The command line: ``nbdserver serve``, ``check-config``, ``list``, ``layers``, ``explain``, ``tls`` and ``ctl``.

Exit status: 0 when all went well, 1 when something cannot be served (one line on stderr says what), 2 for wrong
usage. What a program may want to read goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import re
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

import nbdserver
from nbdserver import client, config, explain, listening, registry, uri
from nbdserver.commands import Commands
from nbdserver.config import Config, ExportConfig
from nbdserver.contexts import Contexts
from nbdserver.control import Control
from nbdserver.ctl import ctl
from nbdserver.ctl_bitmap import bitmap
from nbdserver.ctl_chain import commit, snapshot, stream
from nbdserver.errors import ConfigError, NbdserverError
from nbdserver.events import Events
from nbdserver.extent import AIOS, CACHES
from nbdserver.files import FileOpener
from nbdserver.format import snapshot_named
from nbdserver.graph import Graph
from nbdserver.handshake import TlsMode
from nbdserver.image.cli import image
from nbdserver.layer import Layer
from nbdserver.limits import FD_MAX, POOL_MAX, POOL_MIN, WORKERS_COUNT_MAX
from nbdserver.listening import ListenConfig, Listener
from nbdserver.service import Service, placed
from nbdserver.tls import TlsConfig

if TYPE_CHECKING:
    from nbdserver.server import Server

#: The configuration that is served when nothing is named.
CONFIG_DEFAULT: Final = "exports.toml"

#: Descriptors: of the standard input, output and error; and the largest there can be (Linux's NR_OPEN limit).
STANDARD: Final = (0, 1, 2)
DESCRIPTOR_MAX: Final = (1 << 31) - 1

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class _Failure(click.ClickException):
    """Prints one line and exits with 1."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"nbdserver: {self.message}", file=file, err=True)


class _Commands(click.Group):
    """Turns what may go wrong in the world into one line."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise  # Whoever read our output has had enough: click ends quietly.
        except (NbdserverError, OSError) as error:
            raise _Failure(str(error)) from error


def _check_pool(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return config.size(value, POOL_MIN, POOL_MAX)
    except ValueError as error:
        raise click.BadParameter(f"found {value!r}, allowed is {error}", context, parameter) from error


def _check_listen(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(str(uri.parse_listen(address)) for address in value)
    except ConfigError as error:
        raise click.BadParameter(error.message, context, parameter) from error


def _check_format(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            config.check_format(value)
        except ConfigError as error:
            raise click.BadParameter(error.message, context, parameter) from error
    return value


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(nbdserver.__version__, prog_name="nbdserver")
def main() -> None:
    """Serve layered disk images over NBD, the Network Block Device protocol."""


main.add_command(image)


@main.command(short_help="Serve a configuration or images.")
@click.argument("sources", nargs=-1, metavar="[CONFIG.toml | IMAGE...]")
@click.option(
    "--listen",
    "-l",
    multiple=True,
    metavar="URI",
    callback=_check_listen,
    help="Where to listen, as an NBD URI: nbd://HOST:PORT (port 0: any free one), nbd+unix:///?socket=PATH or "
    "nbd+vsock://CID:PORT. May be given several times; replaces what the configuration says.  "
    "[default: the sockets that systemd hands over, or nbd://127.0.0.1:10809, reachable from this machine alone]",
)
@click.option(
    "--fd",
    type=click.IntRange(0, DESCRIPTOR_MAX),
    metavar="N",
    help="Serve the client that is connected to the descriptor N, a socket, listen nowhere, and end when it leaves: as "
    "inetd starts servers, and libnbd's connect_command (--fd 0).",
)
@click.option(
    "--format",
    "-f",
    metavar="FORMAT",
    callback=_check_format,
    help="The format of the images, such as qcow2 or raw.  [default: probed; what looks raw is then served read-only]",
)
@click.option("--read-only", "-r", is_flag=True, help="Serve everything read-only.")
@click.option(
    "--cache",
    type=click.Choice(CACHES),
    help="How the images are cached: none is past the page cache (O_DIRECT), writethrough durable when answered, "
    "unsafe never made durable.  [default: writeback]",
)
@click.option("--aio", type=click.Choice(AIOS), help="What carries out the images' I/O.  [default: io_uring]")
@click.option(
    "--discard",
    type=click.Choice(config.DISCARDS),
    help="Whether clients may give storage back, by trimming or along with zeroing.  [default: unmap, they may]",
)
@click.option(
    "--detect-zeroes",
    type=click.Choice(config.DETECT_ZEROES),
    help="Whether writes of zeroes become zero requests, which need no storage (unmap: and give it back).  "
    "[default: off]",
)
@click.option(
    "--bitmap",
    "-B",
    "bitmaps",
    multiple=True,
    metavar="NAME",
    help="Offer the dirty bitmap NAME of the images, as the meta context qemu:dirty-bitmap:NAME. May be given several "
    "times.",
)
@click.option(
    "--allocation-depth", "-A", is_flag=True, help="Offer the meta context qemu:allocation-depth of the images."
)
@click.option(
    "--snapshot",
    metavar="SNAPSHOT",
    callback=lambda context, parameter, value: value and snapshot_named(value),
    help="Serve this internal snapshot of the images instead, read-only: an id or a name, also as snapshot.id=ID or "
    "snapshot.name=NAME.",
)
@click.option(
    "--key-file",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="The passphrase of the images, which are encrypted: all that the file holds.",
)
@click.option("--key-env", metavar="NAME", help="... the value of an environment variable.")
@click.option("--key-fd", metavar="N", type=click.IntRange(0, FD_MAX), help="... what an inherited descriptor gives.")
@click.option(
    "--root",
    "roots",
    multiple=True,
    metavar="DIR",
    help="A directory in which images may name files (their backing files), besides their own. May be "
    "given several times.",
)
@click.option(
    "--backend",
    type=click.Choice(config.BACKENDS),
    help="How files are read and written.  [default: auto, which is io_uring where the system allows it]",
)
@click.option(
    "--workers",
    type=click.IntRange(1, WORKERS_COUNT_MAX),
    metavar="N",
    help="Threads that serve connections.  [default: the engine decides, by the number of cores]",
)
@click.option(
    "--pool", callback=_check_pool, metavar="SIZE", help="Memory for payloads, such as 256M.  [default: 128M]"
)
@click.option(
    "--tls",
    "tls_mode",
    type=click.Choice([mode.value for mode in TlsMode]),
    help="Whether clients may, or must, use TLS.  [default: required if certificates or keys are given, else off]",
)
@click.option(
    "--tls-certificates",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Certificates for TLS, laid out as by `nbdserver tls init`. Clients must have one by the same authority.",
)
@click.option("--tls-psk", metavar="FILE", type=click.Path(dir_okay=False), help="Pre-shared keys for TLS, NAME:KEY.")
@click.option(
    "--tls-verify/--no-tls-verify",
    default=None,
    help="Whether clients must have a certificate too.  [default: they must]",
)
@click.option(
    "--record",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Record every write, zero, discard and sync of every file there, for crash tests.",
)
@click.option(
    "--control",
    metavar="PATH",
    type=click.Path(dir_okay=False),
    help="A Unix socket for `nbdserver ctl`, for our own user and root.  [default: what the configuration says]",
)
@click.option(
    "--pid-file",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write the process id there once connections are accepted; removed at the end.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help='Once connections are accepted, print one line of JSON rather than a URI a line and "ready".',
)
@click.option("--verbose", "-v", is_flag=True, help="Log each export at the start, and the counters at the end.")
@click.option("--quiet", "-q", is_flag=True, help="Log nothing but errors.")
def serve(
    *,
    sources: tuple[str, ...],
    listen: tuple[str, ...],
    fd: int | None,
    format: str | None,
    read_only: bool,
    cache: str | None,
    aio: str | None,
    discard: str | None,
    detect_zeroes: str | None,
    bitmaps: tuple[str, ...],
    allocation_depth: bool,
    snapshot: str | None,
    key_file: str | None,
    key_env: str | None,
    key_fd: int | None,
    roots: tuple[str, ...],
    backend: str | None,
    workers: int | None,
    pool: int | None,
    tls_mode: str | None,
    tls_certificates: str | None,
    tls_psk: str | None,
    tls_verify: bool | None,
    record: str | None,
    control: str | None,
    pid_file: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Serve the exports of CONFIG.toml, or IMAGEs.

    An image is exported under its file name, and a single one also as the default export (the empty name). With
    nothing named, exports.toml is served.

    Prints the URI of each export, and "ready" when connections are accepted. SIGTERM or SIGINT stops: what was
    accepted is finished first, a second signal ends it at once. SIGUSR1 prints the counters on stderr, one line of
    JSON. SIGHUP takes up a changed configuration (`nbdserver ctl reload`); with none, it stops too.

    Sockets of systemd's socket activation (LISTEN_FDS) are served besides what the configuration or --listen says; one
    that is bound to an address said there is used for it.

    \b
    Examples:
      nbdserver serve vm.qcow2
      nbdserver serve --cache none --discard ignore --format raw disk.img
      nbdserver serve --snapshot before-update vm.qcow2
      nbdserver serve --key-file vm.key encrypted.qcow2
      nbdserver serve --format raw --listen 'nbd+unix:///?socket=/run/nbd.sock' /dev/vg0/disk
      nbdserver serve exports.toml
    """
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet contradict each other")
    if fd is not None and listen:
        raise click.UsageError("--fd and --listen contradict each other: with --fd there is one client, already there")
    connected = None if fd is None else _connected(fd)
    ready = listening.inherited(os.environ)
    options: dict[str, Any] = {"backend": backend, "workers": workers, "pool": pool, "record": record}
    given = {key: value for key, value in options.items() if value is not None}
    of_image: dict[str, Any] = {
        "format": format,
        "cache": cache,
        "aio": aio,
        "discard": discard,
        "detect_zeroes": detect_zeroes,
    }
    of_image |= {"bitmaps": bitmaps or None, "allocation_depth": allocation_depth or None, "snapshot": snapshot}
    of_image |= {"key_file": key_file, "key_env": key_env, "key_fd": key_fd}

    def configure() -> Config:
        wanted = _configured(sources, of_image, read_only or None)
        wanted = dataclasses.replace(
            wanted,
            listen=() if fd is not None else listen or wanted.listen or (() if ready else (config.LISTEN_DEFAULT,)),
            roots=(*wanted.roots, *roots),
            engine=dataclasses.replace(wanted.engine, **given),
            tls=_tls(wanted.tls, tls_mode, tls_certificates, tls_psk, tls_verify),
            control=control or wanted.control,
        )
        for export in wanted.exports:
            with _misused(export):
                export.check(wanted.engine.backend)
            export.check_tls(wanted.tls)
        for entry in wanted.listen:
            ListenConfig.of(entry).check(wanted.tls)
        return wanted

    is_reloaded = not sources or sources[0].endswith(".toml")
    _Serving(
        configure,
        is_reloaded,
        ready=ready,
        connected=connected,
        pid_file=pid_file,
        as_json=as_json,
        verbose=verbose,
        quiet=quiet,
    ).run()


@main.command("check-config", short_help="Check a configuration.")
@click.argument("file", metavar="CONFIG.toml")
@click.option("--open", "is_open", is_flag=True, help="Open every image too, read-only.")
def check_config(file: str, is_open: bool) -> None:
    """Check a configuration: its keys, addresses and layers.

    Opens no image, unless asked to.
    """
    wanted = config.load(file)
    if is_open:
        _require(_examine(wanted))
    count = len(wanted.exports)
    click.echo(f"{file}: {count} {'export' if count == 1 else 'exports'}, no errors")


@main.command("list", short_help="List exports.")
@click.argument("source", metavar="[CONFIG.toml | URI]", default=CONFIG_DEFAULT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(source: str, as_json: bool) -> None:
    """List the exports of a configuration, or of a running server.

    The images of a configuration are opened, read-only, to see how large they are. A URI may name one export.
    """
    is_uri = "://" in source or source.startswith("nbd+unix:")
    rows = _remote(uri.parse(source)) if is_uri else _examine(config.load(source))
    if as_json:
        click.echo(json.dumps({"exports": rows}, indent=2))
    else:
        for row in rows:
            click.echo(_in_words(row))
    _require(rows)


@main.command("layers", short_help="Describe the layers and their keys.")
def layers_() -> None:
    """Describe the layers there are, and their keys in a configuration."""
    for name in registry.names():
        try:
            cls = registry.layer_type(name)
        except (NbdserverError, ImportError) as error:
            click.echo(f"{name}: cannot be used: {error}\n")
            continue
        click.echo(f"{name}: {_summary(cls)}")
        docs = registry.field_docs(cls)
        for field in dataclasses.fields(cls):
            if field.init:
                default = "" if field.default in (dataclasses.MISSING, None) else f" (default: {field.default})"
                click.echo(f"    {registry.key_of(field)}: {docs.get(field.name, '')}{default}")
        click.echo()


@main.group("tls", short_help="Certificates and keys for TLS.")
def tls_() -> None:
    """Certificates and keys for TLS."""


@tls_.command("init", short_help="Make certificates and keys.")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name or address by which clients call the server. May be given several times.  "
    "[default: localhost, 127.0.0.1 and ::1]",
)
@click.option("--client", metavar="NAME", default="client", show_default=True, help="The client's name.")
def tls_init(*, directory: Path, hosts: tuple[str, ...], client: str) -> None:
    """Make an authority, certificates for a server and a client, and a pre-shared key in DIR.

    The layout is the one that QEMU (tls-creds-x509, tls-creds-psk) and libnbd expect; what is there already is kept.
    ca-key.pem stays with whoever signs; a client is given ca-cert.pem, client-cert.pem and client-key.pem, or keys.psk.
    """
    from nbdserver import tls as files

    for path in files.init(directory, hosts=hosts or ("localhost", "127.0.0.1", "::1"), client=client):
        click.echo(f"made {path}")
    shown = shlex.quote(str(directory))
    host = hosts[0] if hosts else "localhost"
    click.echo(f"""
Serve with certificates, or with pre-shared keys:
  nbdserver serve --tls-certificates {shown} IMAGE
  nbdserver serve --tls-psk {shown}/{files.PSK} IMAGE
Clients:
  nbdinfo 'nbds://{host}/?tls-certificates={directory.absolute()}'
  nbdinfo 'nbds://{client}@{host}/?tls-psk-file={directory.absolute()}/{files.PSK}'
  qemu-img info --object tls-creds-x509,id=tls0,dir={shown},endpoint=client \\
      --image-opts driver=nbd,host={host},port=10809,tls-creds=tls0
  nbd-client {host} -certfile {shown}/{files.CLIENT_CERT} -keyfile {shown}/{files.CLIENT_KEY} \\
      -cacertfile {shown}/{files.CA_CERT} /dev/nbd0""")


@main.command("explain", short_help="Show the way of a request through an export's layers.")
@click.argument("source", metavar="CONFIG.toml|IMAGE")
@click.argument("export", metavar="EXPORT")
@click.argument("operation", type=click.Choice(list(explain.OPERATIONS)))
@click.argument("range_", metavar="OFFSET+LENGTH")
@click.option("--format", "-f", metavar="FORMAT", callback=_check_format, help="The format of IMAGE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain_(*, source: str, export: str, operation: str, range_: str, format: str | None, as_json: bool) -> None:
    """Show the way of one request through the layers of EXPORT, from its root down to files.

    For each layer: the range it is asked for, the request's flags, where the layer says that the bytes live, and what
    becomes of the flag REGISTERED_BUF there, and why: kept with the memory that the client's data is in, bounced (kept
    too) with other memory of the server's registered pool, lost with any other. Then, for each part of the request,
    whether the engine serves it alone or faults, which is to say calls Python.

    EXPORT may be "", the default export. OFFSET and LENGTH take units, such as 1M+4K. Nothing is written: images are
    opened for reading only. What somebody is writing cannot be asked so; `nbdserver ctl explain` asks a running server.

    \b
    Examples:
      nbdserver explain exports.toml vm write 1M+4K
      nbdserver explain vm.qcow2 "" read 0+256K --json
    """
    if "://" in source or source.startswith("nbd+unix:"):
        raise click.UsageError("name a configuration or an image; `nbdserver ctl explain` asks a running server")
    wanted = _configured((source,), {"format": format}, None)
    try:
        offset, length = explain.parse_range(range_)
        told = explain.explain(wanted, export, explain.OPERATIONS[operation], offset, length)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="OFFSET+LENGTH") from error
    click.echo(json.dumps(told.as_json(), indent=2) if as_json else explain.table(told))


main.add_command(ctl)
for _command in (bitmap, snapshot, commit, stream):
    ctl.add_command(_command)


# -- serving -------------------------------------------------------------------------------------------------------


def _tls(
    wanted: TlsConfig, mode: str | None, certificates: str | None, psk: str | None, verify: bool | None
) -> TlsConfig:
    """What the configuration says of TLS, changed by what the options say. Raises click.UsageError."""
    tls = TlsConfig(
        wanted.mode,
        certificates or wanted.certificates,
        psk or wanted.psk,
        wanted.verify_clients if verify is None else verify,
    )
    if mode is not None:
        tls = dataclasses.replace(tls, mode=TlsMode(mode))
    elif certificates is not None or psk is not None:
        tls = dataclasses.replace(tls, mode=TlsMode.REQUIRED)
    try:
        tls.check()
    except ConfigError as error:
        raise click.UsageError(f"--tls: {error.message}") from error
    return tls


@contextlib.contextmanager
def _misused(export: ExportConfig) -> Iterator[None]:
    """What is wrong with an image's key is wrong with the option of that name."""
    try:
        yield
    except ConfigError as error:
        if export.where.file is not None or error.key is None:
            raise
        raise click.UsageError(f"--{error.key.replace('_', '-')}: {error.message}") from error


def _configured(sources: Sequence[str], of_image: Mapping[str, Any], read_only: bool | None) -> Config:
    """What the arguments of ``serve`` name, read-only if so wished. ``of_image``: options for images, None where they
    are not given. Raises ConfigError, click.UsageError."""
    given = {key: value for key, value in of_image.items() if value is not None}
    if not sources:
        if not os.path.exists(CONFIG_DEFAULT):
            raise click.UsageError(f"name a configuration or images (there is no {CONFIG_DEFAULT} here)")
        sources = (CONFIG_DEFAULT,)
    if not any(source.endswith(".toml") for source in sources):
        return config.of_images(sources, read_only=read_only, **given)
    if len(sources) > 1:
        raise click.UsageError("name one configuration, or images: not several, not both")
    for key in given:
        option = key.removesuffix("s") if key == "bitmaps" else key.replace("_", "-")
        raise click.UsageError(f"--{option} is for images; a configuration says each export's {option} itself")
    wanted = config.load(sources[0])
    if read_only:
        exports = tuple(dataclasses.replace(export, read_only=True) for export in wanted.exports)
        wanted = dataclasses.replace(wanted, exports=exports)
    return wanted


class _Serving:
    """``serve`` from its start to its end. ``configure`` gives the configuration, as it is whenever it is called;
    ``is_reloaded``: it may change. ``ready``: sockets that listen already; ``connected``: the only client."""

    def __init__(
        self,
        configure: Callable[[], Config],
        is_reloaded: bool,
        *,
        ready: Sequence[socket.socket] = (),
        connected: socket.socket | None = None,
        pid_file: str | None,
        as_json: bool,
        verbose: bool,
        quiet: bool,
    ) -> None:
        self._config, self._pid_file = configure(), pid_file
        self._ready, self._connected = ready, connected
        self._reread = configure if is_reloaded else None
        self._as_json, self._is_verbose, self._is_quiet = as_json, verbose, quiet
        self._served: list[dict[str, Any]] = []

    def run(self) -> None:
        """Serve until told to stop. Raises ConfigError, ImageError, OSError."""
        with _signals(self._reread is not None) as events:
            service = Service(
                self._config,
                reread=self._reread,
                on_quit=lambda: events.put("stop"),
                log=self._log,
                ready=self._ready,
            )
            with contextlib.ExitStack() as ending:
                ending.callback(_uninterrupted, service.stop)
                service.start(self._opened)
                if self._config.control is not None:
                    ending.enter_context(self._control(service, self._config.control))
                if self._connected is None:
                    self._announce(service.server)
                else:
                    service.server.on_gone = lambda: events.put("stop")
                    service.server.connected(self._connected)
                if self._pid_file is not None:
                    ending.enter_context(_pid_file(self._pid_file))
                self._wait(service, events)
            if self._is_verbose:
                _print_stats(service.server)

    def _opened(self, row: dict[str, Any]) -> None:
        self._served.append(row)
        if self._is_verbose:
            self._log(f"export {_in_words(row)}")

    def _control(self, service: Service, path: str) -> Control:
        directory = os.path.dirname(self._config.exports[0].where.file or "")
        commands = Commands(service, directory).table()
        return Control(path, commands, mode=self._config.control_mode, log=self._log)

    def _announce(self, server: Server) -> None:
        """Say on stdout where everything is."""
        for row in self._served:
            names = [row["name"], *([""] if row["default"] else [])]
            addresses = [_reached(listener, row["tls"]) for listener in server.listeners]
            row["uris"] = [str(address.with_export(name)) for name in names for address in addresses]
        if self._as_json:
            click.echo(json.dumps({"pid": os.getpid(), "exports": self._served}))
            return
        for row in self._served:
            for address in row["uris"]:
                click.echo(address)
        click.echo("ready")

    def _wait(self, service: Service, events: Events) -> None:
        """Return when a signal, a client of the control socket, or the server itself says that it is over."""

        def wait() -> None:
            service.server.wait()
            events.put("stop")

        threading.Thread(target=wait, name="wait", daemon=True).start()
        while (event := events.get()) != "stop":
            if event == "stats":
                _print_stats(service.server)
            else:
                self._reload(service)

    def _reload(self, service: Service) -> None:
        try:
            _uninterrupted(service.reload)
        except (NbdserverError, OSError) as error:
            click.echo(f"nbdserver: not reloaded, nothing has changed: {error}", err=True)

    def _log(self, message: str) -> None:
        if not self._is_quiet:
            click.echo(f"nbdserver: {message}", err=True)


def _reached(listener: Listener, tls: bool) -> uri.NbdUri:
    """What clients call a listener's address. ``tls``: what the export and the server want, if the listener does not
    want something else."""
    address = dataclasses.replace(listener.address, tls=tls)
    if listener.wanted.tls is not None:
        address = dataclasses.replace(address, tls=listener.wanted.tls is TlsMode.REQUIRED)
    return dataclasses.replace(address, cid=uri.CID_HOST) if address.cid == uri.CID_ANY else address


def _connected(fd: int) -> socket.socket:
    """The client that is connected to a descriptor, which is taken over: also where it is the standard input, output
    or error, which lead nowhere then. Raises click.UsageError."""
    try:
        client = socket.socket(fileno=os.dup(fd))
        client.getpeername()
    except OSError as error:
        raise click.UsageError(f"--fd {fd}: this is no connected socket: {error.strerror}") from error
    if client.type != socket.SOCK_STREAM:
        raise click.UsageError(f"--fd {fd}: this is no stream socket")
    there = os.fstat(fd)
    if fd not in STANDARD:
        os.close(fd)
    with open(os.devnull, "r+b") as nowhere:
        for standard in STANDARD:
            with contextlib.suppress(OSError):  # it is closed
                if os.path.samestat(os.fstat(standard), there):
                    os.dup2(nowhere.fileno(), standard)
    return client


@contextlib.contextmanager
def _signals(is_reloaded: bool) -> Iterator[Events]:
    """Signals as a queue of "stop", "stats" and, ``is_reloaded``, "reload". A second one to stop ends the process there
    and then."""
    events = Events()
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        events.put("stop")

    handlers: dict[int, Callable[[int, Any], None]] = dict.fromkeys(STOP_SIGNALS, stop)
    handlers[signal.SIGHUP] = (lambda number, frame: events.put("reload")) if is_reloaded else stop
    handlers[signal.SIGUSR1] = lambda number, frame: events.put("stats")
    # Who started us with SIGHUP ignored (nohup) wants it so.
    chosen = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in chosen.items()}
    try:
        with events:
            yield events
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _uninterrupted(action: Callable[[], object]) -> None:
    """Run ``action``, which may block in the engine, on a thread: so that signals are still heard here."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="stop")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _pid_file(path: str) -> Iterator[None]:
    """The file exists, whole, for the time of the block."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "x") as file:
        file.write(f"{os.getpid()}\n")
    os.replace(temporary, path)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _print_stats(server: Server) -> None:
    click.echo(json.dumps(server.stats()), err=True)


# -- listing -------------------------------------------------------------------------------------------------------


def _remote(address: uri.NbdUri) -> list[dict[str, Any]]:
    return [dataclasses.asdict(export) for export in client.list_exports(address)]


def _examine(wanted: Config) -> list[dict[str, Any]]:
    """A row for each export, its images opened read-only; with ``error`` for what cannot be opened."""
    graph, files = Graph(), explain.UnwrittenFiles()
    rows = []
    for export in wanted.exports:
        row: dict[str, Any] = {"name": export.name, "description": export.description, "default": export.default}
        try:
            with placed(export):
                layer, read_only = export.build()
                user = f"export {export.name!r}"
                with _opened(graph, layer, FileOpener(graph, files, roots=wanted.roots, read_only=True, user=user)):
                    Contexts(layer, export.bitmaps, read_only=True).close()
                    row |= {"size": layer.size, "format": layer.type, "read_only": read_only}
        except (NbdserverError, OSError) as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


@contextlib.contextmanager
def _opened(graph: Graph, layer: Layer, opener: FileOpener) -> Iterator[None]:
    graph.open(layer, opener)
    try:
        yield
    finally:
        graph.close(layer)


def _require(rows: Sequence[dict[str, Any]]) -> None:
    """Fail, with each line, if any row is an error."""
    errors = [f"{row['name']!r}: {row['error']}" for row in rows if "error" in row]
    if errors:
        raise _Failure("\nnbdserver: ".join(errors))


def _in_words(row: dict[str, Any]) -> str:
    name = repr(row["name"])
    if "error" in row:
        return f"{name}: cannot be opened"
    words = [row.get("format"), f"{row['size']} bytes", "read-only" if row["read_only"] else "writable"]
    if row.get("default"):
        words.append("the default export")
    return f"{name}: {', '.join(filter(None, words))}" + (f": {row['description']}" if row["description"] else "")


# -- describing layers ---------------------------------------------------------------------------------------------


def _summary(cls: type[Layer]) -> str:
    """The first line of the layer's documentation, without its name."""
    module = inspect.getmodule(cls)
    text = (cls.__dict__.get("__doc__") or "") if module is None else (module.__doc__ or "")
    return re.sub(r"^``.*?``:\s*", "", text.strip().partition("\n")[0])
