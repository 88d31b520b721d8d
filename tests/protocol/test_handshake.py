"""The handshake's answers, by proto.md: one behaviour a test, and one cause a refusal."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping

import pytest

from nbdserver import limits
from nbdserver.access import Peer, Rule
from nbdserver.errors import ConfigError
from nbdserver.handshake import (
    Begin,
    End,
    ExportInfo,
    Handshake,
    Info,
    Option,
    Reply,
    ReplyType,
    StartTls,
    Style,
    TlsMode,
    TransmissionFlag,
)

FIXED = 1
NO_ZEROES = 2
VM = ExportInfo("vm", 10_000, "a machine", minimum_block=1, preferred_block=65536)
GOLDEN = ExportInfo("golden", 4096, read_only=True)
DEJA_VU = ExportInfo("déjà vu", 512)
EXPORTS = {"vm": VM, "": VM, "golden": GOLDEN, "déjà vu": DEJA_VU}


def shake(flags: int = FIXED, exports: Mapping[str, ExportInfo] = EXPORTS, stopping: bool = False) -> Handshake:
    handshake = Handshake(lambda: exports, peer="127.0.0.1:5", stopping=lambda: stopping)
    assert handshake.client_flags(flags) is None
    return handshake


def replies(data: bytes, option: int) -> Iterator[tuple[int, bytes]]:
    """The (type, payload) of each option reply, all of them well-formed and to ``option``."""
    while data:
        magic, to, reply_type, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        assert to == option
        assert len(data) >= 20 + length
        yield reply_type, data[20 : 20 + length]
        data = data[20 + length :]


def ask(handshake: Handshake, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    """The replies to an option that does not end the handshake."""
    action = handshake.option(option, data)
    assert isinstance(action, Reply)
    return list(replies(action.data, option))


def refused(handshake: Handshake, option: int, data: bytes, reply_type: ReplyType) -> str:
    """The message of the one error reply that ``option`` gets."""
    [(got, message)] = ask(handshake, option, data)
    assert got == reply_type
    return message.decode()


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(data)) + data


def go(name: str | bytes, *infos: int) -> bytes:
    return text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta(name: str | bytes, *queries: str | bytes) -> bytes:
    return text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))


def structured(handshake: Handshake) -> Handshake:
    assert ask(handshake, Option.STRUCTURED_REPLY) == [(ReplyType.ACK, b"")]
    return handshake


# -- client flags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_known_client_flags_go_on(flags: int) -> None:
    assert Handshake(lambda: EXPORTS, peer="p").client_flags(flags) is None


@pytest.mark.parametrize("flags", [4, 7, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    action = Handshake(lambda: EXPORTS, peer="p").client_flags(flags)
    assert action == End(b"", f"p sent unknown client flags {flags & ~3:#x}")


def test_client_without_fixed_newstyle_may_choose_an_export() -> None:
    assert isinstance(shake(0).option(Option.EXPORT_NAME, b"vm"), Begin)


@pytest.mark.parametrize("option", [Option.ABORT, Option.LIST, Option.GO, 5, 99])
def test_client_without_fixed_newstyle_has_no_other_option(option: int) -> None:
    action = shake(NO_ZEROES).option(option, go("vm"))
    assert isinstance(action, End)
    assert action.data == b""
    assert "not the flag FIXED_NEWSTYLE" in action.reason


# -- EXPORT_NAME -------------------------------------------------------------------------------------------------


def test_export_name_answers_size_flags_and_124_zeroes() -> None:
    action = shake().option(Option.EXPORT_NAME, b"golden")
    data = struct.pack(">QH", 4096, GOLDEN.flags(Style.SIMPLE)) + bytes(124)
    assert action == Begin(data, GOLDEN, Style.SIMPLE, (), limits.PAYLOAD_UNTOLD_MAX)


def test_export_name_without_zeroes() -> None:
    action = shake(FIXED | NO_ZEROES).option(Option.EXPORT_NAME, b"golden")
    data = struct.pack(">QH", 4096, GOLDEN.flags(Style.SIMPLE))
    assert action == Begin(data, GOLDEN, Style.SIMPLE, (), limits.PAYLOAD_UNTOLD_MAX)


def test_a_maximum_payload_holds_for_who_was_not_told_of_it() -> None:
    small = {"s": ExportInfo("s", 4096, maximum_payload=1 << 20)}
    for option, data in ((Option.EXPORT_NAME, b"s"), (Option.GO, go("s"))):
        action = shake(exports=small).option(option, data)
        assert isinstance(action, Begin)
        assert action.payload_max == 1 << 20


def test_export_name_keeps_what_was_negotiated() -> None:
    handshake = structured(shake())
    ask(handshake, Option.SET_META_CONTEXT, meta("vm", "base:allocation"))
    action = handshake.option(Option.EXPORT_NAME, b"vm")
    assert isinstance(action, Begin)
    assert action.style is Style.STRUCTURED
    assert [name for _, name in action.contexts] == ["base:allocation"]


def test_export_name_in_utf8() -> None:
    action = shake().option(Option.EXPORT_NAME, "déjà vu".encode())
    assert isinstance(action, Begin)
    assert action.export is DEJA_VU


def test_empty_export_name_is_the_default_export() -> None:
    action = shake().option(Option.EXPORT_NAME, b"")
    assert isinstance(action, Begin)
    assert action.export is VM


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nosuch", "no export is named 'nosuch'"),
        (b"vm\0", "contains a NUL character"),
        (b"\xff", "not valid UTF-8"),
        (b"x" * 4097, "4097 bytes long"),
    ],
)
def test_export_name_refused_ends_the_connection_without_data(data: bytes, reason: str) -> None:
    action = shake().option(Option.EXPORT_NAME, data)
    assert isinstance(action, End)
    assert action.data == b""
    assert reason in action.reason
    assert "127.0.0.1:5" in action.reason


def test_no_default_export() -> None:
    action = shake(exports={"vm": VM}).option(Option.EXPORT_NAME, b"")
    assert isinstance(action, End)
    assert "no default export" in action.reason


# -- ABORT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"bye"])
def test_abort_is_acknowledged_whatever_its_data(data: bytes) -> None:
    action = shake().option(Option.ABORT, data)
    assert isinstance(action, End)
    assert list(replies(action.data, Option.ABORT)) == [(ReplyType.ACK, b"")]
    assert action.reason == ""


def test_abort_with_oversized_data_is_acknowledged_too() -> None:
    action = shake().oversized(Option.ABORT, 1 << 20)
    assert isinstance(action, End)
    assert list(replies(action.data, Option.ABORT)) == [(ReplyType.ACK, b"")]


# -- LIST --------------------------------------------------------------------------------------------------------


def test_list_is_sorted_and_describes_and_omits_aliases() -> None:
    server = ReplyType.SERVER
    assert ask(shake(), Option.LIST) == [
        (server, text("déjà vu")),
        (server, text("golden")),
        (server, text("vm") + b"a machine"),
        (ReplyType.ACK, b""),
    ]


def test_list_has_an_export_whose_name_is_empty() -> None:
    assert ask(shake(exports={"": ExportInfo("", 1)}), Option.LIST) == [
        (ReplyType.SERVER, text("")),
        (ReplyType.ACK, b""),
    ]


def test_list_of_nothing() -> None:
    assert ask(shake(exports={}), Option.LIST) == [(ReplyType.ACK, b"")]


def test_list_with_data_is_invalid() -> None:
    assert "1 bytes too many" in refused(shake(), Option.LIST, b"x", ReplyType.ERR_INVALID)


# -- INFO and GO -------------------------------------------------------------------------------------------------

EXPORT_ITEM = (ReplyType.INFO, struct.pack(">HQH", Info.EXPORT, VM.size, VM.flags(Style.SIMPLE)))
BLOCKS_ITEM = (ReplyType.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, 1, 65536, limits.PAYLOAD_MAX))
NAME_ITEM = (ReplyType.INFO, struct.pack(">H", Info.NAME) + b"vm")
DESCRIPTION_ITEM = (ReplyType.INFO, struct.pack(">H", Info.DESCRIPTION) + b"a machine")
ACK = (ReplyType.ACK, b"")


def test_info_tells_export_and_block_sizes_unasked() -> None:
    assert ask(shake(), Option.INFO, go("vm")) == [EXPORT_ITEM, BLOCKS_ITEM, ACK]


def test_info_tells_name_and_description_on_request() -> None:
    answer = ask(shake(), Option.INFO, go("vm", Info.DESCRIPTION, Info.NAME))
    assert answer == [EXPORT_ITEM, NAME_ITEM, DESCRIPTION_ITEM, BLOCKS_ITEM, ACK]


def test_info_tells_the_canonical_name_of_the_default_export() -> None:
    assert NAME_ITEM in ask(shake(), Option.INFO, go("", Info.NAME))


def test_info_omits_a_description_that_is_not_there() -> None:
    kinds = [int.from_bytes(data[:2]) for _, data in ask(shake(), Option.INFO, go("golden", 2))[:-1]]
    assert kinds == [Info.EXPORT, Info.BLOCK_SIZE]


def test_unknown_and_repeated_information_requests_are_ignored() -> None:
    assert ask(shake(), Option.INFO, go("vm", 4711, 3, 3, 0, 0)) == [EXPORT_ITEM, BLOCKS_ITEM, ACK]


def test_info_does_not_begin() -> None:
    handshake = shake()
    ask(handshake, Option.INFO, go("vm"))
    assert isinstance(handshake.option(Option.GO, go("golden")), Begin)


def test_go_answers_as_info_does_and_begins() -> None:
    handshake = shake()
    info = ask(handshake, Option.INFO, go("vm", Info.NAME))
    action = handshake.option(Option.GO, go("vm", Info.NAME))
    assert isinstance(action, Begin)
    assert list(replies(action.data, Option.GO)) == info
    assert (action.export, action.style, action.contexts) == (VM, Style.SIMPLE, ())


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    ("data", "reply_type", "message"),
    [
        (go("nosuch"), ReplyType.ERR_UNKNOWN, "no export is named 'nosuch'"),
        (go("\x1b[31m"), ReplyType.ERR_UNKNOWN, r"no export is named '\x1b[31m'"),
        (b"", ReplyType.ERR_INVALID, "length of the export name"),
        (b"\0\0\0\2vm", ReplyType.ERR_INVALID, "number of information requests"),
        (b"\0\0\0\3vm", ReplyType.ERR_INVALID, "the export name has 3 bytes, but only 2 are left"),
        (b"\xff\xff\xff\xffvm\0\0", ReplyType.ERR_INVALID, "export name"),
        (go("vm")[:-1] + b"\1", ReplyType.ERR_INVALID, "information request has 2 bytes, but only 0"),
        (go("vm") + b"\0", ReplyType.ERR_INVALID, "1 bytes too many"),
        (go("v\0m"), ReplyType.ERR_INVALID, "NUL"),
        (go(b"\xc3\x28"), ReplyType.ERR_INVALID, "not valid UTF-8"),
        (go("x" * 4097), ReplyType.ERR_INVALID, "4097 bytes long; the protocol allows 4096"),
    ],
)
def test_info_and_go_refuse(option: int, data: bytes, reply_type: ReplyType, message: str) -> None:
    handshake = shake()
    assert message in refused(handshake, option, data, reply_type)
    assert ask(handshake, Option.INFO, go("vm")), "the handshake goes on"


def test_longest_name_is_looked_up() -> None:
    name = "é" * 2048
    export = ExportInfo(name, 1)
    action = shake(exports={name: export}).option(Option.GO, go(name))
    assert isinstance(action, Begin)
    assert action.export is export


def test_exports_are_live() -> None:
    exports: dict[str, ExportInfo] = {}
    handshake = shake(exports=exports)
    refused(handshake, Option.GO, go("vm"), ReplyType.ERR_UNKNOWN)
    exports["vm"] = VM
    assert isinstance(handshake.option(Option.GO, go("vm")), Begin)


# -- STRUCTURED_REPLY --------------------------------------------------------------------------------------------


def test_structured_replies_bring_df() -> None:
    action = structured(shake()).option(Option.GO, go("vm"))
    assert isinstance(action, Begin)
    assert action.style is Style.STRUCTURED
    [(_, item), *_] = replies(action.data, Option.GO)
    assert int.from_bytes(item[-2:]) & TransmissionFlag.SEND_DF


def test_structured_reply_may_be_repeated() -> None:
    structured(structured(shake()))


def test_structured_reply_with_data_is_invalid_and_not_negotiated() -> None:
    handshake = shake()
    refused(handshake, Option.STRUCTURED_REPLY, b"\0", ReplyType.ERR_INVALID)
    action = handshake.option(Option.GO, go("vm"))
    assert isinstance(action, Begin)
    assert action.style is Style.SIMPLE


# -- EXTENDED_HEADERS --------------------------------------------------------------------------------------------


def extended(handshake: Handshake) -> Handshake:
    assert ask(handshake, Option.EXTENDED_HEADERS) == [(ReplyType.ACK, b"")]
    return handshake


def flags_of(handshake: Handshake, option: int) -> int:
    """The transmission flags that INFO or GO tells of "vm"."""
    [(_, item), *_] = replies(handshake.option(option, go("vm")).data, option)
    return int.from_bytes(item[-2:])


@pytest.mark.parametrize("before", [shake, lambda: structured(shake()), lambda: extended(shake())])
def test_extended_headers_need_nothing_before_and_bring_df(before: Callable[[], Handshake]) -> None:
    handshake = extended(before())
    assert flags_of(handshake, Option.INFO) & TransmissionFlag.SEND_DF
    action = handshake.option(Option.GO, go("vm"))
    assert isinstance(action, Begin)
    assert action.style is Style.EXTENDED


def test_extended_headers_with_data_are_invalid_and_not_negotiated() -> None:
    handshake = shake()
    refused(handshake, Option.EXTENDED_HEADERS, b"\0", ReplyType.ERR_INVALID)
    action = handshake.option(Option.GO, go("vm"))
    assert isinstance(action, Begin)
    assert action.style is Style.SIMPLE


def test_structured_replies_after_extended_headers_are_refused_and_change_nothing() -> None:
    handshake = extended(shake())
    refused(handshake, Option.STRUCTURED_REPLY, b"", ReplyType.ERR_EXT_HEADER_REQD)
    action = handshake.option(Option.GO, go("vm"))
    assert isinstance(action, Begin)
    assert action.style is Style.EXTENDED


def test_export_name_after_extended_headers_ends_the_connection() -> None:
    action = extended(shake()).option(Option.EXPORT_NAME, b"vm")
    assert isinstance(action, End)
    assert "extended headers" in action.reason


def test_contexts_need_no_structured_replies_beside_extended_headers() -> None:
    handshake = extended(shake())
    assert ask(handshake, Option.SET_META_CONTEXT, meta("vm", "base:allocation"))[-1] == ACK
    assert begun(handshake, "vm") == [(1, "base:allocation")]


def test_contexts_may_be_named_in_requests_only_where_they_are_negotiated() -> None:
    payload = TransmissionFlag.BLOCK_STATUS_PAYLOAD
    plain = structured(shake())
    ask(plain, Option.SET_META_CONTEXT, meta("vm", "base:allocation"))
    assert not flags_of(plain, Option.INFO) & payload
    for selected, expected in (("golden", 0), ("vm", payload)):
        handshake = extended(shake())
        ask(handshake, Option.SET_META_CONTEXT, meta(selected, "base:allocation"))
        assert [flags_of(handshake, option) & payload for option in (Option.INFO, Option.GO)] == [expected, expected]


def test_go_tells_what_info_told() -> None:
    for before in (shake, lambda: structured(shake()), lambda: extended(shake())):
        for infos in ((), (Info.NAME, Info.BLOCK_SIZE)):
            handshake = before()
            told = ask(handshake, Option.INFO, go("vm", *infos))
            action = handshake.option(Option.GO, go("vm", *infos))
            assert list(replies(action.data, Option.GO)) == told


# -- whom exports are for ----------------------------------------------------------------------------------------

MINE = Rule(users=(1000,))
ALICES = Rule(users=(1000,), subjects=("CN=alice",))


def shake_who(who: Peer, rule: Rule) -> Handshake:
    """With an export "private" that this rule is for, which is the default export too."""
    private = ExportInfo("private", 1 << 20, access=rule)
    exports = {"vm": ExportInfo("vm", 1 << 20), "private": private, "": private}
    handshake = Handshake(lambda: exports, peer="p", who=who, tls=TlsMode.ALLOWED)
    assert handshake.client_flags(FIXED) is None
    return handshake


def test_an_export_is_there_for_whom_it_is_for() -> None:
    handshake = shake_who(Peer(uid=1000), MINE)
    assert names(handshake) == ["private", "vm"]
    assert isinstance(handshake.option(Option.GO, go("")), Begin)


@pytest.mark.parametrize("name", ["private", ""])
def test_to_others_it_is_not_there(name: str) -> None:
    """Nor are they told that it would be there with TLS."""
    for rule in (MINE, ALICES):
        handshake = structured(shake_who(Peer(uid=1), rule))
        assert names(handshake) == ["vm"]
        missing = "no export is named 'private'" if name else "there is no default export"
        for option in (Option.INFO, Option.GO):
            assert refused(handshake, option, go(name), ReplyType.ERR_UNKNOWN) == missing
        for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            assert refused(handshake, option, meta(name), ReplyType.ERR_UNKNOWN) == missing
        assert isinstance(handshake.option(Option.EXPORT_NAME, name.encode()), End)


def test_who_one_is_is_asked_by_tls() -> None:
    handshake = shake_who(Peer(uid=1000), ALICES)
    assert names(handshake) == ["vm"]
    refused(handshake, Option.GO, go("private"), ReplyType.ERR_TLS_REQD)
    assert isinstance(handshake.option(Option.STARTTLS, b""), StartTls)
    assert handshake.secured("CN=alice", None) == Peer(uid=1000, subject="CN=alice")
    assert names(handshake) == ["private", "vm"]
    assert isinstance(handshake.option(Option.GO, go("private")), Begin)


def test_with_tls_it_is_not_there_for_others() -> None:
    for subject in ("CN=bob", None):
        handshake = shake_who(Peer(uid=1000), ALICES)
        handshake.option(Option.STARTTLS, b"")
        handshake.secured(subject, "alice")
        assert names(handshake) == ["vm"]
        refused(handshake, Option.GO, go("private"), ReplyType.ERR_UNKNOWN)


def test_where_there_is_no_tls_what_needs_it_is_not_there() -> None:
    """proto.md, "NOTLS mode": never ERR_TLS_REQD. A listener may be without TLS while the server has it."""
    for export in (ExportInfo("private", 0, tls_required=True), ExportInfo("private", 0, access=ALICES)):
        exports = {"private": export}
        handshake = Handshake(lambda exports=exports: exports, peer="p", who=Peer(uid=1000))
        assert handshake.client_flags(FIXED) is None
        assert names(handshake) == []
        for option in (Option.INFO, Option.GO):
            refused(handshake, option, go("private"), ReplyType.ERR_UNKNOWN)


# -- STARTTLS ----------------------------------------------------------------------------------------------------

SECRET = ExportInfo("secret", 1 << 20, tls_required=True)


def shake_tls(mode: TlsMode) -> Handshake:
    handshake = Handshake(lambda: {**EXPORTS, "secret": SECRET}, peer="127.0.0.1:5", tls=mode)
    assert handshake.client_flags(FIXED) is None
    return handshake


def secure(handshake: Handshake) -> Handshake:
    action = handshake.option(Option.STARTTLS, b"")
    assert isinstance(action, StartTls)
    assert list(replies(action.data, Option.STARTTLS)) == [(ReplyType.ACK, b"")]
    handshake.secured()
    return handshake


def names(handshake: Handshake) -> list[str]:
    return [payload[4:].decode() for kind, payload in ask(handshake, Option.LIST) if kind == ReplyType.SERVER]


def test_without_tls_starttls_is_against_the_policy() -> None:
    assert "does not use TLS" in refused(shake(), Option.STARTTLS, b"", ReplyType.ERR_POLICY)


@pytest.mark.parametrize("mode", [TlsMode.ALLOWED, TlsMode.REQUIRED])
def test_starttls_with_data_is_invalid_and_tls_does_not_begin(mode: TlsMode) -> None:
    refused(shake_tls(mode), Option.STARTTLS, b"x", ReplyType.ERR_INVALID)


@pytest.mark.parametrize("mode", [TlsMode.ALLOWED, TlsMode.REQUIRED])
def test_second_starttls_is_invalid(mode: TlsMode) -> None:
    refused(secure(shake_tls(mode)), Option.STARTTLS, b"", ReplyType.ERR_INVALID)


@pytest.mark.parametrize("option", [2**32 - 1, 4, *(set(Option) - {Option.ABORT, Option.STARTTLS, Option.EXPORT_NAME})])
def test_where_tls_is_required_nothing_else_is_answered_before(option: int) -> None:
    handshake = shake_tls(TlsMode.REQUIRED)
    refused(handshake, option, go("vm"), ReplyType.ERR_TLS_REQD)
    assert isinstance(secure(handshake).option(Option.GO, go("vm")), Begin)


def test_where_tls_is_required_export_name_before_it_ends_the_connection() -> None:
    action = shake_tls(TlsMode.REQUIRED).option(Option.EXPORT_NAME, b"vm")
    assert isinstance(action, End)
    assert action.data == b""
    assert "TLS" in action.reason


def test_where_tls_is_required_abort_is_still_acknowledged() -> None:
    assert isinstance(shake_tls(TlsMode.REQUIRED).option(Option.ABORT, b""), End)


def test_where_tls_is_allowed_other_exports_need_none() -> None:
    assert isinstance(shake_tls(TlsMode.ALLOWED).option(Option.GO, go("vm")), Begin)


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_export_to_be_had_with_tls_alone(option: Option) -> None:
    handshake = shake_tls(TlsMode.ALLOWED)
    assert "'secret' is to be had with TLS alone" in refused(handshake, option, go("secret"), ReplyType.ERR_TLS_REQD)
    assert not isinstance(secure(handshake).option(option, go("secret")), End)
    assert isinstance(handshake.option(Option.GO, go("secret")), Begin)


def test_export_to_be_had_with_tls_alone_is_not_listed_without() -> None:
    handshake = shake_tls(TlsMode.ALLOWED)
    assert "secret" not in names(handshake)
    assert "secret" in names(secure(handshake))


def test_export_name_of_an_export_to_be_had_with_tls_alone_ends_the_connection() -> None:
    assert isinstance(shake_tls(TlsMode.ALLOWED).option(Option.EXPORT_NAME, b"secret"), End)


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_of_an_export_to_be_had_with_tls_alone(option: Option) -> None:
    """ERR_TLS_REQD is for INFO and GO: proto.md, "SELECTIVETLS mode"."""
    refused(structured(shake_tls(TlsMode.ALLOWED)), option, meta("secret", "base:allocation"), ReplyType.ERR_POLICY)


@pytest.mark.parametrize("before", [structured, extended])
def test_nothing_said_before_tls_counts(before: Callable[[Handshake], Handshake]) -> None:
    handshake = before(shake_tls(TlsMode.ALLOWED))
    ask(handshake, Option.SET_META_CONTEXT, meta("vm", "base:allocation"))
    action = secure(handshake).option(Option.GO, go("vm"))
    assert isinstance(action, Begin)
    assert (action.style, action.contexts) == (Style.SIMPLE, ())


# -- block sizes -------------------------------------------------------------------------------------------------


def test_go_without_the_block_size_is_refused_where_it_matters() -> None:
    sectors = {"s": ExportInfo("s", 1 << 20, minimum_block=4096)}
    told, (kind, message) = ask(shake(exports=sectors), Option.GO, go("s"))
    assert told == (ReplyType.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, 4096, 4096, limits.PAYLOAD_MAX))
    assert kind == ReplyType.ERR_BLOCK_SIZE_REQD
    assert b"blocks of 4096 bytes" in message
    assert isinstance(shake(exports=sectors).option(Option.INFO, go("s")), Reply)
    assert isinstance(shake(exports=sectors).option(Option.GO, go("s", Info.BLOCK_SIZE)), Begin)


# -- meta contexts -----------------------------------------------------------------------------------------------

LISTED = (ReplyType.META_CONTEXT, b"\0\0\0\0base:allocation")


@pytest.mark.parametrize("queries", [(), ("base:",), ("base:allocation",), ("qemu:", "base:allocation", "base:")])
def test_list_meta_context_lists_each_match_once(queries: tuple[str, ...]) -> None:
    assert ask(structured(shake()), Option.LIST_META_CONTEXT, meta("vm", *queries)) == [LISTED, ACK]


@pytest.mark.parametrize(
    "query", ["qemu:", "x-mine:thing", "base:alloc", "base:allocation2", "base", "", "nocolon", ":"]
)
@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_queries_that_match_nothing_are_ignored(query: str, option: int) -> None:
    assert ask(structured(shake()), option, meta("vm", query)) == [ACK]


def test_list_meta_context_lists_before_structured_replies_and_selects_nothing() -> None:
    handshake = shake()
    assert ask(handshake, Option.LIST_META_CONTEXT, meta("vm")) == [LISTED, ACK]
    action = structured(handshake).option(Option.GO, go("vm"))
    assert isinstance(action, Begin)
    assert action.contexts == ()


def selected(handshake: Handshake, name: str, *queries: str) -> list[tuple[int, str]]:
    """What SET_META_CONTEXT answers, (id, name)."""
    *contexts, last = ask(handshake, Option.SET_META_CONTEXT, meta(name, *queries))
    assert last == ACK
    assert all(reply_type == ReplyType.META_CONTEXT for reply_type, _ in contexts)
    return [(int.from_bytes(data[:4]), data[4:].decode()) for _, data in contexts]


def begun(handshake: Handshake, name: str) -> list[tuple[int, str]]:
    action = handshake.option(Option.GO, go(name))
    assert isinstance(action, Begin)
    return list(action.contexts)


def test_set_meta_context_selects_once_with_the_id_told() -> None:
    handshake = structured(shake())
    contexts = selected(handshake, "vm", "base:allocation", "base:allocation", "x-other:y")
    assert [name for _, name in contexts] == ["base:allocation"]
    assert begun(handshake, "vm") == contexts


def test_set_meta_context_gives_each_context_its_own_id() -> None:
    names = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")
    handshake = structured(shake(exports={"d": ExportInfo("d", 1, contexts=names)}))
    contexts = selected(handshake, "d", *reversed(names))
    assert {name for _, name in contexts} == set(names)
    assert len({number for number, _ in contexts}) == 3


def test_wildcards_list_their_namespace_only() -> None:
    names = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")
    handshake = shake(exports={"d": ExportInfo("d", 1, contexts=names)})
    answer = ask(handshake, Option.LIST_META_CONTEXT, meta("d", "qemu:"))
    assert [data[4:].decode() for _, data in answer[:-1]] == list(names[1:])


def test_all_dirty_bitmaps_are_a_query_and_their_names_may_have_colons() -> None:
    names = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:a:b")
    handshake = shake(exports={"d": ExportInfo("d", 1, contexts=names)})
    for query, listed in (
        ("qemu:dirty-bitmap:", names[2:]),
        ("qemu:dirty-bitmap:a:", ()),
        ("qemu:dirty-bitmap:a:b", names[3:]),
        ("qemu:dirty", ()),
    ):
        answer = ask(handshake, Option.LIST_META_CONTEXT, meta("d", query))
        assert tuple(data[4:].decode() for _, data in answer[:-1]) == listed


@pytest.mark.parametrize("queries", [(), ("base:",)])
def test_set_meta_context_selects_nothing(queries: tuple[str, ...]) -> None:
    handshake = structured(shake())
    assert selected(handshake, "vm", *queries) == []
    assert begun(handshake, "vm") == []


def test_set_meta_context_replaces() -> None:
    handshake = structured(shake())
    selected(handshake, "vm", "base:allocation")
    selected(handshake, "vm")
    assert begun(handshake, "vm") == []


@pytest.mark.parametrize("bad", [b"", meta("nosuch", "base:allocation"), meta("vm", "base:\0"), meta("vm")[:-1]])
def test_failing_set_meta_context_replaces_too(bad: bytes) -> None:
    handshake = structured(shake())
    selected(handshake, "vm", "base:allocation")
    assert ask(handshake, Option.SET_META_CONTEXT, bad)[0][0] & 1 << 31
    assert begun(handshake, "vm") == []


def test_oversized_set_meta_context_replaces_too() -> None:
    handshake = structured(shake())
    selected(handshake, "vm", "base:allocation")
    assert isinstance(handshake.oversized(Option.SET_META_CONTEXT, 1 << 20), Reply)
    assert begun(handshake, "vm") == []


def test_contexts_hold_for_the_export_they_were_selected_for() -> None:
    handshake = structured(shake())
    selected(handshake, "golden", "base:allocation")
    assert begun(handshake, "vm") == []


def test_contexts_hold_for_the_name_that_was_used() -> None:
    handshake = structured(shake())
    contexts = selected(handshake, "", "base:allocation")
    assert begun(handshake, "") == contexts


def test_contexts_outlive_information_about_other_exports() -> None:
    handshake = structured(shake())
    contexts = selected(handshake, "vm", "base:allocation")
    ask(handshake, Option.INFO, go("golden"))
    ask(handshake, Option.LIST_META_CONTEXT, meta("golden"))
    assert begun(handshake, "vm") == contexts


def test_set_meta_context_needs_structured_replies() -> None:
    message = refused(shake(), Option.SET_META_CONTEXT, meta("vm", "base:allocation"), ReplyType.ERR_INVALID)
    assert "STRUCTURED_REPLY" in message


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "reply_type", "message"),
    [
        (meta("nosuch"), ReplyType.ERR_UNKNOWN, "no export is named 'nosuch'"),
        (b"", ReplyType.ERR_INVALID, "length of the export name"),
        (b"\0\0\0\x09vm\0\0\0\0", ReplyType.ERR_INVALID, "export name has 9 bytes, but only 6"),
        (text("vm"), ReplyType.ERR_INVALID, "number of queries"),
        (meta("vm") + b"x", ReplyType.ERR_INVALID, "1 bytes too many"),
        (text("vm") + b"\0\0\0\1", ReplyType.ERR_INVALID, "length of the query"),
        (text("vm") + b"\0\0\0\1\0\0\0\5base", ReplyType.ERR_INVALID, "query has 5 bytes, but only 4"),
        (meta("vm", "base:\0"), ReplyType.ERR_INVALID, "the query contains a NUL"),
        (meta("vm", b"\x80"), ReplyType.ERR_INVALID, "the query is not valid UTF-8"),
        (meta("vm", "q" * 4097), ReplyType.ERR_INVALID, "the query is 4097 bytes long"),
        (meta("vm", *["base:"] * 129), ReplyType.ERR_TOO_BIG, "129 queries; this server takes 128"),
        (text("vm") + b"\xff\xff\xff\xff", ReplyType.ERR_TOO_BIG, "4294967295 queries"),
    ],
)
def test_meta_context_refuses(option: int, data: bytes, reply_type: ReplyType, message: str) -> None:
    assert message in refused(structured(shake()), option, data, reply_type)


# -- everything else ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [0, 4, 12, 0xFFFFFFFF])
def test_other_options_are_unsupported(option: int) -> None:
    """Among them PEEK_EXPORT."""
    assert refused(shake(), option, b"data", ReplyType.ERR_UNSUP) == f"option {option} is not supported"


@pytest.mark.parametrize(
    ("option", "reply_type"),
    [
        (Option.LIST, ReplyType.ERR_INVALID),
        (Option.STRUCTURED_REPLY, ReplyType.ERR_INVALID),
        (Option.EXTENDED_HEADERS, ReplyType.ERR_INVALID),
        (Option.INFO, ReplyType.ERR_TOO_BIG),
        (Option.GO, ReplyType.ERR_TOO_BIG),
        (Option.LIST_META_CONTEXT, ReplyType.ERR_TOO_BIG),
        (Option.SET_META_CONTEXT, ReplyType.ERR_TOO_BIG),
        (Option.STARTTLS, ReplyType.ERR_INVALID),
        (99, ReplyType.ERR_UNSUP),
    ],
)
def test_oversized_options_are_refused_and_the_handshake_goes_on(option: int, reply_type: ReplyType) -> None:
    handshake = shake()
    action = handshake.oversized(option, 70_000)
    assert isinstance(action, Reply)
    [(got, _)] = replies(action.data, option)
    assert got == reply_type
    assert isinstance(handshake.option(Option.GO, go("vm")), Begin)


def test_oversized_export_name_ends_the_connection() -> None:
    action = shake().oversized(Option.EXPORT_NAME, 70_000)
    assert isinstance(action, End)
    assert action.data == b""


def test_too_many_options_end_the_connection() -> None:
    handshake = shake()
    for _ in range(limits.OPTIONS_COUNT_MAX):
        assert isinstance(handshake.option(99, b""), Reply)
    action = handshake.option(99, b"")
    assert action == End(b"", "127.0.0.1:5 sent more than 512 options")


def test_stopping_server_refuses_options() -> None:
    assert refused(shake(stopping=True), Option.GO, go("vm"), ReplyType.ERR_SHUTDOWN) == "the server is shutting down"


def test_stopping_server_ends_export_name() -> None:
    assert isinstance(shake(stopping=True).option(Option.EXPORT_NAME, b"vm"), End)


def test_stopping_server_acknowledges_abort() -> None:
    action = shake(stopping=True).option(Option.ABORT, b"")
    assert isinstance(action, End)
    assert action.data != b""


# -- ExportInfo --------------------------------------------------------------------------------------------------

T = TransmissionFlag
WRITING = T.SEND_FUA | T.SEND_TRIM | T.SEND_WRITE_ZEROES | T.SEND_FAST_ZERO
ALWAYS = T.HAS_FLAGS | T.SEND_FLUSH | T.SEND_CACHE | T.CAN_MULTI_CONN


def test_flags_of_a_writable_export() -> None:
    assert ExportInfo("x", 1).flags(Style.STRUCTURED) == ALWAYS | WRITING | T.SEND_DF


def test_flags_of_a_read_only_export() -> None:
    assert ExportInfo("x", 1, read_only=True).flags(Style.SIMPLE) == ALWAYS | T.READ_ONLY


def test_flags_of_an_export_that_can_nothing() -> None:
    names = ["flush", "fua", "trim", "zero", "fast_zero", "cache", "df", "multi_conn"]
    export = ExportInfo("x", 1, **{f"can_{name}": False for name in names})  # type: ignore[arg-type]
    assert export.flags(Style.STRUCTURED) == T.HAS_FLAGS


def test_fast_zero_depends_on_zero() -> None:
    assert not ExportInfo("x", 1, can_zero=False).flags(Style.STRUCTURED) & T.SEND_FAST_ZERO


def test_rotational_is_told() -> None:
    assert ExportInfo("x", 1, rotational=True).flags(Style.SIMPLE) & T.ROTATIONAL


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\0b", r"the name of export 'a\x00b' contains a NUL character"),
        ("\udcff", r"the name of export '\udcff' is not valid Unicode, and so cannot be sent as UTF-8"),
        ("é" * 2049, f"the name of export {'é' * 64 + '...'!r} is 4098 bytes long in UTF-8; NBD allows 4096"),
    ],
)
def test_unspeakable_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExportInfo(name, 1)
    assert str(caught.value) == message


def test_overlong_description_is_refused() -> None:
    with pytest.raises(ConfigError, match="the description of export 'x' is 4097 bytes long"):
        ExportInfo("x", 1, "d" * 4097)


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="bytes large"):
        ExportInfo("x", size)


@pytest.mark.parametrize(
    "blocks",
    [
        (0, 4096, 1 << 25),
        (3, 4096, 1 << 25),
        (1, 256, 1 << 25),
        (1, 4097, 1 << 25),
        (1 << 17, 1 << 17, 1 << 25),
        (4096, 512, 1 << 25),
        (1, 4096, 4095),
        (1, 4096, 1 << 32),
    ],
)
def test_unlawful_block_sizes_are_refused(blocks: tuple[int, int, int]) -> None:
    minimum, preferred, maximum = blocks
    with pytest.raises(ConfigError, match="has block sizes"):
        ExportInfo("x", 1, minimum_block=minimum, preferred_block=preferred, maximum_payload=maximum)
