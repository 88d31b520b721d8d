"""The filters that jobs put above the active image for as long as they run: QEMU's ``commit_top`` and ``cor`` nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar, Final

from nbdserver.copier import Copier
from nbdserver.extent import CODE, DirtyBitmap, Extent, Intent
from nbdserver.image.allocation import Run
from nbdserver.layer import Buffers, Layer, Opener, finish
from nbdserver.limits import KIB
from nbdserver.live.chain import held
from nbdserver.permissions import CHANGING, Grant, Permission
from nbdserver.request import Flag, Request

#: What a bit stands for that says that the guest has written: as QEMU's jobs have it.
GRANULARITY: Final = 64 * KIB


@dataclasses.dataclass(eq=False)
class JobFilter(Layer):
    """A filter that only its job takes away."""

    #: The active image.
    file: Layer

    is_filter: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return self.file.size

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self.file.status(context, offset, length)

    def resize(self, size: int) -> None:
        self.file.resize(size)


@dataclasses.dataclass(eq=False)
class CommitTop(JobFilter):
    """Knows what the guest writes: all of it is mapped, and marked in a bitmap before it is answered."""

    supported_write_flags: ClassVar[Flag] = Flag.FUA | Flag.WRITE_COMPRESSED
    buffers: ClassVar[Buffers] = Buffers(
        read="none: always mapped", write="keeps: mapped, or passed on to be compressed", zero="none: always mapped"
    )

    def open(self, opener: Opener) -> None:
        self._log = self.dirty_log = opener.dirty_log()
        self._written = self._marked_anew(opener)

    def _marked_anew(self, opener: Opener) -> DirtyBitmap:
        written = opener.dirty_bitmap(self.size, GRANULARITY)
        self._log.set([written])
        return written

    def child_grant(self, role: str, own: Grant) -> Grant:
        # What somebody wrote past this layer, the job would never hear of.
        return Grant(own.used, own.shared & ~CHANGING)

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        end = offset + length if intent is Intent.ZERO else self.size
        yield Extent(end - offset, self.file, offset, writable=True)

    def write(self, request: Request) -> None:
        """Called for what is to be compressed below: everything else is mapped."""
        finish(self.file.write(request))

    def take(self) -> DirtyBitmap:
        """What has been written since the last time, or since this layer was put in: whatever is answered after this
        call, and was not before it, is in the next one, if not in this."""
        assert self._opener is not None, "not open"
        written, self._written = self._written, self._marked_anew(self._opener)
        return written

    @property
    def dirty_bytes(self) -> int:
        """How much that will be, if nothing more comes."""
        return self._written.count() * GRANULARITY


@dataclasses.dataclass(eq=False)
class StreamTop(Copier, JobFilter):
    """Copies into the active image what images below it hold: `copy`. Reads of the guest, and what it writes where the
    image has room, stay mapped.

    Where a copy is about to be, or may be, the guest's writes come here, one by one with copies.
    """

    #: The active image, and those below it of which it takes in what they hold.
    above: tuple[Layer, ...] = ()

    buffers: ClassVar[Buffers] = Buffers(
        read="keeps: passed on",
        write="keeps: the image is given it",
        zero="none: the image zeroes",
    )

    def child_grant(self, role: str, own: Grant) -> Grant:
        # What somebody wrote past this layer, a copy could go over. (Before it is in use, everybody does.)
        return Grant(own.used | Permission.WRITE_UNCHANGED, own.shared & ~CHANGING if own.used else own.shared)

    # -- where the bytes live ---------------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        if intent is Intent.READ:
            # Not to be written as it was found to be read: whether that may be is asked for by who writes.
            yield Extent(self.size - offset, self.file, offset)
            return
        for start, end, is_below in self._parts(offset, offset + length):
            if is_below:
                yield Extent(end - start, CODE)
            else:
                yield from self.local(start, end)

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether images below the active one decide it) of the bytes [start, end)."""
        for run in held(self.above, start, end):
            if start < run.start:
                yield start, run.start, False
            yield run.start, run.end, run.depth > 0
            start = run.end
        if start < end:
            yield start, end, False

    # -- copying ----------------------------------------------------------------------------------------------------

    def copy(self, offset: int, length: int) -> None:
        """Have the active image hold all of a range that images below it hold. One call at a time. Raises RequestError,
        OSError, ImageError."""
        with self.copying(offset, length):
            for run in held(self.above, offset, offset + length):
                if run.depth > 0:
                    self._keep(run)

    def _keep(self, run: Run) -> None:
        if run.entry.zero:
            finish(self.file.zero(Request.zero(run.start, run.length, Flag.WRITE_UNCHANGED)))
            return
        vector = self.allocate(run.length)
        finish(self.file.read(Request.read(run.start, vector)))
        finish(self.file.write(Request.write(run.start, vector, Flag.WRITE_UNCHANGED)))

    # -- by code ----------------------------------------------------------------------------------------------------

    def read(self, request: Request) -> None:
        finish(self.file.read(request))
