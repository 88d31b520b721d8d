"""The server: wires graphs to the engine. The only module that knows `nbdserver._engine`.

::

    listening sockets ──> engine ──events──> one thread:   Handshake       what a client may have
                            │
                            └──faults──> fault threads:    graph.flatten   where the bytes live  ──> engine.fill
                                                           graph.execute   what only a layer's code can do
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from nbdserver import _engine
from nbdserver.errors import ConfigError, ImageError, NbdserverError, RequestError
from nbdserver.extent import CODE, ZERO, FileMode, Intent, MeterLimits, Transform
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Graph, Leaf, execute, flatten, walk
from nbdserver.handshake import Begin, End, ExportInfo, Handshake
from nbdserver.layer import Layer, finish
from nbdserver.limits import (
    CONNECTIONS_BACKLOG,
    DRAIN_TIMEOUT,
    EXTENTS_AHEAD_MAX,
    FAULT_THREADS,
    FILLS_COUNT_MAX,
    HANDSHAKE_TIMEOUT,
    POOL_DEFAULT,
    STATUS_COUNT_MAX,
    STOP_TIMEOUT,
    WORKERS_MAX,
)
from nbdserver.request import Flag, Request, Segment, Vector, add_region
from nbdserver.uri import NbdUri, parse_listen

#: Flags of requests on the wire (proto.md, "Command flags").
FUA: Final = 1 << 0
NO_HOLE: Final = 1 << 1
REQ_ONE: Final = 1 << 3
FAST_ZERO: Final = 1 << 4

#: How `_engine` is told of ZERO and CODE.
ENGINE_ZERO: Final = 0
ENGINE_CODE: Final = 1

_log = logging.getLogger("nbdserver")

EngineLeaf = tuple[int, "_engine.File | int", int, bool, int, int, int]


class Effects:
    """What extents go through, as numbers of the engine's."""

    def __init__(self, engine: _engine.Engine) -> None:
        self._engine = engine
        self._transforms: dict[Transform, int] = {}

    def leaf(self, leaf: Leaf) -> EngineLeaf:
        """A leaf as the engine takes it; what it cannot do itself is called through Python."""
        meters = [meter for meter in leaf.meters if isinstance(meter, _engine.Meter)]
        if len(meters) < len(leaf.meters) or leaf.target is CODE:
            return (leaf.length, ENGINE_CODE, 0, False, 0, 0, 0)
        metered = self._engine.meters(meters) if meters else 0
        if leaf.target is ZERO:
            return (leaf.length, ENGINE_ZERO, 0, False, 0, 0, metered)
        if not isinstance(leaf.target, _engine.File):
            return (leaf.length, ENGINE_CODE, 0, False, 0, 0, 0)
        transform = self._number(leaf.transform) if leaf.transform is not None else 0
        return (leaf.length, leaf.target, leaf.offset, leaf.writable, transform, leaf.position, metered)

    def _number(self, transform: Transform) -> int:
        number = self._transforms.get(transform)
        if number is None:
            number = self._engine.add_transform(transform.cipher, transform.key, transform.sector_size)
            self._transforms[transform] = number
        return number


class Supplies:
    """What layers are given of the engine's: files, memory, meters.

    Not methods of the server: by them a layer would keep it alive, and the engine's memory with it.
    """

    def __init__(self, engine: _engine.Engine) -> None:
        self._engine = engine

    def allocate(self, length: int) -> Vector:
        return Vector(Segment(slot, 0, len(slot)) for slot in self._engine.allocate(length))

    def open_file(self, fd: int, name: str, read_only: bool, mode: FileMode) -> _engine.File:
        try:
            return self._engine.open_file(
                fd,
                name,
                read_only,
                direct=mode.cache == "none",
                unsafe=mode.cache == "unsafe",
                threads=mode.aio == "threads",
            )
        except OSError as error:
            what = " with direct I/O" if mode.cache == "none" else ""
            raise ImageError(f"cannot be used{what}: {error.strerror}", path=name) from error

    def meter(self, limits: MeterLimits) -> _engine.Meter:
        *buckets, iops_size = limits
        return self._engine.new_meter(buckets, iops_size)


class Export:
    """One export: a layer graph, and the engine's cache of where its bytes live."""

    def __init__(
        self, name: str, root: Layer, info: ExportInfo, engine_export: _engine.Export, effects: Effects
    ) -> None:
        self.name, self.root, self.info, self.engine_export = name, root, info, engine_export
        self._effects = effects

    @contextlib.contextmanager
    def drained(self, timeout: float = DRAIN_TIMEOUT) -> Iterator[None]:
        """A drained section: new requests wait, running ones have ended. Nests.

        Not from within a request of this export. Raises TimeoutError when requests will not end.
        """
        if not self.engine_export.drain_begin(timeout):
            raise TimeoutError(f"requests of export {self.name!r} have not ended within {timeout} s")
        try:
            yield
        finally:
            self.engine_export.drain_end()

    # -- faults --------------------------------------------------------------------------------------------------

    def serve(self, fault: _engine.Fault) -> None:
        """Do what the fault wants until its request has been answered."""
        fills = 0
        wanted = True
        while wanted:
            offset, length = fault.range
            match fault.kind:
                case "resolve":
                    self.engine_export.fill(fault.sequence, offset, self._extents(offset, length))
                    wanted = fault.again()
                case "write":
                    if not fault.mapped and fills < FILLS_COUNT_MAX and self._make_writable(fault, offset, length):
                        fills += 1
                        wanted = fault.again()
                    else:
                        count = length if fault.mapped else self._unwritable(offset, length)
                        execute(self.root, Request.write(offset, _vector(fault, offset, count)))
                        wanted = fault.done(count)
                case "read":
                    execute(self.root, Request.read(offset, _vector(fault, offset, length)))
                    wanted = fault.done(length)
                case "zero":
                    execute(self.root, Request.zero(offset, length, _zero_flags(fault.flags)))
                    wanted = fault.done(length)
                case "trim":
                    fua = Flag.FUA if fault.flags & FUA else Flag.NONE
                    execute(self.root, Request.trim(offset, length, fua))
                    wanted = fault.done(length)
                case "flush":
                    finish(self.root.flush())
                    wanted = fault.done(0)
                case "status":
                    one = bool(fault.flags & REQ_ONE)
                    fault.status([(id, self.status(name, offset, length, one)) for id, name in fault.contexts])
                    wanted = False

    def _extents(self, offset: int, length: int) -> list[EngineLeaf]:
        """Where the range can be read, and as much beyond it as the layers offer without being asked again."""
        leaves: list[EngineLeaf] = []
        covered = ahead = 0
        for leaf in flatten(self.root, offset, length, Intent.READ):
            leaves.append(self._effects.leaf(leaf))
            covered += leaf.length
            if covered >= length:
                ahead += 1
                if ahead > EXTENTS_AHEAD_MAX:
                    break
        return leaves

    def _make_writable(self, fault: _engine.Fault, offset: int, length: int) -> bool:
        """Enter the places at the start of the range that may be written as they are; False if there are none."""
        leaves: list[EngineLeaf] = []
        covered = ahead = 0
        for leaf in flatten(self.root, offset, length, Intent.WRITE):
            if not (leaf.writable and isinstance(leaf.target, _engine.File)):
                break
            leaves.append(self._effects.leaf(leaf))
            covered += leaf.length
            if covered >= length:
                ahead += 1
                if ahead > EXTENTS_AHEAD_MAX:
                    break
        self.engine_export.fill(fault.sequence, offset, leaves)
        return bool(leaves)

    def _unwritable(self, offset: int, length: int) -> int:
        """How much of the range, from its start, has to go through the layers: up to a place that may be written as it
        is, but not nothing."""
        count = 0
        for leaf in flatten(self.root, offset, length, Intent.WRITE):
            if count and leaf.writable and isinstance(leaf.target, _engine.File):
                break
            count += leaf.length
            if count >= length:
                return length
        return count

    def status(self, context: str, offset: int, length: int, one: bool) -> list[tuple[int, int]]:
        """(length, flags) descriptors for a meta context, neighbours merged, at most STATUS_COUNT_MAX."""
        runs: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            for run, flags in self.root.status(context, offset, end - offset):
                run = min(run, end - offset)
                offset += run
                if runs and runs[-1][1] == flags:
                    runs[-1] = (runs[-1][0] + run, flags)
                elif len(runs) == (1 if one else STATUS_COUNT_MAX):
                    return runs
                else:
                    runs.append((run, flags))
                if offset >= end:
                    break
        return runs

    def counters(self) -> dict[str, Any]:
        """What the engine has counted (`_engine.Export.counters`), and of each layer and file what it has."""
        layers: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for path, layer in walk(self.root):
            layers[path] = {"type": layer.type, **layer.buffer_counters.counts()}
            for file in vars(layer).values():
                if isinstance(file, _engine.File):
                    files[file.name] = file.counters()
        return {**self.engine_export.counters(), "layers": layers, "files": files}


def _vector(fault: _engine.Fault, offset: int, length: int) -> Vector:
    return Vector(Segment(slot, start, count) for slot, start, count in fault.segments(offset, length))


def _zero_flags(wire: int) -> Flag:
    flags = Flag.NONE if wire & NO_HOLE else Flag.MAY_UNMAP
    if wire & FAST_ZERO:
        flags |= Flag.NO_FALLBACK
    if wire & FUA:
        flags |= Flag.FUA
    return flags


class Server:
    """An NBD server: exports served on listening addresses.

    ``listen``: NBD URIs (port 0 takes a free one). ``backend``: "auto", "io_uring" or "threads". ``workers``: engine
    threads, by default one a processor. ``pool``: bytes of the buffer pool. ``roots``: directories that images may
    name files in. ``record``: a directory for the I/O recorder. ``log`` is given each line of the log.

    Use it as a context manager, or call `start` and `stop`. Raises ConfigError.
    """

    def __init__(
        self,
        *,
        listen: Sequence[str] = (),
        backend: str = "auto",
        workers: int | None = None,
        pool: int = POOL_DEFAULT,
        fault_threads: int = FAULT_THREADS,
        roots: Sequence[str | os.PathLike[str]] = (),
        record: str | os.PathLike[str] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._addresses = [parse_listen(uri) for uri in listen]
        self._roots = tuple(roots)
        self._log = log if log is not None else _log.info
        workers = workers if workers is not None else min(os.cpu_count() or 1, WORKERS_MAX)
        try:
            self._engine = _engine.Engine(
                workers=workers,
                pool=pool,
                backend=backend,
                fault_threads=fault_threads,
                handshake_timeout=HANDSHAKE_TIMEOUT,
                record=os.fspath(record) if record is not None else None,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"the engine cannot start: {error}") from error
        add_region(self)
        _raise_descriptor_limit()
        self._fault_threads_count = fault_threads
        self._effects = Effects(self._engine)
        self._graph = Graph()
        self._supplies = Supplies(self._engine)
        self._files = Files(self._supplies.open_file)
        self._lock = threading.Lock()
        self._exports: dict[str, Export] = {}
        self._by_id: dict[int, Export] = {}
        self._default: str | None = None
        self._handshakes: dict[tuple[int, int], Handshake] = {}
        self._threads: list[threading.Thread] = []
        self._bound: list[tuple[str, tuple[int, int]]] = []
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        #: Actual addresses as NBD URIs, once started.
        self.listening: list[str] = []

    # -- exports -------------------------------------------------------------------------------------------------

    def export(
        self,
        name: str,
        layer: Layer,
        *,
        read_only: bool = False,
        description: str = "",
        default: bool = False,
    ) -> Export:
        """Open ``layer`` and everything below it, and export it as ``name`` (and under "", if ``default``).

        Raises ImageError, ConfigError; nothing is left open then.
        """
        self._check_free(name, default)
        opener = FileOpener(
            self._graph,
            self._files,
            roots=self._roots,
            read_only=read_only,
            allocate=self._supplies.allocate,
            meter=self._supplies.meter,
        )
        self._graph.open(layer, opener)
        try:
            read_only = read_only or layer.read_only
            info = ExportInfo(name=name, description=description, size=layer.size, read_only=read_only)
            export = Export(
                name,
                layer,
                info,
                self._engine.new_export(layer.size, read_only, writethrough=layer.writethrough),
                self._effects,
            )
            self._graph.subscribe(layer, export.engine_export.changed)
            with self._lock:
                self._check_free(name, default)
                self._exports[name] = export
                self._by_id[export.engine_export.id] = export
                if default:
                    self._default = name
        except BaseException:
            self._graph.close(layer)
            raise
        return export

    def _check_free(self, name: str, default: bool) -> None:
        if name in self._exports:
            raise ConfigError(f"there is an export {name!r} already")
        if default and self._default is not None:
            raise ConfigError(f"export {name!r} cannot be the default: {self._default!r} is")
        if (default and "" in self._exports) or (name == "" and self._default is not None):
            raise ConfigError('the empty name "" is taken: only one export can be the default')

    def _export_infos(self) -> Mapping[str, ExportInfo]:
        with self._lock:
            infos = {name: export.info for name, export in self._exports.items()}
            if self._default is not None:
                infos[""] = infos[self._default]
        return infos

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and serve. Raises ConfigError, with nothing left listening."""
        sockets: list[socket.socket] = []
        try:
            for address in self._addresses:
                bound = _bind(address)
                sockets.append(bound)
                self._note_bound(address, bound)
            # The threads first: from the first connection on there must be somebody to answer.
            self._spawn("nbd-handshake", self._serve_events)
            for index in range(self._fault_threads_count):
                self._spawn(f"nbd-fault-{index}", self._serve_faults)
            self._engine.start([bound.detach() for bound in sockets])
        except BaseException:
            for bound in sockets:
                bound.close()
            self._unlink()
            raise
        refused = self._engine.refused
        self._log(f"backend: {self._engine.backend}" + (f" ({refused})" if refused else ""))

    def _note_bound(self, address: NbdUri, bound: socket.socket) -> None:
        if address.socket is not None:
            path = os.path.abspath(address.socket)
            status = os.stat(path)
            self._bound.append((path, (status.st_dev, status.st_ino)))
            self.listening.append(str(NbdUri(socket=path)))
        else:
            self.listening.append(str(NbdUri(host=address.host, port=bound.getsockname()[1])))

    def _spawn(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def stop(self, timeout: float | None = STOP_TIMEOUT) -> None:
        """Accept no more, finish what was accepted (for ``timeout`` seconds at most), close everything.

        Idempotent. Raises the first error of closing an image, after all have been closed.
        """
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
        self._engine.stop(timeout if timeout is not None else STOP_TIMEOUT)
        for thread in self._threads:
            thread.join()
        self._handshakes.clear()
        self._unlink()
        try:
            with contextlib.ExitStack() as closing:
                for export in self._exports.values():
                    closing.callback(self._graph.close, export.root)
        finally:
            self._stopped.set()

    def _unlink(self) -> None:
        """Remove our sockets, unless somebody has put others in their place."""
        for path, identity in self._bound:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                if (status.st_dev, status.st_ino) == identity:
                    os.unlink(path)
        self._bound.clear()

    def wait(self) -> None:
        """Wait until the server has been stopped by another thread."""
        self._stopped.wait()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def backend(self) -> str:
        """The backend in use: "io_uring" or "threads"."""
        return self._engine.backend

    @property
    def registered_region(self) -> tuple[int, int]:
        """`request.Region`: the part of the pool that is registered."""
        return self._engine.pool_region

    def stats(self) -> dict[str, Any]:
        """Counters: of the engine, and of every export by name (``faults`` are requests that needed a fault thread,
        ``*_calls`` calls into Python, ``hits`` requests that the engine answered alone). Of an export, also ``layers``
        by the roles that lead to them ("/" is the root; `layer.BufferCounters`), and ``files`` by their names
        (``fixed``: reads and writes on registered buffers)."""
        with self._lock:
            exports = {name: export.counters() for name, export in self._exports.items()}
        return {
            "backend": self._engine.backend,
            "connections": self._engine.connections,
            "pool": {"size": self._engine.pool_size, "free": self._engine.pool_free},
            "exports": exports,
        }

    # -- threads -------------------------------------------------------------------------------------------------

    def _serve_events(self) -> None:
        while (event := self._engine.take_event()) is not None:
            try:
                self._handle(event)
            except Exception:
                _log.exception("handshake failed")
                event.end(b"")

    def _handle(self, event: _engine.Event) -> None:
        connection = event.connection
        if event.kind == "open":
            peer = event.peer or ""
            self._handshakes[connection] = Handshake(self._export_infos, peer=peer, stopping=self._stopping.is_set)
            return
        if event.kind == "closed":
            self._handshakes.pop(connection, None)
            return
        handshake = self._handshakes.get(connection)
        if handshake is None:
            return  # it has begun transmission or ended: nothing more is asked of us
        if event.kind == "flags":
            action = handshake.client_flags(event.code)
        elif event.kind == "option":
            action = handshake.option(event.code, event.data)
        else:
            action = handshake.oversized(event.code, event.length)
        if action is None:
            event.next(b"")
        elif isinstance(action, Begin):
            del self._handshakes[connection]
            self._begin(event, action)
        elif isinstance(action, End):
            del self._handshakes[connection]
            if action.reason:
                self._log(action.reason)
            event.end(action.data)
        else:
            event.next(action.data)

    def _begin(self, event: _engine.Event, action: Begin) -> None:
        with self._lock:
            export = self._exports.get(action.export.name)
        if export is None:  # removed since it was looked up
            event.end(b"")
            return
        event.begin(action.data, export.engine_export, action.style, list(action.contexts))

    def _serve_faults(self) -> None:
        while (fault := self._engine.take_fault()) is not None:
            try:
                self._by_id[fault.export].serve(fault)
            except RequestError as error:
                fault.fail(error.errno, str(error))
            except OSError as error:
                fault.fail(error.errno or errno.EIO, str(error))
            except NbdserverError as error:
                self._log(f"export {self._by_id[fault.export].name!r}: {error}")
                fault.fail(errno.EIO, str(error))
            except Exception as error:
                _log.exception("a layer of export %r failed", self._by_id[fault.export].name)
                fault.fail(errno.EIO, f"{type(error).__name__} in a layer")


def _raise_descriptor_limit() -> None:
    """Let the process have as many descriptors as it may: every image takes two, every client one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# -- listening -------------------------------------------------------------------------------------------------------


def _bind(address: NbdUri) -> socket.socket:
    """A listening socket. Raises ConfigError."""
    try:
        if address.socket is not None:
            return _bind_unix(address.socket)
        found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        with contextlib.ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
            bound.listen(CONNECTIONS_BACKLOG)
            bound.setblocking(False)
            undo.pop_all()
            return bound
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}", key="listen") from error


def _bind_unix(path: str) -> socket.socket:
    with contextlib.ExitStack() as undo:
        bound = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        try:
            bound.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            bound.bind(path)
        bound.listen(CONNECTIONS_BACKLOG)
        bound.setblocking(False)
        undo.pop_all()
        return bound


def _is_stale(path: str) -> bool:
    """Whether ``path`` is a socket that nobody listens on any more."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False
