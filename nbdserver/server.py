"""The server: wires graphs to the engine. The only module that knows `nbdserver._engine`.

::

    listening sockets ──> engine ──events──> one thread:   Handshake       what a client may have
                            │
                            └──faults──> fault threads:    graph.flatten   where the bytes live  ──> engine.fill
                                                           graph.execute   what only a layer's code can do
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import ipaddress
import itertools
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from nbdserver import _engine, blocks
from nbdserver.access import ANYBODY, Peer, Rule
from nbdserver.bounds import DEFAULTS, Bounds
from nbdserver.contexts import Bitmaps, Contexts
from nbdserver.errors import ConfigError, ImageError, NbdserverError, RequestError
from nbdserver.extent import CODE, ZERO, DirtyBitmap, FileMode, Intent, MeterLimits, Transform
from nbdserver.files import FileOpener, Files, block_limits
from nbdserver.graph import Graph, Leaf, Use, bare, execute, execute_leaf, flatten, walk
from nbdserver.handshake import Action, Begin, End, ExportInfo, Handshake, Option, StartTls, TlsMode, Unavailable
from nbdserver.jobs import Jobs
from nbdserver.layer import ALLOCATION_DEPTH, Layer, finish
from nbdserver.limits import (
    DISK_MAX,
    DRAIN_TIMEOUT,
    EXTENTS_AHEAD_MAX,
    FAULT_THREADS,
    FILLS_COUNT_MAX,
    POOL_DEFAULT,
    STATUS_COUNT_MAX,
    STOP_TIMEOUT,
    TEMPLATE_THREADS,
    TEMPLATE_TIMEOUT,
    THREADS_STOP_TIMEOUT,
    WORKERS_MAX,
)
from nbdserver.listening import ListenConfig, Listener, Ready, bind, keep_alive
from nbdserver.offers import KEEP, Client, Keep, Maker, Offers, Removal
from nbdserver.permissions import ONLOOKER, Grant
from nbdserver.pool import Pool, raise_limit
from nbdserver.request import Flag, Request, Segment, Vector, add_region
from nbdserver.sparing import Sparing
from nbdserver.tls import NO_TLS, TlsConfig
from nbdserver.uri import NbdUri

#: Flags of requests on the wire (proto.md, "Command flags").
FUA: Final = 1 << 0
NO_HOLE: Final = 1 << 1
REQ_ONE: Final = 1 << 3
FAST_ZERO: Final = 1 << 4

#: How `_engine` is told of ZERO and CODE.
ENGINE_ZERO: Final = 0
ENGINE_CODE: Final = 1

#: How connections are served that came by no listener.
UNLISTENED: Final = ListenConfig(NbdUri())

#: Who uses layers that are no export's yet, in errors.
ADDED: Final = "a layer that is being added"

_log = logging.getLogger("nbdserver")

#: See `_engine.Export.fill`.
EngineLeaf = tuple[int, "_engine.File | int", int, bool, int, int, int, int, int]


class Effects:
    """What extents go through, as numbers of the engine's."""

    def __init__(self, engine: _engine.Engine) -> None:
        self._engine = engine
        self._transforms: dict[Transform, int] = {}

    def leaf(self, leaf: Leaf) -> EngineLeaf:
        """A leaf as the engine takes it; what it cannot do itself is called through Python."""
        meters = [meter for meter in leaf.meters if isinstance(meter, _engine.Meter)]
        if len(meters) < len(leaf.meters) or leaf.target is CODE:
            return (leaf.length, ENGINE_CODE, 0, False, 0, 0, 0, 0, 0)
        metered = self._engine.meters(meters) if meters else 0
        if leaf.target is ZERO:
            return (leaf.length, ENGINE_ZERO, 0, False, 0, 0, metered, 0, 0)
        if not isinstance(leaf.target, _engine.File):
            return (leaf.length, ENGINE_CODE, 0, False, 0, 0, 0, 0, 0)
        transform = self._number(leaf.transform) if leaf.transform is not None else 0
        log, marked_from = self._mark(leaf) or (0, 0)
        writable = self.is_writable(leaf)
        return (
            *(leaf.length, leaf.target, leaf.offset, writable),
            *(transform, leaf.position, metered, log, marked_from),
        )

    def is_writable(self, leaf: Leaf) -> bool:
        """Whether the engine may write there, and mark it where that is due: in one log, but no more."""
        return leaf.writable and isinstance(leaf.target, _engine.File) and self._mark(leaf) is not None

    def _mark(self, leaf: Leaf) -> tuple[int, int] | None:
        """(number of a log or 0, where in its layer the leaf begins); None if that is not all."""
        if not leaf.logs:
            return 0, 0
        log, position = leaf.logs[0]
        return (log.number, position) if len(leaf.logs) == 1 and isinstance(log, _engine.DirtyLog) else None

    def _number(self, transform: Transform) -> int:
        number = self._transforms.get(transform)
        if number is None:
            number = self._engine.add_transform(transform.cipher, transform.key, transform.sector_size)
            self._transforms[transform] = number
        return number


class Supplies:
    """What layers are given of the engine's: files, memory, meters, dirty bitmaps and logs.

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
                block_limits(fd, mode),
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

    def dirty_bitmap(self, size: int, granularity: int) -> DirtyBitmap:
        return _engine.DirtyBitmap(size, granularity)

    def dirty_log(self) -> _engine.DirtyLog:
        return self._engine.new_dirty_log()


class Export:
    """One export: a layer graph, and the engine's cache of where its bytes live."""

    def __init__(
        self,
        name: str,
        use: Use,
        info: ExportInfo,
        engine_export: _engine.Export,
        *,
        effects: Effects,
        graph: Graph,
        contexts: Contexts,
        discard: bool = True,
    ) -> None:
        """``use`` is what this is in ``graph``: a user of its root; ``contexts`` are offered besides allocation.
        ``discard``: whether clients may give storage back, by trimming or along with zeroing."""
        self.name, self.use, self.info, self.engine_export = name, use, info, engine_export
        self.root = use.layer
        self._effects, self._graph, self._contexts, self._discard = effects, graph, contexts, discard
        self._unsubscribe = graph.subscribe(self.root, engine_export.changed)
        self._follow()
        #: Is called when it is over and its layers are closed.
        self.after_end: Callable[[], None] = lambda: None
        #: See `offers.Offered`.
        self.made_by: Maker | None = None
        self.clients: set[Client] = set()
        self.is_leaving = self.is_ending = False
        #: Set when it is over: its layers are closed.
        self.ended = threading.Event()

    @contextlib.contextmanager
    def running(self, timeout: float = DRAIN_TIMEOUT) -> Iterator[None]:
        """Count as a request: nobody changes the graph meanwhile. Raises TimeoutError when a drained section does not
        end."""
        running = self.engine_export.running(timeout)
        if running is None:
            raise TimeoutError(f"a drained section of export {self.name!r} has not ended within {timeout} s")
        with running:
            yield

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

    def describe(self, description: str, tls_required: bool, access: Rule) -> None:
        """Have clients told another description, and new ones held to other rules."""
        self.info = dataclasses.replace(self.info, description=description, tls_required=tls_required, access=access)

    def offer(self, bitmaps: Bitmaps) -> None:
        """Have clients that come from now on offered these bitmaps (see `contexts.Contexts`), and no others; whoever
        has selected another gets errors. Nobody changes the graph meanwhile. Raises as `Contexts` does, with nothing
        changed."""
        contexts = Contexts(
            self.root,
            bitmaps,
            allocation_depth=ALLOCATION_DEPTH in self.info.contexts,
            read_only=self.info.read_only,
        )
        old, self._contexts = self._contexts, contexts
        self.info = dataclasses.replace(self.info, contexts=contexts.names)
        old.close()

    def renew(self) -> None:
        """Other layers are below, or open in another way, in a drained section. What of the bitmaps is there no more is
        not offered any longer. Raises ImageError, OSError."""
        old, self._contexts = self._contexts, self._contexts.renewed(self.root)
        self.info = dataclasses.replace(self.info, contexts=self._contexts.names)
        old.close()
        self._follow()
        self.resized()

    def _follow(self) -> None:
        """Have the engine know what of the root concerns every request."""
        self.engine_export.writethrough = self.root.writethrough
        self.engine_export.in_place = self.root.in_place

    def resized(self) -> None:
        """The root has another size, in a drained section: clients learn of it when they connect again."""
        self.engine_export.size = self.root.size
        self.info = dataclasses.replace(self.info, size=self.root.size)

    def replace_root(self, root: Layer) -> None:
        """Serve ``root``, which is open, from now on: in a drained section. Everything that is cached is dropped.

        The export becomes a user of it, and lets the old one go, which may close that. Clients stay; a new size they
        see when they connect again. Raises ConfigError, with nothing changed, if a disk that is written could not be
        any more; and what closing raises.
        """
        assert self.engine_export.is_draining, "not in a drained section"
        if root.read_only and not self.info.read_only:
            raise ConfigError(f"export {self.name!r} is writable, but {root.type} is not")
        self._graph.replace(self.root, root, [self.use], edges=False, then=lambda: self.show(root))

    def show(self, root: Layer) -> None:
        """Serve ``root``, which the graph has made the export's. In a drained section."""
        self._unsubscribe()
        self.root = root
        self._unsubscribe = self._graph.subscribe(root, self.engine_export.changed)
        self.engine_export.changed(0, DISK_MAX)
        self._follow()
        self.info = dataclasses.replace(
            self.info, preferred_block=preferred_block(root), rotational=is_rotational(root)
        )
        self.resized()

    def close(self) -> None:
        """Let the layers go. No request runs, and none will. Raises what closing raises."""
        self._unsubscribe()
        self._contexts.close()
        self._graph.close(self.root, self.use)

    # -- faults --------------------------------------------------------------------------------------------------

    def serve(self, fault: _engine.Fault) -> None:
        """Do what the fault wants until its request has been answered."""
        fills = 0
        wanted = True
        while wanted:
            offset, length = fault.range
            match fault.kind:
                case "resolve":
                    self._resolve(fault.sequence, offset, length)
                    wanted = fault.again()
                case "write":
                    if fault.mapped:
                        execute(self.root, Request.write(offset, _vector(fault, offset, length)))
                        wanted = fault.done(length)
                        continue
                    seen = self.root.changes
                    leaves = flatten(self.root, offset, length, Intent.WRITE)
                    first = next(leaves)
                    if fills < FILLS_COUNT_MAX and self._make_writable(fault, first, leaves):
                        fills += 1
                        wanted = fault.again()
                    else:
                        wanted = fault.done(self._write(fault, offset, length, seen, first, leaves))
                case "read":
                    execute(self.root, Request.read(offset, _vector(fault, offset, length)))
                    wanted = fault.done(length)
                case "zero":
                    execute(self.root, Request.zero(offset, length, self._zero_flags(fault.flags)))
                    wanted = fault.done(length)
                case "trim":
                    if self._discard:
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

    def _zero_flags(self, wire: int) -> Flag:
        flags = Flag.MAY_UNMAP if self._discard and not wire & NO_HOLE else Flag.NONE
        if wire & FAST_ZERO:
            flags |= Flag.NO_FALLBACK
        if wire & FUA:
            flags |= Flag.FUA
        return flags

    def _resolve(self, sequence: int, offset: int, length: int) -> None:
        """Enter where the range can be read, and as much beyond it as the layers offer without being asked again:
        the root's table if it has one, else some extents."""
        leaves = flatten(self.root, offset, length, Intent.READ)
        first = next(leaves)
        ahead = 0 if self._enter_table(sequence, offset, first) else EXTENTS_AHEAD_MAX
        found = _some(itertools.chain((first,), leaves), length, ahead)
        self.engine_export.fill(sequence, offset, [self._effects.leaf(leaf) for leaf in found])

    def _enter_table(self, sequence: int, offset: int, first: Leaf) -> bool:
        """Enter the table that says where ``first`` is, at ``offset``, if there is one that has not been."""
        file = first.target
        if not isinstance(file, _engine.File) or self.engine_export.has_table(offset):
            return False
        table = self.root.packed(offset)
        if table is None or bare(table.target).whole is not file:
            return False
        return self.engine_export.fill_table(
            sequence,
            table.offset,
            table.words,
            file=file,
            unit=table.unit,
            places=table.places,
            refused=table.refused,
            zeroes=table.zeroes,
            limit=table.limit,
        )

    def _make_writable(self, fault: _engine.Fault, first: Leaf, others: Iterator[Leaf]) -> bool:
        """Enter places from the start of the range on that may be written as they are, if ``first`` is one or its layer
        can make it one: whether it is so. ``others`` follow it."""
        offset, length = fault.range
        if first.layer is not None:
            room = first.layer.make_room(first.offset, min(first.length, length))
            if room is None:
                return False
            # Where the layer's bytes are in the export is known for those that were asked for, and guessed of others.
            start = max(offset - max(first.offset - room[0], 0), 0)
            length = min(room[1], self.root.size - start)
            sequence = self.engine_export.sequence
            leaves = _some(flatten(self.root, start, length, Intent.WRITE), length, 0)
        elif not self._effects.is_writable(first):
            return False
        else:
            start, sequence = offset, fault.sequence
            leaves = _some(itertools.chain((first,), others), length, EXTENTS_AHEAD_MAX)
        places = itertools.takewhile(self._effects.is_writable, leaves)
        self.engine_export.fill(sequence, start, [self._effects.leaf(leaf) for leaf in places])
        return True

    def _write(
        self, fault: _engine.Fault, offset: int, length: int, seen: int, first: Leaf, others: Iterator[Leaf]
    ) -> int:
        """Write what has to go through the layers, from the start of the range up to a place that may be written as it
        is, but not nothing; how much that was. ``first`` and ``others`` were found when ``changes`` was ``seen``."""
        count = min(first.length, length)
        if count == length and first.target is CODE:
            request = Request.write(offset, _vector(fault, offset, count))
            if not execute_leaf(self.root, first, request, seen):
                execute(self.root, request)
            return count
        while count < length and (leaf := next(others, None)) is not None and not self._effects.is_writable(leaf):
            count = min(count + leaf.length, length)
        execute(self.root, Request.write(offset, _vector(fault, offset, count)))
        return count

    def status(self, context: str, offset: int, length: int, one: bool) -> list[tuple[int, int]]:
        """(length, flags) descriptors for a meta context, neighbours merged, at most STATUS_COUNT_MAX."""
        self._contexts.check(self.root, context)
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
            for file in list(vars(layer).values()):
                if isinstance(file, _engine.File):
                    files[file.name] = file.counters()
        return {**self.engine_export.counters(), "layers": layers, "files": files}


def _leave(export: Export, timeout: float) -> None:
    raise TimeoutError(
        f"requests of export {export.name!r} have not ended within {timeout:g} s; its images are not closed"
    )


def preferred_block(root: Layer) -> int:
    return blocks.preferred(below for _, below in walk(root))


def is_rotational(root: Layer) -> bool:
    return any(below.limits.rotational for _, below in walk(root))


def _tls_context(tls: TlsConfig) -> _engine.TlsContext | None:
    """What connections begin TLS with, if they do. ConfigError."""
    if tls.mode is TlsMode.OFF:
        return None
    try:
        return _engine.TlsContext(**tls.files(), keys=tls.keys())
    except ValueError as error:
        raise ConfigError(f"TLS cannot be used: {error}") from error


def _who(client: _engine.Client) -> Peer:
    """A client as far as the system knows it."""
    _, uid, groups = client.process or (0, None, ())
    address = None if client.address is None else ipaddress.ip_address(client.address)
    return Peer(address=address, uid=uid, groups=frozenset(groups), cid=client.machine)


def _user(name: str) -> str:
    """Who an export is, among the users of layers and files."""
    return f"export {name!r}"


def _some(leaves: Iterable[Leaf], length: int, ahead: int) -> Iterator[Leaf]:
    """The first of the leaves: those of ``length`` bytes, and so many more."""
    for leaf in leaves:
        if length <= 0:
            ahead -= 1
            if ahead < 0:
                return
        yield leaf
        length -= leaf.length
        if length <= 0 and ahead <= 0:
            return


def _vector(fault: _engine.Fault, offset: int, length: int) -> Vector:
    return Vector(Segment(slot, start, count) for slot, start, count in fault.segments(offset, length))


class Server:
    """An NBD server: exports served on listening addresses.

    ``listen``: NBD URIs (port 0 takes a free one), or more of each (`listening.ListenConfig`). ``ready``: sockets that
    somebody has bound already; those at an address of ``listen`` are taken for it, the others served too. ``bounds``:
    what clients may have. ``backend``: "auto", "io_uring" or "threads". ``workers``: engine
    threads, by default one a processor. ``pool``: bytes of the buffer pool. ``roots``: directories that images may
    name files in. ``record``: a directory for the I/O recorder. ``tls``: whether and how connections use TLS.
    ``log`` is given each line of the log.

    Use it as a context manager, or call `start` and `stop`. Raises ConfigError.
    """

    def __init__(
        self,
        *,
        listen: Sequence[str | ListenConfig] = (),
        ready: Sequence[socket.socket] = (),
        bounds: Bounds = DEFAULTS,
        backend: str = "auto",
        workers: int | None = None,
        pool: int = POOL_DEFAULT,
        fault_threads: int = FAULT_THREADS,
        roots: Sequence[str | os.PathLike[str]] = (),
        record: str | os.PathLike[str] | None = None,
        tls: TlsConfig = NO_TLS,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._wanted = [ListenConfig.of(wanted) for wanted in listen]
        self._ready = Ready(ready)
        self._roots = tuple(roots)
        self._log = log if log is not None else _log.info
        self._log_client = Sparing(self._log)
        workers = workers if workers is not None else min(os.cpu_count() or 1, WORKERS_MAX)
        # Every image takes two descriptors, every client one; registered memory is locked memory.
        raise_limit(resource.RLIMIT_NOFILE)
        raise_limit(resource.RLIMIT_MEMLOCK)
        try:
            self._engine = _engine.Engine(
                workers=workers,
                pool=pool,
                backend=backend,
                fault_threads=fault_threads,
                limits=bounds.of_engine(),
                record=os.fspath(record) if record is not None else None,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"the engine cannot start: {error}") from error
        add_region(self)
        self._bounds = bounds
        for wanted in self._wanted:
            wanted.check(tls)
        self._tls, self._tls_context = tls, _tls_context(tls)
        self._fault_threads_count = fault_threads
        self._effects = Effects(self._engine)
        self._graph = Graph()
        self._supplies = Supplies(self._engine)
        self._files = Files(self._supplies.open_file)
        self._lock = threading.Lock()
        self._structure = threading.RLock()
        self._offers: Offers[Export] = Offers()
        #: The exports that take clients, by name. Read only.
        self.exports: Mapping[str, Export] = self._offers.exports
        self._exports = self.exports
        self._by_id: dict[int, Export] = {}
        self._clients: dict[tuple[int, int], Client] = {}
        self._client_numbers = itertools.count(1)
        self._threads: list[threading.Thread] = []
        #: Where exports are made that are asked for.
        self._makers = concurrent.futures.ThreadPoolExecutor(TEMPLATE_THREADS, "nbd-make")
        #: Threads that end exports whose last client has left.
        self._enders: set[threading.Thread] = set()
        #: Those that are accepted on, once started: first those of ``listen``.
        self.listeners: list[Listener] = []
        self._listener_of: dict[int, Listener] = {}
        #: Is called when a client has gone.
        self.on_gone: Callable[[], None] = lambda: None
        #: Is told of exports that have ended after their last client.
        self.on_end: Callable[[Export], None] = lambda export: None
        #: Is told of layers that stand in the place of others, in a drained section of these.
        self.on_replace: Callable[[Layer, Layer], None] = lambda old, new: None
        #: Long work on its exports.
        self.jobs = Jobs()
        self._stopping = threading.Event()
        self._stopped = threading.Event()

    # -- exports -------------------------------------------------------------------------------------------------

    def export(
        self,
        name: str,
        layer: Layer,
        *,
        read_only: bool = False,
        description: str = "",
        default: bool = False,
        tls_required: bool = False,
        access: Rule = ANYBODY,
        discard: bool = True,
        roots: Sequence[str | os.PathLike[str]] | None = None,
        bitmaps: Bitmaps = (),
        allocation_depth: bool = False,
    ) -> Export:
        """Open ``layer`` and everything below it, and export it as ``name`` (and under "", if ``default``).
        ``tls_required``: to clients with TLS alone. ``access``: to whom else alone. ``discard``: see `Export`.
        ``roots``: where images may name files, if not in the server's. ``bitmaps``, ``allocation_depth``: which meta
        contexts to offer (`contexts.Contexts`).

        Raises ImageError, ConfigError; nothing is left open then.
        """
        with self.changing():
            self._offers.check_free(name, default)
            export = self.open(
                name,
                layer,
                read_only=read_only,
                description=description,
                tls_required=tls_required,
                access=access,
                discard=discard,
                roots=roots,
                bitmaps=bitmaps,
                allocation_depth=allocation_depth,
            )
            try:
                self.change(add=[export], default=name if default else KEEP)
            except BaseException:
                self.end(export)
                raise
            return export

    def open(
        self,
        name: str,
        layer: Layer,
        *,
        read_only: bool = False,
        description: str = "",
        tls_required: bool = False,
        access: Rule = ANYBODY,
        discard: bool = True,
        roots: Sequence[str | os.PathLike[str]] | None = None,
        bitmaps: Bitmaps = (),
        allocation_depth: bool = False,
    ) -> Export:
        """An export as `export` makes it that is not offered yet: for `change`, or `end`. Raises as `export` does."""
        with self.changing():
            if self._stopping.is_set():
                raise ConfigError("the server is stopping")
            opener = self._opener(read_only, self._roots if roots is None else roots, _user(name))
            use = self._graph.open(layer, opener, user=_user(name))
            with contextlib.ExitStack() as undo:
                undo.callback(self._graph.close, layer, use)
                read_only = read_only or layer.read_only
                contexts = Contexts(layer, bitmaps, allocation_depth=allocation_depth, read_only=read_only)
                undo.callback(contexts.close)
                info = ExportInfo(
                    name=name,
                    description=description,
                    size=layer.size,
                    read_only=read_only,
                    tls_required=tls_required,
                    access=access,
                    preferred_block=preferred_block(layer),
                    rotational=is_rotational(layer),
                    contexts=contexts.names,
                )
                engine_export = self._engine.new_export(layer.size, read_only)
                export = Export(
                    name,
                    use,
                    info,
                    engine_export,
                    effects=self._effects,
                    graph=self._graph,
                    contexts=contexts,
                    discard=discard,
                )
                undo.pop_all()
            self._by_id[engine_export.id] = export
            return export

    def is_open(self, layer: Layer) -> bool:
        return self._graph.is_open(layer)

    @contextlib.contextmanager
    def opened_layers(
        self,
        layer: Layer,
        *,
        read_only: bool = False,
        roots: Sequence[str | os.PathLike[str]] | None = None,
        grant: Grant = ONLOOKER,
    ) -> Iterator[Layer]:
        """``layer`` and everything below it, open for the time of the block, and longer if it has users by then: for
        `Export.replace_root` and `replace`. ``grant``: what is done with it meanwhile. Raises ImageError,
        ConfigError."""
        with self.changing():
            opener = self._opener(read_only, self._roots if roots is None else roots, ADDED)
            use = self._graph.open(layer, opener, user=ADDED, grant=grant)
            try:
                yield layer
            finally:
                self._graph.close(layer, use)

    def replace(self, old: Layer, new: Layer) -> None:
        """Put ``new``, which is open, in the place of ``old``: under all layers that stand on it, but for those that
        are ``new`` or below it, and as the root of exports. So a layer is put in above another, or taken out again,
        with all who are connected.

        Not from within a request. Raises ConfigError, with nothing changed, if a disk that is written could not be any
        more; TimeoutError when requests will not end; and what closing ``old`` raises, should that be its end.
        """
        with self.drained(old) as exports:
            roots = [export for export in exports if export.root is old]
            for export in exports:
                if new.read_only and not old.read_only and not export.info.read_only:
                    raise ConfigError(f"export {export.name!r} is writable, but {new.type} is not")

            def show() -> None:
                for export in roots:
                    export.show(new)

            self._graph.replace(old, new, [export.use for export in roots], then=show)
            self.on_replace(old, new)
            for export in exports:
                export.renew()

    def redirect(self, parent: Layer, old: Layer, new: Layer) -> None:
        """`replace`, for one parent of ``old``, and nobody else."""
        with self.drained(old) as exports:
            self._graph.replace(old, new, edges=parent)
            for export in exports:
                export.renew()

    def reopen(self, layer: Layer, *, read_only: bool) -> None:
        """Open ``layer``, but not its backing file, for other access: `Graph.reopen`. Not from within a request. Raises
        as that does, and TimeoutError."""
        with self.drained(layer) as exports:
            self._graph.reopen(layer, read_only=read_only)
            for export in exports:
                export.renew()

    def orphan(self, layer: Layer) -> None:
        """Take its backing file away from ``layer``, which shows nothing of it: `Graph.orphan`. As `reopen`."""
        with self.drained(layer) as exports:
            self._graph.orphan(layer, "backing")
            for export in exports:
                export.renew()

    @contextlib.contextmanager
    def claimed(self, layer: Layer, grant: Grant, *, user: str = ADDED) -> Iterator[None]:
        """Use ``layer``, which is open, for the time of the block, in this way, which others must share. Raises
        ConfigError."""
        with self.changing():
            use = self._graph.claim(layer, user=user, grant=grant)
        try:
            yield
        finally:
            with self.changing():
                self._graph.close(layer, use)

    @contextlib.contextmanager
    def hiding(self, layers: Iterable[Layer]) -> Iterator[None]:
        """Have what changes below these layers be of no concern to them for the time of the block
        (`Layer.hides_changes`)."""
        with contextlib.ExitStack() as ending:
            for layer in layers:
                self._graph.hide_changes(layer, hidden=True)
                ending.callback(self._graph.hide_changes, layer, hidden=False)
            yield

    def _opener(self, read_only: bool, roots: Sequence[str | os.PathLike[str]], user: str) -> FileOpener:
        return FileOpener(
            self._graph,
            self._files,
            roots=roots,
            read_only=read_only,
            allocate=self._supplies.allocate,
            meter=self._supplies.meter,
            dirty_bitmap=self._supplies.dirty_bitmap,
            dirty_log=self._supplies.dirty_log,
            user=user,
        )

    def change(
        self,
        *,
        add: Sequence[Export] = (),
        remove: Sequence[Export] = (),
        default: str | Keep | None = KEEP,
        mode: Removal = Removal.DRAIN,
    ) -> None:
        """Offer some exports, and no longer others, in one step for all clients; what has none is ended before this
        returns. ``default``: the name of the default export (None: there is to be none).

        Raises ConfigError, with nothing changed; and, after all has been done, the first error of closing an image.
        """
        idle = self._offers.change(add=add, remove=remove, default=default, if_idle=mode is Removal.SAFE)
        if mode is Removal.HARD:
            self.disconnect_all(remove)
        with contextlib.ExitStack() as ending:
            for export in idle:
                ending.callback(self.end, export)

    def remove(self, name: str, mode: Removal = Removal.SAFE, timeout: float = STOP_TIMEOUT) -> bool:
        """Offer the export no longer; HARD also disconnects the clients of one that is leaving already. Whether it is
        over: with DRAIN it may not be, and with HARD not if running requests take longer than ``timeout``, seconds.
        Raises as `change`, and ConfigError if there is none such."""
        leaving = [export for export in self.leaving if export.name == name and mode is Removal.HARD]
        removed = [self._named(name)] if name in self.exports or not leaving else []
        self.change(remove=removed, mode=mode)
        self.disconnect_all(leaving)
        deadline = time.monotonic() + (timeout if mode is Removal.HARD else 0)
        return all(export.ended.wait(max(0.0, deadline - time.monotonic())) for export in (*removed, *leaving))

    def end(self, export: Export) -> None:
        """Close the layers of an export that takes no clients and has none, once its last requests have ended."""
        try:
            while not export.engine_export.drain_begin(DRAIN_TIMEOUT):
                self._log(f"export {export.name!r} cannot end: its requests have been running for {DRAIN_TIMEOUT} s")
            with self.changing():
                export.close()
        finally:
            try:
                export.after_end()
            finally:
                self._by_id.pop(export.engine_export.id, None)
                self._offers.forget(export)
                export.ended.set()

    def resize(self, name: str, size: int) -> None:
        """Give the export's disk another size, in bytes. Raises ConfigError, RequestError (the layers cannot),
        TimeoutError (requests do not end)."""
        export = self._named(name)
        if not 0 <= size <= DISK_MAX:
            raise ConfigError(f"found a size of {size}, allowed are 0 to {DISK_MAX}")
        if export.info.read_only:
            raise ConfigError(f"export {name!r} is read-only")
        with self.drained(export.root) as exports:
            for other in self.sharing(export):
                if other.root is not export.root:
                    raise ConfigError(f"export {name!r} stands on layers that export {other.name!r} uses too")
            for job in self.jobs.on(layer for _, layer in walk(export.root)):
                raise ConfigError(f"job {job.id!r} works on export {name!r}")
            try:
                export.root.resize(size)
            finally:
                for changed in exports:
                    changed.resized()

    def sharing(self, export: Export) -> list[Export]:
        """The other exports that use a layer which this one writes."""
        written = {layer for _, layer in walk(export.root) if not layer.read_only}
        others = [other for other in self.opened if other is not export and not other.is_ending]
        return [other for other in others if not written.isdisjoint(layer for _, layer in walk(other.root))]

    @contextlib.contextmanager
    def drained(self, layer: Layer, timeout: float = DRAIN_TIMEOUT) -> Iterator[list[Export]]:
        """A drained section of every export and job that reaches ``layer``; gives those exports. Nobody opens or closes
        layers meanwhile. Nests; a job may call it, and is not held itself.

        Not from within a request. Raises TimeoutError when requests will not end.
        """
        with contextlib.ExitStack() as sections:
            sections.enter_context(self.changing())
            exports = [export for export in self.opened if any(found is layer for _, found in walk(export.root))]
            layers = {below for export in exports for _, below in walk(export.root)} | {layer}
            sections.enter_context(self.jobs.held(layers, timeout))
            for export in exports:
                sections.enter_context(export.drained(timeout))
            yield exports

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Be alone among those who open, close or join layers. Nests."""
        with self.jobs.waiting():
            self._structure.acquire()
        try:
            yield
        finally:
            self._structure.release()

    def _named(self, name: str) -> Export:
        export = self.exports.get(name)
        if export is None:
            raise ConfigError(f"there is no export {name!r}")
        return export

    def use_makers(self, makers: Sequence[Maker]) -> None:
        """Have these make exports that are asked for and not there, and no others."""
        self._offers.makers = tuple(makers)

    @property
    def opened(self) -> list[Export]:
        """All that have open layers, offered or not."""
        return list(self._by_id.values())

    @property
    def leaving(self) -> list[Export]:
        """Those that take no clients any more, and are not over."""
        return self._offers.leaving

    @property
    def default(self) -> str | None:
        """The name of the default export."""
        return self._offers.default

    # -- clients -------------------------------------------------------------------------------------------------

    @property
    def clients(self) -> list[Client]:
        """Those that are connected, in the order in which they came."""
        return sorted(self._clients.values(), key=lambda client: client.id)

    def clients_of(self, export: Export) -> list[Client]:
        return self._offers.clients_of(export)

    def disconnect_all(self, exports: Iterable[Export]) -> None:
        """Close the connections of all clients of these exports."""
        for export in exports:
            for client in self._offers.clients_of(export):
                client.connection.disconnect()

    def disconnect(self, id: int) -> None:
        """Close one client's connection. Raises ConfigError if there is none such."""
        for client in self.clients:
            if client.id == id:
                client.connection.disconnect()
                return
        raise ConfigError(f"there is no client {id}")

    # -- listening -----------------------------------------------------------------------------------------------

    @property
    def listening(self) -> list[str]:
        """Actual addresses as NBD URIs, once started."""
        return [str(listener.address) for listener in self.listeners]

    def accept(self, listener: Listener) -> None:
        """Serve those who connect to ``listener``, too. The server is running."""
        while listener.sockets:
            bound = listener.sockets.pop(0)
            keep_alive(bound, self._bounds.keepalive)
            with self._lock:  # the first client may be there at once
                number = self._engine.listen(bound.detach())
                listener.numbers.append(number)
                self._listener_of[number] = listener
        self.listeners.append(listener)

    def refuse(self, listener: Listener) -> None:
        """Accept no more on ``listener``; who is connected stays."""
        self.listeners.remove(listener)
        for number in listener.numbers:
            self._engine.unlisten(number)
        listener.close()

    def connected(self, client: socket.socket) -> None:
        """Serve who is at the other end of a connected socket, too, which is taken over. The server is running."""
        keep_alive(client, self._bounds.keepalive)
        client.setblocking(False)
        self._engine.connected(client.detach())

    def use_bounds(self, bounds: Bounds) -> None:
        """Hold clients to these from now on; ``keepalive`` goes for new listeners."""
        self._bounds = bounds
        self._engine.set_limits(bounds.of_engine())

    def prepared_tls(self, tls: TlsConfig) -> Callable[[], None]:
        """What has new connections use TLS so, with the files as they are now; those that there are go on as they are.
        Raises ConfigError, with nothing changed."""
        context = _tls_context(tls)

        def use() -> None:
            self._tls, self._tls_context = tls, context

        return use

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and serve. Raises ConfigError, with nothing left listening."""
        with contextlib.ExitStack() as undo:
            bound = []
            for wanted in self._wanted:
                bound.append(bind(wanted, self._ready, self._wanted))
                undo.callback(bound[-1].close)
            bound += self._ready.listeners()
            # The threads first: from the first connection on there must be somebody to answer.
            self._spawn("nbd-handshake", self._serve_events)
            for index in range(self._fault_threads_count):
                self._spawn(f"nbd-fault-{index}", self._serve_faults)
            self._engine.start()
            for listener in bound:
                self.accept(listener)
            undo.pop_all()
        refused = self._engine.refused
        self._log(f"backend: {self._engine.backend}" + (f" ({refused})" if refused else ""))
        self._log(f"buffer pool: {self.pool}")

    def _spawn(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def stop(self, timeout: float | None = STOP_TIMEOUT) -> None:
        """Accept no more, finish what was accepted (for ``timeout`` seconds at most), close everything.

        Idempotent. Raises the first error of closing an image, after all have been closed. TimeoutError: a layer's code
        has not come back, and its images are left as they are, because it may be using them. RuntimeError: a worker of
        the engine's has panicked.
        """
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
        try:
            self.jobs.stop()
        except TimeoutError as error:
            self._log(str(error))
        timeout = timeout if timeout is not None else STOP_TIMEOUT
        deadline = time.monotonic() + timeout
        is_orderly = self._engine.stop(timeout)
        deadline = max(deadline, time.monotonic() + THREADS_STOP_TIMEOUT)
        for thread in [*self._threads, *self._enders]:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._makers.shutdown()
        for listener in self.listeners:
            listener.close()
        for client in self.clients:
            self._offers.leave(client)
        self._clients.clear()
        try:
            with self.changing(), contextlib.ExitStack() as closing:
                for export in self._offers.take_all():
                    if export.engine_export.drain_begin(0):
                        closing.callback(self.end, export)
                    else:
                        closing.callback(_leave, export, timeout)
        finally:
            self._stopped.set()
        if not is_orderly:
            raise RuntimeError("a worker of the engine has panicked; what it said is on the standard error output")

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

    @property
    def pool(self) -> Pool:
        """The buffer pool as it is now."""
        pages, huge = self._engine.pool_pages
        _, registered = self._engine.pool_region
        wanted = self._engine.refused is None
        return Pool(self._engine.pool_size, registered if wanted else None, pages, huge, self._engine.unregistered)

    def stats(self) -> dict[str, Any]:
        """Counters: of the engine, and of every export by name (``faults`` are requests that needed a fault thread,
        ``*_calls`` calls into Python, ``hits`` requests that the engine answered alone). Of an export, also ``layers``
        by the roles that lead to them ("/" is the root; `layer.BufferCounters`), and ``files`` by their names
        (``fixed``: reads and writes on registered buffers). Of the ``pool``, in bytes, its size, what is free, what is
        registered and what lies on ``huge`` pages now, and the kind of its ``pages`` (normal, transparent or hugetlb).
        ``turned_away``: clients that were one too many; ``reply_memory``: what counts against the limit of that name.
        ``ring``: the operations that the kernel was given through rings. Of every client, what it has asked for."""
        exports = {name: export.counters() for name, export in list(self.exports.items())}
        return {
            "backend": self._engine.backend,
            "connections": self._engine.connections,
            "turned_away": self._engine.turned_away,
            "reply_memory": self._engine.reply_memory,
            "pool": {**self.pool.counts(), "free": self._engine.pool_free},
            "ring": self._engine.operations(),
            "exports": exports,
            "clients": [client.describe() for client in self.clients],
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
        if event.kind == "open":
            self._opened(event)
            return
        if event.kind == "closed":
            self._closed(event.connection)
            return
        if event.kind == "full":
            self._log_client(event.reason or "")
            return
        client = self._clients.get(event.connection)
        if client is None or client.handshake is None:
            return  # it has begun transmission or ended: nothing more is asked of us
        if event.kind == "option" and event.code in (Option.GO, Option.EXPORT_NAME) and self._offers.makers:
            self._makers.submit(self._answer_alone, event, client, client.handshake)
        else:
            self._answer(event, client, client.handshake)

    def _answer_alone(self, event: _engine.Event, client: Client, handshake: Handshake) -> None:
        """`_answer`, on a thread where it may take its time."""
        try:
            self._answer(event, client, handshake)
        except Exception:
            _log.exception("handshake failed")
            event.end(b"")

    def _answer(self, event: _engine.Event, client: Client, handshake: Handshake) -> None:
        action: Action | None = None
        if event.kind == "insecure":
            self._log_client(f"{handshake.peer}: TLS could not begin: {event.reason}")
            return
        if event.kind == "secured":
            action = self._secured(event, client, handshake)
        elif event.kind == "flags":
            action = handshake.client_flags(event.code)
        elif event.kind == "option":
            action = handshake.option(event.code, event.data)
        else:
            action = handshake.oversized(event.code, event.length)
        if action is None:
            event.next(b"")
        elif isinstance(action, StartTls):
            event.start_tls(action.data, client.tls)
        elif isinstance(action, Begin):
            client.handshake = None
            self._begin(event, action, client)
        elif isinstance(action, End):
            client.handshake = None
            if action.reason:
                self._log_client(action.reason)
            event.end(action.data)
        else:
            event.next(action.data)

    def _opened(self, event: _engine.Event) -> None:
        assert event.client is not None
        client = Client(next(self._client_numbers), event.client, time.time())
        client.who = _who(event.client)
        number = event.client.listener
        with self._lock:
            client.listener = None if number is None else self._listener_of[number]
        wanted = UNLISTENED if client.listener is None else client.listener.wanted
        self._clients[event.connection] = client
        if not wanted.access.admits_origin(client.who):
            self._log_client(f"{event.client.peer} may not connect to {wanted.address}")
            event.end(b"")
            return
        # What the server does about TLS may change meanwhile; not for this connection.
        mode, client.tls = self._tls.mode, self._tls_context
        if wanted.tls is not None and client.tls is not None:
            mode = wanted.tls
        if wanted.access.needs_tls:
            mode = TlsMode.REQUIRED
        client.handshake = Handshake(
            self._export_infos,
            peer=event.client.peer,
            who=client.who,
            enter=functools.partial(self._enter, client),
            stopping=self._stopping.is_set,
            tls=mode,
        )
        event.greet()

    def _secured(self, event: _engine.Event, client: Client, handshake: Handshake) -> Action | None:
        """TLS has begun: whether the client may stay."""
        assert event.secured is not None
        subject, identity, _ = event.secured
        client.who = handshake.secured(subject, identity)
        wanted = UNLISTENED if client.listener is None else client.listener.wanted
        if wanted.access.admits_identity(client.who):
            return None
        return End(b"", f"{handshake.peer} is {subject or identity}, who may not connect to {wanted.address}")

    def _export_infos(self) -> Mapping[str, ExportInfo]:
        return self._offers

    def _enter(self, client: Client, name: str) -> ExportInfo:
        """Make the client one of the export's, which may have to be made. Raises Unavailable."""
        while (maker := self._offers.maker_of(name)) is not None:
            for export in self.leaving:
                if export.name == name and not export.ended.wait(TEMPLATE_TIMEOUT):
                    raise Unavailable(f"the last export {name!r} has not ended yet")
            with self.changing():
                if any(export.name == name for export in self.leaving):
                    continue
                if self._offers.maker_of(name) is maker:
                    return self._make(maker, client, name).info
        return self._offers.enter(client, name).info

    def _make(self, maker: Maker, client: Client, name: str) -> Export:
        export: Export = maker.make(name)
        try:
            self._offers.offer_to(client, export)
        except (Unavailable, ConfigError) as error:
            self.end(export)
            raise Unavailable(str(error)) from error
        return export

    def _begin(self, event: _engine.Event, action: Begin, client: Client) -> None:
        assert isinstance(client.export, Export), "entered before it was answered"
        client.style = action.style.value
        contexts, block_min = list(action.contexts), action.export.minimum_block
        event.begin(action.data, client.export.engine_export, action.style, contexts, action.payload_max, block_min)

    def _closed(self, connection: tuple[int, int]) -> None:
        client = self._clients.pop(connection, None)
        if client is None:
            return
        export = self._offers.leave(client)
        self.on_gone()
        if export is not None:
            thread = threading.Thread(target=self._end_alone, args=(export,), name=f"nbd-end-{export.name}")
            self._enders.add(thread)
            thread.start()

    def _end_alone(self, export: Export) -> None:
        """`end`, with nobody there to be told how it failed."""
        try:
            self.end(export)
        except Exception as error:
            _log.exception("export %r did not end well", export.name)
            self._log(f"export {export.name!r} did not end well: {error}")
        try:
            self.on_end(export)
        finally:
            self._enders.discard(threading.current_thread())

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
