"""The NBD fixed newstyle handshake, sans-IO: an option goes in, an action comes out.

The engine sends the greeting, frames the options and bounds their length; what to answer is decided here::

    engine                                   Handshake
    client flags  ───────────────────────>   client_flags()  ──> None, or End
    option, data  ───────────────────────>   option()        ──> Reply   send, wait for the next option
    option, its length (data thrown away) >  oversized()     ──> Begin   send, then the transmission phase
                                                             ──> StartTls  send, begin TLS; then secured()
                                                             ──> End     send, then close

Nothing here raises for what a client sends, waits, or knows what a socket is. Specification: proto.md of the NBD
project, "Handshake", "Metadata querying" and "Values / Handshake phase"; its words are used here.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag, StrEnum
from typing import Final

from nbdserver.access import ANYBODY, UNKNOWN, Peer, Rule
from nbdserver.errors import ConfigError
from nbdserver.limits import (
    DISK_MAX,
    MINIMUM_BLOCK_MAX,
    OPTION_MAX,
    OPTIONS_COUNT_MAX,
    PAYLOAD_MAX,
    PAYLOAD_UNTOLD_MAX,
    PREFERRED_BLOCK_DEFAULT,
    PREFERRED_BLOCK_MIN,
    QUERIES_COUNT_MAX,
    SHOWN_COUNT_MAX,
    STRING_MAX,
)

REPLY_MAGIC: Final = 0x3E889045565A9

#: The query for all contexts of dirty bitmaps: QEMU's docs/interop/nbd.rst.
DIRTY_BITMAPS: Final = "qemu:dirty-bitmap:"

#: What EXPORT_NAME appends to the answer for clients that have not negotiated NO_ZEROES.
RESERVED_ZEROES: Final = bytes(124)


class ClientFlag(IntFlag):
    """What the client answers the greeting with. The handshake flags of the greeting have the same two bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do (``NBD_FLAG_*``)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """The options that are answered with more than "unsupported" (``NBD_OPT_*``)."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class ReplyType(IntEnum):
    """``NBD_REP_*``; errors have bit 31."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


class Style(StrEnum):
    """How requests and replies of the transmission phase are framed, by what was negotiated. Of the last two EXTENDED
    takes precedence."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


class TlsMode(StrEnum):
    """Whether connections use TLS: proto.md's NOTLS, SELECTIVETLS and FORCEDTLS."""

    OFF = "off"
    ALLOWED = "allowed"
    REQUIRED = "required"


class Info(IntEnum):
    """The kinds of information in INFO and GO (``NBD_INFO_*``)."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


def encoded(text: str) -> bytes:
    """``text`` as an NBD string. ValueError, saying why, if it cannot be one (proto.md, "Conventions")."""
    if "\0" in text:
        raise ValueError("contains a NUL character")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode, and so cannot be sent as UTF-8") from error
    if len(data) > STRING_MAX:
        raise ValueError(f"is {len(data)} bytes long in UTF-8; NBD allows {STRING_MAX}")
    return data


@dataclass(frozen=True)
class ExportInfo:
    """What a client is told about an export. Sizes are bytes.

    ``name`` is the canonical name; the mapping of exports may hold the same export under another key too (the
    default export, "", usually is one that has a name). What a read-only export cannot have (trim, zero, FUA) is
    left out of its flags by itself, as is what depends on something not negotiated. ``access``: whom it is for; to
    others it is not there.

    Raises ConfigError for what the protocol cannot express.
    """

    name: str
    size: int
    description: str = ""
    read_only: bool = False
    tls_required: bool = False
    access: Rule = ANYBODY
    can_flush: bool = True
    can_fua: bool = True
    can_trim: bool = True
    can_zero: bool = True
    can_fast_zero: bool = True
    can_cache: bool = True
    can_df: bool = True
    can_multi_conn: bool = True
    rotational: bool = False
    minimum_block: int = 1
    preferred_block: int = PREFERRED_BLOCK_DEFAULT
    maximum_payload: int = PAYLOAD_MAX
    #: The meta contexts a client may select.
    contexts: tuple[str, ...] = ("base:allocation",)

    def __post_init__(self) -> None:
        for what, text in (
            ("name", self.name),
            ("description", self.description),
            *(("meta context", context) for context in self.contexts),
        ):
            try:
                encoded(text)
            except ValueError as error:
                raise ConfigError(f"the {what} of export {_shown(self.name)} {error}") from None
        if not 0 <= self.size <= DISK_MAX:
            raise ConfigError(f"export {_shown(self.name)} is {self.size} bytes large; a disk has 0 to {DISK_MAX}")
        if not self._lawful_blocks():
            raise ConfigError(
                f"export {_shown(self.name)} has block sizes {self.minimum_block} (minimum), {self.preferred_block} "
                f"(preferred) and {self.maximum_payload} (maximum payload); the first two must be powers of 2, at most "
                f"{MINIMUM_BLOCK_MAX} and at least {PREFERRED_BLOCK_MIN}, and none smaller than the one before"
            )

    @property
    def needs_tls(self) -> bool:
        """Whether it is to be had with TLS alone."""
        return self.tls_required or self.access.needs_tls

    def _lawful_blocks(self) -> bool:
        minimum, preferred, maximum = self.minimum_block, self.preferred_block, self.maximum_payload
        powers = all(value > 0 and value & (value - 1) == 0 for value in (minimum, preferred))
        ascending = minimum <= preferred <= maximum <= 0xFFFFFFFF
        return powers and ascending and minimum <= MINIMUM_BLOCK_MAX and preferred >= PREFERRED_BLOCK_MIN

    def flags(self, style: Style, *, contexts: bool = False) -> TransmissionFlag:
        """The transmission flags. DF exists only where replies are chunks; a list of meta contexts with a request for
        their status only with extended headers, and where ``contexts`` are negotiated."""
        writable = not self.read_only
        can = {
            TransmissionFlag.READ_ONLY: self.read_only,
            TransmissionFlag.SEND_FLUSH: self.can_flush,
            TransmissionFlag.SEND_FUA: self.can_fua and writable,
            TransmissionFlag.ROTATIONAL: self.rotational,
            TransmissionFlag.SEND_TRIM: self.can_trim and writable,
            TransmissionFlag.SEND_WRITE_ZEROES: self.can_zero and writable,
            TransmissionFlag.SEND_DF: self.can_df and style is not Style.SIMPLE,
            TransmissionFlag.CAN_MULTI_CONN: self.can_multi_conn,
            TransmissionFlag.SEND_CACHE: self.can_cache,
            TransmissionFlag.SEND_FAST_ZERO: self.can_fast_zero and self.can_zero and writable,
            TransmissionFlag.BLOCK_STATUS_PAYLOAD: contexts and style is Style.EXTENDED,
        }
        flags = TransmissionFlag.HAS_FLAGS
        for flag, is_set in can.items():
            if is_set:
                flags |= flag
        return flags


@dataclass(frozen=True)
class Reply:
    """Send ``data``, whole option replies, and wait for the next option."""

    data: bytes


@dataclass(frozen=True)
class StartTls:
    """Send ``data``, and let TLS begin. When it has, call `Handshake.secured`."""

    data: bytes


@dataclass(frozen=True)
class Begin:
    """Send ``data``; then the transmission phase of ``export`` begins.

    ``contexts``: the selected meta contexts, (id, name). ``payload_max``: the longest READ or WRITE, bytes.
    """

    data: bytes
    export: ExportInfo
    style: Style
    contexts: tuple[tuple[int, str], ...]
    payload_max: int


@dataclass(frozen=True)
class End:
    """Send ``data``, which may be empty, and close. ``reason`` is for the log; "" when the client wished it so."""

    data: bytes
    reason: str


Action = Reply | StartTls | Begin | End


class Handshake:
    """The server's side of one connection's handshake.

    ``exports`` gives the exports by the names they may be asked for under, "" being the default export; it is
    called again for each option, so exports may come and go. ``enter`` is given the name that transmission is about to
    begin with and gives the export, there to stay until the connection ends; it may raise `Unavailable`.
    ``stopping`` says whether the server is shutting down. ``peer`` names the client, for reasons; ``who`` is what the
    rules of exports are told of it. With ``tls`` "allowed", exports that say so are to be had with TLS alone, and are
    not listed without; with "required", all are.
    Used by one thread at a time, and not after Begin or End.
    """

    def __init__(
        self,
        exports: Callable[[], Mapping[str, ExportInfo]],
        *,
        peer: str,
        who: Peer = UNKNOWN,
        enter: Callable[[str], ExportInfo] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        tls: TlsMode = TlsMode.OFF,
    ) -> None:
        self._exports, self._peer, self._enter, self._stopping = exports, peer, enter, stopping
        self._who, self._tls, self._is_secure = who, tls, False
        self._flags = ClientFlag(0)
        self._options_count = 0
        self._style = Style.SIMPLE
        # The export that meta contexts were last selected for, and those: they hold for that name alone.
        self._contexts: tuple[str, tuple[tuple[int, str], ...]] = ("", ())

    def client_flags(self, flags: int) -> Action | None:
        """Take the client's flags: None to go on, End for flags that nobody offered it."""
        known = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)  # An IntFlag's ~ would keep to known bits.
        unknown = flags & ~known
        if unknown:
            return self._end(f"sent unknown client flags {unknown:#x}")
        self._flags = ClientFlag(flags)
        return None

    def secured(self, subject: str | None = None, identity: str | None = None) -> Peer:
        """TLS has begun, with whoever has this certificate's subject or knows the key of this name; who the client is
        now. Nothing said before counts: somebody else may have said it."""
        self._is_secure = True
        self._who = dataclasses.replace(self._who, subject=subject, identity=identity)
        self._style = Style.SIMPLE
        self._contexts = ("", ())
        return self._who

    def option(self, option: int, data: bytes) -> Action:
        """Take one option with its data (at most OPTION_MAX bytes) and answer it."""
        return self._answer(option, lambda: self._dispatch(option, data))

    def oversized(self, option: int, length: int) -> Action:
        """Answer an option whose ``length`` bytes of data were too many to keep and have been thrown away."""
        return self._answer(option, lambda: self._dispatch_oversized(option, length))

    def _answer(self, option: int, answer: Callable[[], Action]) -> Action:
        if option == Option.ABORT and self._is_fixed:
            # Its data is to be ignored, however much; it is honoured also by a server that is shutting down.
            return End(_reply(option, ReplyType.ACK), "")
        self._options_count += 1
        try:
            if self._options_count > OPTIONS_COUNT_MAX:
                return self._end(f"sent more than {OPTIONS_COUNT_MAX} options")
            if option != Option.EXPORT_NAME and not self._is_fixed:
                return self._end(f"sent option {option} but not the flag FIXED_NEWSTYLE, which allows EXPORT_NAME only")
            if self._tls is TlsMode.REQUIRED and not self._is_secure and option != Option.STARTTLS:
                raise _RefusalError(ReplyType.ERR_TLS_REQD, "this server demands TLS: send STARTTLS first")
            if self._stopping():
                raise _RefusalError(ReplyType.ERR_SHUTDOWN, "the server is shutting down")
            return answer()
        except _RefusalError as refusal:
            if option == Option.EXPORT_NAME:  # This one alone has no error reply.
                return self._end(f"asked for an export by EXPORT_NAME: {refusal.message}")
            return Reply(_reply(option, refusal.type, refusal.message.encode()))

    def _dispatch(self, option: int, data: bytes) -> Action:
        fields = _Fields(data)
        match option:
            case Option.EXPORT_NAME:
                return self._export_name(fields)
            case Option.LIST:
                return self._list(fields)
            case Option.STARTTLS:
                return self._start_tls(fields)
            case Option.INFO | Option.GO:
                return self._info(option, fields)
            case Option.STRUCTURED_REPLY:
                return self._structured_reply(fields)
            case Option.EXTENDED_HEADERS:
                return self._extended_headers(fields)
            case Option.LIST_META_CONTEXT:
                return self._list_meta_context(fields)
            case Option.SET_META_CONTEXT:
                return self._set_meta_context(fields)
            case _:
                raise _unsupported(option)

    def _dispatch_oversized(self, option: int, length: int) -> Action:
        match option:
            case Option.LIST | Option.STARTTLS | Option.STRUCTURED_REPLY | Option.EXTENDED_HEADERS:
                raise _RefusalError(ReplyType.ERR_INVALID, f"the option has {length} bytes of data; it takes none")
            case Option.SET_META_CONTEXT:
                self._contexts = ("", ())
            case Option.EXPORT_NAME | Option.INFO | Option.GO | Option.LIST_META_CONTEXT:
                pass
            case _:
                raise _unsupported(option)
        raise _RefusalError(
            ReplyType.ERR_TOO_BIG, f"the option has {length} bytes of data; this server takes {OPTION_MAX}"
        )

    def _export_name(self, fields: _Fields) -> Action:
        if self._style is Style.EXTENDED:
            raise _RefusalError(ReplyType.ERR_INVALID, "which extended headers rule out: use GO")
        name = fields.rest("export name")
        export = self._entered(name)
        data = struct.pack(">QH", export.size, export.flags(self._style))
        if not self._flags & ClientFlag.NO_ZEROES:
            data += RESERVED_ZEROES
        # It was told of no maximum, so a usual one is no promise that it has broken.
        untold = PAYLOAD_UNTOLD_MAX if export.maximum_payload == PAYLOAD_MAX else export.maximum_payload
        return self._begin(data, name, export, untold)

    def _list(self, fields: _Fields) -> Action:
        fields.end()
        replies = []
        for name, export in sorted(self._exports().items()):
            if name != export.name:  # An alias, such as the default export's: listed under its own name.
                continue
            if self._hides(export) or (export.needs_tls and not self._is_secure):
                continue
            encoded_name = name.encode()
            details = struct.pack(">I", len(encoded_name)) + encoded_name + export.description.encode()
            replies.append(_reply(Option.LIST, ReplyType.SERVER, details))
        return Reply(b"".join(replies) + _reply(Option.LIST, ReplyType.ACK))

    def _start_tls(self, fields: _Fields) -> Action:
        if self._tls is TlsMode.OFF:
            raise _RefusalError(ReplyType.ERR_POLICY, "this server does not use TLS")
        if self._is_secure:
            raise _RefusalError(ReplyType.ERR_INVALID, "TLS has begun already")
        fields.end()
        return StartTls(_reply(Option.STARTTLS, ReplyType.ACK))

    def _info(self, option: int, fields: _Fields) -> Action:
        name = fields.string("export name")
        asked = {fields.u16("information request") for _ in range(fields.u16("number of information requests"))}
        fields.end()
        export = self._find(name, ReplyType.ERR_TLS_REQD)
        if option == Option.GO and export.minimum_block > 1 and Info.BLOCK_SIZE not in asked:
            return Reply(_reply(option, ReplyType.INFO, _block_sizes(export)) + _blocks_demanded(option, export))
        if option == Option.GO:
            export = self._entered(name)
        items = self._information(export, name, asked)
        data = b"".join(_reply(option, ReplyType.INFO, item) for item in items) + _reply(option, ReplyType.ACK)
        return self._begin(data, name, export, export.maximum_payload) if option == Option.GO else Reply(data)

    def _information(self, export: ExportInfo, name: str, asked: set[int]) -> Iterable[bytes]:
        """The INFO payloads: the same for INFO and for a GO that follows it. Block sizes are told unasked too, as QEMU
        does: clients must ignore what they do not know, and one that would keep to them can only do so when told."""
        selected_for, selected = self._contexts
        flags = export.flags(self._style, contexts=selected_for == name and bool(selected))
        yield struct.pack(">HQH", Info.EXPORT, export.size, flags)
        if Info.NAME in asked:
            yield struct.pack(">H", Info.NAME) + export.name.encode()
        if Info.DESCRIPTION in asked and export.description:
            yield struct.pack(">H", Info.DESCRIPTION) + export.description.encode()
        yield _block_sizes(export)

    def _structured_reply(self, fields: _Fields) -> Action:
        fields.end()
        if self._style is Style.EXTENDED:
            raise _RefusalError(ReplyType.ERR_EXT_HEADER_REQD, "extended headers were negotiated, and stay")
        self._style = Style.STRUCTURED  # Once more does no harm, and so is allowed.
        return Reply(_reply(Option.STRUCTURED_REPLY, ReplyType.ACK))

    def _extended_headers(self, fields: _Fields) -> Action:
        fields.end()
        self._style = Style.EXTENDED
        return Reply(_reply(Option.EXTENDED_HEADERS, ReplyType.ACK))

    def _list_meta_context(self, fields: _Fields) -> Action:
        export, _, queries = self._meta_queries(fields)
        # No query asks for all there is; "namespace:" for all of the namespace, and so on.
        chosen = (
            context
            for context in export.contexts
            if not queries or any(query == context or _is_wildcard(query, context) for query in queries)
        )
        return Reply(_meta_replies(Option.LIST_META_CONTEXT, ((0, context) for context in chosen)))

    def _set_meta_context(self, fields: _Fields) -> Action:
        self._contexts = ("", ())  # Also a failing SET replaces what was set.
        if self._style is Style.SIMPLE:
            raise _RefusalError(
                ReplyType.ERR_INVALID,
                "STRUCTURED_REPLY or EXTENDED_HEADERS must be negotiated before SET_META_CONTEXT",
            )
        export, name, queries = self._meta_queries(fields)
        chosen = tuple(
            (number, context) for number, context in enumerate(export.contexts, start=1) if context in queries
        )
        self._contexts = (name, chosen)
        return Reply(_meta_replies(Option.SET_META_CONTEXT, chosen))

    def _meta_queries(self, fields: _Fields) -> tuple[ExportInfo, str, set[str]]:
        """The export asked about, the name it was called by, and the queries. What is no query of a known
        namespace is to be ignored: it matches nothing."""
        name = fields.string("export name")
        count = fields.u32("number of queries")
        if count > QUERIES_COUNT_MAX:
            raise _RefusalError(ReplyType.ERR_TOO_BIG, f"{count} queries; this server takes {QUERIES_COUNT_MAX}")
        queries = {fields.string("query") for _ in range(count)}
        fields.end()
        return self._find(name), name, queries

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._peer

    @property
    def _is_fixed(self) -> bool:
        return bool(self._flags & ClientFlag.FIXED_NEWSTYLE)

    def _find(self, name: str, insecure: ReplyType = ReplyType.ERR_POLICY) -> ExportInfo:
        """The export called ``name``. ``insecure``: how a client without TLS is told that it needs it. (ERR_TLS_REQD is
        for INFO and GO alone: proto.md, "SELECTIVETLS mode".)"""
        export = self._exports().get(name)
        if export is None or self._hides(export):
            what = f"no export is named {_shown(name)}" if name else "there is no default export"
            raise _RefusalError(ReplyType.ERR_UNKNOWN, what)
        if export.needs_tls and not self._is_secure:
            raise _RefusalError(insecure, f"export {_shown(name)} is to be had with TLS alone")
        return export

    def _hides(self, export: ExportInfo) -> bool:
        """Whether the export is not there for this client; one that TLS would show to it is. (proto.md, "NOTLS mode":
        where there is no TLS, nobody is told of it.)"""
        if not export.access.admits_origin(self._who) or (export.needs_tls and self._tls is TlsMode.OFF):
            return True
        return self._is_secure and not export.access.admits_identity(self._who)

    def _entered(self, name: str) -> ExportInfo:
        """The export that transmission is to begin with, there to stay."""
        export = self._find(name)
        try:
            return self._enter(name) if self._enter is not None else export
        except Unavailable as error:
            raise _RefusalError(ReplyType.ERR_UNKNOWN, str(error)) from error

    def _begin(self, data: bytes, name: str, export: ExportInfo, payload_max: int) -> Begin:
        selected_for, contexts = self._contexts
        return Begin(data, export, self._style, contexts if selected_for == name else (), payload_max)

    def _end(self, what: str) -> End:
        return End(b"", f"{self._peer} {what}")


class Unavailable(Exception):
    """An export cannot be had now; the message is for the client."""


class _RefusalError(Exception):
    """The option gets an error reply."""

    def __init__(self, reply_type: ReplyType, message: str) -> None:
        self.type, self.message = reply_type, message
        super().__init__(message)


def _unsupported(option: int) -> _RefusalError:
    return _RefusalError(ReplyType.ERR_UNSUP, f"option {option} is not supported")


class _Fields:
    """Takes an option's data apart, from front to back. Raises _RefusalError."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def u16(self, what: str) -> int:
        return int.from_bytes(self._take(2, what))

    def u32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what))

    def string(self, what: str) -> str:
        """A string with its 32-bit length before it."""
        return _decoded(self._take(self.u32(f"length of the {what}"), what), what)

    def rest(self, what: str) -> str:
        """All that is left, as a string."""
        return _decoded(self._take(len(self._data) - self._position, what), what)

    def end(self) -> None:
        """Nothing may be left."""
        left = len(self._data) - self._position
        if left:
            raise _RefusalError(ReplyType.ERR_INVALID, f"{left} bytes too many in the option's data")

    def _take(self, length: int, what: str) -> bytes:
        left = len(self._data) - self._position
        if length > left:
            raise _RefusalError(
                ReplyType.ERR_INVALID, f"the {what} has {length} bytes, but only {left} are left in the option"
            )
        self._position += length
        return self._data[self._position - length : self._position]


def _decoded(data: bytes, what: str) -> str:
    if len(data) > STRING_MAX:
        raise _RefusalError(
            ReplyType.ERR_INVALID, f"the {what} is {len(data)} bytes long; the protocol allows {STRING_MAX}"
        )
    if b"\0" in data:
        raise _RefusalError(ReplyType.ERR_INVALID, f"the {what} contains a NUL character")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _RefusalError(ReplyType.ERR_INVALID, f"the {what} is not valid UTF-8: {error.reason}") from error


def _is_wildcard(query: str, context: str) -> bool:
    """Whether ``query`` asks for all of a namespace, or for all of QEMU's dirty bitmaps. (A bitmap's own name may have
    colons in it.)"""
    is_namespace = query.endswith(":") and query.count(":") == 1
    return (is_namespace or query == DIRTY_BITMAPS) and context.startswith(query)


def _block_sizes(export: ExportInfo) -> bytes:
    sizes = (export.minimum_block, export.preferred_block, export.maximum_payload)
    return struct.pack(">HIII", Info.BLOCK_SIZE, *sizes)


def _blocks_demanded(option: int, export: ExportInfo) -> bytes:
    message = f"export {_shown(export.name)} takes blocks of {export.minimum_block} bytes: ask for BLOCK_SIZE"
    return _reply(option, ReplyType.ERR_BLOCK_SIZE_REQD, message.encode())


def _meta_replies(option: int, contexts: Iterable[tuple[int, str]]) -> bytes:
    replies = [
        _reply(option, ReplyType.META_CONTEXT, struct.pack(">I", number) + name.encode()) for number, name in contexts
    ]
    return b"".join(replies) + _reply(option, ReplyType.ACK)


def _reply(option: int, reply_type: ReplyType, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", REPLY_MAGIC, option, reply_type, len(data)) + data


def _shown(text: str) -> str:
    """A string that a client chose, fit for messages and logs: quoted, printable, short."""
    return repr(text if len(text) <= SHOWN_COUNT_MAX else text[:SHOWN_COUNT_MAX] + "...")
