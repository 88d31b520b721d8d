"""Errors, split by consequence.

=============== ===========================================================
ConfigError     the server refuses to start (or the caller's call is refused)
ImageError      this image cannot be served: path, offset, found, wanted
RequestError    one request fails with an NBD errno; the connection lives
ProtocolError   the connection ends
=============== ===========================================================

Assertions are for our bugs; these are for the world.
"""

from __future__ import annotations

import errno as _errno
from typing import Self


class NbdserverError(Exception):
    """The root of every error this package raises on purpose."""


class ConfigError(NbdserverError):
    """A setting cannot be honoured. Says file, table, key, what was found and what is allowed."""

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        table: str | None = None,
        key: str | None = None,
    ) -> None:
        self.message, self.file, self.table, self.key = message, file, table, key
        place = ": ".join(
            part
            for part in (
                file,
                f"[{table}]" if table else None,
                key,
            )
            if part
        )
        super().__init__(f"{place}: {message}" if place else message)

    def at(self, file: str | None, table: str | None) -> Self:
        """The same error, with its place in a configuration."""
        other = self.__class__.__new__(self.__class__)  # whatever its own arguments are
        other.__dict__.update(self.__dict__)
        ConfigError.__init__(other, self.message, file=file, table=table, key=self.key)
        return other


class ImageError(NbdserverError):
    """An image is broken, hostile, locked or uses what is not supported.

    ``offset`` is where in the image file the bad value lies, ``found`` and ``wanted`` are the value and
    what would have been allowed; all three are optional because a lock or a missing file has none.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        offset: int | None = None,
        found: object = None,
        wanted: object = None,
    ) -> None:
        self.message, self.path, self.offset = message, path, offset
        self.found, self.wanted = found, wanted
        text = message
        if offset is not None:
            text += f" at offset {offset:#x}"
        if found is not None:
            text += f": found {found}"
        if wanted is not None:
            text += f", wanted {wanted}"
        super().__init__(f"{path}: {text}" if path else text)


class RequestError(NbdserverError):
    """One request fails; ``errno`` is sent to the client if NBD knows it, else EIO (``wire_errno``)."""

    def __init__(self, errno: int, message: str = "") -> None:
        self.errno = errno
        super().__init__(message or _errno.errorcode.get(errno, str(errno)))

    @classmethod
    def of(cls, error: OSError) -> RequestError:
        """The RequestError for a failed system call."""
        return cls(error.errno or _errno.EIO, str(error))


class ProtocolError(NbdserverError):
    """The peer broke the protocol in a way that leaves no way on; the connection ends."""
