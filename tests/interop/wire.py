"""The NBD protocol byte by byte, for clients that libnbd would not be: rude ones. Numbers: proto.md."""

from __future__ import annotations

import socket
import struct

from nbdserver.uri import parse

GREETING = struct.Struct(">8s8sH")
OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")

IHAVEOPT = b"IHAVEOPT"
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_GO = 1, 7
REP_ACK = 1
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3


class Wire:
    """A connection at whatever stage its methods have brought it to."""

    def __init__(self, uri: str) -> None:
        address = parse(uri)
        self.export = address.export
        if address.socket is None:
            self.socket = socket.create_connection((address.host, address.port))
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address.socket)
        self.socket.settimeout(20)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes. Raises EOFError."""
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def rest(self) -> bytes:
        """All there is until the server hangs up; a reset counts as that."""
        data = b""
        try:
            while piece := self.socket.recv(1 << 16):
                data += piece
        except ConnectionError:
            pass
        return data

    def greet(self) -> None:
        magic, option, flags = GREETING.unpack(self.receive(GREETING.size))
        assert (magic, option) == (b"NBDMAGIC", IHAVEOPT)
        assert flags & FIXED_NEWSTYLE and flags & NO_ZEROES
        self.send(struct.pack(">I", FIXED_NEWSTYLE | NO_ZEROES))

    def option(self, code: int, data: bytes = b"") -> None:
        self.send(OPTION.pack(IHAVEOPT, code, len(data)) + data)

    def option_reply(self) -> tuple[int, bytes]:
        """The type and payload of one reply."""
        _, _, kind, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
        return kind, self.receive(length)

    def go(self) -> None:
        """From the beginning into transmission, with simple replies."""
        self.greet()
        name = self.export.encode()
        self.option(OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        while (kind := self.option_reply()[0]) != REP_ACK:
            assert not kind & 1 << 31, hex(kind)

    def request(self, command: int, offset: int = 0, length: int = 0, *, cookie: int = 0, data: bytes = b"") -> None:
        self.send(REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, length) + data)

    def reply(self) -> tuple[int, int]:
        """(cookie, error) of a simple reply; the data of a read follows."""
        magic, error, cookie = SIMPLE_REPLY.unpack(self.receive(SIMPLE_REPLY.size))
        assert magic == SIMPLE_REPLY_MAGIC
        return cookie, error

    def close(self) -> None:
        self.socket.close()
