"""The layer: what it is made of, and where its bytes live."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from layers.ondisk.qcow2 import (
    AUTOCLEAR_AT,
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_FIELD,
    EXTENSION_BITMAPS,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
)
from layers.qcow2 import status
from layers.qcow2.bitmap_directory import check_recordable, read_directory
from layers.qcow2.bitmap_store import BitmapStore
from layers.qcow2.bitmaps import Bitmaps
from layers.qcow2.clusters import Kind, Run
from layers.qcow2.create import Options, make_image
from layers.qcow2.encryption import Encryption, open_encryption
from layers.qcow2.extensions import set_backing, set_extension
from layers.qcow2.head import Head
from layers.qcow2.header import KEPT, Header, check_writable, read_header
from layers.qcow2.host import DataFile, InImage
from layers.qcow2.info import describe
from layers.qcow2.limits import (
    ALLOCATION_AHEAD_DEFAULT,
    BACKING_NAME_MAX,
    GROWTH,
    L2_CACHE_DEFAULT,
    REFCOUNT_CACHE_DEFAULT,
)
from layers.qcow2.mapping import Mapping, WritableMapping
from layers.qcow2.marks import Marks
from layers.qcow2.measure import measure
from layers.qcow2.occupied import Occupied
from layers.qcow2.order import Order
from layers.qcow2.points import Image
from layers.qcow2.reading import Reader
from layers.qcow2.refcounts import Refcounts
from layers.qcow2.repair import check, clean_up
from layers.qcow2.resize import resize
from layers.qcow2.snapshot_table import Entry, find, read_table
from layers.qcow2.snapshots import Snapshots, shown
from layers.qcow2.storage import CorruptImage, Storage, Unopened
from layers.qcow2.survey import Survey
from layers.qcow2.writing import Discard, Writer
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.extent import CODE, ZERO, BlockLimits, DirtyBitmap, DirtyLog, Extent, Intent, Packed, Size, Special
from nbdserver.format import Bitmap, ImageCheck, MapEntry, Measure, Progress, Repair, Snapshot, no_progress
from nbdserver.graph import attach, bare, reach
from nbdserver.layer import BASE_ALLOCATION, DIRTY_BITMAP, Buffers, Layer, Opener
from nbdserver.permissions import READER, Grant
from nbdserver.ranges import RangeLock
from nbdserver.request import Flag, Request

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Qcow2(Layer):
    #: Where the image's bytes are.
    file: Layer
    #: What unallocated clusters show. By default (None) what the image names; false: nothing, whatever it names.
    backing: Layer | Literal[False] | None = None
    #: Where guest data is, if the image has an external data file. By default what the image names; false: leave it
    #: alone, so that the image can be described but not read.
    data_file: Layer | Literal[False] | None = None
    #: Where the passphrase of an encrypted image is: see `layers.luks.Luks`. ``key_file`` false: none; the image can be
    #: described but not read.
    key_file: str | Literal[False] | None = None
    key_env: str | None = None
    key_fd: int | None = None
    #: Show this internal snapshot (its ID, or else its name) rather than the disk, read-only.
    snapshot: str | None = None
    #: How much of the L2 tables, and of the refcount blocks, is kept in memory.
    l2_cache_size: Size = L2_CACHE_DEFAULT
    refcount_cache_size: Size = REFCOUNT_CACHE_DEFAULT
    #: Whether refcounts may be written late, so that they are counted anew after a crash. By default as the image says.
    lazy_refcounts: bool | None = None
    #: Whether the file's storage is given back of clusters that zeroing and trimming free; that applying and deleting
    #: snapshots frees; that anything else frees.
    pass_discard_request: bool = True
    pass_discard_snapshot: bool = True
    pass_discard_other: bool = False

    #: How much is allocated at once around a write where nothing is, in an image that is not encrypted and has no
    #: backing file. What is not written yet is a hole in the file, and zeroes. 0: the clusters that are written.
    allocation_ahead: Size = ALLOCATION_AHEAD_DEFAULT

    is_format: ClassVar[bool] = True
    supported_write_flags: ClassVar[Flag] = Flag.MAY_UNMAP | Flag.NO_FALLBACK | Flag.WRITE_COMPRESSED
    buffers: ClassVar[Buffers] = Buffers(
        read="keeps: compressed data is read into ordinary memory, and decompressed into the request's",
        write="bounces: in a new cluster pool memory stands beside it, with what surrounds it there; compressed, "
        "it lies in ordinary memory",
        zero="bounces: zeroes that must be stored are written out from pool memory",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        #: The metadata lock: never held during data I/O, nor by one who waits.
        self._lock = threading.Lock()
        #: Guest clusters, by their bytes: held alone by who may change what they map to, shared by who reads them
        #: through code.
        self._clusters = RangeLock()
        self._reader: Reader | None = None
        self._writer: Writer | None = None
        self._image: Image | None = None
        self._snapshots: Snapshots | None = None
        #: If a snapshot is shown of an image that is being written: that image's, and what they keep for us.
        self._live: Snapshots | None = None
        self._held: Entry | None = None
        self._header: Header | None = None
        self._bitmaps: Bitmaps | None = None
        #: What `dirty_log` is while there are bitmaps to mark in.
        self._log: DirtyLog | None = None
        self._marks: Marks | None = None
        self._is_preallocated: bool | None = None
        self._encryption: Encryption | None = None

    # -- making images ----------------------------------------------------------------------------------------------

    CreateOptions = Options

    @classmethod
    def create(
        cls,
        file: Layer,
        size: int,
        options: Options,
        *,
        opener: Opener,
        progress: Progress = no_progress,
    ) -> None:
        """Make an empty image of ``size`` bytes in ``file`` (see `nbdserver.format.Creates`)."""
        make_image(reach(file), size, options, opener, progress)

    @classmethod
    def measure(
        cls,
        size: int,
        options: Options,
        allocated: Iterable[tuple[int, int]],
        bitmaps: Sequence[Bitmap] | None = None,
    ) -> Measure:
        """How large would the file be (see `nbdserver.format.Creates`)?"""
        return measure(size, options, allocated, bitmaps)

    @classmethod
    def check(
        cls, file: Layer, *, repair: Repair = Repair.NONE, opener: Opener, progress: Progress = no_progress
    ) -> ImageCheck:
        """Check the image in ``file``, and mend what ``repair`` allows (see `nbdserver.format.Checks`)."""
        return check(reach(file), repair, progress)

    # -- life -------------------------------------------------------------------------------------------------------

    def open(self, opener: Opener) -> None:
        is_read_only = opener.read_only or self.file.read_only or self.snapshot is not None
        is_read_only = is_read_only or self.data_file is False or self.key_file is False
        self._header = header = self._header or self._read_header(is_read_only)
        if self._encryption is None:
            self._encryption = self._open_encryption(header, opener)
        if self.backing is None and header.backing_name is not None:
            below = opener.image(header.backing_name, header.backing_format, named_by=self)
            attach(self, "backing", below)
        storage = Storage(self.file, header.geometry.cluster_size)
        # Bitmaps are the live disk's; a snapshot has none.
        named = header if self.snapshot is None else dataclasses.replace(header, extensions={})
        self._bitmaps = Bitmaps(storage, named, size=lambda: self.size, make=self._new_bits, track=self._mark_in)
        self._open_data_file(header, opener, is_read_only)
        if not header.geometry.has_data_file:
            data = storage
        else:
            data = Storage(self.data_file or Unopened(header.size), header.geometry.cluster_size)
        if self._encryption is not None:
            data = self._encryption.storage(data, self)
        if self.snapshot is not None:
            if header.geometry.has_data_file:
                raise ConfigError(
                    f"{self.filename} has an external data file, so can have no snapshots", key="snapshot"
                )
            header = shown(storage, header, self._entry(storage, header, self.snapshot))
        if is_read_only or data.file.read_only:
            mapping = Mapping(storage, header, self.l2_cache_size, self._lock)
            self._reader = Reader(storage, data, header, mapping, self._lock, self.backing or None)
        else:
            check_writable(header, self.filename)
            self._open_writable(storage, data, header)

    def _read_header(self, is_read_only: bool) -> Header:
        """The header of an image whose refcounts are right, if they are going to be used."""
        header = read_header(self.file)
        if header.incompatible & INCOMPATIBLE_DIRTY and not is_read_only:
            check_writable(header, self.filename)
            clean_up(self.file)
            header = read_header(self.file)
        return header

    def _open_encryption(self, header: Header, opener: Opener) -> Encryption | None:
        return open_encryption(
            self.file, header, opener, key_file=self.key_file, key_env=self.key_env, key_fd=self.key_fd
        )

    def _open_data_file(self, header: Header, opener: Opener, is_read_only: bool) -> None:
        """Open the external data file if the image has one that the configuration does not give."""
        if not header.geometry.has_data_file:
            if self.data_file:
                raise ConfigError("the image has no external data file", key="data-file")
            return
        if header.is_raw and self.backing and not is_read_only:
            raise ImageError(
                "has a backing file and a raw external data file; it cannot be written and both be true",
                path=self.filename,
            )
        if self.data_file is None:
            name = header.data_file_name
            if name is None:
                raise ImageError("has an external data file and does not name it: set data-file", path=self.filename)
            layer = opener.image(name, "raw", named_by=self, read_only=is_read_only, beside=False)
            attach(self, "data_file", layer)

    def _open_writable(self, storage: Storage, data: Storage, header: Header) -> None:
        occupied, snapshots = Occupied(), read_table(storage, header.snapshots_offset, header.snapshots_count)
        head = Head(header)
        bitmaps = read_directory(storage, header)
        check_recordable(storage, bitmaps)
        refcounts = Refcounts(storage, header, occupied, self.refcount_cache_size)
        host = self._data_host(data, head) if header.geometry.has_data_file else InImage(data, refcounts, occupied)
        mapping = WritableMapping(
            storage, header, self.l2_cache_size, self._lock, refcounts=refcounts, occupied=occupied, host=host
        )
        Survey(storage, header, mapping, refcounts, snapshots, bitmaps).fill(occupied)
        storage.fill_up()
        storage.growth = GROWTH
        kept = header.autoclear & KEPT
        if not bitmaps.entries:
            kept &= ~AUTOCLEAR_BITMAPS
        if header.autoclear != kept:
            # What they promise to keep up to date, we shall not. Durable before anything else changes.
            self.file.pwrite(AUTOCLEAR_AT, AUTOCLEAR_FIELD.pack(kept))
            self.file.flush()
        if EXTENSION_BITMAPS in header.extensions and not bitmaps.entries:
            self._forget_bitmaps()
        self._reader = Reader(storage, data, header, mapping, self._lock, self.backing or None)
        self._marks = marks = Marks(storage, header)
        data_file = host if isinstance(host, DataFile) else None
        is_lazy = header.is_lazy if self.lazy_refcounts is None else self.lazy_refcounts and header.version >= 3
        users = data.file if data_file is None else self.file
        lazy = marks if is_lazy else None
        order = Order(storage, self._lock, mapping, refcounts, head, data_file, lazy, users=users)
        self._writer = Writer(
            self._reader,
            mapping,
            refcounts,
            host,
            lock=self._lock,
            clusters=self._clusters,
            discard=Discard(self.pass_discard_request, self.pass_discard_other),
            is_raw=header.is_raw,
            ahead=self._ahead(header, data),
            changed=self.changed,
            allocate=self.allocate,
            order=order,
        )
        image = Image(
            storage=storage,
            geometry=header.geometry,
            head=head,
            lock=self._lock,
            clusters=self._clusters,
            reader=self._reader,
            mapping=mapping,
            refcounts=refcounts,
            occupied=occupied,
            writer=self._writer,
            order=order,
            changed=self.changed,
        )
        self._image = image
        self._snapshots = Snapshots(image, snapshots, discard=self.pass_discard_snapshot)
        self.bitmap_list.start(
            BitmapStore(
                storage,
                bitmaps,
                kept,
                lock=self._lock,
                refcounts=refcounts,
                occupied=occupied,
                flush=order.flush,
            )
        )

    def _ahead(self, header: Header, data: Storage) -> int:
        """How much to allocate ahead: only where what is new in the file shows what the disk had there, zeroes. Of an
        external data file nobody knows where it is new."""
        has_backing = bool(self.backing) or header.backing_name is not None
        return 0 if has_backing or data.is_encrypted or self.data_file else self.allocation_ahead

    def _forget_bitmaps(self) -> None:
        """Take away the extension of bitmaps that somebody has made worthless, as QEMU does. Their clusters leak."""
        with contextlib.suppress(OSError):  # there may be no room to; so it stays, and says no more than before
            set_extension(self.file, EXTENSION_BITMAPS, None)

    def _new_bits(self, size: int, granularity: int) -> DirtyBitmap:
        assert self._opener is not None, "not open"
        return self._opener.dirty_bitmap(size, granularity)

    def _mark_in(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Have writes marked in these bitmaps and no others."""
        if self._log is None:
            if not bitmaps:
                return
            assert self._opener is not None, "not open"
            self._log = self._opener.dirty_log()
        self._log.set(bitmaps)
        log = self._log if bitmaps else None
        if log is not self.dirty_log:
            self.dirty_log = log
            self.changed(0, self.size)

    def _data_host(self, data: Storage, head: Head) -> DataFile:
        data.fill_up(head.size)
        return DataFile(
            data,
            head,
            lock=self._lock,
            clusters=self._clusters,
            runs=lambda start, end: self.reader.mapping.runs(start, end, ahead=False),
        )

    def _entry(self, storage: Storage, header: Header, id_or_name: str) -> Entry:
        """The snapshot to show. Raises ConfigError, ImageError, OSError."""
        if self._live is not None:
            entries = self._live.entries
            self._held = entry = self._live.hold(id_or_name)
        else:
            entries, _ = read_table(storage, header.snapshots_offset, header.snapshots_count)
            entry = find(entries, id_or_name)
        if entry is None:
            known = ", ".join(repr(known.name) for known in entries) or "none"
            raise ConfigError(f"{self.filename} has no snapshot {id_or_name!r}; there are: {known}", key="snapshot")
        return entry

    @contextlib.contextmanager
    def _rewriting(self) -> Iterator[None]:
        """The block gives the disk another content: all of it counts as written."""
        try:
            yield
        finally:
            if self.dirty_log is not None:
                self.dirty_log.mark(0, self.size)

    def reopen(self, opener: Opener) -> None:
        if self._live is not None or (self._snapshots is not None and self._snapshots.is_shown):
            raise ConfigError(f"{self.filename}: a snapshot of it is being shown beside it")
        try:
            self._shut()
        finally:
            self._writer = self._image = self._snapshots = self._header = self._marks = None
            self._is_preallocated = None
            self._mark_in(())
        self.open(opener)

    def close(self) -> None:
        self._shut()
        if self._live is not None and self._held is not None:
            self._live.release(self._held)

    def _shut(self) -> None:
        """Bring everything into the file, and end its use."""
        try:
            is_condemned = self._writer is not None and self._writer.is_condemned
            if self._bitmaps is not None and not is_condemned:
                self._bitmaps.stop()
        finally:
            if self._writer is not None:
                self._writer.close()

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def header(self) -> Header:
        """The header as it was when the image was opened; asserts that it has been."""
        assert self._header is not None, "not open"
        return self._header

    @property
    def reader(self) -> Reader:
        """What reads the image; asserts that the layer is open."""
        assert self._reader is not None, "not open"
        return self._reader

    @property
    def writer(self) -> Writer:
        """What writes the image; asserts that the layer is open for writing."""
        assert self._writer is not None, "not open for writing"
        return self._writer

    @property
    def bitmap_list(self) -> Bitmaps:
        """The bitmaps; asserts that the layer is open."""
        assert self._bitmaps is not None, "not open"
        return self._bitmaps

    @property
    def size(self) -> int:
        return self.reader.size

    def child_grant(self, role: str, own: Grant) -> Grant:
        # A snapshot is shown beside the disk that is being written: where its own bytes are never changes.
        is_beside = self._live is not None and role != "backing"
        return READER if is_beside else super().child_grant(role, own)

    @property
    def limits(self) -> BlockLimits:
        # Whoever writes a whole new cluster has nothing copied around it.
        return _limits(self.reader.geometry.cluster_size)

    @property
    def read_only(self) -> bool:
        return self._writer is None

    @property
    def cluster_size(self) -> int:
        return self.reader.geometry.cluster_size

    @property
    def why_uncompressed(self) -> str | None:
        return self._writer.why_uncompressed if self._writer is not None else None

    @property
    def dirty_flag(self) -> bool:
        if self._marks is not None:
            return self._marks.has(INCOMPATIBLE_DIRTY)
        return bool(self.header.incompatible & INCOMPATIBLE_DIRTY)

    @property
    def is_encrypted(self) -> bool:
        return self._encryption is not None

    def info(self) -> dict[str, Any]:
        """`nbdserver.format.Describes`."""
        is_corrupt = self._marks is not None and self._marks.has(INCOMPATIBLE_CORRUPT)
        return describe(self.header, self.bitmaps(), self._encryption, is_corrupt=is_corrupt)

    # -- the backing file's name: `nbdserver.format.HasBacking` -----------------------------------------------------

    @property
    def backing_name(self) -> str | None:
        return self.header.backing_name

    @property
    def backing_format(self) -> str | None:
        return self.header.backing_format

    def set_backing(self, name: str | None, format: str | None) -> None:
        if self._writer is None or self._marks is None:
            raise RequestError(errno.EROFS, f"{self.filename}: is open read-only")
        encoded = os.fsencode(name) if name else b""
        if encoded and self.header.is_raw:
            raise RequestError(
                errno.EINVAL, f"{self.filename}: its data file is a raw image, and shows no backing file"
            )
        if len(encoded) > BACKING_NAME_MAX:
            raise RequestError(
                errno.EINVAL, f"{self.filename}: a backing file's name has at most {BACKING_NAME_MAX} bytes"
            )
        if not encoded:
            format = None
        try:
            with self._writer.paused(), self._marks.lock:
                set_backing(self.file, encoded, os.fsencode(format) if format else None)
        except OSError as error:
            raise RequestError.of(error) from error
        self._header = dataclasses.replace(self.header, backing_name=name or None, backing_format=format or None)

    # -- where the bytes live ---------------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        zero = intent is Intent.ZERO
        extents = self._resolve_zero(offset, length) if zero else self._resolve(offset, length, intent)
        return self._watched(_joined(extents, length))

    def packed(self, offset: int) -> Packed | None:
        return self.reader.packed(offset)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        if child not in (self.backing, self.data_file):
            return ((0, self.size),)
        end = min(offset + length, self.size)
        return ((offset, end - offset),) if offset < end else ()

    def _resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        reader, behind, is_code = self.reader, offset + length, False
        for run, start, end in reader.spans(offset, length, ahead=True):
            if is_code and start >= behind:
                return  # what is written by code is not looked up ahead: the answer would not last
            is_writable = self._is_writable(run)
            is_code = intent is Intent.WRITE and not is_writable
            if is_writable:
                yield Extent(end - start, reader.data.file, reader.place(run, start), True)
            elif run.kind is Kind.NORMAL and intent is Intent.READ:
                yield from reader.stored(run, start, end)
            elif run.kind is Kind.COMPRESSED or intent is Intent.WRITE:
                yield Extent(end - start, CODE)
            elif run.kind is Kind.UNALLOCATED:
                yield from reader.below(start, end)
            else:
                yield Extent(end - start, ZERO)

    def _resolve_zero(self, offset: int, length: int) -> Iterator[Extent]:
        """Whole subclusters are given up or marked as zero, by code; parts of them are zeroed where they are.

        Answers no more than is asked: it matters where a request begins and ends.
        """
        reader = self.reader
        for run, start, end in reader.spans(offset, length):
            if run.place is None and reader.is_zero(run, start) and not self.header.is_raw:
                yield Extent(end - start, ZERO)
            elif self._is_writable(run) and self.pass_discard_request:
                first, stop = self.writer.whole(start, end)
                yield from self._in_place(run, start, first)
                if first < stop:
                    yield Extent(stop - first, CODE)
                yield from self._in_place(run, stop, end)
            else:
                yield Extent(end - start, CODE)

    def _in_place(self, run: Run, start: int, end: int) -> Iterator[Extent]:
        if start < end:
            yield Extent(end - start, self.reader.data.file, self.reader.place(run, start), True)

    def _is_writable(self, run: Run) -> bool:
        return self._writer is not None and self._writer.is_overwritable(run)

    # -- by code ----------------------------------------------------------------------------------------------------

    def read(self, request: Request) -> None:
        start, end = self.reader.geometry.span(request.offset, request.end)
        with self._watch(), self._clusters.shared(start, end - start):
            self.reader.read(request)

    def write(self, request: Request) -> None:
        try:  # as `_watch`
            if Flag.WRITE_COMPRESSED in request.asked_flags:
                self.writer.write_compressed(request)
            else:
                self.writer.write(request)
        except CorruptImage as error:
            self._condemn(error)
            raise

    def make_room(self, offset: int, length: int) -> tuple[int, int] | None:
        try:  # as `_watch`
            room = self.writer.make_room(offset, offset + length)
        except CorruptImage as error:
            self._condemn(error)
            raise
        return (room[0], min(room[1], self.size) - room[0]) if room is not None else None

    def zero(self, request: Request) -> None:
        with self._watch():
            self.writer.zero(request)

    def trim(self, request: Request) -> None:
        with self._watch():
            self.writer.trim(request)

    def flush(self) -> None:
        if self._writer is not None:
            with self._watch():
                self._writer.flush()

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        """Condemn the image if its metadata turns out to be wrong: nothing is written any more, here or elsewhere.

        (Where page faults come by it is written out, which takes less time.)
        """
        try:
            yield
        except CorruptImage as error:
            self._condemn(error)
            raise

    def _watched(self, extents: Iterator[Extent]) -> Iterator[Extent]:
        try:  # as `_watch`
            yield from extents
        except CorruptImage as error:
            self._condemn(error)
            raise

    def _condemn(self, error: CorruptImage) -> None:
        writer = self._writer
        if writer is None or error.storage not in (self.reader.storage, self.reader.data):
            return
        with self._lock:
            if writer.is_condemned:
                return
            writer.condemn(error)
        self.changed(0, self.size)
        log.error("%s; the image is marked as corrupt, and takes no more writes", error)
        assert self._marks is not None
        try:
            self._marks.set(INCOMPATIBLE_CORRUPT)
        except (OSError, RequestError) as failure:
            log.error("%s: cannot be marked as corrupt: %s", self.filename, failure)

    def make_empty(self) -> None:
        with self._rewriting():
            self.writer.make_empty()

    def empty_at_once(self) -> Callable[[], None]:
        if self._snapshots is None or self.data_file is not None:
            # What is in a data file is not counted, so it is given up place by place.
            self.make_empty()
            self.flush()
            return lambda: None
        with self._rewriting():
            return self._snapshots.empty()

    # -- size -------------------------------------------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """Make the disk larger or smaller. After an error, `size` says which it is."""
        self.grow(size)

    def grow(self, size: int, preallocation: str = "off", progress: Progress = no_progress) -> None:
        """`format.GrowsPreallocated`."""
        if self._image is None:
            raise RequestError(errno.EROFS, f"{self.filename}: is open read-only")
        with self.bitmap_list.resizing(size):
            resize(self._image, size, preallocation=preallocation, progress=progress)

    # -- snapshots --------------------------------------------------------------------------------------------------

    def snapshots(self) -> Sequence[Snapshot]:
        """`format.HasSnapshots`."""
        writable = self._snapshots or self._live
        if writable is not None:
            return [entry.info for entry in writable.entries]
        place, count = self.header.snapshots_offset, self.header.snapshots_count
        return [entry.info for entry in read_table(self.reader.storage, place, count)[0]]

    def create_snapshot(self, name: str) -> Snapshot:
        return self._changeable().create(name).info

    def apply_snapshot(self, id_or_name: str) -> None:
        snapshots = self._changeable()
        with self._rewriting(), self.bitmap_list.resizing(snapshots.size(id_or_name)):
            snapshots.apply(id_or_name)

    def delete_snapshot(self, id_or_name: str) -> None:
        self._changeable().delete(id_or_name)

    def show_snapshot(self, id_or_name: str) -> Qcow2:
        """Another layer, not open yet, that shows a snapshot of this image (`layers.snapshot.ShowsSnapshots`).

        It reads the same file and backing file for itself: where a snapshot's bytes are does not change. As long as it
        is open the snapshot is not deleted.
        """
        view = dataclasses.replace(
            self, file=bare(self.file), backing=bare(self.backing) if self.backing else False, snapshot=id_or_name
        )
        view._live, view._header = self._snapshots or self._live, self._header
        view._encryption = self._encryption
        return view

    def _changeable(self) -> Snapshots:
        if self._snapshots is None:
            raise RequestError(errno.EROFS, f"{self.filename}: is open read-only")
        if self.data_file is not None:
            raise RequestError(
                errno.ENOTSUP, f"{self.filename}: has an external data file, and so no internal snapshots"
            )
        return self._snapshots

    # -- bitmaps: `nbdserver.format.HasBitmaps` -----------------------------------------------------------------------

    def bitmaps(self) -> Sequence[Bitmap]:
        return self.bitmap_list.described()

    def use_bitmap(self, name: str) -> AbstractContextManager[Bitmap]:
        return self.bitmap_list.used(name)

    def add_bitmap(self, name: str, *, granularity: int | None = None, enabled: bool = True) -> None:
        self.bitmap_list.add(name, granularity, enabled=enabled)

    def remove_bitmap(self, name: str) -> None:
        self.bitmap_list.remove(name)

    def enable_bitmap(self, name: str) -> None:
        self.bitmap_list.enable(name)

    def disable_bitmap(self, name: str) -> None:
        self.bitmap_list.disable(name)

    def clear_bitmap(self, name: str) -> None:
        self.bitmap_list.clear(name)

    def merge_bitmap(self, name: str, source: Layer, source_name: str) -> None:
        if not isinstance(source, Qcow2):
            raise RequestError(errno.EINVAL, f"{source.type} has no bitmaps to merge")
        self.bitmap_list.merge(name, source.bitmap_list.bits(source_name))

    # -- block status -----------------------------------------------------------------------------------------------

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        if context.startswith(DIRTY_BITMAP):
            return status.dirty(self.reader, self.bitmap_list, context, offset, length)
        preallocated = context == BASE_ALLOCATION and self._has_preallocation()
        return status.status(self.reader, context, offset, length, preallocated=preallocated)

    def map(self, offset: int, length: int) -> Iterator[MapEntry]:
        return status.entries(self.reader, offset, length, preallocated=self._has_preallocation())

    def _has_preallocation(self) -> bool:
        """`status.has_preallocation`, asked once, as QEMU does: it says how the image was made."""
        if self._live is not None:
            return False  # what the file's size says is of the disk as it is now
        if self._is_preallocated is None:
            try:
                refcounts = (
                    self._writer.refcounts
                    if self._writer is not None
                    else Refcounts(self.reader.storage, self.header, Occupied(), 0)
                )
                self._is_preallocated = status.has_preallocation(self.reader, refcounts, self._lock)
            except (ImageError, OSError):
                self._is_preallocated = False  # it is extra information: without it, all that is allocated is data
        return self._is_preallocated


@functools.cache
def _limits(cluster_size: int) -> BlockLimits:
    return BlockLimits(opt_transfer=cluster_size)


def _joined(extents: Iterable[Extent], length: int) -> Iterator[Extent]:
    """The same extents, those of the first ``length`` bytes joined that continue one another. What lies behind is not
    looked at before it is wanted."""
    last: Extent | None = None
    for extent in extents:
        length -= extent.length
        if last is not None:
            if (
                extent.target is last.target
                and extent.writable == last.writable
                and (isinstance(extent.target, Special) or extent.offset == last.offset + last.length)
            ):
                extent = last._replace(length=last.length + extent.length)
            else:
                yield last
        last = extent
        if length <= 0:
            yield last
            last = None
    if last is not None:
        yield last
