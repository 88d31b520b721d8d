"""Whatever a client sends: one action, well-formed and bounded; never an exception."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from nbdserver.handshake import Action, Begin, End, ExportInfo, Handshake, Option, Reply, Style
from nbdserver.limits import OPTION_MAX, STRING_MAX

EXPORTS = {
    "vm": ExportInfo("vm", 1 << 40, "a machine", contexts=("base:allocation", "qemu:allocation-depth")),
    "": ExportInfo("", 0),
    "é" * 2048: ExportInfo("é" * 2048, (1 << 63) - 1, "d" * STRING_MAX, read_only=True),
}

#: No reply here is longer than listing every export, name and description.
REPLY_MAX = (len(EXPORTS) + 1) * (20 + 4 + 2 * STRING_MAX)

ERROR = 1 << 31


def check(action: Action, option: int) -> None:
    """``action`` is what proto.md allows as an answer to ``option``, to the letter."""
    assert len(action.data) <= REPLY_MAX
    if option == Option.EXPORT_NAME:
        assert isinstance(action, Begin) or (isinstance(action, End) and action.data == b"")
        if isinstance(action, Begin):
            assert len(action.data) in (10, 134)
        return
    if isinstance(action, End) and action.data == b"":
        assert action.reason
        return
    types = [check_reply(reply_type, data, option) for reply_type, data in split(action.data, option)]
    assert types
    assert all(reply_type not in (1,) and not reply_type & ERROR for reply_type in types[:-1])
    assert types[-1] == 1 or (types[-1] & ERROR and len(types) == 1)
    if isinstance(action, Begin):
        assert option == Option.GO
        assert types[-1] == 1
        assert not action.contexts or action.style is not Style.SIMPLE
        assert len({number for number, _ in action.contexts}) == len(action.contexts)
    else:
        assert isinstance(action, End) == (option == Option.ABORT)
        assert isinstance(action, End | Reply)


def split(data: bytes, option: int) -> list[tuple[int, bytes]]:
    found = []
    while data:
        magic, to, reply_type, length = struct.unpack_from(">QIII", data)
        assert (magic, to) == (0x3E889045565A9, option)
        assert len(data) >= 20 + length
        found.append((reply_type, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def check_reply(reply_type: int, data: bytes, option: int) -> int:
    if reply_type & ERROR:
        message = data.decode()
        assert 0 < len(data) <= STRING_MAX
        assert message.isprintable()
    elif reply_type == 1:
        assert data == b""
    elif reply_type == 2:
        assert option == Option.LIST
        [length] = struct.unpack_from(">I", data)
        assert length <= len(data) - 4
        data[4 : 4 + length].decode()
        data[4 + length :].decode()
    elif reply_type == 3:
        assert option in (Option.INFO, Option.GO)
        assert len(data) == {0: 12, 3: 14}.get(int.from_bytes(data[:2]), len(data))
    else:
        assert reply_type == 4
        assert option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)
        assert ":" in data[4:].decode()
    return reply_type


def string(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return content.map(lambda data: struct.pack(">I", len(data)) + data)


names = st.one_of(
    st.sampled_from([name.encode() for name in EXPORTS]),
    st.sampled_from([b"base:", b"base:allocation", b"qemu:", b"x" * 4097, b"\0", b"\xff"]),
    st.binary(max_size=20),
    st.text(max_size=20).map(lambda text: text.encode(errors="surrogatepass")),
)
counts = st.one_of(st.integers(0, 40), st.integers(0, (1 << 32) - 1))
payloads = st.one_of(
    st.just(b""),
    st.binary(max_size=200),
    names,
    st.lists(
        st.one_of(string(names), counts.map(lambda n: struct.pack(">I", n)), st.binary(max_size=4)), max_size=6
    ).map(b"".join),
    st.builds(
        lambda name, queries, lie, tail: (
            name + struct.pack(">I", max(0, len(queries) + lie)) + b"".join(queries) + tail
        ),
        string(names),
        st.lists(string(names), max_size=34),
        st.sampled_from([0, 0, 0, 1, -1]),
        st.sampled_from([b"", b"", b"\0"]),
    ),
    st.builds(
        lambda name, infos, lie: name + struct.pack(f">H{len(infos)}H", max(0, len(infos) + lie), *infos),
        string(names),
        st.lists(st.integers(0, 5) | st.integers(0, 65535), max_size=10),
        st.sampled_from([0, 0, 0, 1, -1]),
    ),
)
options = st.one_of(st.integers(0, 12), st.sampled_from(list(Option)), st.integers(0, (1 << 32) - 1))


@given(
    st.integers(0, 3) | st.integers(0, (1 << 32) - 1),
    st.lists(st.tuples(options, payloads | st.integers(OPTION_MAX + 1, (1 << 32) - 1)), max_size=12),
)
def test_any_client_gets_a_lawful_answer(flags: int, sent: list[tuple[int, bytes | int]]) -> None:
    handshake = Handshake(lambda: EXPORTS, peer="fuzz")
    refusal = handshake.client_flags(flags)
    assert (refusal is None) == (flags <= 3)
    if refusal is not None:
        assert isinstance(refusal, End)
        assert refusal.data == b""
        return
    for option, data in sent:
        if isinstance(data, int):
            action = handshake.oversized(option, data)
        else:
            action = handshake.option(option, data)
        check(action, option)
        if not flags & 1 and option != Option.EXPORT_NAME:
            assert isinstance(action, End)
        if not isinstance(action, Reply):
            return


@given(st.sampled_from(list(Option)), payloads)
def test_truncating_any_option_is_answered(option: int, data: bytes) -> None:
    for length in range(len(data) + 1 if len(data) < 64 else 64):
        handshake = Handshake(lambda: EXPORTS, peer="fuzz")
        handshake.client_flags(3)
        check(handshake.option(Option.STRUCTURED_REPLY, b""), Option.STRUCTURED_REPLY)
        check(handshake.option(option, data[:length]), option)
