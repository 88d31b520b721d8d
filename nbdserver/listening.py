"""Listening sockets: from an address to descriptors that accept.

A host name may have several addresses, such as 127.0.0.1 and ::1: all of them are bound, with one port.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from nbdserver.errors import ConfigError
from nbdserver.limits import CONNECTIONS_BACKLOG
from nbdserver.uri import NbdUri

#: How often a free port is looked for that is free on every address of a name.
_PORT_ATTEMPTS: Final = 16

#: The machine does not have this address, or not this kind of address: no reason not to listen on the others.
_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


@dataclass(eq=False)
class Listener:
    """Where somebody listens, and the bound sockets."""

    #: What it really is: with a port, and an absolute path.
    address: NbdUri
    sockets: list[socket.socket]
    #: A Unix socket's device and inode: whether what is at its path is still ours.
    identity: tuple[int, int] | None = None
    #: What the engine calls its sockets, once it accepts on them.
    numbers: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Let the sockets go that nobody has taken over, and remove the path, unless somebody has put another there."""
        for bound in self.sockets:
            bound.close()
        self.sockets.clear()
        if self.identity is not None and self.address.socket is not None:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(self.address.socket)
                if (status.st_dev, status.st_ino) == self.identity:
                    os.unlink(self.address.socket)
            self.identity = None


def bind(address: NbdUri) -> Listener:
    """Listen on ``address``; port 0 takes a free one. Raises ConfigError, with nothing left bound."""
    try:
        return _bind_tcp(address) if address.socket is None else _bind_unix(os.path.abspath(address.socket))
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}", key="listen") from error


# -- TCP -----------------------------------------------------------------------------------------------------------

_Where = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
_Place = tuple[socket.AddressFamily, int, _Where]


def _bind_tcp(address: NbdUri) -> Listener:
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    places = list(dict.fromkeys((family, protocol, where) for family, _, protocol, _, where in found))
    for attempt in range(_PORT_ATTEMPTS):
        try:
            sockets = _bind_all(places, address.port)
        except OSError as error:
            # The port that was free on the first address was not on another.
            if address.port != 0 or error.errno != errno.EADDRINUSE or attempt == _PORT_ATTEMPTS - 1:
                raise
        else:
            return Listener(NbdUri(host=address.host, port=sockets[0].getsockname()[1]), sockets)
    raise AssertionError("the last attempt returns or raises")


def _bind_all(places: Sequence[_Place], port: int) -> list[socket.socket]:
    """A socket for each of the addresses that this machine has, all with one port."""
    refused: OSError | None = None
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        for family, protocol, where in places:
            try:
                sockets.append(_bind_one(family, protocol, (where[0], port, *where[2:])))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                refused = error
                continue
            undo.callback(sockets[-1].close)
            port = sockets[-1].getsockname()[1]
        if refused is not None and not sockets:
            raise refused
        undo.pop_all()
        return sockets


def _bind_one(family: socket.AddressFamily, protocol: int, where: tuple[object, ...]) -> socket.socket:
    with contextlib.ExitStack() as undo:
        bound = undo.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, protocol))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        return _listen(bound, undo)


# -- Unix ----------------------------------------------------------------------------------------------------------


def _bind_unix(path: str) -> Listener:
    bound = unix_socket(path)
    status = os.stat(path)
    return Listener(NbdUri(socket=path), [bound], (status.st_dev, status.st_ino))


def unix_socket(path: str, mode: int | None = None) -> socket.socket:
    """A Unix socket that listens at ``path``, with the permissions ``mode`` from the start (None: the umask's).

    A path that a dead server has left behind is taken over. Raises OSError.
    """
    with contextlib.ExitStack() as undo:
        bound = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        if mode is not None:
            os.fchmod(bound.fileno(), mode)  # Linux: bind() gives the file these permissions, less the umask
        try:
            bound.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            bound.bind(path)
        if mode is not None:
            os.chmod(path, mode)
        return _listen(bound, undo)


def _is_stale(path: str) -> bool:
    """Whether ``path`` is a socket that nobody listens on any more."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def _listen(bound: socket.socket, undo: contextlib.ExitStack) -> socket.socket:
    bound.listen(CONNECTIONS_BACKLOG)
    bound.setblocking(False)
    undo.pop_all()
    return bound
