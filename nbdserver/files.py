"""Files: the only place that opens a path.

::

    layer ──file()──────────> FileOpener ──open()──> Files ──> one OpenFile per inode, locked
    layer ──image(name)─────>     │ roots, loops, depth, probing
                                  └──> registry, graph: another layer stack

`PlainFile` is `extent.OpenFile` in plain Python; `Files` the table of what is open; `FileOpener` what a layer sees.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, TypedDict

from nbdserver import dirty, registry
from nbdserver.errors import ConfigError, ImageError
from nbdserver.extent import (
    FILE_MODE,
    NO_LIMITS,
    BlockLimits,
    DirtyBitmap,
    DirtyLog,
    FileMode,
    Meter,
    MeterLimits,
    OpenFile,
)
from nbdserver.graph import Graph
from nbdserver.layer import Layer
from nbdserver.limits import DEPTH_MAX, FRAMES_COUNT_MAX, IOV_COUNT_MAX, SECRET_MAX, STATUS_COUNT_MAX, ZERO_PIECE
from nbdserver.locks import lock_image, relock_image
from nbdserver.permissions import ALL, READER, WRITER, Grant, as_backing, as_data, as_file, refused, together
from nbdserver.probe import probe
from nbdserver.ranges import Uses
from nbdserver.request import Vector

# -- one file ------------------------------------------------------------------------------------------------------

#: linux/falloc.h and linux/fs.h.
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
BLKSSZGET: Final = 0x1268
BLKDISCARD: Final = 0x1277
BLKPBSZGET: Final = 0x127B

#: How a file system or device says that it cannot do this, or not for this range (EINVAL: not its alignment).
_CANNOT: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY)


class PlainFile:
    """`extent.OpenFile` over a descriptor, in plain Python. Owns the descriptor. Goes through the page cache whatever
    the mode; "unsafe" is never synced."""

    def __init__(self, fd: int, name: str, read_only: bool, mode: FileMode = FILE_MODE) -> None:
        self._fd = fd
        self.name = name
        self.read_only = read_only
        self.limits = block_limits(fd, mode)
        self._syncs = mode.cache != "unsafe"
        self._is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._uses = Uses()
        self._sync_lock = threading.Lock()
        self._sync_failure: int | None = None

    @property
    def size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END) if self._is_device else os.fstat(self._fd).st_size

    @property
    def stored(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def read(self, offset: int, vector: Vector) -> None:
        def transfer(views: list[memoryview], at: int) -> int:
            count = os.preadv(self._fd, views, at)
            return count if count else _clear(views)

        _transfer_all(transfer, offset, vector)

    def write(self, offset: int, vector: Vector) -> None:
        def transfer(views: list[memoryview], at: int) -> int:
            count = os.pwritev(self._fd, views, at)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return count

        _transfer_all(transfer, offset, vector)

    def copy_to(self, offset: int, target: PlainFile, target_offset: int, length: int) -> None:
        """Have the kernel copy a range, which the file has, into another file. Raises OSError: also where it cannot."""
        while length:
            count = os.copy_file_range(self._fd, target._fd, length, offset, target_offset)
            if count == 0:
                raise OSError(errno.EOPNOTSUPP, "ends where it is to be copied", self.name)
            offset, target_offset, length = offset + count, target_offset + count, length - count

    def zero(self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool) -> None:
        if length == 0:
            return
        if may_unmap and self._punch(offset, length):
            return
        # A device that cannot zero by command has the kernel write the zeroes: the fallback by another name.
        if not (self._is_device and no_fallback) and self._fallocate(FALLOC_FL_ZERO_RANGE, offset, length):
            return
        if no_fallback:
            raise OSError(errno.ENOTSUP, "no fast way to zero", self.name)
        zeroes = Vector.of(min(length, ZERO_PIECE))
        for start in range(0, length, ZERO_PIECE):
            self.write(offset + start, zeroes.slice(0, min(ZERO_PIECE, length - start)))

    def discard(self, offset: int, length: int) -> None:
        if self._is_device:
            self._discard_device(offset, length)
        elif length > 0:
            self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def sync(self) -> None:
        if not self._syncs:
            return
        with self._sync_lock:
            if self._sync_failure is not None:
                raise OSError(
                    self._sync_failure, f"an earlier sync failed: {os.strerror(self._sync_failure)}", self.name
                )
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                # The kernel has dropped the dirty pages and tells only once: no later sync may say all is well.
                self._sync_failure = error.errno or errno.EIO
                raise

    def resize(self, size: int) -> None:
        if self._is_device:
            raise OSError(errno.ENOTSUP, "a block device cannot be resized", self.name)
        os.ftruncate(self._fd, size)

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """As `OpenFile.status`; after STATUS_COUNT_MAX runs, more than one reply holds, the rest counts as data."""
        runs: list[tuple[int, bool]] = []
        end = offset + length
        while offset < end:
            hole = self._seek(offset, os.SEEK_HOLE) if len(runs) < STATUS_COUNT_MAX else end
            is_data = hole > offset
            run_end = min(hole if is_data else self._seek(offset, os.SEEK_DATA), end)
            if run_end <= offset:  # a hole was filled between the two questions
                continue
            runs.append((run_end - offset, is_data))
            offset = run_end
        return runs

    def use(self, offset: int, length: int) -> contextlib.AbstractContextManager[object]:
        return self._uses.use(offset, length)

    def wait_unused(self, offset: int, length: int) -> None:
        self._uses.wait_unused(offset, length)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"PlainFile({self.name!r}{', read-only' if self.read_only else ''})"

    def _punch(self, offset: int, length: int) -> bool:
        """Make the range a hole, inside the file; False if that cannot be done here."""
        end = offset + length
        if end > self.size and not self._is_device:
            # Grow by writing the last byte, which is in the range: ftruncate could cut off a write that has made
            # the file longer since its size was read.
            self.write(end - 1, Vector.of(1))
        return self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Whether the file could do that; raises OSError if it can but failed."""
        try:
            fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            return False
        return True

    def _discard_device(self, offset: int, length: int) -> None:
        block = self.limits.pwrite_zeroes_alignment  # a logical block: the kernel takes no less
        start = -(-offset // block) * block
        end = (offset + length) // block * block
        if start >= end:
            return
        try:
            fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("=QQ", start, end - start))
        except OSError as error:
            if error.errno not in _CANNOT:
                raise

    def _seek(self, offset: int, whence: int) -> int:
        """Where the next hole or data from ``offset`` begins; a file that cannot tell is data up to its end."""
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # past the end, or nothing but a hole up to it
                return offset if whence == os.SEEK_HOLE else FILE_END
            if error.errno not in _CANNOT:
                raise
            size = self.size
            if whence == os.SEEK_HOLE:
                return max(size, offset)
            return offset if offset < size else FILE_END


#: Past the end of every file.
FILE_END: Final = 1 << 63


def block_limits(fd: int, mode: FileMode) -> BlockLimits:
    """What requests to the file are held to, as QEMU's file-posix has it: on block devices zeroing and discarding are
    better aligned. How much a device takes at once is the kernel's business."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return BlockLimits(max_transfer=mode.max_transfer) if mode.max_transfer else NO_LIMITS
    logical, physical = (_ioctl_int(fd, request) for request in (BLKSSZGET, BLKPBSZGET))
    return BlockLimits(
        max_transfer=mode.max_transfer,
        opt_transfer=physical,
        pwrite_zeroes_alignment=logical,
        pdiscard_alignment=max(_queue_attribute(status.st_rdev, "discard_granularity"), logical),
        rotational=bool(_queue_attribute(status.st_rdev, "rotational")),
    )


def _ioctl_int(fd: int, request: int) -> int:
    """The answer of an ioctl that gives an int."""
    return int(struct.unpack("=i", fcntl.ioctl(fd, request, bytes(4)))[0])


def _queue_attribute(device: int, name: str) -> int:
    """A number that a block device says of itself in sysfs; 0 if it does not. A partition has its disk's."""
    directory = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for place in (directory, f"{directory}/.."):
        with contextlib.suppress(OSError, ValueError), open(f"{place}/queue/{name}") as file:
            return int(file.read())
    return 0


def _transfer_all(transfer: Callable[[list[memoryview], int], int], offset: int, vector: Vector) -> None:
    """Call ``transfer(views, offset)``, which says how many bytes it did, until the whole vector is done."""
    views = [view for view in vector.views() if len(view)]
    first = 0
    while first < len(views):
        count = transfer(views[first : first + IOV_COUNT_MAX], offset)
        offset += count
        while first < len(views) and count >= len(views[first]):
            count -= len(views[first])
            first += 1
        if count:
            views[first] = views[first][count:]


def _clear(views: list[memoryview]) -> int:
    for view in views:
        view[:] = bytes(len(view))
    return sum(len(view) for view in views)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which Python's ``os`` lacks. Raises OSError."""
    while _libc().fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# -- all files -----------------------------------------------------------------------------------------------------

#: Makes an open file of (descriptor, name, read_only, mode); owns the descriptor, also if it fails.
Wrap = Callable[[int, str, bool, FileMode], OpenFile]


def _plain(fd: int, name: str, read_only: bool, mode: FileMode) -> OpenFile:
    """A file of plain Python's."""
    return PlainFile(fd, name, read_only, mode)


class BusyError(ImageError):
    """Somebody in this process has the file open already, as ``file``, and does not share it."""

    def __init__(self, message: str, *, path: str, file: OpenFile) -> None:
        super().__init__(message, path=path)
        self.file = file


#: What a file is, whatever it is called: ("file", st_dev, st_ino) or ("device", st_rdev, 0).
Identity = tuple[str, int, int]

#: A user that nobody has named.
SOMEBODY: Final = "somebody"

#: Users that open a file in the same way share it.
_How = tuple[FileMode, Grant]


class _Wanted(NamedTuple):
    """A file that somebody wants to have open, and for what."""

    fd: int
    path: str
    read_only: bool
    mode: FileMode
    grant: Grant
    user: str


@dataclass(eq=False, slots=True)
class _Open:
    """One open inode and how many hold it."""

    file: OpenFile
    #: What is done with it, and what others may do.
    grant: Grant
    #: The descriptor that carries the image locks. One of its own: io_uring keeps those it does I/O on for a while
    #: after they have been closed, even by the end of the process, and their locks with them.
    lock: int
    path: str
    #: Whoever has it open, in words.
    users: list[str]


class Files:
    """Every file that a server has open: one per inode, whatever its names. Thread-safe.

    A file is open for one writer, or for any number of readers (and for any number of those who only look what it is);
    those that use it in the same way share one descriptor. With ``force_share`` readers do not mind whether somebody
    writes: QEMU's ``force-share``.
    """

    def __init__(self, wrap: Wrap = _plain, *, force_share: bool = False) -> None:
        self._wrap, self._force_share = wrap, force_share
        self._lock = threading.Lock()
        self._open: dict[Identity, dict[_How, _Open]] = {}
        self._places: dict[OpenFile, tuple[Identity, _How]] = {}
        #: Serialises the opening of images that images name, so that one image is opened once.
        self.images_lock = threading.RLock()
        #: The read-only images that images named, for all who name them.
        self.images: weakref.WeakValueDictionary[tuple[Identity, str, FileMode], Layer] = weakref.WeakValueDictionary()

    def open(
        self,
        path: str,
        *,
        read_only: bool,
        mode: FileMode = FILE_MODE,
        grant: Grant | None = None,
        user: str = SOMEBODY,
    ) -> OpenFile:
        """Open and lock a regular file or block device; give it back with `close`.

        ``grant``: what the users of the layer that opens it are granted; by default the client of an export. ``user``:
        who that is, for errors. Raises ImageError, also if others do what this user does not let them do, or the other
        way round.
        """
        grant = as_file(grant or (READER if read_only else WRITER), read_only=read_only)
        if read_only and self._force_share:
            grant = grant._replace(shared=ALL)
        fd = _open(path, read_only=read_only)
        with self._lock, contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            return self._enter(_Wanted(fd, path, read_only, mode, grant, user), undo)

    def _enter(self, wanted: _Wanted, undo: contextlib.ExitStack) -> OpenFile:
        identity = _identity(os.fstat(wanted.fd))
        same = self._open.get(identity, {})
        for other in same.values():
            _check_together(wanted, other)
        use = (wanted.mode, wanted.grant)
        known = same.get(use)
        if known is not None:
            known.users.append(wanted.user)
            return known.file
        try:
            lock = os.open(f"/proc/self/fd/{wanted.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"cannot be opened again for its lock: {error.strerror}", path=wanted.path) from error
        undo.callback(os.close, lock)
        lock_image(lock, wanted.path, wanted.grant)
        undo.pop_all()
        try:
            file = self._wrap(wanted.fd, wanted.path, wanted.read_only, wanted.mode)
        except BaseException:
            os.close(lock)
            raise
        self._open.setdefault(identity, {})[use] = _Open(file, wanted.grant, lock, wanted.path, [wanted.user])
        self._places[file] = (identity, use)
        return file

    def reopen(self, file: OpenFile, *, read_only: bool, grant: Grant | None = None, user: str = SOMEBODY) -> OpenFile:
        """The same file, open anew for other access by its one user; ``file`` is closed then, and nobody uses it. It is
        locked all the while. Raises as `open`, with nothing changed."""
        grant = as_file(grant or (READER if read_only else WRITER), read_only=read_only)
        with self._lock, contextlib.ExitStack() as undo:
            identity, how = self._places[file]
            known = self._open[identity][how]
            wanted = _Wanted(_open_again(known, read_only=read_only), known.path, read_only, how[0], grant, user)
            undo.callback(os.close, wanted.fd)
            for other in self._open[identity].values():
                if other is not known:
                    _check_together(wanted, other)
                elif len(known.users) > 1:
                    raise BusyError(f"{known.users[0]} has it open, too", path=known.path, file=file)
            relock_image(known.lock, known.path, known.grant, grant)
            undo.pop_all()
            return self._exchange(file, wanted)

    def _exchange(self, file: OpenFile, wanted: _Wanted) -> OpenFile:
        """Have ``wanted``, which is locked for, in the place of ``file``. Raises ImageError, with nothing changed."""
        identity, how = self._places[file]
        known = self._open[identity][how]
        try:
            new = self._wrap(wanted.fd, wanted.path, wanted.read_only, wanted.mode)
        except BaseException:
            relock_image(known.lock, known.path, wanted.grant, known.grant)
            raise
        del self._open[identity][how], self._places[file]
        place = (wanted.mode, wanted.grant)
        self._open[identity][place] = _Open(new, wanted.grant, known.lock, wanted.path, known.users)
        self._places[new] = (identity, place)
        file.close()
        return new

    def memory(self, size: int, name: str) -> OpenFile:
        """Anonymous memory of ``size`` zero bytes; give it back with `close`. Raises ConfigError."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise ConfigError(f"no memory of {size} bytes can be had: {error}") from error
        return self._wrap(fd, name, False, FILE_MODE)

    def close(self, file: OpenFile, user: str = SOMEBODY) -> None:
        """Let one user of the file go; the last one closes it."""
        with self._lock:  # held to the end, or the next to open the file would meet our own image lock
            place = self._places.get(file)
            if place is None:
                file.close()
                return
            identity, use = place
            known = self._open[identity][use]
            known.users.remove(user)
            if known.users:
                return
            del self._open[identity][use], self._places[file]
            if not self._open[identity]:
                del self._open[identity]
            try:
                file.close()
            finally:
                os.close(known.lock)

    def probe(self, path: str) -> str:
        """The format of the image at ``path``, by its bytes (see `nbdserver.probe`). Raises ImageError."""
        file = self.open(path, read_only=True)
        try:
            return probe(file)
        finally:
            self.close(file)


def make(path: str) -> None:
    """Have a file at ``path``: an empty one, if there is nothing. Raises ImageError."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        pass
    except OSError as error:
        raise ImageError(f"cannot be made: {error.strerror}", path=path) from error
    except ValueError as error:
        raise ImageError(f"is no path: {error}", path=repr(path)) from error


def _open(path: str, *, read_only: bool) -> int:
    """A descriptor of the regular file or block device at ``path``. Raises ImageError."""
    try:
        kind = os.stat(path).st_mode  # before opening: to open a FIFO waits, a tape rewinds, a watchdog starts
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise ImageError(f"is {_kind(kind)}; an image is a regular file or a block device", path=path)
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        purpose = "reading" if read_only else "reading and writing"
        raise ImageError(f"cannot be opened for {purpose}: {error.strerror}", path=path) from error
    except ValueError as error:
        raise ImageError(f"is no path: {error}", path=repr(path)) from error


def _open_again(known: _Open, *, read_only: bool) -> int:
    """Another descriptor of a file that is open, wherever it is by now. Raises ImageError."""
    try:
        return os.open(f"/proc/self/fd/{known.lock}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        purpose = "reading" if read_only else "reading and writing"
        raise ImageError(f"cannot be opened for {purpose}: {error.strerror}", path=known.path) from error


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISCHR(mode):
        return "a character device"
    return "a socket" if stat.S_ISSOCK(mode) else "of an unknown kind"


def _identity(status: os.stat_result) -> Identity:
    if stat.S_ISBLK(status.st_mode):
        return ("device", status.st_rdev, 0)
    return ("file", status.st_dev, status.st_ino)


def _check_together(wanted: _Wanted, known: _Open) -> None:
    """Raise ImageError if one of two users of a file does what the other does not share."""
    for one, who, other, whom in (
        (wanted.grant, wanted.user, known.grant, known.users[0]),
        (known.grant, known.users[0], wanted.grant, wanted.user),
    ):
        permission = refused(one, other)
        if permission:
            alias = f" (one of them as {known.path})" if known.path != wanted.path else ""
            against = f"which {whom} does not allow" if who != whom else "but has it open already, not to be written"
            message = f"{who} {permission.verb} it, {against}{alias}"
            raise BusyError(message, path=wanted.path, file=known.file)


class _Unmetered:
    """A meter that never waits."""

    def charge(self, length: int, write: bool) -> None:
        pass


# -- what a layer sees ---------------------------------------------------------------------------------------------


#: Old images name a protocol where their backing file's format belongs; QEMU takes that for raw.
PROTOCOL_FORMATS: Final = {"file": "raw", "host_device": "raw"}


class Source(TypedDict):
    """Where a secret is: what `layer.Opener.secret` takes, all but one None."""

    key_file: str | None
    key_env: str | None
    key_fd: int | None


class Keys:
    """Secrets that have names, and images that some of them are the keys of, wherever such an image is named."""

    def __init__(self, sources: Mapping[str, Source] = MappingProxyType({})) -> None:
        self.sources = sources
        self._images: dict[str, Source] = {}
        self._read: dict[int, bytes] = {}

    def source(self, name: str) -> Source:
        """Where the secret of that name is. Raises ConfigError."""
        source = self.sources.get(name)
        if source is None:
            known = ", ".join(map(repr, self.sources)) or "none"
            raise ConfigError(f"there is no secret {name!r}; there are: {known} (name one by --object secret)")
        return source

    def set(self, path: str, name: str) -> None:
        """Have the secret of that name be the key of the image at ``path``. Raises ConfigError."""
        self._images[os.path.realpath(path)] = self.source(name)

    def read_once(self, fd: int) -> bytes:
        """All that a descriptor gives; it may be the key of several images. Raises ConfigError."""
        if fd not in self._read:
            self._read[fd] = _contents("key-fd", fd)
        return self._read[fd]

    def of(self, path: str) -> dict[str, object]:
        """The keys of the layer for the image at ``path`` that say where its passphrase is; none if nobody said."""
        return dict(self._images.get(os.path.realpath(path), {}))


class FileOpener:
    """`layer.Opener` for one export: what its layers may open.

    ``roots``: directories, besides the one of the image that the configuration names, that images may name files
    in (both include what is below them). ``read_only``: whether the export is. ``user``: who opens files, for errors.
    ``keys``: `Keys`.
    """

    def __init__(
        self,
        graph: Graph,
        files: Files,
        *,
        roots: Sequence[str | os.PathLike[str]] = (),
        read_only: bool = False,
        allocate: Callable[[int], Vector] = Vector.of,
        meter: Callable[[MeterLimits], Meter] | None = None,
        dirty_bitmap: Callable[[int, int], DirtyBitmap] = dirty.Bitmap,
        dirty_log: Callable[[], DirtyLog] = dirty.Log,
        user: str = SOMEBODY,
        keys: Keys | None = None,
    ) -> None:
        self._graph, self._files = graph, files
        self._keys = keys or Keys()
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self.read_only = read_only
        self._allocate = allocate
        self._meter = meter
        self.dirty_bitmap, self.dirty_log = dirty_bitmap, dirty_log
        self._user = user
        sys.setrecursionlimit(max(sys.getrecursionlimit(), FRAMES_COUNT_MAX))
        #: How the file was opened of the image that this opener opens: those that it names are opened likewise.
        self._mode = FILE_MODE
        #: The images on the way from the configured one to the one that this opener opens.
        self._chain: tuple[Identity, ...] = ()

    def for_access(self, *, read_only: bool) -> FileOpener:
        if read_only == self.read_only:
            return self
        other = copy.copy(self)
        other.read_only = read_only
        return other

    def file(self, path: str, *, read_only: bool, mode: FileMode = FILE_MODE, grant: Grant | None = None) -> OpenFile:
        self._mode = mode
        return self._files.open(path, read_only=read_only, mode=mode, grant=grant, user=self._user)

    def reopen(self, file: OpenFile, *, read_only: bool) -> OpenFile:
        return self._files.reopen(file, read_only=read_only, user=self._user)

    def memory(self, size: int, name: str) -> OpenFile:
        return self._files.memory(size, name)

    def release(self, file: OpenFile) -> None:
        self._files.close(file, self._user)

    def allocate(self, length: int) -> Vector:
        return self._allocate(length)

    def secret(self, *, key_file: str | None, key_env: str | None, key_fd: int | None) -> bytes:
        sources = {"key-file": key_file, "key-env": key_env, "key-fd": key_fd}
        given = [(key, source) for key, source in sources.items() if source is not None]
        if len(given) != 1:
            found = " and ".join(key for key, _ in given) or "none"
            raise ConfigError(f"found {found}; a secret has exactly one source: {', '.join(sources)}", key="key-file")
        key, source = given[0]
        if isinstance(source, int):
            return self._keys.read_once(source)
        return _environment(source) if key == "key-env" else _contents(key, source)

    def named_secret(self, name: str) -> bytes:
        return self.secret(**self._keys.source(name))

    def meter(self, limits: MeterLimits) -> Meter:
        return self._meter(limits) if self._meter is not None else _Unmetered()

    def image(
        self, name: str, format: str | None, *, named_by: Layer, read_only: bool = True, beside: bool = True
    ) -> Layer:
        source = named_by.filename
        if format is None and not read_only:
            raise ImageError(f"names {name!r} without a format; only read-only images are probed", path=source)
        path = resolve_name(name, source, beside=beside)
        roots = self._roots if self._chain else (*self._roots, *own_roots(source))
        within(path, roots, name, source)
        try:
            chain = self._chain or (() if source is None else (_identity_at(source),))
            identity = _identity_at(path)
        except OSError as error:
            raise ImageError(f"names {name!r}; {path} cannot be opened: {error.strerror}", path=source) from error
        if identity in chain:
            raise ImageError(f"names {name!r}, which closes a loop in its chain", path=source)
        if len(chain) + 2 > DEPTH_MAX:  # with this image and the file that it is in
            raise ImageError(f"names {name!r}, which makes a chain deeper than {DEPTH_MAX}", path=source)
        grant = as_backing(named_by.grant) if read_only else as_data(together([named_by.grant, WRITER]))
        role = "backing" if read_only else "data_file"
        with self._files.images_lock:
            format = PROTOCOL_FORMATS.get(format, format) if format else self._files.probe(path)
            if read_only:
                shared = self._files.images.get((identity, format, self._mode))
                if shared is not None:
                    _all_within(shared, roots, source)  # whoever opened it first may have had wider roots
                    if self._graph.share(shared, user=role, grant=grant, parent=named_by):
                        return shared
            opener = FileOpener(
                self._graph,
                self._files,
                read_only=read_only,
                allocate=self._allocate,
                meter=self._meter,
                dirty_bitmap=self.dirty_bitmap,
                dirty_log=self.dirty_log,
                user=self._user,
                keys=self._keys,
            )
            opener._roots, opener._chain = roots, (*chain, identity)
            layer = registry.image(path, format, self._mode, self._keys.of(path))
            self._graph.open(layer, opener, user=role, grant=grant, parent=named_by)
            if read_only:
                self._files.images[identity, format, self._mode] = layer
            return layer


def _environment(name: str) -> bytes:
    """The value of an environment variable. Raises ConfigError."""
    value = os.environb.get(os.fsencode(name))
    if value is None:
        raise ConfigError(f"there is no environment variable {name!r}", key="key-env")
    return value


def _contents(key: str, source: str | int) -> bytes:
    """All that a file holds, or that a descriptor, which stays open, gives. Raises ConfigError."""
    name = source if isinstance(source, str) else f"descriptor {source}"
    try:
        with open(source, "rb", closefd=isinstance(source, str)) as file:
            data: bytes | None = file.read(SECRET_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}", key=key) from error
    except (ValueError, OverflowError, TypeError) as error:  # no path, or no int that a descriptor can be
        raise ConfigError(f"{name} cannot be: {error}", key=key) from error
    if data is None:
        raise ConfigError(f"{name} does not wait for what is to be read from it", key=key)
    if len(data) > SECRET_MAX:
        raise ConfigError(f"{name} is longer than {SECRET_MAX} bytes, so no secret", key=key)
    return data


def resolve_name(name: str, named_by: str | None, *, beside: bool = True) -> str:
    """The path that an image at ``named_by`` means by ``name``, as QEMU combines them. Raises ImageError.

    A relative name is relative to the directory of the image; not ``beside``: to the working directory.

    A name with a colon before its first slash names a protocol, of which only ``file:`` is taken (relative, too, to
    the directory of the image); a path that begins so is written ``./a:b``.
    """
    scheme, colon, rest = name.partition(":")
    if colon and "/" not in scheme:
        if scheme != "file":
            raise ImageError(f"names {name!r}: images may name files only, no other protocol", path=named_by)
        name = rest
    if not name or "\0" in name:
        raise ImageError(f"names {name!r}, which is no path", path=named_by)
    if os.path.isabs(name) or not beside:
        return name
    if named_by is None:
        raise ImageError(f"an image that is no file names {name!r}; nothing says relative to what")
    return os.path.join(os.path.dirname(named_by), name)


def own_roots(path: str | None) -> tuple[str, ...]:
    """The directory of the configured image, in which images may name files: where it is called so, and where it is."""
    if path is None:
        return ()
    return tuple({os.path.realpath(os.path.dirname(path)), os.path.dirname(os.path.realpath(path))})


def within(path: str, roots: Iterable[str], name: str, named_by: str | None) -> None:
    """Raise ImageError if ``path``, which the image ``named_by`` calls ``name``, lies in none of the directories."""
    real = os.path.realpath(path)
    if any(os.path.commonpath((root, real)) == root for root in roots):
        return
    raise ImageError(
        f"names {name!r}, which is {real}, outside the roots that images may name files in "
        f'({", ".join(roots) or "none"}); to allow it, set roots = ["{os.path.dirname(real)}"] in the '
        f"configuration, or give --root {os.path.dirname(real)}",
        path=named_by,
    )


def _all_within(layer: Layer, roots: Iterable[str], named_by: str | None) -> None:
    below = [layer]
    while below:
        layer = below.pop()
        if layer.filename is not None:
            within(layer.filename, roots, layer.filename, named_by)
        below.extend(child for _, child in layer.children())


def _identity_at(path: str) -> Identity:
    return _identity(os.stat(path))
