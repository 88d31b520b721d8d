"""What another server exports: the handshake from the client's side, as far as LIST and INFO go.

For ``nbdserver list URI``. Simple and blocking; it trusts the server no more than the server trusts its clients:
every length is bounded, and nothing is waited for longer than a few seconds.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from nbdserver.errors import ProtocolError
from nbdserver.handshake import REPLY_MAGIC, ClientFlag, Info, Option, ReplyType, TransmissionFlag
from nbdserver.limits import CLIENT_REPLIES_COUNT_MAX, CLIENT_REPLY_MAX, CLIENT_TIMEOUT
from nbdserver.tls import CA_CERT, CLIENT_CERT, CLIENT_KEY
from nbdserver.uri import NbdUri

GREETING_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"

ERROR_BIT: Final = 1 << 31


@dataclass(frozen=True)
class RemoteExport:
    """An export as its server describes it. ``size`` is bytes."""

    name: str
    size: int
    read_only: bool
    description: str


def list_exports(address: NbdUri) -> list[RemoteExport]:
    """All exports of the server, or the one that ``address`` names. Raises ProtocolError, which names the server."""
    try:
        with _connect(address) as connection:
            client = _Client(connection)
            if address.tls:
                client.start_tls()
                client = _Client(_secured(connection, address), greeted=True)
            listed = {address.export: ""} if address.export else client.list()
            exports = [client.info(name, description) for name, description in listed.items()]
            client.abort()
            return exports
    except OSError as error:
        raise ProtocolError(f"{address}: {error.strerror or error}") from error
    except ProtocolError as error:
        raise ProtocolError(f"{address}: {error}") from error


def _secured(connection: socket.socket, address: NbdUri) -> ssl.SSLSocket:
    """The connection with TLS, the server's certificate checked by the authority's in the client's directory."""
    if address.certificates is None:
        raise ProtocolError("for TLS, name the directory of the client's certificates: ?tls-certificates=DIRECTORY")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # A server behind a Unix socket, or on another machine of ours, has no name to check.
    context.check_hostname = bool(address.host)
    try:
        context.load_verify_locations(os.path.join(address.certificates, CA_CERT))
        cert, key = (os.path.join(address.certificates, name) for name in (CLIENT_CERT, CLIENT_KEY))
        if os.path.exists(cert):
            context.load_cert_chain(cert, key)
        return context.wrap_socket(connection, server_hostname=address.host or None)
    except ssl.SSLError as error:
        raise ProtocolError(f"TLS could not begin: {error}") from error


def _connect(address: NbdUri) -> socket.socket:
    if address.socket is None and address.cid is None:
        return socket.create_connection((address.host, address.port), CLIENT_TIMEOUT)
    family = socket.AF_UNIX if address.socket is not None else socket.AF_VSOCK
    with contextlib.ExitStack() as undo:
        connection = undo.enter_context(socket.socket(family))
        connection.settimeout(CLIENT_TIMEOUT)
        connection.connect(address.socket if address.socket is not None else (address.cid, address.port))
        undo.pop_all()
        return connection


class _Client:
    """A connection in option haggling."""

    def __init__(self, connection: socket.socket, *, greeted: bool = False) -> None:
        self._connection = connection
        if greeted:
            return
        greeting = self._receive(18)
        if greeting[:8] != GREETING_MAGIC:
            raise ProtocolError("this is no NBD server: its greeting is another")
        if greeting[8:16] != OPTION_MAGIC or not greeting[17] & ClientFlag.FIXED_NEWSTYLE:
            raise ProtocolError(
                "the server does not speak the fixed newstyle handshake, and so cannot list its exports"
            )
        # The greeting's flags and the client's answer have the same bits.
        known = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
        connection.sendall(struct.pack(">I", greeting[17] & known))

    def start_tls(self) -> None:
        """Ask for TLS, which is to begin now."""
        for _ in self._ask(Option.STARTTLS, b""):
            pass

    def list(self) -> dict[str, str]:
        """The exports' names and descriptions."""
        found = {}
        for reply_type, data in self._ask(Option.LIST, b""):
            if reply_type != ReplyType.SERVER or len(data) < 4:
                raise ProtocolError(f"the server answered LIST with a reply of type {reply_type:#x}")
            end = 4 + int.from_bytes(data[:4])
            if end > len(data):
                raise ProtocolError("the server listed a name that is longer than the reply")
            found[_text(data[4:end])] = _text(data[end:])
        return found

    def info(self, name: str, description: str) -> RemoteExport:
        encoded = name.encode()
        asked = struct.pack(">I", len(encoded)) + encoded + struct.pack(">HH", 1, Info.DESCRIPTION)
        size, flags = None, TransmissionFlag(0)
        for reply_type, data in self._ask(Option.INFO, asked):
            kind = int.from_bytes(data[:2])
            if reply_type == ReplyType.INFO and kind == Info.EXPORT and len(data) == 12:
                size, bits = struct.unpack_from(">QH", data, 2)
                flags = TransmissionFlag(bits)
            elif reply_type == ReplyType.INFO and kind == Info.DESCRIPTION:
                description = _text(data[2:])
        if size is None:
            raise ProtocolError(f"the server told nothing about the export {name!r}")
        return RemoteExport(name, size, bool(flags & TransmissionFlag.READ_ONLY), description)

    def abort(self) -> None:
        """Say goodbye; a server that has left already is fine."""
        with contextlib.suppress(ProtocolError, OSError):
            self._send(Option.ABORT, b"")
            self._receive(20)

    def _ask(self, option: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The replies to an option, up to and without the ACK. Raises ProtocolError for an error reply."""
        self._send(option, data)
        for _ in range(CLIENT_REPLIES_COUNT_MAX):
            magic, to, reply_type, length = struct.unpack(">QIII", self._receive(20))
            if magic != REPLY_MAGIC or to != option or length > CLIENT_REPLY_MAX:
                raise ProtocolError(f"the server answered option {option} with something that is no reply to it")
            payload = self._receive(length)
            if reply_type == ReplyType.ACK:
                return
            if reply_type & ERROR_BIT:
                raise ProtocolError(f"the server refused option {option}: {_text(payload) or hex(reply_type)}")
            yield reply_type, payload
        raise ProtocolError(f"the server answered option {option} with more than {CLIENT_REPLIES_COUNT_MAX} replies")

    def _send(self, option: int, data: bytes) -> None:
        self._connection.sendall(OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)

    def _receive(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            piece = self._connection.recv(length - len(received))
            if not piece:
                raise ProtocolError("the server closed the connection")
            received += piece
        return received


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError("the server sent a string that is not UTF-8") from None
