"""THE CONTRACT, second part: what a format offers to those who handle images as files (``nbdserver image``).

A format is a layer that can also make, describe, repair and change images of its kind. Each ability is a protocol, and
a layer class has it by having its methods: a format without snapshots leaves them out, and who asks for them is told
so by name. Names are those of QEMU's QAPI (``ImageInfo``, ``ImageCheck``, ``SnapshotInfo``, ...) with underscores.

Class methods work on the bytes of an image that is not open as a disk (``file``: a layer of the host file, open for
writing where they write); the others on an open layer. Those that change a disk that is being served are called in a
drained section, where they say so.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Final, NamedTuple, Protocol, runtime_checkable

from nbdserver.errors import RequestError
from nbdserver.layer import Layer, Opener, finish
from nbdserver.limits import PREALLOCATION_PIECE, ZERO_PIECE
from nbdserver.request import Request

#: Told how much is done: (done, total), of any unit.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """A `Progress` for who does not look."""


class Repair(enum.Enum):
    """What `Checks.check` may mend: ``qemu-img check -r``."""

    NONE = "none"
    #: Clusters that are counted and not used.
    LEAKS = "leaks"
    ALL = "all"


#: The metadata of a creation option that is not shown when it has its default value.
TACIT: Final = types.MappingProxyType({"tacit": True})


@dataclasses.dataclass
class ImageCheck:
    """What a check found; the counts are of what is left after repairs. QAPI: ``ImageCheck``."""

    #: Errors that mean wrong data, or danger of it.
    corruptions: int = 0
    #: Space that is lost.
    leaks: int = 0
    #: Errors of the check itself: what could not be read.
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    #: Where the image ends, bytes of the host file.
    image_end_offset: int = 0
    #: Clusters of the disk, and of these allocated, fragmented and compressed ones.
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    #: Each finding in words, with its place; bounded.
    messages: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Measure:
    """The size of the host file of an image, bytes. QAPI: ``BlockMeasureInfo``."""

    #: With this data in it.
    required: int
    #: With every cluster allocated.
    fully_allocated: int
    #: What persistent bitmaps would add, if any are to be copied.
    bitmaps: int | None = None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One internal snapshot. QAPI: ``SnapshotInfo``."""

    id: str
    name: str
    vm_state_size: int
    #: When it was made, ns since 1970.
    date_ns: int
    #: The guest's clock then, ns.
    vm_clock_ns: int
    #: The disk's size then, bytes; None: an old image does not say.
    disk_size: int | None = None
    icount: int | None = None


@dataclasses.dataclass(frozen=True)
class Bitmap:
    """One persistent dirty bitmap. QAPI: ``Qcow2BitmapInfo``."""

    name: str
    #: Bytes that one bit stands for, a power of two.
    granularity: int
    #: Whether it records writes.
    auto: bool
    #: Whether it was not stored properly, and so says nothing.
    in_use: bool
    #: Bytes marked dirty; None if it is not known.
    count: int | None = None


class MapEntry(NamedTuple):
    """What one layer itself says of a range of its disk. QAPI: ``MapEntry``; QEMU's block status of one node.

    Neither ``data`` nor ``zero``: the layer has nothing there, so that a backing file shows, or else zeroes.
    """

    length: int
    #: There is something stored that must be read (it may be zeroes all the same).
    data: bool = False
    #: It reads as zeroes.
    zero: bool = False
    compressed: bool = False
    #: The child in which the bytes lie one to one, from ``offset`` on; None: in none.
    child: Layer | None = None
    offset: int = 0


@runtime_checkable
class Creates(Protocol):
    """A format of which new images can be made."""

    #: A dataclass, all fields with defaults: the format's ``-o`` options, under QEMU's names (where that cannot be a
    #: field's, the metadata have it as "option"), in the order in which they are shown; ``size``, which is none of
    #: them, is shown before ``compat``. Making one raises ConfigError for options that no image can have together. The
    #: comment above a field (``#:``) is its help. Fields ``backing_file``, ``backing_fmt``, ``preallocation``,
    #: ``data_file`` mean what they mean in QEMU, where they are there.
    CreateOptions: ClassVar[type[Any]]

    @classmethod
    def create(cls, file: Layer, size: int, options: Any, *, opener: Opener, progress: Progress = no_progress) -> None:
        """Make an empty image of ``size`` bytes in ``file``, which is empty and writable. Raises ConfigError for
        options that cannot be had (key: the option), OSError."""

    @classmethod
    def measure(
        cls,
        size: int,
        options: Any,
        allocated: Iterable[tuple[int, int]],
        bitmaps: Sequence[Bitmap] | None = None,
    ) -> Measure:
        """How large would the host file be for a disk with ``allocated`` (offset, length) ranges of data, ascending?
        ``bitmaps``: what might be copied too; None: the source cannot have any."""


@runtime_checkable
class Checks(Protocol):
    """A format whose metadata can be checked."""

    @classmethod
    def check(
        cls, file: Layer, *, repair: Repair = Repair.NONE, opener: Opener, progress: Progress = no_progress
    ) -> ImageCheck:
        """Check the image in ``file``, and mend what ``repair`` allows. Opens what `Layer.open` would refuse for being
        dirty or corrupt. Raises ImageError if it cannot be checked at all, OSError."""


@runtime_checkable
class Describes(Protocol):
    """A format that has more to say than its size."""

    def info(self) -> dict[str, Any]:
        """QEMU's ``ImageInfoSpecific``: ``type`` and ``data``, JSON-able, its keys spelled as QEMU spells them, and in
        the order in which it prints them."""


@runtime_checkable
class Maps(Protocol):
    """A format that says more of its own mapping than `Layer.resolve` can."""

    def map(self, offset: int, length: int) -> Iterator[MapEntry]:
        """Entries from ``offset`` on, covering ``length`` bytes exactly; neighbours may be alike. Raises ImageError,
        OSError."""


@runtime_checkable
class HasClusters(Protocol):
    """A format that allocates in units."""

    @property
    def cluster_size(self) -> int:
        """Bytes. QAPI: ``ImageInfo.cluster-size``."""


@runtime_checkable
class Compresses(Protocol):
    """A format that stores what is written with WRITE_COMPRESSED compressed, if that is whole clusters."""

    @property
    def cluster_size(self) -> int: ...

    @property
    def why_uncompressed(self) -> str | None:
        """Why this image has no compressed data, so that such writes fail; None: it can have some."""


@runtime_checkable
class HasDirtyFlag(Protocol):
    """A format whose images say whether they were closed properly."""

    @property
    def dirty_flag(self) -> bool:
        """Whether it was not. QAPI: ``ImageInfo.dirty-flag``."""


@runtime_checkable
class HasEncryption(Protocol):
    """A format whose images may be encrypted."""

    @property
    def is_encrypted(self) -> bool:
        """QAPI: ``ImageInfo.encrypted``."""


@runtime_checkable
class GrowsPreallocated(Protocol):
    """A format that can have room for what a disk grows by from the beginning."""

    def grow(self, size: int, preallocation: str = "off", progress: Progress = no_progress) -> None:
        """`Layer.resize`; ``preallocation`` of what the disk grows by: "metadata" (it is allocated), "falloc" (and its
        storage is reserved) or "full" (and zeroes are written there). ENOSPC, with nothing changed, if there is no
        room. Called in a drained section of whoever uses the disk."""


def snapshot_named(parameter: str) -> str:
    """The ID or name that is meant by a snapshot parameter of QEMU's tools: that, or snapshot.id=ID or
    snapshot.name=NAME."""
    for prefix in ("snapshot.id=", "snapshot.name="):
        if parameter.startswith(prefix):
            return parameter.removeprefix(prefix)
    return parameter


@runtime_checkable
class HasSnapshots(Protocol):
    """A format with internal snapshots. An id or name finds one by id first, as in QEMU. All but the list raise
    RequestError: ENOENT, EEXIST, ENOTSUP; and are called in a drained section of whoever uses the disk."""

    def snapshots(self) -> Sequence[Snapshot]: ...

    def create_snapshot(self, name: str) -> Snapshot: ...

    def apply_snapshot(self, id_or_name: str) -> None:
        """Make the disk what it was. Its size may change."""

    def delete_snapshot(self, id_or_name: str) -> None: ...


@runtime_checkable
class HasBitmaps(Protocol):
    """A format that keeps dirty bitmaps. `Layer.status` tells what is marked in one, as the context ``DIRTY_BITMAP``
    and its name. Raises RequestError: ENOENT, EEXIST, EINVAL, EBUSY, EROFS, ENOTSUP; OSError. What changes them is
    called in a drained section of whoever uses the disk; when it returns it is durable, but for what is done to an
    enabled bitmap, which is stored when the image is closed."""

    def bitmaps(self) -> Sequence[Bitmap]: ...

    def use_bitmap(self, name: str) -> AbstractContextManager[Bitmap]:
        """Have the bitmap stay, and stay what it is but for the writes that it records, for the time of the block: what
        would change it fails with EBUSY. EINVAL if it is ``in_use``, and so says nothing."""

    def add_bitmap(self, name: str, *, granularity: int | None = None, enabled: bool = True) -> None: ...

    def remove_bitmap(self, name: str) -> None: ...

    def enable_bitmap(self, name: str) -> None: ...

    def disable_bitmap(self, name: str) -> None: ...

    def clear_bitmap(self, name: str) -> None: ...

    def merge_bitmap(self, name: str, source: Layer, source_name: str) -> None:
        """Mark in ``name`` all that is marked in the bitmap of ``source``, which may be this layer."""


@runtime_checkable
class HasBacking(Protocol):
    """A format whose images can name a backing file."""

    @property
    def backing_name(self) -> str | None:
        """The name as the image spells it."""

    @property
    def backing_format(self) -> str | None: ...

    def set_backing(self, name: str | None, format: str | None) -> None:
        """Write another name into the image's header; the open layers stay as they are. ENOSPC if there is no room."""


@runtime_checkable
class Empties(Protocol):
    """A format whose images can give up all that they hold, so that their backing file shows throughout."""

    def make_empty(self) -> None:
        """Give up everything. Wherever a crash comes, every range shows what it did or what the backing file has there.
        Called in a drained section of whoever uses the disk. Raises RequestError, OSError, ImageError."""

    def empty_at_once(self) -> Callable[[], None]:
        """The same in a step that takes no longer the more is given up, and is durable when it has been taken. What is
        returned gives back the storage, which takes its time; call it when nobody else uses the disk. If it is never
        called, that space is lost until the image is repaired."""


# -- for formats that make images ------------------------------------------------------------------------------------


def grow(file: Layer, length: int) -> None:
    """Make ``file`` at least ``length`` bytes long. Raises OSError: ENOSPC if it cannot grow, as block devices."""
    if file.size >= length:
        return
    try:
        file.resize(length)
    except RequestError as error:
        number = errno.ENOSPC if error.errno == errno.ENOTSUP else error.errno
        raise OSError(number, os.strerror(number), file.filename) from error


def preallocate(file: Layer, offset: int, length: int, *, written: bool, progress: Progress = no_progress) -> None:
    """Take up the storage of a range of ``file``, which then reads as zeroes: these are ``written``, or else storage is
    reserved, if the file system can do that. Raises OSError, RequestError."""
    if not length:
        return
    zeroes = file.allocate(min(ZERO_PIECE, length))
    zeroes.zero()
    step = ZERO_PIECE if written else PREALLOCATION_PIECE
    for start in range(0, length, step):
        count = min(step, length - start)
        if written:
            finish(file.write(Request.write(offset + start, zeroes.slice(0, count))))
        else:
            finish(file.zero(Request.zero(offset + start, count)))
        progress(start + count, length)
