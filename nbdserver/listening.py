"""Listening sockets: from an address to descriptors that accept.

A host name may have several addresses, such as 127.0.0.1 and ::1: all of them are bound, with one port. ``[::]`` is any
address of IPv6 and IPv4, as usual, unless 0.0.0.0 is listened on besides.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from nbdserver.access import ANYBODY, Rule
from nbdserver.errors import ConfigError
from nbdserver.handshake import TlsMode
from nbdserver.limits import CONNECTIONS_BACKLOG, KEEPALIVE_COUNT
from nbdserver.tls import TlsConfig
from nbdserver.uri import NbdUri, parse_listen

#: sd_listen_fds(3), SD_LISTEN_FDS_START: descriptors of socket activation begin here.
INHERITED_FIRST: Final = 3

#: What is listened on.
FAMILIES: Final = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_VSOCK)

#: How often a free port is looked for that is free on every address of a name.
_PORT_ATTEMPTS: Final = 16

#: The machine does not have this address, or not this kind of address: no reason not to listen on the others.
_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


@dataclass(frozen=True)
class ListenConfig:
    """An entry of ``listen``: where, and for whom.

    ``mode``, ``owner`` and ``group``: of a Unix socket (None: the umask's, our own). ``tls``: None for the server's
    mode. ``access``: who may connect.
    """

    address: NbdUri
    mode: int | None = None
    owner: int | None = None
    group: int | None = None
    tls: TlsMode | None = None
    access: Rule = ANYBODY

    @classmethod
    def of(cls, wanted: str | ListenConfig) -> ListenConfig:
        """An address alone is for everybody. Raises ConfigError."""
        return cls(parse_listen(wanted)) if isinstance(wanted, str) else wanted

    def check(self, tls: TlsConfig) -> None:
        """Hold it to what the server does about TLS. Raises ConfigError."""
        if tls.mode is not TlsMode.OFF:
            if self.tls is TlsMode.OFF and self.access.needs_tls:
                raise ConfigError('found "off" beside subjects or identities, which TLS tells', key="tls")
            return
        if self.tls not in (None, TlsMode.OFF):
            raise ConfigError(f'found "{self.tls}", but the server does not use TLS: see [tls]', key="tls")
        if self.access.needs_tls:
            raise ConfigError("has subjects or identities, but the server does not use TLS: see [tls]", key="access")


@dataclass(eq=False)
class Listener:
    """Where somebody listens, and the bound sockets. ``wanted`` may change while it does."""

    wanted: ListenConfig
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


class Ready:
    """Sockets that somebody else has bound for us, and listens on: systemd. Those that nobody takes stay."""

    def __init__(self, sockets: Iterable[socket.socket]) -> None:
        self.sockets = list(sockets)

    def take(self, *names: object) -> socket.socket | None:
        """The one at this address; None: there is none."""
        for ready in self.sockets:
            if _name(ready) in names:
                self.sockets.remove(ready)
                return ready
        return None

    def listeners(self) -> list[Listener]:
        """One for each that is left, for everybody."""
        rest = [Listener(ListenConfig(address_of(ready)), address_of(ready), [ready]) for ready in self.sockets]
        self.sockets = []
        return rest


def _name(bound: socket.socket) -> object:
    """A socket's address, as far as one says where to listen."""
    name = bound.getsockname()
    return name if bound.family in (socket.AF_UNIX, socket.AF_VSOCK) else name[:2]


def address_of(bound: socket.socket) -> NbdUri:
    """Where a bound socket is to be reached."""
    name = bound.getsockname()
    if bound.family == socket.AF_UNIX:
        return NbdUri(socket=os.fsdecode(name))
    if bound.family == socket.AF_VSOCK:
        return NbdUri(cid=name[0], port=name[1])
    return NbdUri(host=name[0], port=name[1])


def inherited(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """The sockets that systemd's socket activation hands us: sd_listen_fds(3), sd_listen_fds_with_names(3). What says
    so is taken out of the environment. Raises ConfigError."""
    pid, count, names = (environment.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):
        return []  # there is nothing, or it is for somebody else
    if not (count.isascii() and count.isdecimal()) or not 0 < len(count) < 6:
        raise ConfigError(f"LISTEN_FDS is {count!r}, which is no number of sockets")
    called = dict(enumerate(names.split(":"), start=INHERITED_FIRST))
    numbers = range(INHERITED_FIRST, INHERITED_FIRST + int(count))
    return [_inherited(fd, called.get(fd, "")) for fd in numbers]


def _inherited(fd: int, name: str) -> socket.socket:
    what = f"descriptor {fd} of LISTEN_FDS" + (f" ({name})" if name else "")
    try:
        os.set_inheritable(fd, False)
        ready = socket.socket(fileno=fd)
        is_listening = ready.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"{what} is no socket: {error.strerror}") from error
    if not is_listening or ready.type != socket.SOCK_STREAM or ready.family not in FAMILIES:
        raise ConfigError(f"{what} is no stream socket that listens, of TCP, Unix or vsock")
    ready.setblocking(False)
    return ready


def keep_alive(bound: socket.socket, seconds: int | None) -> None:
    """Have TCP ask whether a client is there that has been silent for so long, and give it up if it does not answer;
    None: never. Connections have what their listener has."""
    if bound.family not in (socket.AF_INET, socket.AF_INET6):
        return
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, seconds is not None)
    if seconds is not None:
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // KEEPALIVE_COUNT))
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


def bind(wanted: ListenConfig, ready: Ready | None = None, beside: Sequence[ListenConfig] = ()) -> Listener:
    """Listen where ``wanted`` says; port 0 takes a free one. Sockets of ``ready`` at that address are taken, instead of
    binding others. ``beside``: where else is listened.

    Raises ConfigError, with nothing left bound.
    """
    address, ready = wanted.address, ready or Ready(())
    try:
        if address.socket is not None:
            listener = _bind_unix(wanted, os.path.abspath(address.socket), ready)
        elif address.cid is not None:
            listener = _bind_vsock(wanted, address.cid, address.port, ready)
        else:
            listener = _bind_tcp(wanted, ready, beside)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}", key="listen") from error
    return listener


# -- TCP -----------------------------------------------------------------------------------------------------------

_Where = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]

#: Any address: of IPv4, and of both (unless the other is listened on besides).
_ANY, _ANY_OF_BOTH = "0.0.0.0", "::"
_Place = tuple[socket.AddressFamily, int, _Where]


def _bind_tcp(wanted: ListenConfig, ready: Ready, beside: Sequence[ListenConfig]) -> Listener:
    address = wanted.address
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    places = list(dict.fromkeys((family, protocol, where) for family, _, protocol, _, where in found))
    has_ipv4 = any(other.address.host == _ANY and other.address.port == address.port for other in beside)
    for attempt in range(_PORT_ATTEMPTS):
        try:
            sockets = _bind_all(places, address.port, ready, has_ipv4)
        except OSError as error:
            # The port that was free on the first address was not on another.
            if address.port != 0 or error.errno != errno.EADDRINUSE or attempt == _PORT_ATTEMPTS - 1:
                raise
        else:
            return Listener(wanted, NbdUri(host=address.host, port=sockets[0].getsockname()[1]), sockets)
    raise AssertionError("the last attempt returns or raises")


def _bind_all(places: Sequence[_Place], port: int, ready: Ready, has_ipv4: bool) -> list[socket.socket]:
    """A socket for each of the addresses that this machine has, all with one port. ``has_ipv4``: somebody else listens
    on any address of IPv4."""
    refused: OSError | None = None
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        for family, protocol, where in places:
            try:
                there = ready.take((where[0], port))
                sockets.append(there or _bind_one(family, protocol, (where[0], port, *where[2:]), has_ipv4))
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


def _bind_one(family: socket.AddressFamily, protocol: int, where: tuple[object, ...], has_ipv4: bool) -> socket.socket:
    with contextlib.ExitStack() as undo:
        bound = undo.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, protocol))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if where[0] == _ANY_OF_BOTH:  # whatever net.ipv6.bindv6only says
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, has_ipv4)
        bound.bind(where)
        _use_no_pacing(bound)
        return _listen(bound, undo)


def _use_no_pacing(bound: socket.socket) -> None:
    """Have the connections of a socket that only this machine reaches never wait for a timer before they send, as
    congestion controls do that find out what a network takes: there is none."""
    if ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
        # For speed alone: a kernel that refuses has its connections served all the same.
        with contextlib.suppress(OSError):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


# -- vsock -------------------------------------------------------------------------------------------------------------


def _bind_vsock(wanted: ListenConfig, cid: int, port: int, ready: Ready) -> Listener:
    bound = ready.take((cid, port))
    if bound is None:
        with contextlib.ExitStack() as undo:
            bound = undo.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            bound.bind((cid, port if port else socket.VMADDR_PORT_ANY))
            _listen(bound, undo)
    return Listener(wanted, NbdUri(cid=cid, port=bound.getsockname()[1]), [bound])


# -- Unix ----------------------------------------------------------------------------------------------------------


def _bind_unix(wanted: ListenConfig, path: str, ready: Ready) -> Listener:
    taken = ready.take(path, wanted.address.socket)
    if taken is not None:  # whose path, and its permissions, are systemd's
        return Listener(wanted, NbdUri(socket=path), [taken])
    bound = unix_socket(path, wanted.mode, (wanted.owner, wanted.group))
    status = os.stat(path)
    return Listener(wanted, NbdUri(socket=path), [bound], (status.st_dev, status.st_ino))


def unix_socket(
    path: str, mode: int | None = None, owners: tuple[int | None, int | None] = (None, None)
) -> socket.socket:
    """A Unix socket that listens at ``path``, with the permissions ``mode`` (None: the umask's) and the owner and group
    ``owners`` (None: ours) from the start.

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
        undo.callback(_unlink, path)
        permit(path, mode, owners)  # nobody can connect before it listens
        return _listen(bound, undo)


def permit(path: str, mode: int | None, owners: tuple[int | None, int | None]) -> None:
    """Give a socket's path its owner and permissions, as far as they are said. Raises OSError."""
    owner, group = (-1 if id is None else id for id in owners)
    if (owner, group) != (-1, -1):
        os.chown(path, owner, group)
    if mode is not None:
        os.chmod(path, mode)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


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
