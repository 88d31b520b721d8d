"""The graph: layers joined into a DAG, flattened to extents, and told upwards when mappings change.

    export root ── qcow2 ──file──> raw ──file──> file ── open file
                     └──backing──> qcow2 ── ...

`flatten` is the page walk: from a range of any layer down to open files, ZERO and CODE, in a loop. `execute` runs a
request by it in plain Python: the reference executor, and the slow path of the engine. `Child` is an edge: what a
parent holds in the place of a child, so that every request between layers passes one door.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from nbdserver import blocks, flags
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import (
    CODE,
    NO_LIMITS,
    ZERO,
    BlockLimits,
    DirtyLog,
    Extent,
    Intent,
    Meter,
    OpenFile,
    Special,
    Transform,
    clip,
    lawful,
)
from nbdserver.layer import Layer, Opener, finish
from nbdserver.limits import DEPTH_MAX
from nbdserver.permissions import ONLOOKER, READ, READER, WRITER, WRITING, Grant, Permission, refused, together
from nbdserver.request import Flag, Operation, Request, Vector, check_flag, debug


class Leaf(NamedTuple):
    """The end of a page walk. ``target`` is an open file, ZERO, or CODE; for CODE, ``layer`` is the one to call
    and ``offset`` lies in it.

    ``transform``, ``meters`` and ``logs`` were gathered on the way, top to bottom; ``position`` is where the leaf
    begins in the layer that set the transform, and each log comes with where it begins in the log's layer.
    """

    length: int
    target: OpenFile | Special
    offset: int
    writable: bool
    layer: Layer | None
    transform: Transform | None = None
    position: int = 0
    meters: tuple[Meter, ...] = ()
    logs: tuple[tuple[DirtyLog, int], ...] = ()


INTENTS = {
    Operation.READ: Intent.READ,
    Operation.WRITE: Intent.WRITE,
    Operation.ZERO: Intent.ZERO,
    Operation.TRIM: Intent.ZERO,
}


@dataclass(slots=True)
class _Level:
    """One layer of a page walk under way."""

    owner: Layer
    extents: Iterator[Extent]
    here: int
    writable: bool
    meters: tuple[Meter, ...] = ()
    #: The dirty logs of this layer and those above, and how far ahead of its offsets those of their layers are.
    logs: tuple[tuple[DirtyLog, int], ...] = ()
    #: The transform set above, by which layer, and where in that the walk is.
    transform: Transform | None = None
    top: Layer | None = None
    lifted: int = 0


def flatten(layer: Layer, offset: int, length: int, intent: Intent, *, transforms: bool = True) -> Iterator[Leaf]:
    """Walk ``length`` bytes from ``offset`` of ``layer`` down to leaves; goes on past ``length`` as far as the
    layers' own answers do, but only within what was asked of every child.

    Writability is the conjunction along the path. What lies under a transform and is not in a file is CODE of the layer
    that set it (zeroes, too, are data there), and so is a second transform, and whatever is to be zeroed; without
    ``transforms``, everything under one. Raises ImageError when the walk is deeper than DEPTH_MAX, and
    ExtentLawError for a layer that breaks the law.
    """
    # An explicit stack of generators, so that a chain of a thousand images needs no recursion.
    stack = [_Level(layer, _answers(layer, offset, length, intent), offset, True, logs=_own_log(layer))]
    while stack:
        level = stack[-1]
        extent = next(level.extents, None)
        if extent is None:
            stack.pop()
            continue
        here, lifted = level.here, level.lifted
        level.here += extent.length
        level.lifted += extent.length
        transform, top, meters = level.transform, level.top, level.meters
        mapped = extent.target is not CODE and (extent.target is not ZERO or top is None)
        through = extent.through
        if isinstance(through, Transform):
            mapped = mapped and transforms and top is None and intent is not Intent.ZERO
            if top is None:
                transform, top, lifted = through, level.owner, here
        elif through is not None:
            meters = (*meters, through)
        marks = tuple([(log, here + ahead) for log, ahead in level.logs]) if level.logs else ()
        target = extent.target
        if not mapped:
            code, at = (level.owner, here) if top is None else (top, lifted)
            yield Leaf(extent.length, CODE, at, False, code, meters=meters, logs=marks)
        elif isinstance(target, Layer):
            if len(stack) >= DEPTH_MAX:
                raise ImageError(f"layers nest deeper than {DEPTH_MAX}", path=layer.filename)
            child = target.layer if isinstance(target, Child) else target
            file = child.whole
            if file is not None and extent.offset + extent.length <= file.size:  # else the law is broken: see there
                writable = level.writable and extent.writable and not file.read_only
                position = lifted if transform is not None else 0
                yield Leaf(extent.length, file, extent.offset, writable, None, transform, position, meters, marks)
                continue
            below = clip(_answers(child, extent.offset, extent.length, intent), extent.length)
            writable = level.writable and extent.writable
            logs = (*((log, at - extent.offset) for log, at in marks), *_own_log(child))
            stack.append(_Level(child, below, extent.offset, writable, meters, logs, transform, top, lifted))
        elif target is ZERO:
            yield Leaf(extent.length, ZERO, 0, False, None, meters=meters, logs=marks)
        else:
            assert not isinstance(target, Special)
            writable = level.writable and extent.writable
            position = lifted if transform is not None else 0
            yield Leaf(extent.length, target, extent.offset, writable, None, transform, position, meters, marks)


def _answers(layer: Layer, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
    return lawful(layer.resolve(offset, length, intent), offset, length, layer.size, layer.type)


def _own_log(layer: Layer) -> tuple[tuple[DirtyLog, int], ...]:
    return ((layer.dirty_log, 0),) if layer.dirty_log is not None else ()


def execute(layer: Layer, request: Request) -> None:
    """Run one request on ``layer``, in plain Python, on this thread.

    What maps is done at its place, what is CODE by the layer that said so. A place is used as hazard pointers
    are: resolve, announce the use, see that the mapping has not changed meanwhile, and only then touch it; so a
    layer that has called ``changed`` and then waits with ``wait_unused`` waits for us, or we have resolved again. A
    range of a layer below that is CODE there is a place, too (`Layer.code_uses`).

    Raises RequestError, OSError, ImageError.
    """
    _arrive(layer, request, "enters the range")
    if request.end > layer.size:
        raise RequestError(
            errno.ENOSPC if request.operation in (Operation.WRITE, Operation.ZERO) else errno.EINVAL,
            f"{request.operation.value} of {request.length} bytes at {request.offset:#x} passes the end, "
            f"{layer.size:#x}, of {layer.type}",
        )
    if request.operation is not Operation.READ and layer.read_only:
        raise RequestError(errno.EPERM, f"{layer.type} is read-only")
    demands = flags.demanded(layer, request)
    is_fua = flags.is_fua(request)
    by_others = False  # whether any of it is done otherwise than by the layer's own code
    done = 0
    if request.length and not demands and (file := layer.whole) is not None:
        leaf = Leaf(request.length, file, request.offset, not file.read_only, None)
        while not _run(layer, leaf, request, layer.changes):
            pass
        done, by_others = request.length, True
    roomed = -1  # where room has been made: once for each place, lest it never ends
    while done < request.length:
        seen = layer.changes
        at, left = request.offset + done, request.length - done
        leaves = flatten(layer, at, left, INTENTS[request.operation], transforms=False)
        for leaf in _by_code(layer, at, left) if demands else leaves:
            part = request.slice(done, min(leaf.length, request.length - done))
            if leaf.layer is not None and request.operation is Operation.WRITE and not demands and roomed < done:
                roomed = done
                if leaf.layer.make_room(leaf.offset, part.length) is not None:
                    break
            if not _run(layer, leaf, part, seen):
                break
            by_others = by_others or leaf.layer is not layer
            done += part.length
            if done == request.length:
                break
    if is_fua and (by_others or Flag.FUA not in layer.supported_write_flags):
        finish(layer.flush())


def _by_code(layer: Layer, offset: int, length: int) -> Iterator[Leaf]:
    """The range as CODE, wherever it lives: for what only the layer's own code can honour."""
    yield Leaf(length, CODE, offset, False, layer, logs=tuple((log, offset) for log, _ in _own_log(layer)))


def execute_leaf(layer: Layer, leaf: Leaf, request: Request, seen: int) -> bool:
    """`execute`, for a request without flags within what ``layer`` called CODE when ``layer.changes`` was ``seen``:
    ``leaf``. Whether it has been done: it is not if what was found is stale."""
    _arrive(layer, request, "enters the range")
    return _run(layer, leaf, request, seen)


def _run(layer: Layer, leaf: Leaf, part: Request, seen: int) -> bool:
    """Do one leaf's part; False, with nothing done, if the mapping may have changed since ``seen``."""
    operation = part.operation
    for meter in leaf.meters:
        meter.charge(part.length, operation is not Operation.READ)
    if leaf.target is CODE:
        assert leaf.layer is not None
        if leaf.layer is layer:
            _run_code(layer, leaf, part)
            return True
        with leaf.layer.code_uses.use(leaf.offset, part.length):
            if layer.changes != seen:
                return False
            _arrive(leaf.layer, part, "is passed to its code")
            _run_code(leaf.layer, leaf, part)
        return True
    if leaf.target is ZERO:
        if layer.changes != seen:
            return False
        with _marked(leaf, part):
            if operation is Operation.READ:
                part.vector.zero()
            else:
                assert operation is not Operation.WRITE, "resolve(WRITE) answered ZERO"
        return True
    file = leaf.target
    assert not isinstance(file, Special)
    with file.use(leaf.offset, part.length):
        if layer.changes != seen:
            return False
        if part.vector.registered:
            layer.buffer_counters.passed(part.vector)
        assert leaf.writable or operation is not Operation.WRITE, "resolve(WRITE) answered a place that is not writable"
        with _marked(leaf, part):
            moved = part.moved(leaf.offset)
            for piece in (moved,) if file.limits is NO_LIMITS else blocks.parts(moved, file.limits):
                _run_on_file(file, piece)
    return True


def _run_code(code: Layer, leaf: Leaf, part: Request) -> None:
    """Have a layer's code do the part of a leaf that is CODE."""
    passed = flags.passed(code, part.moved(leaf.offset))
    with _marked(leaf, part):
        blocks.carry_out(passed, code, lambda request: _call(code, request))


def _run_on_file(file: OpenFile, request: Request) -> None:
    match request.operation:
        case Operation.READ:
            file.read(request.offset, request.vector)
        case Operation.WRITE:
            file.write(request.offset, request.vector)
        case Operation.ZERO:
            asked = request.asked_flags
            may_unmap, no_fallback = Flag.MAY_UNMAP in asked, Flag.NO_FALLBACK in asked
            file.zero(request.offset, request.length, may_unmap=may_unmap, no_fallback=no_fallback)
        case Operation.TRIM:
            file.discard(request.offset, request.length)


_UNMARKED: Final = contextlib.nullcontext()


def _marked(leaf: Leaf, part: Request) -> contextlib.AbstractContextManager[None]:
    """See `_marking`."""
    return _marking(leaf, part) if leaf.logs else _UNMARKED


@contextlib.contextmanager
def _marking(leaf: Leaf, part: Request) -> Iterator[None]:
    """Mark a leaf's part in the dirty logs when the block has ended, however it has: it may have been done in part.

    What leaves the content as it is (a copy on read) is no change.
    """
    try:
        yield
    finally:
        if part.operation is not Operation.READ and Flag.WRITE_UNCHANGED not in part.asked_flags:
            for log, position in leaf.logs:
                log.mark(position, part.length)


class _Hop(threading.local):
    """Which layer's code this thread runs, if it was called with registered memory: for the counters."""

    layer: Layer | None = None


_hop = _Hop()


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """For a layer's own metadata, which is no client's request."""
    hop, _hop.layer = _hop.layer, None
    try:
        yield
    finally:
        _hop.layer = hop


def _arrive(layer: Layer, request: Request, how: str) -> None:
    """Count a request that comes to a layer."""
    if debug.flags:
        check_flag(
            request.vector, f"{request.operation.value} of {request.length} bytes that {how}, of {type(layer).__name__}"
        )
    if request.vector.length:
        layer.buffer_counters.arrived(request.vector)


def _call(layer: Layer, request: Request) -> None:
    """Call a layer's code. Where that turns out to have no way to zero, zeroes are written out through it."""
    before = _hop.layer
    _hop.layer = layer if request.vector.registered else None
    try:
        finish(getattr(layer, request.operation.value)(request))
    except RequestError as error:
        if not (error.errno == errno.ENOTSUP and flags.has_fallback(request)):
            raise
        finish(Layer.zero(layer, request))
    finally:
        _hop.layer = before


@dataclass(eq=False, slots=True)
class Use:
    """One user of a layer, and what it does: a ``parent`` in the graph, or somebody outside."""

    layer: Layer
    grant: Grant
    #: Who it is; or what the layer is to the parent, its role.
    name: str
    parent: Layer | None = None
    #: Whether the layer is a child of the parent's yet.
    is_attached: bool = False


class Child(Layer):
    """An edge: ``layer`` as its parent sees it. Requests to a child pass here and only here."""

    def __init__(self, parent: Layer, role: str, layer: Layer) -> None:
        super().__init__()
        self._parent, self.role, self._layer = parent, role, layer
        #: What the parent may do, in the books of the graph.
        self.use = Use(layer, WRITER, role, parent, is_attached=True)

    @property
    def layer(self) -> Layer:
        """The layer at the far end."""
        return self._layer

    @property
    def size(self) -> int:
        return self._layer.size

    @property
    def read_only(self) -> bool:
        return self._layer.read_only

    @property
    def stored(self) -> int | None:
        return self._layer.stored

    @property
    def writethrough(self) -> bool:
        return self._layer.writethrough

    @property
    def in_place(self) -> bool:
        return self._layer.in_place

    @property
    def limits(self) -> BlockLimits:
        return self._layer.limits

    @property
    def filename(self) -> str | None:
        return self._layer.filename

    def children(self) -> Iterator[tuple[str, Layer]]:
        return self._layer.children()

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        return self._layer.resolve(offset, length, intent)

    def read(self, request: Request) -> None:
        if debug.permissions:
            self._check_permission(request)
        hop, _hop.layer = _hop.layer, None
        if hop is not None and request.vector.length:
            hop.buffer_counters.passed(request.vector)
        try:
            execute(self._layer, request)
        finally:
            _hop.layer = hop

    write = zero = trim = read

    def _check_permission(self, request: Request) -> None:
        """That the parent may do this. (Reading is open to all: what it needs permission for is to rely on it.)"""
        is_unchanged = Flag.WRITE_UNCHANGED in request.asked_flags
        needed = WRITING if is_unchanged else Permission.WRITE
        if request.operation is not Operation.READ and not needed & self.use.grant.used:
            raise AssertionError(f"{self._parent.type} has {self.use.grant} of its {self.role}: {request}")

    def pread(self, offset: int, length: int) -> bytes:
        with _uncounted():
            return super().pread(offset, length)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview, flags: Flag = Flag.NONE) -> None:
        with _uncounted():
            super().pwrite(offset, data, flags)

    def flush(self) -> None:
        finish(self._layer.flush())

    def resize(self, size: int) -> None:
        self._layer.resize(size)

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self._layer.status(context, offset, length)

    def wait_unused(self, offset: int, length: int) -> None:
        self._layer.wait_unused(offset, length)

    def allocate(self, length: int) -> Vector:
        return self._layer.allocate(length)


class ExcludedError(ConfigError):
    """Two users of ``layer`` exclude each other: one does what the other does not share."""

    def __init__(self, message: str, layer: Layer) -> None:
        super().__init__(message)
        self.layer = layer


class Graph:
    """All the layers of a server: a DAG whose roots are exports. Layers may be shared by several parents.

    Thread-safe. ``changed`` runs on whatever thread changed a mapping and never waits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._edges: dict[Layer, list[Child]] = {}  # layer -> the edges that lead to it
        self._uses: dict[Layer, list[Use]] = {}  # who holds it open
        self._sinks: dict[Layer, list[Callable[[int, int], None]]] = {}
        #: Those that have children, which may be in use already, and cannot answer yet.
        self._opening: set[Layer] = set()

    def open(
        self, layer: Layer, opener: Opener, *, user: str = "", grant: Grant | None = None, parent: Layer | None = None
    ) -> Use:
        """Open ``layer`` and everything below it, children first; counts one user of it, and says which.

        ``user`` says who that is, in errors; ``grant`` what it does, by default what the client of an export does. If
        that is to be its ``parent``, ``user`` is the role in which it will `attach` it. A layer that is open already
        only gains a user. On failure all that was opened here is closed again. Raises ImageError; and ConfigError, also
        if others do what this user does not let them do, or the other way round.
        """
        use = Use(layer, grant or (READER if opener.read_only else WRITER), user, parent)
        if self._enter(use):
            return use
        layer._listener, layer._opener = self, opener
        layer.is_open_for_writing = not opener.read_only
        with self._lock:
            self._opening.add(layer)
        try:
            for role, child in list(layer.children()):
                below = _granted(layer, role)
                is_written = below.writes or not (opener.read_only or _is_never_written(layer, role))
                self.open(child, opener.for_access(read_only=not is_written), user=role, grant=below, parent=layer)
                self.attach(layer, role, child)
            layer.open(opener)
        except BaseException:
            with self._lock:
                del self._uses[layer]
            self._end(layer)
            raise
        finally:
            with self._lock:
                self._opening.remove(layer)
        self._withdraw(use)
        return use

    def is_open(self, layer: Layer) -> bool:
        with self._lock:
            return layer in self._uses

    def share(self, layer: Layer, *, user: str, grant: Grant, parent: Layer) -> bool:
        """Count one more user of ``layer`` if it is open; whether it is. As `open`."""
        with self._lock:
            if layer not in self._uses:
                return False
        return self._enter(Use(layer, grant, user, parent))

    def attach(self, parent: Layer, role: str, child: Layer) -> None:
        """Make ``child``, which is open, a child of ``parent``: for children that a layer finds as it opens."""
        edge = Child(parent, role, child)
        with self._lock:
            waiting = (use for use in reversed(self._uses[child]) if use.parent is parent and not use.is_attached)
            edge.use = next(waiting)
            edge.use.name, edge.use.is_attached = role, True
            self._edges.setdefault(child, []).append(edge)
        _set_role(parent, role, edge)

    def replace(
        self,
        old: Layer,
        new: Layer,
        users: Collection[Use] = (),
        *,
        edges: bool | Layer = True,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Have users of ``old`` use ``new``, both of which are open: ``users`` from outside, and all whose child
        ``old`` is, but for those that are ``new`` or below it (``edges``: none of these; or one parent alone). So a
        layer is put in above another (``new`` stands on ``old``), or taken out again.

        In a drained section of all that reach either. ``then`` is called when it is so, before ``old`` is closed if it
        has no user left. Raises ExcludedError, with nothing changed; and what closing raises.
        """
        below = {layer for _, layer in walk(new)}
        with self._lock:
            moved = [edge for edge in self._edges.get(old, ()) if edges and edge._parent not in below]
            if isinstance(edges, Layer):
                moved = [edge for edge in moved if edge._parent is edges]
            self._move([*users, *(edge.use for edge in moved)], old, new)
            for edge in moved:
                self._edges[old].remove(edge)
                self._edges.setdefault(new, []).append(edge)
                edge._layer = new
            is_unused = not self._uses[old]
            if is_unused:
                del self._uses[old]
        for edge in moved:
            self.changed(edge._parent, 0, edge._parent.size)
        then()
        if is_unused:
            self._end(old)

    def _move(self, uses: Sequence[Use], old: Layer, new: Layer) -> None:
        """Make uses of ``old`` such of ``new``. Raises ExcludedError, with nothing changed. Locked."""
        for use in uses:
            self._uses[old].remove(use)
            self._uses[new].append(use)
            use.layer = new
        try:
            self._regrant(old)  # first: what it does below for nobody is in nobody's way
            self._regrant(new)
        except ExcludedError:
            for use in uses:
                self._uses[new].remove(use)
                self._uses[old].append(use)
                use.layer = old
            self._regrant(new)
            self._regrant(old)
            raise

    def claim(self, layer: Layer, *, user: str, grant: Grant) -> Use:
        """Count one more user of ``layer``, which is open; read-only it may be yet. Raises ExcludedError."""
        use = Use(layer, grant, user)
        with self._lock:
            self._count(use)
        return use

    def hide_changes(self, layer: Layer, *, hidden: bool) -> None:
        """Say whether what changes in the layer's backing file is of no concern to it (`Layer.hides_changes`). Raises
        ExcludedError, with nothing changed."""
        with self._lock:
            before, layer.hides_changes = layer.hides_changes, hidden
            if layer not in self._uses:
                return  # it has been closed
            try:
                self._regrant(layer)
            except ExcludedError:
                layer.hides_changes = before
                self._regrant(layer)
                raise

    # -- opening anew ------------------------------------------------------------------------------------------------

    def reopen(self, layer: Layer, *, read_only: bool) -> None:
        """Open ``layer``, and what its own bytes are in, for other access: to be written, or not to be any more (but
        for what others write).

        In a drained section of all that reach it. Raises ConfigError, ImageError, RequestError, OSError, with all as it
        was; unless what was open cannot be opened again, which raises, too.
        """
        finish(layer.flush())
        nodes = [node for node in _own(layer) if node.is_open_for_writing == read_only]
        if read_only:
            self._close_for_writing(layer, nodes)
        else:
            self._open_for_writing(nodes)
        for node in {layer, *nodes}:
            self.changed(node, 0, node.size)

    def orphan(self, layer: Layer, role: str) -> None:
        """Take a child away from ``layer``, which has no use for it any more. As `reopen`."""
        finish(layer.flush())
        edge = getattr(layer, role)
        assert isinstance(edge, Child) and layer._opener is not None
        setattr(layer, role, False)
        try:
            self._open_anew([layer], read_only=layer._opener.read_only)
        except BaseException:
            setattr(layer, role, edge)
            self._open_anew([layer], read_only=layer._opener.read_only)
            raise
        self.changed(layer, 0, layer.size)
        self._part(edge)

    def _open_for_writing(self, nodes: Sequence[Layer]) -> None:
        """Reopen the nodes, parents first, to be written: what others stand on is before these."""
        with self._lock:
            self._turn(nodes, to_write=True)
        try:
            self._open_anew(nodes[::-1], read_only=False)
        except BaseException:
            with self._lock:
                self._turn(nodes, to_write=False)
            raise

    def _close_for_writing(self, layer: Layer, nodes: Sequence[Layer]) -> None:
        """Reopen the nodes, of which ``layer`` is on top, not to be written any more, but for those that others write.
        Each may write to those below it until it has been reopened."""
        done: list[Layer] = []
        try:
            for node in nodes:
                if node is layer or not node.grant.writes:
                    self._open_anew([node], read_only=True)
                    done.append(node)
                    with self._lock:
                        self._turn([node], to_write=False)
        except BaseException:
            with self._lock:
                self._turn(done, to_write=True)
            self._open_anew(done[::-1], read_only=False)
            raise

    def _turn(self, nodes: Sequence[Layer], *, to_write: bool) -> None:
        """Grant the nodes, parents first, what it takes to be open so. Raises ExcludedError, with nothing changed.
        Locked."""
        for node in nodes:
            node.is_open_for_writing = to_write
        try:
            for node in nodes:
                self._regrant(node)
        except ExcludedError:
            for node in nodes:
                node.is_open_for_writing = not to_write
            for node in nodes:
                self._regrant(node)
            raise

    def _open_anew(self, nodes: Sequence[Layer], *, read_only: bool) -> None:
        """Reopen the nodes in this order. What fails is undone."""
        done: list[tuple[Layer, Opener]] = []
        try:
            for node in nodes:
                assert node._opener is not None, "not open"
                done.append((node, node._opener))
                _reopen(node, node._opener.for_access(read_only=read_only))
        except BaseException as error:
            if isinstance(error, ConfigError):
                done.pop()  # it has changed nothing
            for node, opener in reversed(done):
                _reopen(node, opener)
            raise

    def _part(self, edge: Child) -> None:
        with self._lock:
            self._edges[edge.layer].remove(edge)
        self._leave(edge.use)

    def close(self, layer: Layer, use: Use | None = None) -> None:
        """Let one user of ``layer`` go, ``use`` or the last that came and is no parent; at the last, close it and then
        its children. Raises what closing raises, after everything below has been closed too."""
        use = use or self._outside(layer)
        if use is not None:
            self._leave(use)

    def hold(self, layer: Layer) -> None:
        """Have the last user that came from outside keep ``layer`` open and do no more: others may write it now."""
        use = self._outside(layer)
        if use is not None:
            with self._lock:
                use.grant = ONLOOKER
                self._regrant(layer)

    def _outside(self, layer: Layer) -> Use | None:
        """The last use of the layer that is no parent's."""
        with self._lock:
            return next((use for use in reversed(self._uses.get(layer, ())) if not use.is_attached), None)

    def _leave(self, use: Use) -> None:
        layer = use.layer
        with self._lock:
            uses = self._uses[layer]
            uses.remove(use)
            if uses:
                if not any(other.grant == use.grant for other in uses):
                    self._regrant(layer)
                return
            del self._uses[layer]
        self._end(layer)

    def _end(self, layer: Layer) -> None:
        with contextlib.ExitStack() as ending:
            for _, edge in layer.children():
                if isinstance(edge, Child):
                    ending.callback(self._part, edge)
            layer.close()
        # Whoever keeps the layer does not keep what it was opened with.
        layer._listener = layer._opener = None
        with self._lock:
            self._edges.pop(layer, None)
            self._sinks.pop(layer, None)

    # -- permissions -------------------------------------------------------------------------------------------------

    def _enter(self, use: Use) -> bool:
        """Count a user in; whether the layer was open. Raises ConfigError, with nothing changed."""
        layer = use.layer
        is_read_only = self.is_open(layer) and layer.read_only  # asked with no lock held: a layer may have one
        with self._lock:
            is_open = layer in self._uses
            if is_read_only:
                self._check([*self._uses[layer], use])
                use.grant = use.grant._replace(used=use.grant.used & READ)
            self._count(use)
        return is_open

    def _count(self, use: Use) -> None:
        """Count a user in. Raises ExcludedError, with nothing changed. Locked."""
        layer = use.layer
        self._uses.setdefault(layer, []).append(use)
        try:
            self._regrant(layer)
        except ExcludedError:
            self._uses[layer].remove(use)
            if self._uses[layer]:
                self._regrant(layer)
            else:
                del self._uses[layer]
            raise

    def _withdraw(self, use: Use) -> None:
        """What turns out to be read-only when it is open is not written."""
        if use.layer.read_only and use.parent is None:
            with self._lock:
                use.grant = use.grant._replace(used=use.grant.used & READ)
                self._regrant(use.layer)

    def _regrant(self, layer: Layer) -> None:
        """Grant the layer, and all below it, what their users have come to. Raises ExcludedError if they exclude one
        another, with some of it granted: to be called once more without the user who is to blame. Locked."""
        pending = [layer]
        while pending:
            node = pending.pop()
            uses = self._uses[node]
            # Of the many users that a golden image may have, most do the same.
            node.grant = together({use.grant for use in uses})
            if node.grant.used & ~node.grant.shared:
                self._check(uses)
            for role, child in node.children():
                grant = _granted(node, role)
                if isinstance(child, Child) and child.use.grant != grant:
                    child.use.grant = grant
                    pending.append(child.layer)

    def _check(self, uses: Sequence[Use]) -> None:
        """Raise ExcludedError if two users exclude each other; who came last is to blame."""
        # A golden image may have thousands of users who do the same: two of them tell what all would.
        alike: dict[Grant, list[Use]] = {}
        for use in reversed(uses):
            same = alike.setdefault(use.grant, [])
            if len(same) < 2:
                same.append(use)
        for one, other in itertools.permutations(itertools.chain(*alike.values()), 2):
            permission = refused(one.grant, other.grant)
            if permission:
                node = one.layer.filename or one.layer.type
                message = f"{self._who(one)} {permission.verb} {node}, which {self._who(other)} does not allow"
                raise ExcludedError(message, one.layer)

    def _who(self, use: Use) -> str:
        """A user in words: who is at the top, and what the layer is to its parent, if it has one."""
        top = use
        while top.parent is not None:
            uses = self._uses[top.parent]
            top = next((use for use in uses if use.grant.used), uses[0])
        who = top.name or "somebody"
        if use.parent is None:
            return who
        own = use.parent.filename
        role = use.name.replace("_.", ".").replace("_", "-")
        return f"{who} ({role} of {use.parent.type}{f' {own}' if own not in (None, use.layer.filename) else ''})"

    def subscribe(self, root: Layer, sink: Callable[[int, int], None]) -> Callable[[], None]:
        """Have ``sink(offset, length)`` called for every change of ``root``'s mapping; returns the way to stop."""
        with self._lock:
            self._sinks.setdefault(root, []).append(sink)

        def stop() -> None:
            with self._lock:
                if sink in self._sinks.get(root, []):
                    self._sinks[root].remove(sink)

        return stop

    def changed(self, layer: Layer, offset: int, length: int) -> None:
        """Number the change in ``layer`` and everything above it, and drop it from the caches of the roots."""
        pending = [(layer, offset, length)]
        while pending:
            node, start, count = pending.pop()
            with self._lock:
                node.changes += 1
                sinks = tuple(self._sinks.get(node, ()))
                # Who is about to open has asked for nothing yet that could have changed.
                edges = tuple(edge for edge in self._edges.get(node, ()) if edge._parent not in self._opening)
            for sink in sinks:
                sink(start, count)
            for edge in edges:
                parent = edge._parent
                pending.extend((parent, at, run) for at, run in parent.translate(edge, start, count))


def _granted(parent: Layer, role: str) -> Grant:
    """What a parent does to a child, and lets others do. Who does nothing for nobody is in nobody's way: a layer that
    is about to be put in, or has been taken out."""
    grant = parent.child_grant(role, parent.grant)
    return ONLOOKER if parent.grant == ONLOOKER and not grant.used else grant


def _own(layer: Layer) -> Iterator[Layer]:
    """The layer and those that its own bytes are in, so not its backing files: parents first."""
    pending, seen = [layer], set[Layer]()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending.extend(bare(child) for role, child in node.children() if role != "backing")


def _reopen(layer: Layer, opener: Opener) -> None:
    layer.reopen(opener)
    layer._opener = opener


def _is_never_written(parent: Layer, role: str) -> bool:
    """Whether a child cannot be written while it is one, by this parent or by others: a backing file."""
    grant = parent.child_grant(role, WRITER)
    return not grant.writes and Permission.WRITE not in grant.shared


def walk(root: Layer) -> Iterator[tuple[str, Layer]]:
    """Every layer under ``root``, once, with the roles that lead to it: "/", "/backing", "/backing/file"."""
    seen: set[Layer] = set()
    pending = [("", root)]
    while pending:
        path, layer = pending.pop()
        if layer in seen:
            continue
        seen.add(layer)
        yield path or "/", layer
        for role, child in layer.children():
            pending.append((f"{path}/{role}", child.layer if isinstance(child, Child) else child))


def attach(parent: Layer, role: str, child: Layer) -> None:
    """`Graph.attach` in the graph that ``parent`` is being opened in. For use in ``Layer.open``."""
    graph = parent._listener
    assert isinstance(graph, Graph), "attach is for layers that a graph is opening"
    graph.attach(parent, role, child)


def open_child(parent: Layer, role: str, child: Layer, opener: Opener) -> None:
    """Open ``child`` and make it a child of ``parent``: for layers that a layer makes as it opens. Raises ImageError,
    ConfigError."""
    graph = parent._listener
    assert isinstance(graph, Graph), "open_child is for layers that a graph is opening"
    graph.open(child, opener, user=role, grant=_granted(parent, role), parent=parent)
    graph.attach(parent, role, child)


def bare(layer: Layer) -> Layer:
    """The layer itself, if ``layer`` is an edge to it: to have it as a child of another layer, too."""
    return layer.layer if isinstance(layer, Child) else layer


def reach(layer: Layer) -> Layer:
    """``layer``, which is open, as something that requests can be made of: for code that is no parent of it."""
    return layer if isinstance(layer, Child) else Child(layer, "file", layer)


def _set_role(parent: Layer, role: str, edge: Child) -> None:
    name, _, index = role.partition(".")
    if index:
        getattr(parent, name)[int(index)] = edge
    else:
        setattr(parent, name, edge)
