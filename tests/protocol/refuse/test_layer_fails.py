"""An error of the storage: the NBD value that says it best, and never one that a client may not expect (proto.md,
"Error values")."""

from __future__ import annotations

import errno

import pytest

from nbdserver.handshake import Style
from tests.protocol.kit import EINVAL, EIO, ENOMEM, ENOSPC, EPERM, ESHUTDOWN, READ, TRIM, WRITE, WRITE_ZEROES, Enter

ERRORS = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.ESHUTDOWN: ESHUTDOWN,
    errno.EOPNOTSUPP: EINVAL,
    errno.ENOTTY: EINVAL,
    errno.ETIMEDOUT: EIO,
    errno.EBADF: EIO,
}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_its_error_is_told(enter: Enter, style: Style, number: int) -> None:
    client = enter(style, "broken")
    for command in (READ, WRITE, WRITE_ZEROES, TRIM):
        data = bytes(512) if command == WRITE else b""
        client.errs(ERRORS[number], "it is broken", command, number << 12, 512, data=data)
