"""Clients that say exactly what a test wants them to, in each style of the transmission phase. Numbers: proto.md."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import threading
from collections.abc import Callable, Sequence

from nbdserver.handshake import Option, ReplyType, Style
from nbdserver.layer import Layer
from nbdserver.request import Request
from tests.interop.wire import IHAVEOPT, OPTION, OPTION_REPLY, Wire

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108

MIB = 1 << 20
SIZE = MIB
#: More than 32 bits can say.
HUGE = 8 << 40
COOKIE = 0x0123456789ABCDEF
STYLES = tuple(Style)

#: By style: the magic and the layout of a request, and of a reply's (or chunk's) header.
_REQUESTS = {
    Style.SIMPLE: (0x25609513, ">IHHQQI"),
    Style.STRUCTURED: (0x25609513, ">IHHQQI"),
    Style.EXTENDED: (0x21E41C71, ">IHHQQQ"),
}
_REPLIES = {
    Style.SIMPLE: (0x67446698, ">IIQ"),
    Style.STRUCTURED: (0x668E33EF, ">IHHQI"),
    Style.EXTENDED: (0x6E8A278C, ">IHHQQQ"),
}
_OPTIONS = {Style.STRUCTURED: Option.STRUCTURED_REPLY, Style.EXTENDED: Option.EXTENDED_HEADERS}
_DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT, ERROR = 0, 1, 2, 5, 6, 0x8001


def text(value: str | bytes) -> bytes:
    """A string of the handshake, with its length before it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(data)) + data


def go(name: str | bytes = "", *infos: int) -> bytes:
    """The data of GO and INFO."""
    return text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta(name: str | bytes, *queries: str | bytes) -> bytes:
    """The data of SET_META_CONTEXT and LIST_META_CONTEXT."""
    return text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))


def request(
    style: Style, command: int, offset: int, length: int, *, flags: int = 0, cookie: int = COOKIE, data: bytes = b""
) -> bytes:
    """A request as it is sent; ``length`` need not be the truth about ``data``."""
    magic, layout = _REQUESTS[style]
    return struct.pack(layout, magic, flags, command, cookie, offset, length) + data


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole reply. ``chunks``: (kind, payload) of each, where replies have chunks."""

    error: int = 0
    message: str = ""
    data: bytes = b""
    chunks: tuple[tuple[int, bytes], ...] = ()


class Client(Wire):
    """A connection whose greeting has been answered."""

    def __init__(self, uri: str, *, flags: int | None = 3, source: str = "") -> None:
        super().__init__(uri, source=source)
        self.style = Style.SIMPLE
        greeting = self.receive(18)
        assert greeting == b"NBDMAGICIHAVEOPT\0\3"
        if flags is not None:
            self.send(struct.pack(">I", flags))

    def secured(self, connected: socket.socket) -> Client:
        """Go on by another socket."""
        self.socket = connected
        return self

    # -- the handshake -----------------------------------------------------------------------------------------

    def ask(self, option: int, data: bytes = b"", *, length: int | None = None) -> list[tuple[int, bytes]]:
        """Send an option; the (type, payload) of each reply to it. ``length``: what its header says of its data."""
        self.send(OPTION.pack(IHAVEOPT, option, len(data) if length is None else length) + data)
        return self.replies(option)

    def replies(self, option: int) -> list[tuple[int, bytes]]:
        found = []
        while not found or (found[-1][0] not in (ReplyType.ACK,) and not found[-1][0] & 1 << 31):
            magic, to, kind, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
            assert (magic, to) == (0x3E889045565A9, option)
            found.append((kind, self.receive(length)))
        return found

    def refused(self, option: int, data: bytes, kind: ReplyType, message: str) -> None:
        """The option gets this one error, whose message says ``message``, and the handshake goes on."""
        [(got, said)] = self.ask(option, data)
        assert (ReplyType(got), message in said.decode()) == (kind, True), said
        assert self.ask(Option.LIST)[-1] == (ReplyType.ACK, b"")

    def enter(self, style: Style = Style.SIMPLE, name: str = "", contexts: Sequence[str] = ()) -> Client:
        """On into transmission."""
        if style is not Style.SIMPLE:
            assert self.ask(_OPTIONS[style]) == [(ReplyType.ACK, b"")]
        if contexts:
            assert len(self.ask(Option.SET_META_CONTEXT, meta(name, *contexts))) == len(contexts) + 1
        assert self.ask(Option.GO, go(name, 3))[-1] == (ReplyType.ACK, b"")
        self.style = style
        return self

    # -- the transmission phase --------------------------------------------------------------------------------

    def issue(
        self, command: int, offset: int = 0, length: int | None = None, *, flags: int = 0, data: bytes = b""
    ) -> None:
        """Send a request, with the flag that says so if it has a payload."""
        if data and self.style is Style.EXTENDED:
            flags |= PAYLOAD_LEN
        self.send(request(self.style, command, offset, len(data) if length is None else length, flags=flags, data=data))

    def answer(self, offset: int = 0, length: int = 0, cookie: int = COOKIE) -> Answer:
        """The next reply, whole, of a read of ``length`` bytes (0: of another request)."""
        magic, layout = _REPLIES[self.style]
        if self.style is Style.SIMPLE:
            found, error, whose = struct.unpack(layout, self.receive(struct.calcsize(layout)))
            assert (found, whose) == (magic, cookie)
            return Answer(error, data=b"" if error else self.receive(length))
        chunks, flags = [], 0
        while not flags & _DONE:
            found, flags, kind, *rest = struct.unpack(layout, self.receive(struct.calcsize(layout)))
            assert found == magic
            assert rest[:-1] == ([cookie] if self.style is Style.STRUCTURED else [cookie, offset])
            chunks.append((kind, self.receive(rest[-1])))
        return _told(chunks, offset, length)

    def do(
        self, command: int, offset: int = 0, length: int | None = None, *, flags: int = 0, data: bytes = b""
    ) -> Answer:
        """A request and its reply."""
        self.issue(command, offset, length, flags=flags, data=data)
        return self.answer(offset, length or 0 if command == READ else 0)

    def errs(self, error: int, message: str, *args: int, flags: int = 0, data: bytes = b"") -> None:
        """The request ``args`` (command, offset, length) gets this error, with a message where there is room for one;
        and the next one is answered."""
        answer = self.do(*args, flags=flags, data=data)
        assert answer.error == error
        assert message in answer.message or self.style is Style.SIMPLE
        assert self.do(READ, 0, 4) == self.do(READ, 0, 4)
        assert self.do(READ, 0, 4).error == 0

    def tries(self, data: bytes) -> None:
        """Send what the server may hang up on before it has all been sent."""
        with contextlib.suppress(ConnectionError):
            self.send(data)

    def is_cut_off(self) -> None:
        """The server sends nothing more, and hangs up."""
        assert self.rest() == b""


def _told(chunks: list[tuple[int, bytes]], offset: int, length: int) -> Answer:
    """What chunks say, put together."""
    found: dict[int, bytes] = {}
    for kind, payload in chunks:
        if kind == ERROR:
            error, size = struct.unpack_from(">IH", payload)
            assert len(payload) == 6 + size
            return Answer(error, payload[6:].decode(), chunks=tuple(chunks))
        if kind == OFFSET_DATA:
            (at,) = struct.unpack_from(">Q", payload)
            found[at] = payload[8:]
        elif kind == OFFSET_HOLE:
            at, size = struct.unpack(">QI", payload)
            found[at] = bytes(size)
    end = offset
    for at in sorted(found):
        assert at == end, "the chunks have a gap, or overlap"
        end += len(found[at])
    assert end == offset + length
    return Answer(data=b"".join(found[at] for at in sorted(found)), chunks=tuple(chunks))


#: ``enter(style, export, contexts)``: a client in transmission.
Enter = Callable[..., Client]
#: ``secure(uri, before)``: a client that has begun TLS, and before that sent some options.
Secure = Callable[..., Client]
#: One way of leaving.
Leave = Callable[[Wire], None]


def is_served(uri: str) -> None:
    """A client that behaves gets its due."""
    for style in STYLES:
        client = Client(uri).enter(style)
        assert client.do(WRITE, 4096, data=b"here").error == 0
        assert client.do(READ, 4096, 4).data == b"here"
        client.issue(DISC, length=0)
        client.is_cut_off()
        client.close()


@dataclasses.dataclass(eq=False)
class Broken(Layer):
    """Every request fails, with the errno that its offset is in units of 4096; below 4096 none does."""

    size: int = SIZE

    def read(self, request: Request) -> None:
        self._fail(request)
        request.vector.fill(bytes(request.length))

    def write(self, request: Request) -> None:
        self._fail(request)

    zero = trim = write

    def _fail(self, request: Request) -> None:
        if request.offset >= 4096:
            raise OSError(request.offset >> 12, "it is broken")


@dataclasses.dataclass(eq=False)
class Slow(Layer):
    """Its data is in memory, and it has no way to zero but to write."""

    size: int = SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data = bytearray(b"slow" * (self.size // 4))

    def read(self, request: Request) -> None:
        request.vector.fill(bytes(self.data[request.offset : request.end]))

    def write(self, request: Request) -> None:
        self.data[request.offset : request.end] = request.vector.tobytes()


@dataclasses.dataclass(eq=False)
class Held(Layer):
    """Reads wait until ``go`` is set; ``reading`` says that one does."""

    size: int = SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.go, self.reading = threading.Event(), threading.Event()

    def read(self, request: Request) -> None:
        self.reading.set()
        assert self.go.wait(60)
        request.vector.fill(bytes(request.length))


def half_close(wire: Wire) -> None:
    """Send no more; what is answered can still be read."""
    wire.socket.shutdown(socket.SHUT_WR)


def reset(wire: Wire) -> None:
    """Go without a word: what is on its way to us is refused."""
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.close()
