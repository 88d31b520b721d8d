"""THE CONTRACT: what a layer is.

A layer is one node of an export's stack: a format, a filter or a source. It says *where* its bytes live
(`Layer.resolve`); only where nothing but its own code can produce or take the bytes does it answer CODE, and is
then called (`Layer.read`, `Layer.write`, ...) for exactly such ranges.

    mapping layer   overrides ``resolve``; ``read``/``write``/``zero``/``trim`` only for what it answers CODE
    data layer      overrides ``read`` and ``write``; inherits a ``resolve`` that says CODE throughout

A layer answers **only for itself**: it aims at a child's range and the graph goes on from there. It knows its
children by role (``self.file``, ``self.backing``), which the graph has replaced by edges (`nbdserver.graph.Child`)
through which every request to a child goes; it never knows its parents, the server, sockets, or a path.

Threads: any method may be called from several threads at once, and may block. `Layer.changed` only drops and
numbers, never waits, and so may be called under a layer's lock; `wait_unused` is called with no lock held.

Subclasses are written ``@dataclass(eq=False)``: a layer is itself, not its settings.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import ClassVar, NamedTuple, ParamSpec, Protocol

from nbdserver import permissions
from nbdserver.errors import ImageError, RequestError
from nbdserver.extent import (
    CODE,
    FILE_MODE,
    NO_LIMITS,
    BlockLimits,
    DirtyBitmap,
    DirtyLog,
    Extent,
    FileMode,
    Intent,
    Meter,
    MeterLimits,
    OpenFile,
    Packed,
    Special,
)
from nbdserver.limits import ZERO_PIECE
from nbdserver.permissions import Grant
from nbdserver.ranges import RangeLock, Uses
from nbdserver.request import Flag, Request, Vector

Parameters = ParamSpec("Parameters")

#: The meta context that every layer answers. Its flags: proto.md, "base:allocation metadata context".
BASE_ALLOCATION = "base:allocation"
STATE_HOLE = 1
STATE_ZERO = 2

#: QEMU's meta context (docs/interop/nbd.txt, "qemu:allocation-depth"): which image of a chain holds a range, from 1
#: for the topmost; 0: none does.
ALLOCATION_DEPTH = "qemu:allocation-depth"

#: The beginning of the names of QEMU's other meta contexts, one a dirty bitmap (ibid., "qemu:dirty-bitmap"), and their
#: flag.
DIRTY_BITMAP = "qemu:dirty-bitmap:"
STATE_DIRTY = 1


class Buffers(NamedTuple):
    """What a layer's code, called for CODE, does with a request's memory, and so with REGISTERED_BUF: for people.

    Each begins with one of these words, and a colon and the reason may follow::

        keeps      the request's own memory is filled, or passed on
        bounces    other memory takes its place or stands beside it, from `Layer.allocate`: registered while the pool
                   has room
        loses      ordinary memory takes its place
        none       no memory is involved, or the code is never called

    Nothing depends on it: the flag is derived at every hop. The test suite holds layers to what they say.
    """

    read: str = "keeps"
    write: str = "keeps"
    zero: str = "bounces: zeroes are written out from pool memory"


class BufferCounters:
    """What became of REGISTERED_BUF at one layer: of requests with memory that ran in Python. (What the engine serves
    alone meets no layer; its files count that.) Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._registered = self._kept = self._bounced = 0
        self._lost: dict[str, int] = {}

    def arrived(self, vector: Vector) -> None:
        """A request with this memory has come to the layer."""
        with self._lock:
            self._requests += 1
            self._registered += vector.registered

    def passed(self, vector: Vector) -> None:
        """The layer, or the graph for it, has passed on this memory for a request that had arrived registered."""
        kind = vector.unregistered
        with self._lock:
            if kind is None:
                self._kept += 1
            else:
                self._lost[kind] = self._lost.get(kind, 0) + 1

    def bounced(self, length: int) -> None:
        """The layer has taken so many bytes of memory, to stand for a request's or beside it."""
        with self._lock:
            self._bounced += length

    def counts(self) -> dict[str, int | dict[str, int]]:
        """``requests``; of these ``registered`` ones; of what was passed on for those, ``kept`` and, by the kind of the
        memory that had taken its place, ``lost``. ``bounce_bytes``: memory that the layer took of its own accord."""
        with self._lock:
            counts: dict[str, int | dict[str, int]] = {"requests": self._requests, "registered": self._registered}
            return counts | {"kept": self._kept, "lost": dict(self._lost), "bounce_bytes": self._bounced}


class Opener(Protocol):
    """What a layer may ask for while it is opened: the only way from a layer to the outside."""

    @property
    def read_only(self) -> bool:
        """Whether the layer being opened must not be written (a read-only export, a backing file)."""

    def for_access(self, *, read_only: bool) -> Opener:
        """The same, for a layer that is, or is not, to be written."""

    def file(self, path: str, *, read_only: bool, mode: FileMode = FILE_MODE, grant: Grant | None = None) -> OpenFile:
        """Open a regular file or block device that the *configuration* named; locks it for what its layer's users are
        granted. ConfigError, ImageError."""

    def reopen(self, file: OpenFile, *, read_only: bool) -> OpenFile:
        """The same file as `file` gave, open for other access; ``file`` is closed. ImageError, with nothing changed."""

    def memory(self, size: int, name: str) -> OpenFile:
        """Anonymous memory of ``size`` zero bytes, as a file."""

    def release(self, file: OpenFile) -> None:
        """Let go of what `file` or `memory` gave. Files are shared, so the last one to let go closes it."""

    def image(
        self, name: str, format: str | None, *, named_by: Layer, read_only: bool = True, beside: bool = True
    ) -> Layer:
        """Open the image that an *image* named (a backing or data file), and count one user of it.

        ``name`` is relative to the directory of the image ``named_by`` (not ``beside``: to the working directory, as
        QEMU takes the names of data files). ImageError if it lies outside the
        allowed roots, names a remote protocol, closes a loop, or makes the chain too deep. ``format`` None
        means: probe (read-only images only).
        """

    def secret(self, *, key_file: str | None, key_env: str | None, key_fd: int | None) -> bytes:
        """A secret, byte for byte, from the one source given: a file, an environment variable, or an inherited
        descriptor, which is read to its end. A layer's keys for them have these names. ConfigError."""

    def named_secret(self, name: str) -> bytes:
        """The secret that who opens images has given this name (QEMU's secret objects, by their IDs). ConfigError."""

    def meter(self, limits: MeterLimits) -> Meter:
        """A meter, for extents to go through. The reference executor's never waits."""

    def dirty_bitmap(self, size: int, granularity: int) -> DirtyBitmap:
        """A bitmap, all clear, of a disk of ``size`` bytes; ``granularity``: a power of two."""

    def dirty_log(self) -> DirtyLog:
        """A log, for `Layer.dirty_log`, that marks in no bitmap yet."""

    def allocate(self, length: int) -> Vector:
        """Memory for a bounced request: from the registered pool while that has room, else ordinary memory."""


class Listener(Protocol):
    """Whom a layer tells that its mapping has changed: the graph."""

    def changed(self, layer: Layer, offset: int, length: int) -> None: ...


@dataclasses.dataclass(eq=False)
class Layer:
    """Base of all layers. Subclasses are dataclasses too: their fields are their keys in ``exports.toml``.

    A field whose value is a Layer (or a list of them) is a child; its name is its role.
    """

    #: The layer's name in configuration: its file's name. Set by the registry; before, it is made of the class's.
    type: ClassVar[str] = "layer"
    #: Flags the layer's code honours when it reads; and when it writes, zeroes and trims. What it lacks is emulated
    #: above it, dropped or refused, as `nbdserver.flags` says; REGISTERED_BUF is exempt and always passed on.
    supported_read_flags: ClassVar[Flag] = Flag.NONE
    supported_write_flags: ClassVar[Flag] = Flag.NONE
    #: Whether it shows the bytes of its ``file`` child, each at its own offset, so that it can be put above a layer
    #: that is in use, and taken away again.
    is_filter: ClassVar[bool] = False
    #: Whether it keeps metadata in its ``file`` child, which so nobody else may write (`child_grant`).
    is_format: ClassVar[bool] = False
    #: What its code does with a request's memory.
    buffers: ClassVar[Buffers] = Buffers()

    def __init_subclass__(cls) -> None:
        cls.type = re.sub(r"(?<=.)(?=[A-Z])", "-", cls.__name__).lower()

    def __post_init__(self) -> None:
        self._listener: Listener | None = None
        self._opener: Opener | None = None
        #: What its users do to it, and let others do: kept up to date by the graph.
        self.grant = permissions.READER
        #: Whether it has been opened to be written.
        self.is_open_for_writing = False
        #: Whether what changes in its backing file changes nothing here, because it changes only where this layer has
        #: something itself: a commit is under way. Set by who sees to that.
        self.hides_changes = False
        #: How often the mapping of this layer, or of anything below it, has changed. See `graph.execute`.
        self.changes = 0
        self.buffer_counters = BufferCounters()
        #: What writes, zeroing and trimming of this layer are marked in, at its own offsets; None: nothing. It is
        #: another one for all that is resolved after `changed`.
        self.dirty_log: DirtyLog | None = None
        #: Where its code writes, if that takes whole blocks only: who merges a part of one holds it alone (`blocks`).
        self.mutations = RangeLock()
        #: The ranges that its code is called for by way of other layers' mappings, kept by `graph.execute`.
        self.code_uses = Uses()

    # -- life ------------------------------------------------------------------------------------------------

    def open(self, opener: Opener) -> None:
        """Become usable. Children given in the configuration are open already; others are asked of the opener
        and then attached as attributes (`nbdserver.graph.attach`).

        Raises ImageError, ConfigError.
        """

    def reopen(self, opener: Opener) -> None:
        """Be open for other access from now on: to be written or not, as ``opener.read_only`` says. Called in a drained
        section, when everything has been flushed; children that it will write are open for that. By default: there is
        nothing to do.

        Raises ConfigError, with nothing changed; ImageError, OSError: it is called once more then, for the access that
        it had.
        """

    def close(self) -> None:
        """Write out whatever is held back and let go. Children are closed after their parents. Called once,
        also after a failed ``open``."""

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The virtual disk's size, bytes."""
        raise NotImplementedError(f"{type(self).__name__}.size")

    @property
    def read_only(self) -> bool:
        """Whether writes are refused here. By default: as the ``file`` child is."""
        file = getattr(self, "file", None)
        return file.read_only if isinstance(file, Layer) else False

    @property
    def stored(self) -> int | None:
        """How much storage its file takes up, bytes; None if that is not known. By default: the ``file`` child's."""
        file = getattr(self, "file", None)
        return file.stored if isinstance(file, Layer) else None

    @property
    def writethrough(self) -> bool:
        """Whether a write is to be durable when it is answered: so if any writable child says so."""
        return any(child.writethrough for _, child in self.children() if not child.read_only)

    @property
    def in_place(self) -> bool:
        """Whether every byte of it is, for as long as it is open, at one place of one file, and that place is never
        any other byte's, of this disk or of another. Replies may then leave straight from the page cache: what reaches
        a client is what its bytes were at some moment before they reached it. By default: no."""
        return False

    @property
    def limits(self) -> BlockLimits:
        """What the requests that its own code is called with are held to; what is mapped onto a child is held to the
        child's. (``opt_transfer`` is told to clients.)"""
        return NO_LIMITS

    @property
    def whole(self) -> OpenFile | None:
        """The file whose bytes, all of them and in place, are this layer's; None: there is none such. It saves asking
        `resolve`."""
        return None

    @property
    def filename(self) -> str | None:
        """The file this layer's bytes are in, if it is one (QEMU's ``bs->filename``): for messages and for
        names relative to it. By default: the ``file`` child's."""
        file = getattr(self, "file", None)
        return file.filename if isinstance(file, Layer) else None

    def children(self) -> Iterator[tuple[str, Layer]]:
        """(role, child) pairs, in the order of the fields; children of a list are ``role.0``, ``role.1``, ..."""
        for name, value in list(vars(self).items()):  # a copy: who only looks on may do so while the layer changes
            if name.startswith("_"):
                continue
            if isinstance(value, Layer):
                yield name, value
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, Layer):
                        yield f"{name}.{index}", item

    def child_grant(self, role: str, own: Grant) -> Grant:
        """What this layer, being granted ``own`` by its users, does to the child of that role, and what it lets others
        do to it meanwhile. Asked also before the layer is open."""
        match role:
            case "backing":
                return permissions.ONLOOKER if self.hides_changes else permissions.as_backing(own)
            case "data_file":
                return permissions.as_data(own)
            case _:
                if self.is_format:
                    return permissions.as_format(own, is_writable=self.is_open_for_writing)
                return permissions.as_filter(own)

    # -- where the bytes live ----------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        """Where do ``length`` bytes from ``offset`` live, for ``intent``?

        Extents as `extent.lawful` demands; longer than asked is welcome (the engine caches it), and a generator
        is consumed only as far as is useful. May be called while the mapping changes: answer from a consistent
        state (hold the lock for each table, not across ``yield``).

        For READ: a place, ZERO or CODE; an extent may say that it is ``writable`` too.
        For WRITE: the places READ names that may be overwritten in place; CODE for all else, ZERO included.
        For ZERO (zeroing and trimming): places that the file itself may zero or discard; ZERO for what reads as
        zeroes already and needs nothing; CODE for all else.
        """
        return (Extent(self.size - offset, CODE),)

    def packed(self, offset: int) -> Packed | None:
        """What ``resolve(READ)`` says of the byte at ``offset`` and of many around it, packed; None: resolve them. For
        layers that have such tables. Raises ImageError, OSError."""
        return None

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """Which (offset, length) ranges of this layer may map to that range of ``child``? By default all of it."""
        return ((0, self.size),)

    def changed(self, offset: int, length: int) -> None:
        """Tell everyone above that the mapping of this range is no longer what was resolved.

        Call it after the metadata has changed (under the layer's lock) and before the old place is freed, reused,
        or relied on as read-only. Only drops and numbers; never waits.
        """
        if self._listener is not None:
            self._listener.changed(self, offset, length)
        else:
            self.changes += 1

    def wait_unused(self, offset: int, length: int) -> None:
        """Wait for I/O still running on the place of this *child* range (see `OpenFile.wait_unused`), and for requests
        still in the child's code that the mapping of a layer above has led there.

        For ranges whose mapping is static, as a format's ``file`` child is. Hold no lock.
        """
        self.code_uses.wait_unused(offset, length)
        for extent in self.resolve(offset, length, Intent.READ):
            if length <= 0:
                break
            take = min(extent.length, length)
            if not isinstance(extent.target, Special):
                extent.target.wait_unused(extent.offset, take)
            length -= take

    # -- called for CODE ranges ----------------------------------------------------------------------------------

    def read(self, request: Request) -> Awaitable[None] | None:
        """Fill ``request.vector``. Called for ranges that ``resolve(READ)`` calls CODE (and possibly for ranges
        that were CODE an instant ago). Raises RequestError, OSError."""
        raise NotImplementedError(f"{type(self).__name__}.read")

    def write(self, request: Request) -> Awaitable[None] | None:
        """Take ``request.vector``: every range that ``resolve(WRITE)`` calls CODE. Raises RequestError, OSError."""
        raise NotImplementedError(f"{type(self).__name__}.write")

    def make_room(self, offset: int, length: int) -> tuple[int, int] | None:
        """Have a place for bytes that ``resolve(WRITE)`` calls CODE, and perhaps for others around them, all of which
        stay what they are: (offset, length) of what should be resolved again, and may be written in place then.

        By default None: `write` is to be called, because the data is needed. Raises RequestError, OSError, ImageError.
        """
        return None

    def zero(self, request: Request) -> Awaitable[None] | None:
        """Make the range read as zeroes: every range that ``resolve(ZERO)`` calls CODE.

        By default zeroes are written out through ``write``; so they are when this raises ENOTSUP, unless the request
        has NO_FALLBACK (which only a layer that supports it is given).
        """
        flags = request.asked_flags & ~(Flag.ZERO_WRITE | Flag.MAY_UNMAP | Flag.NO_FALLBACK)
        length_max = min(request.length, ZERO_PIECE, self.limits.max_transfer or ZERO_PIECE)
        zeroes = self.allocate(length_max)
        zeroes.zero()
        for piece in request.pieces(length_max):
            finish(self.write(Request.write(piece.offset, zeroes.slice(0, piece.length), flags)))
        return None

    def trim(self, request: Request) -> Awaitable[None] | None:
        """The range's contents are no longer needed: advice, by default not taken."""
        return None

    def flush(self) -> Awaitable[None] | None:
        """Make every write that has completed durable, through all children. By default: flush the children."""
        for _, child in self.children():
            if not child.read_only:
                finish(child.flush())
        return None

    def resize(self, size: int) -> None:
        """Change the virtual size. Called in a drained section. Raises RequestError (ENOTSUP by default)."""
        raise RequestError(95, f"{self.type} cannot be resized")

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(length, flags) runs for a meta context, in order from ``offset``, at least covering ``length`` bytes
        or stopping early after at least one. For BASE_ALLOCATION: STATE_HOLE | STATE_ZERO.

        The default follows ``resolve``: ZERO is a hole of zeroes, CODE is data, a child or file says itself. For
        ALLOCATION_DEPTH, all that is no child's is this layer's own: 1. For DIRTY_BITMAP and a name, CODE is what the
        ``file`` child says of the same offsets, and all else that is no child's is clean.
        """
        end = offset + length
        for extent in self.resolve(offset, length, Intent.READ):
            if offset >= end:
                return
            take = min(extent.length, end - offset)
            child, at = self._told_by(extent, context, offset)
            if child is not None:
                left = take
                for run, flags in child.status(context, at, take):
                    run = min(run, left)
                    yield run, flags
                    left -= run
                if left:
                    return
            elif context.startswith(DIRTY_BITMAP):
                yield take, 0
            elif context == ALLOCATION_DEPTH:
                yield take, 1
            elif isinstance(extent.target, Special):
                yield take, 0 if extent.target is CODE else STATE_HOLE | STATE_ZERO
            else:
                assert not isinstance(extent.target, Layer)
                for run, is_data in extent.target.status(extent.offset, take):
                    yield run, 0 if is_data else STATE_HOLE | STATE_ZERO
            offset += take

    def _told_by(self, extent: Extent, context: str, offset: int) -> tuple[Layer | None, int]:
        """Which child tells the status of an extent at ``offset``, and where in it; None: none does."""
        if isinstance(extent.target, Layer):
            return extent.target, extent.offset
        file = getattr(self, "file", None)
        if context.startswith(DIRTY_BITMAP) and extent.target is CODE and isinstance(file, Layer):
            return (file, offset) if offset + extent.length <= file.size else (None, 0)
        return None, 0

    # -- for layer code: reaching a child ------------------------------------------------------------------------

    def allocate(self, length: int) -> Vector:
        """Memory for a bounced request (see `Opener.allocate`), which is counted."""
        self.buffer_counters.bounced(length)
        return self._opener.allocate(length) if self._opener is not None else Vector.of(length)

    def pread(self, offset: int, length: int) -> bytes:
        """Read bytes of a *child* (call it on ``self.file`` and the like). Metadata-sized, copies."""
        data = bytearray(length)
        finish(self.read(Request.read(offset, Vector.of(data))))
        return bytes(data)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview, flags: Flag = Flag.NONE) -> None:
        """Write bytes to a *child*."""
        finish(self.write(Request.write(offset, Vector.of(data), flags)))


def attempt(
    method: Callable[Parameters, Awaitable[None] | None], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> RequestError | None:
    """Call a child's method and tell how it failed, or None: for layers with several children, which go on."""
    try:
        finish(method(*args, **kwargs))
    except RequestError as error:
        return error
    except OSError as error:
        return RequestError.of(error)
    except ImageError as error:
        return RequestError(5, str(error))  # 5: EIO
    return None


def finish(result: Awaitable[None] | None) -> None:
    """Run a layer method's result to its end on this thread: nothing to do unless it was ``async def``."""
    if result is not None:
        import asyncio

        async def wait() -> None:
            await result

        asyncio.run(wait())
