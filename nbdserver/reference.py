"""The reference: runs an export in plain Python, slowly and obviously. The oracle that the engine must equal.

::

    client's view     read, write, zero, trim, flush, status    answers bytes, or RequestError with the errno
                        │                                       that goes over the wire
    Reference ──────────┤ bounds, read-only (in graph.execute), errors to errnos
                        │
    graph.execute ──> layers ──> open files

Layers are tested on it with no engine built.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Final

from nbdserver.errors import ImageError, RequestError
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Graph, execute
from nbdserver.layer import BASE_ALLOCATION, Layer, finish
from nbdserver.request import Flag, Operation, Request, Vector

#: The errors that NBD knows (proto.md, "Error values") and what stands for those it does not; all others are EIO.
WIRE_ERRNOS: Final = {
    **{
        number: number
        for number in (
            errno.EPERM,
            errno.EIO,
            errno.ENOMEM,
            errno.EINVAL,
            errno.ENOSPC,
            errno.EOVERFLOW,
            errno.ENOTSUP,
            errno.ESHUTDOWN,
        )
    },
    errno.EACCES: errno.EPERM,
    errno.EROFS: errno.EPERM,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.ENOTTY: errno.ENOTSUP,
}


def wire_errno(number: int, *, is_fast_zero: bool = False) -> int:
    """The errno that a client is told for ``number``: ENOTSUP only in answer to a zero request that is to be fast."""
    found = WIRE_ERRNOS.get(number, errno.EIO)
    return errno.EINVAL if found == errno.ENOTSUP and not is_fast_zero else found


class Reference:
    """An export, whose root layer is open, as a client sees it.

    Every method raises RequestError with the errno that the client would be sent; offsets and lengths are bytes.
    """

    def __init__(self, root: Layer, *, read_only: bool = False) -> None:
        self.root = root
        #: Whether the export is, whatever the layers are.
        self.read_only = read_only

    @property
    def size(self) -> int:
        return self.root.size

    def read(self, offset: int, length: int) -> bytes:
        vector = Vector.of(length)
        self.execute(Request.read(offset, vector))
        return vector.tobytes()

    def write(self, offset: int, data: bytes, flags: Flag = Flag.NONE) -> None:
        self.execute(Request.write(offset, Vector.of(bytearray(data)), flags))

    def zero(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        self.execute(Request.zero(offset, length, flags))

    def trim(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        self.execute(Request.trim(offset, length, flags))

    def flush(self) -> None:
        with _errnos():
            finish(self.root.flush())

    def status(self, offset: int, length: int, context: str = BASE_ALLOCATION) -> list[tuple[int, int]]:
        """(length, flags) runs covering the range exactly, equal neighbours joined."""
        end = offset + length
        runs: list[tuple[int, int]] = []
        with _errnos():
            if end > self.root.size:
                raise RequestError(errno.EINVAL, f"status of {length} bytes at {offset:#x} passes the end")
            while offset < end:
                for run, flags in self.root.status(context, offset, end - offset):
                    run = min(run, end - offset)
                    offset += run
                    if runs and runs[-1][1] == flags:
                        run += runs.pop()[0]
                    runs.append((run, flags))
                    if offset == end:
                        break
        return runs

    def execute(self, request: Request) -> None:
        """Run any request."""
        is_zero = request.operation is Operation.ZERO
        with _errnos(is_fast_zero=is_zero and Flag.NO_FALLBACK in request.asked_flags):
            if self.read_only and request.operation is not Operation.READ:
                raise RequestError(errno.EPERM, "the export is read-only")
            execute(self.root, request)


@contextlib.contextmanager
def _errnos(*, is_fast_zero: bool = False) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise RequestError(wire_errno(error.errno, is_fast_zero=is_fast_zero), str(error)) from error
    except OSError as error:
        raise RequestError(wire_errno(error.errno or errno.EIO, is_fast_zero=is_fast_zero), str(error)) from error
    except ImageError as error:
        raise RequestError(errno.EIO, str(error)) from error


@contextlib.contextmanager
def open_stack(
    root: Layer,
    *,
    read_only: bool = False,
    roots: Sequence[str | os.PathLike[str]] = (),
    graph: Graph | None = None,
    files: Files | None = None,
) -> Iterator[Reference]:
    """Open a stack of layers on plain files for the time of the ``with`` block.

    ``graph`` and ``files`` let several stacks share layers and files. Raises ImageError, ConfigError.
    """
    graph = Graph() if graph is None else graph
    opener = FileOpener(graph, Files() if files is None else files, roots=roots, read_only=read_only)
    graph.open(root, opener)
    try:
        yield Reference(root, read_only=read_only)
    finally:
        graph.close(root)
