"""The engine: it moves bytes. Written in Rust (nbdserver/engine); used by nbdserver.server alone."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Self, final

from nbdserver import extent
from nbdserver.request import Vector

@final
class Slot:
    """Memory of the buffer pool, or ordinary memory when that is used up. Has the buffer protocol, writable."""

    @property
    def view(self) -> memoryview: ...
    @property
    def registration(self) -> tuple[int, int, int] | None:
        """(pool, slot, generation) while it is a live slot of a registered pool."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

@final
class Use:
    def __enter__(self) -> None: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class File:
    """`nbdserver.extent.OpenFile`. Every method releases the GIL while it works; errors are OSError."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def stored(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def limits(self) -> extent.BlockLimits: ...
    @property
    def alignment(self) -> tuple[int, int] | None:
        """(memory, block) alignment that direct I/O asks for, bytes; None where the page cache is used."""

    def read(self, offset: int, vector: Vector) -> None: ...
    def write(self, offset: int, vector: Vector) -> None: ...
    def zero(self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def sync(self) -> None: ...
    def resize(self, size: int) -> None: ...
    def status(self, offset: int, length: int) -> list[tuple[int, bool]]: ...
    def use(self, offset: int, length: int) -> Use: ...
    def wait_unused(self, offset: int, length: int) -> None: ...
    def in_use(self, offset: int, length: int) -> bool:
        """Whether any I/O or use is on the range now."""

    def close(self) -> None:
        """Wait for running I/O and let the descriptor go."""

    def counters(self) -> dict[str, int]:
        """What the kernel was given to do: reads, writes, syncs; of the reads and writes, ``fixed`` ones on registered
        buffers and ``plain`` ones. ``bounce_bytes`` were copied: ordinary memory of Python's, and what was padded."""

@final
class Meter:
    """`nbdserver.extent.Meter`."""

    def charge(self, length: int, write: bool) -> None: ...

@final
class DirtyBitmap(extent.DirtyBitmap):
    """`nbdserver.extent.DirtyBitmap`. ValueError for a granularity that is no power of two, and where bytes are not in
    multiples of 8."""

    def __new__(cls, size: int, granularity: int) -> DirtyBitmap: ...
    @property
    def size(self) -> int: ...
    @property
    def granularity(self) -> int: ...
    def mark(self, offset: int, length: int) -> None: ...
    def merge(self, other: extent.DirtyBitmap) -> None: ...
    def clear(self) -> None: ...
    def resize(self, size: int) -> None: ...
    def count(self) -> int: ...
    def runs(self, offset: int, length: int, count_max: int) -> list[tuple[int, bool]]: ...
    def data(self, start: int, length: int) -> bytes: ...
    def load(self, start: int, data: bytes) -> None: ...

@final
class DirtyLog(extent.DirtyLog):
    """`nbdserver.extent.DirtyLog`."""

    @property
    def number(self) -> int:
        """What `Export.fill` is told for it."""

    def set(self, bitmaps: Sequence[extent.DirtyBitmap]) -> None: ...
    def mark(self, offset: int, length: int) -> None: ...

@final
class Running:
    def __enter__(self) -> None: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class Export:
    """The engine's view of an export: its size and the cache of where its bytes live."""

    @property
    def id(self) -> int: ...
    #: Bytes; changed in a drained section.
    size: int
    #: Whether every write is a write and a flush; changed in a drained section.
    writethrough: bool
    #: Whether replies may leave from the page cache (`Layer.in_place`); changed in a drained section.
    in_place: bool
    @property
    def sequence(self) -> int:
        """How many changes there have been: to be read before resolving, and given to `fill`."""

    def fill(
        self, sequence: int, offset: int, leaves: Sequence[tuple[int, File | int, int, bool, int, int, int, int, int]]
    ) -> bool:
        """Enter (length, target, offset, writable, transform, position, meters, log, log_position) extents, contiguous
        from ``offset``; a target is a file, 0 for ZERO, or 1 for CODE; transform, meters and log are the numbers of
        `Engine.add_transform`, `Engine.meters` and `DirtyLog.number`, or 0. What has changed since ``sequence`` is left
        out; False if nothing was entered."""

    def fill_table(
        self,
        sequence: int,
        offset: int,
        words: array[int],
        *,
        file: File,
        unit: int,
        places: int,
        refused: int,
        zeroes: Sequence[tuple[int, int]],
        limit: int,
    ) -> bool:
        """`fill` with a `nbdserver.extent.Packed` table, of which ``words`` are the words; it may be read, and not
        written."""

    def has_table(self, offset: int) -> bool:
        """Whether a table has been entered for what is at ``offset``."""

    def changed(self, offset: int, length: int) -> None:
        """Drop the range, and number the change. Afterwards no new I/O begins on the old place. Never waits."""

    def clear(self) -> None:
        """Forget every extent (they are resolved again when needed)."""

    def known(self, offset: int, length: int, write: bool) -> list[tuple[int, bool]]:
        """Which parts of the range are cached (for ``write``: as writable), as (length, is cached) runs."""

    def running(self, timeout: float) -> Running | None:
        """Count as a request that runs, for the time of a ``with`` block: drained sections wait for it. Waits
        (seconds) for the end of one that has begun; None: it did not end."""

    @property
    def is_draining(self) -> bool: ...
    def drain_begin(self, timeout: float) -> bool:
        """Hold new requests up and wait (seconds) until none runs. False: they did not end, and nothing is held."""

    def drain_end(self) -> None: ...
    def counters(self) -> dict[str, int]: ...

@final
class Fault:
    """A request that needs Python. ``kind`` says what is wanted of ``range``:

    resolve   `Export.fill` with ``sequence``, then `again`
    write     the same, if a prefix can be written in place; or write a prefix, then `done`
    read, zero, trim, flush    carry it out, then `done`
    status    `status` answers it

    `fail` answers at any point. A fault that is dropped unanswered is answered with EIO.
    """

    @property
    def export(self) -> int: ...
    @property
    def flags(self) -> int:
        """The request's flags, as on the wire."""

    @property
    def kind(self) -> str: ...
    @property
    def range(self) -> tuple[int, int]: ...
    @property
    def sequence(self) -> int: ...
    @property
    def mapped(self) -> bool:
        """Whether what is to be written is mapped and writable, and must go through its layer all the same."""

    @property
    def contexts(self) -> list[tuple[int, str]]: ...
    def segments(self, offset: int, length: int) -> list[tuple[Slot, int, int]]:
        """The request's memory for a range of the export, as (slot, start, length)."""

    def again(self) -> bool:
        """Go on after filling. True: another step is wanted, see ``kind``. False: it has been answered."""

    def done(self, length: int) -> bool:
        """Go on, ``length`` bytes of the step being done; as `again`."""

    def fail(self, errno: int, message: str) -> None: ...
    def status(self, contexts: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> None:
        """Answer a status request: per context (identifier, [(length, flags), ...])."""

@final
class Client:
    """A connection, also after it has ended."""

    @property
    def peer(self) -> str:
        """Where it comes from, in words."""

    @property
    def listener(self) -> int | None:
        """The number of the listener that it came by; None: it was handed over connected."""

    @property
    def address(self) -> str | None:
        """Its IP address, by TCP; an IPv4 address in IPv6 as such."""

    @property
    def process(self) -> tuple[int, int, list[int]] | None:
        """Of the process that connected, by a Unix socket: id, user, groups."""

    @property
    def machine(self) -> int | None:
        """Its context id, by vsock."""

    def counters(self) -> dict[str, int]:
        """requests that were begun; bytes_read, bytes_written by them."""

    def disconnect(self) -> None:
        """Close it, whatever it is doing. What it has asked for and is running goes on, unanswered."""

@final
class TlsContext:
    """What connections begin TLS with. Files are PEM; ``authority`` signs clients' certificates, which are then
    demanded; ``revoked`` is a list of those that no longer count; ``keys``: pre-shared keys by name.
    ValueError: a file cannot be used, with its path."""

    def __new__(
        cls,
        *,
        certificate: str | None = None,
        key: str | None = None,
        authority: str | None = None,
        revoked: str | None = None,
        keys: Mapping[str, bytes] | None = None,
    ) -> Self: ...

@final
class Event:
    """What a connection in its handshake has sent. ``kind``: open (see ``client``), flags (``code``), option (``code``,
    ``data``), oversized (``code``, ``length``; the data is gone), secured, insecure, closed. After open exactly one of
    `greet` and `end` is due; after flags, option, oversized and secured one of `next`, `begin`, `start_tls` and `end`.
    Not of a connection: full (``reason``; clients are turned away)."""

    @property
    def connection(self) -> tuple[int, int]: ...
    @property
    def kind(self) -> str: ...
    @property
    def client(self) -> Client | None: ...
    @property
    def code(self) -> int: ...
    @property
    def data(self) -> bytes: ...
    @property
    def length(self) -> int: ...
    @property
    def secured(self) -> tuple[str | None, str | None, str] | None:
        """Of "secured": the subject of the client's certificate (RFC 4514), the name of its pre-shared key, and the
        protocol and cipher."""

    @property
    def reason(self) -> str | None:
        """Of "insecure": why TLS could not begin, and the connection has ended. Of "full": who is one too many."""

    def greet(self) -> None:
        """The client is welcome: its handshake begins."""

    def start_tls(self, data: bytes, context: TlsContext) -> None:
        """Send ``data``, then begin TLS as the server. "secured", "insecure" or "closed" follows."""

    def next(self, data: bytes) -> None:
        """Send ``data`` and take the next option."""

    def begin(
        self,
        data: bytes,
        export: Export,
        style: str,
        contexts: Sequence[tuple[int, str]],
        payload_max: int,
        block_min: int,
    ) -> None:
        """Send ``data`` and begin the transmission phase. ``style``: "simple", "structured" or "extended", by what was
        negotiated (`handshake.Style`). READ and WRITE may have ``payload_max`` bytes, at most 64 MiB; ranges must be
        multiples of ``block_min``, a power of two. ValueError for any other."""

    def end(self, data: bytes) -> None:
        """Send ``data`` and close."""

@final
class Engine:
    def __new__(
        cls,
        *,
        workers: int,
        pool: int,
        backend: str,
        fault_threads: int,
        limits: dict[str, float | None],
        record: str | None = None,
    ) -> Engine:
        """``limits``: see `set_limits`."""

    @property
    def backend(self) -> str: ...
    @property
    def refused(self) -> str | None:
        """Why the backend is "threads", or None."""

    @property
    def connections(self) -> int: ...
    @property
    def pool_free(self) -> int: ...
    @property
    def pool_size(self) -> int: ...
    @property
    def pool_region(self) -> tuple[int, int]:
        """(address, length) of the registered part of the pool; nothing is registered where the length is 0."""

    @property
    def pool_pages(self) -> tuple[str, int]:
        """The kind of pages that the pool is on ("normal", "transparent" or "hugetlb"), and how many bytes are on huge
        ones now."""

    @property
    def unregistered(self) -> int | None:
        """The errno with which the kernel refused to register all of the pool with the rings; None if it did not."""

    def operations(self) -> dict[str, int]:
        """What the kernel has been given to do through all rings: read, write, read_fixed, write_fixed."""

    def add_transform(self, cipher: str, key: bytes, sector_size: int) -> int:
        """The number of a new transform. ValueError if there is none such."""

    def new_meter(self, limits: Sequence[tuple[float, float, float]], iops_size: int) -> Meter:
        """A meter of six (average, max, length) limits: bps total, read, write; iops total, read, write."""

    def meters(self, set: Sequence[Meter]) -> int:
        """The number of a set of meters."""

    def new_dirty_log(self) -> DirtyLog: ...
    def open_file(
        self,
        fd: int,
        name: str,
        read_only: bool,
        limits: extent.BlockLimits,
        *,
        direct: bool = False,
        unsafe: bool = False,
        threads: bool = False,
    ) -> File:
        """Take over a descriptor. ``limits``: kept for `File.limits`; what is served without Python is held to their
        ``max_transfer``. ``direct``: O_DIRECT; ``unsafe``: never sync; ``threads``: never the ring."""

    def new_export(self, size: int, read_only: bool) -> Export: ...
    def allocate(self, length: int) -> list[Slot]:
        """Memory for a bounced request; its contents are undefined. OSError ENOMEM when even the reserve is gone."""

    def start(self) -> None:
        """Start the workers."""

    def listen(self, listener: int) -> int:
        """Take over a listening descriptor (non-blocking) and accept on it; its number. After `start`."""

    def connected(self, socket: int) -> None:
        """Take over a connected socket (non-blocking) and serve it. After `start`. RuntimeError: nobody is there to."""

    def set_limits(self, limits: dict[str, float | None]) -> None:
        """connections, connections_per_peer, requests_per_connection, memory_per_connection, reply_memory,
        handshake_timeout and idle_timeout (None: none): see `nbdserver.bounds.Bounds`."""

    @property
    def turned_away(self) -> int:
        """Clients that were one too many."""

    @property
    def reply_memory(self) -> int:
        """Bytes that count against the limit of that name now."""

    def unlisten(self, number: int) -> None:
        """Close that listener. What it has accepted stays."""

    def stop(self, timeout: float) -> bool:
        """Finish what was accepted, for ``timeout`` seconds at most, and end every thread and queue. False if a worker
        has panicked."""

    def take_fault(self) -> Fault | None:
        """Wait for a fault; None when the engine has stopped."""

    def take_event(self) -> Event | None: ...

@final
class Stop:
    """A thread held at a named point of the engine: for deterministic tests. Dropping it releases the thread."""

    def wait_reached(self, timeout: float) -> bool: ...
    def release(self) -> None: ...

def panic_at(name: str) -> Stop:
    """Have the next thread that reaches the point ``name`` panic."""

def stop_at(name: str, nth: int = 1) -> Stop:
    """Hold the next thread that reaches the point ``name``, or the ``nth`` that does from now on."""
