"""``blkverify``: two layers that should be the same disk; whatever they disagree about is an error.

::

                 ┌── test    what is being tested, a format say; the data that a client gets
    blkverify ───┤
                 └── raw     what is trusted, a raw image of the same contents

Every read reads both and compares; everything that changes goes to both. QEMU's ``blkverify`` (docs/devel/blkverify)
ends the process at the first difference; here the request fails (EIO) and the log says where they differ.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
from collections.abc import Iterable, Iterator
from typing import ClassVar, NoReturn

from nbdserver.errors import ConfigError, RequestError
from nbdserver.layer import Buffers, Layer, Opener, attempt
from nbdserver.limits import BOUNCE_MAX
from nbdserver.permissions import Grant, as_replica
from nbdserver.ranges import RangeLock
from nbdserver.request import Flag, Request

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Blkverify(Layer):
    #: What is tested.
    test: Layer
    #: What it is compared with.
    raw: Layer

    # Not NO_FALLBACK: one child may be able to and the other not, and then they would differ.
    supported_write_flags: ClassVar[Flag] = Flag.MAY_UNMAP | Flag.WRITE_UNCHANGED
    buffers: ClassVar[Buffers] = Buffers(
        read="bounces: test fills it, raw fills pool memory that it is compared with",
        write="keeps: both children are given it",
        zero="none: both children zero",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Ranges with requests on their way to both: a second one must not overtake the first at one child alone.
        self._ranges = RangeLock()

    def open(self, opener: Opener) -> None:
        if self.raw.size < self.size:
            raise ConfigError(f"found a disk of {self.raw.size} bytes, but test has {self.size}", key="raw")

    def child_grant(self, role: str, own: Grant) -> Grant:
        return as_replica(own)

    @property
    def size(self) -> int:
        return self.test.size

    @property
    def read_only(self) -> bool:
        return self.test.read_only or self.raw.read_only

    @property
    def filename(self) -> str | None:
        return self.test.filename

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ()  # all is CODE, wherever the children keep it

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self.test.status(context, offset, length)

    def read(self, request: Request) -> None:
        with self._ranges.shared(request.offset, request.length):
            trusted = self.allocate(min(request.length, BOUNCE_MAX))
            for part in request.pieces(BOUNCE_MAX):
                self._compare(part, part.with_vector(trusted.slice(0, part.length)))

    def _compare(self, test: Request, raw: Request) -> None:
        self._on_both(test, raw)
        at = test.vector.difference(raw.vector)
        if at is not None:
            found, wanted = (request.vector.slice(at, 1).tobytes().hex() for request in (test, raw))
            self._disagree(test, f"the first byte that differs, at {test.offset + at:#x}, is {found}, raw has {wanted}")

    def write(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length):
            self._on_both(request, request)

    def zero(self, request: Request) -> None:
        self.write(request)

    def trim(self, request: Request) -> None:
        # Trimmed bytes are undefined, and each child would define them in its own way: they are to be alike.
        self.write(Request.zero(request.offset, request.length, Flag.MAY_UNMAP))

    def _on_both(self, test: Request, raw: Request) -> None:
        """Run a request on both, each with its own memory; they must succeed or fail alike."""
        failed = attempt(getattr(self.test, test.operation.value), test)
        trusted = attempt(getattr(self.raw, raw.operation.value), raw)
        if failed is not None and trusted is not None and failed.errno == trusted.errno:
            raise failed
        if failed is not None or trusted is not None:
            self._disagree(test, f"test: {failed or 'success'}, raw: {trusted or 'success'}")

    def _disagree(self, request: Request, how: str) -> NoReturn:
        message = f"blkverify: {request.operation.value} of {request.length} bytes at {request.offset:#x}: {how}"
        log.error("%s", message)
        raise RequestError(errno.EIO, message)
