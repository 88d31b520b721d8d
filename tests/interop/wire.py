"""The NBD protocol byte by byte, for clients that libnbd would not be: rude ones. Numbers: proto.md."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence

from nbdserver.uri import parse

GREETING = struct.Struct(">8s8sH")
OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")

IHAVEOPT = b"IHAVEOPT"
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_CHUNK_MAGIC = 0x6E8A278C
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_GO = 1, 7
OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = 10, 11
REP_ACK = 1
REP_ERR_UNKNOWN = 1 << 31 | 6
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS_EXT, CHUNK_ERROR = 0, 1, 2, 6, 0x8001


class Wire:
    """A connection at whatever stage its methods have brought it to."""

    #: What is going to be sent in one piece.
    _gathered: bytearray | None = None

    def __init__(self, uri: str, *, source: str = "") -> None:
        """``source``: the address to come from, by TCP."""
        address = parse(uri)
        self.export = address.export
        if address.socket is None:
            self.socket = socket.create_connection((address.host, address.port), source_address=(source, 0))
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address.socket)
        self.socket.settimeout(20)

    @classmethod
    def of(cls, connected: socket.socket) -> Wire:
        """Go on with a connection that somebody else has brought so far."""
        wire = cls.__new__(cls)
        wire.export, wire.socket = "", connected
        return wire

    def send(self, data: bytes) -> None:
        if self._gathered is None:
            self.socket.sendall(data)
        else:
            self._gathered += data

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Send what is sent meanwhile in one piece: many small ones soon fill the buffer of a socket."""
        self._gathered = bytearray()
        try:
            yield
            self.socket.sendall(self._gathered)
        finally:
            self._gathered = None

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

    def go(self, *, contexts: Sequence[str] = (), extended: bool = False) -> None:
        """From the beginning into transmission: with extended headers and meta contexts, or with simple replies."""
        self.greet()
        name = self.export.encode()
        if extended:
            self.option(OPT_EXTENDED_HEADERS)
            assert self.option_reply() == (REP_ACK, b"")
        if contexts:
            queries = b"".join(struct.pack(">I", len(query)) + query.encode() for query in contexts)
            data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(contexts)) + queries
            self.option(OPT_SET_META_CONTEXT, data)
            while self.option_reply()[0] != REP_ACK:
                pass
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

    def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 0, data: bytes = b""
    ) -> None:
        """A request with an extended header. ``length``: that of ``data``, if there is any."""
        if data and not flags & PAYLOAD_LEN:
            flags |= PAYLOAD_LEN
        head = (EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, len(data) or length)
        self.send(EXTENDED_REQUEST.pack(*head) + data)

    def chunk(self) -> tuple[int, int, int, int, bytes]:
        """One chunk with an extended header: flags, kind, cookie, offset of the request, payload."""
        magic, flags, kind, cookie, offset, length = EXTENDED_CHUNK.unpack(self.receive(EXTENDED_CHUNK.size))
        assert magic == EXTENDED_CHUNK_MAGIC
        return flags, kind, cookie, offset, self.receive(length)

    def close(self) -> None:
        self.socket.close()
