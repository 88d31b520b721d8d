"""Image locks as QEMU takes them, so that QEMU keeps out of our images and we out of QEMU's.

QEMU's block/file-posix.c marks what a process does to an image by read-locking single bytes with OFD locks; the
locked bytes need not exist. Nobody ever *holds* a write lock: a conflict is found by asking (F_OFD_GETLK) whether
one could be had::

    byte 100 + bit   I use this permission
    byte 200 + bit   I do not let others use this permission

The bits are QEMU's ``BLK_PERM_*``. Each side marks first and asks afterwards, so of two that race at least one sees
the other.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from typing import Final

from nbdserver.errors import ImageError
from nbdserver.permissions import ALL, WRITING, Grant, Permission

log = logging.getLogger(__name__)

#: RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE of QEMU's block/file-posix.c.
USED_BASE: Final = 100
UNSHARED_BASE: Final = 200

#: struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks), padded to 8 bytes.
_FLOCK: Final = struct.Struct("hhqqi0q")

#: What a file system answers that knows no locks. QEMU's ``locking=auto`` goes on without them, and so do we.
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def lock_image(fd: int, path: str, grant: Grant) -> None:
    """Lock the open image for what ``grant`` says is done with it, until ``fd`` is closed; never waits.

    On a file system without locks this only logs. Raises ImageError when another process is in the way; what has
    been locked by then goes with the descriptor, which the caller closes.
    """
    unshared = ALL & ~grant.shared
    try:
        _mark(fd, USED_BASE, grant.used)
        _mark(fd, UNSHARED_BASE, unshared)
        in_the_way = _marked(fd, USED_BASE, unshared)
        refused = _marked(fd, UNSHARED_BASE, grant.used)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            log.warning("%s: served without an image lock: %s", path, os.strerror(error.errno))
            return
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ImageError("is locked by another process (with a write lock, so not by QEMU)", path=path) from error
        raise ImageError(f"cannot be locked: {error.strerror}", path=path) from error
    purpose = "writing" if grant.used & WRITING else "reading"
    if in_the_way:
        raise ImageError(
            f'cannot be opened for {purpose}: it is held by another process with the "{in_the_way.label}" lock '
            "(QEMU or another server)",
            path=path,
        )
    if refused:
        raise ImageError(
            f"cannot be opened for {purpose}: it is held by another process which does not share the "
            f'"{refused.label}" lock (QEMU or another server)',
            path=path,
        )


def relock_image(fd: int, path: str, before: Grant, after: Grant) -> None:
    """Have the image that is locked by ``fd`` for ``before`` be locked for ``after``, with no moment in between. Raises
    as `lock_image` does, with nothing changed."""
    try:
        lock_image(fd, path, after)
    except ImageError:
        _unmark(fd, after, before)
        raise
    _unmark(fd, before, after)


def _unmark(fd: int, grant: Grant, kept: Grant) -> None:
    """Take back the marks of ``grant`` that ``kept`` does not have."""
    for base, permissions in (
        (USED_BASE, grant.used & ~kept.used),
        (UNSHARED_BASE, kept.shared & ~grant.shared),
    ):
        for permission in permissions:
            try:
                _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, base, permission)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise


def _mark(fd: int, base: int, permissions: Permission) -> None:
    for permission in permissions:
        _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, base, permission)


def _marked(fd: int, base: int, permissions: Permission) -> Permission:
    """The first of the permissions whose byte another open file holds, or NONE."""
    for permission in permissions:
        if _fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, base, permission) != fcntl.F_UNLCK:
            return permission
    return Permission.NONE


def _fcntl(fd: int, command: int, kind: int, base: int, permission: Permission) -> int:
    """One lock call on one byte; the resulting ``l_type``."""
    byte = base + permission.bit_length() - 1
    answer = fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0])
