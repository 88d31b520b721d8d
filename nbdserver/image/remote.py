"""Disks that NBD servers export, as sources and targets: a layer over libnbd, if its Python bindings are installed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import queue
from collections.abc import Iterator
from typing import Any, ClassVar, Final

from nbdserver.errors import ImageError, RequestError
from nbdserver.extent import BlockLimits
from nbdserver.format import MapEntry
from nbdserver.layer import BASE_ALLOCATION, STATE_HOLE, STATE_ZERO, Layer, Opener
from nbdserver.limits import GIB, PAYLOAD_MAX
from nbdserver.request import Flag, Request

#: What begins the URIs of NBD servers.
SCHEMES: Final = ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://")

#: What is zeroed, and asked the status of, at once: lengths on the wire may be of 32 bits.
RANGE_MAX: Final = GIB

#: Connections to a server that says that it does not matter which: as many as threads may use them at once.
CONNECTIONS_MAX: Final = 4


def is_remote(name: str) -> bool:
    """Whether ``name`` is a URI rather than a path."""
    return name.startswith(SCHEMES)


@dataclasses.dataclass(eq=False)
class Remote(Layer):
    #: Where the export is.
    uri: str

    type: ClassVar[str] = "nbd"
    supported_write_flags: ClassVar[Flag] = Flag.MAY_UNMAP

    def open(self, opener: Opener) -> None:
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        self._connections: list[Any] = []
        handle = self._connect()
        self._size = int(handle.get_size())
        self._is_read_only = opener.read_only or bool(handle.is_read_only())
        self._has_status = bool(handle.can_meta_context(BASE_ALLOCATION))
        with self._failing():
            for _ in range(CONNECTIONS_MAX - 1 if handle.can_multi_conn() else 0):
                self._connect()

    def close(self) -> None:
        for handle in getattr(self, "_connections", ()):
            with contextlib.suppress(_library().Error):  # what mattered has been flushed
                handle.shutdown()

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._is_read_only

    @property
    def limits(self) -> BlockLimits:
        nbd = _library()
        smallest = int(self._connections[0].get_block_size(nbd.SIZE_MINIMUM)) or 1
        largest = int(self._connections[0].get_block_size(nbd.SIZE_MAXIMUM)) or PAYLOAD_MAX
        largest = min(largest, PAYLOAD_MAX) // smallest * smallest
        return BlockLimits(request_alignment=smallest, max_transfer=largest, max_pwrite_zeroes=RANGE_MAX)

    # -- requests ----------------------------------------------------------------------------------------------------

    def read(self, request: Request) -> None:
        with self._handle() as handle:
            request.vector.fill(handle.pread(request.length, request.offset))

    def write(self, request: Request) -> None:
        with self._handle() as handle:
            handle.pwrite(request.vector.tobytes(), request.offset)

    def zero(self, request: Request) -> None:
        nbd = _library()
        with self._handle() as handle:
            if handle.can_zero():
                flags = 0 if request.flags & Flag.MAY_UNMAP else nbd.CMD_FLAG_NO_HOLE
                handle.zero(request.length, request.offset, flags)
                return
        super().zero(request)

    def flush(self) -> None:
        with self._handle() as handle:
            if handle.can_flush():
                handle.flush()

    def map(self, offset: int, length: int) -> Iterator[MapEntry]:
        """`nbdserver.format.Maps`."""
        end = offset + length
        while offset < end:
            for run, flags in self._runs(offset, min(end - offset, RANGE_MAX)):
                run = min(run, end - offset)
                is_data, is_zero = not flags & STATE_HOLE, bool(flags & STATE_ZERO)
                yield MapEntry(run, data=is_data or not is_zero, zero=is_zero, child=self, offset=offset)
                offset += run
                if offset == end:
                    return

    def _runs(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags), at least one."""
        if not self._has_status:
            return [(length, 0)]
        found: list[int] = []

        def take(context: str, offset: int, entries: list[int], error: object) -> None:
            if context == BASE_ALLOCATION:
                found.extend(entries)

        with self._handle() as handle:
            handle.block_status(length, offset, take)
        if len(found) < 2 or found[0] <= 0:
            raise RequestError(errno.EIO, "the server tells nothing of a range whose status was asked for")
        return list(zip(found[::2], found[1::2], strict=True))

    # -- connections -------------------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        nbd = _library()
        handle = nbd.NBD()
        try:
            handle.add_meta_context(BASE_ALLOCATION)
            handle.connect_uri(self.uri)
        except nbd.Error as error:
            raise ImageError(f"cannot be connected to: {error.string}", path=self.uri) from error
        self._connections.append(handle)
        self._idle.put(handle)
        return handle

    @contextlib.contextmanager
    def _handle(self) -> Iterator[Any]:
        """A connection that nobody else uses meanwhile."""
        handle = self._idle.get()
        try:
            with self._failing():
                yield handle
        finally:
            self._idle.put(handle)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except _library().Error as error:
            raise RequestError(error.errnum or errno.EIO, f"{self.uri}: {error.string}") from error


def _library() -> Any:
    try:
        return importlib.import_module("nbd")
    except ImportError as error:
        raise ImageError(
            "an NBD URI needs libnbd's Python bindings, which are not installed (Debian: python3-libnbd)"
        ) from error
