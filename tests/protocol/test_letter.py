"""What proto.md demands of a server that answers: one statement a test. (What it demands of one that refuses is in
``refuse``; ``docs/PROTOCOL.md`` says which test holds which statement.)"""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.memory import Memory
from nbdserver import tls
from nbdserver.extent import ZERO, Extent, Intent
from nbdserver.handshake import Info, Option, ReplyType, Style, TlsMode, TransmissionFlag
from nbdserver.layer import Layer
from nbdserver.testing import NbdServers
from tests.interop.wire import Wire
from tests.protocol.kit import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    ERROR,
    FAST_ZERO,
    FLUSH,
    FUA,
    HUGE,
    MIB,
    NO_HOLE,
    NONE,
    OFFSET_DATA,
    OFFSET_HOLE,
    READ,
    REQ_ONE,
    SIZE,
    STATUS,
    STATUS_EXT,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    go,
    meta,
    request,
    text,
)
from tests.serving import create, qemu_io, run

CHUNKED = [Style.STRUCTURED, Style.EXTENDED]
CLUSTER = 64 << 10
T = TransmissionFlag


@dataclasses.dataclass(eq=False)
class Patchy(Layer):
    """Every other 64 KiB are zeroes; the rest is memory."""

    file: Layer

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterator[Extent]:
        while offset < self.size:
            left = CLUSTER - offset % CLUSTER
            is_zero = offset // CLUSTER % 2 == 1 and intent is Intent.READ
            yield Extent(left, ZERO) if is_zero else Extent(left, self.file, offset, writable=True)
            offset += left

    @property
    def size(self) -> int:
        return self.file.size


@pytest.fixture(scope="module")
def uri(servers: NbdServers) -> str:
    """The exports "disk" (the default), "golden" (read-only), "huge", and "déjà vu" with a description."""
    server, uri = servers.start(Memory(SIZE), name="disk")
    server.change(default="disk")
    server.export("golden", Memory(SIZE), read_only=True)
    server.export("huge", Memory(HUGE))
    server.export("déjà vu", Memory(SIZE), description="seen before")
    return uri.replace("///disk", "///")


def flags_of(replies: list[tuple[int, bytes]]) -> TransmissionFlag:
    """The transmission flags among the replies to INFO or GO."""
    [(_, item)] = [reply for reply in replies if reply[1][:2] == bytes(2) and reply[0] == ReplyType.INFO]
    return TransmissionFlag(int.from_bytes(item[-2:]))


# -- the handshake -----------------------------------------------------------------------------------------------------


def test_the_greeting_is_that_of_fixed_newstyle(uri: str) -> None:
    wire = Wire(uri)
    assert wire.receive(18) == b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)
    wire.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        wire.receive(1)


@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name_has_124_zeroes_unless_both_said_no(uri: str, flags: int, zeroes: int) -> None:
    client = Client(uri, flags=flags)
    client.option(Option.EXPORT_NAME, b"")
    assert struct.unpack(">Q", client.receive(8)) == (SIZE,)
    assert T(int.from_bytes(client.receive(2))) & T.HAS_FLAGS
    assert client.receive(zeroes) == bytes(zeroes)
    assert client.do(READ, 0, 4).error == 0


@pytest.mark.parametrize("flags", [1, 3])
def test_nothing_is_sent_between_go_and_the_first_reply(uri: str, flags: int) -> None:
    client = Client(uri, flags=flags).enter()
    assert client.do(FLUSH).error == 0


def test_a_client_that_is_not_of_fixed_newstyle_may_still_choose(uri: str) -> None:
    client = Client(uri, flags=2)
    client.option(Option.EXPORT_NAME, "déjà vu".encode())
    client.receive(10)
    assert client.do(READ, 0, 4).data == bytes(4)


def test_list_says_name_and_description_of_each_export(uri: str) -> None:
    replies = Client(uri).ask(Option.LIST)
    assert replies[-1] == (ReplyType.ACK, b"")
    expected = [text("disk"), text("déjà vu") + b"seen before", text("golden"), text("huge")]
    assert sorted(replies[:-1]) == sorted((int(ReplyType.SERVER), item) for item in expected)


def test_abort_is_acknowledged_and_ends_the_connection(uri: str) -> None:
    client = Client(uri)
    assert client.ask(Option.ABORT) == [(ReplyType.ACK, b"")]
    client.is_cut_off()


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_information_is_as_long_as_it_must_be(uri: str, option: int) -> None:
    replies = Client(uri).ask(option, go("déjà vu", Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 99))
    items = {int.from_bytes(item[:2]): item[2:] for kind, item in replies if kind == ReplyType.INFO}
    assert len(items) == len(replies) - 1, "each kind once"
    assert struct.unpack(">Q", items[Info.EXPORT][:8]) == (SIZE,) and len(items[Info.EXPORT]) == 10
    assert items[Info.NAME].decode() == "déjà vu"
    assert items[Info.DESCRIPTION] == b"seen before"
    assert struct.unpack(">III", items[Info.BLOCK_SIZE]) == (1, 4096, 32 * MIB)
    assert set(items) == {0, 1, 2, 3}


def test_the_empty_name_is_the_default_export(uri: str) -> None:
    replies = Client(uri).ask(Option.INFO, go("", Info.NAME))
    assert (ReplyType.INFO, struct.pack(">H", Info.NAME) + b"disk") in replies


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_go_tells_what_info_told(uri: str, style: Style) -> None:
    for infos in ((), (1, 2, 3)):
        client = Client(uri)
        if style is not Style.SIMPLE:
            client.ask(Option.STRUCTURED_REPLY if style is Style.STRUCTURED else Option.EXTENDED_HEADERS)
        assert sorted(client.ask(Option.INFO, go("", *infos))) == sorted(client.ask(Option.GO, go("", *infos)))


def test_a_refused_go_may_be_followed_by_another(uri: str) -> None:
    client = Client(uri)
    for _ in range(3):
        assert client.ask(Option.GO, go("nobody"))[-1][0] == ReplyType.ERR_UNKNOWN
    assert client.enter().do(READ, 0, 4).error == 0


def test_flags_are_what_was_negotiated_and_what_the_export_can(uri: str) -> None:
    always = T.HAS_FLAGS | T.SEND_FLUSH | T.CAN_MULTI_CONN | T.SEND_CACHE
    writable = T.SEND_FUA | T.SEND_TRIM | T.SEND_WRITE_ZEROES | T.SEND_FAST_ZERO
    client = Client(uri)
    assert flags_of(client.ask(Option.INFO, go("disk"))) == always | writable
    assert flags_of(client.ask(Option.INFO, go("golden"))) == always | T.READ_ONLY
    client.ask(Option.STRUCTURED_REPLY)
    assert flags_of(client.ask(Option.INFO, go("disk"))) == always | writable | T.SEND_DF
    client.ask(Option.EXTENDED_HEADERS)
    assert flags_of(client.ask(Option.INFO, go("disk"))) == always | writable | T.SEND_DF
    client.ask(Option.SET_META_CONTEXT, meta("disk", "base:allocation"))
    everything = always | writable | T.SEND_DF | T.BLOCK_STATUS_PAYLOAD
    assert flags_of(client.ask(Option.GO, go("disk"))) == everything


def test_both_structured_replies_and_extended_headers_may_be_asked_for_again(uri: str) -> None:
    client = Client(uri)
    for option in (Option.STRUCTURED_REPLY, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.EXTENDED_HEADERS):
        assert client.ask(option) == [(ReplyType.ACK, b"")]
    client.enter()
    client.style = Style.EXTENDED
    assert client.do(READ, 0, 4).error == 0


# -- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ((), 1),
        (("base:",), 1),
        (("base:allocation",), 1),
        (("base:allocation", "base:", "base:allocation"), 1),
        (("base:nothing",), 0),
        (("qemu:", "nobody:", "x-y:z", "qemu:dirty-bitmap:"), 0),
        (("", "base", ":", "allocation", "base:allocation:"), 0),
        (("x-\u00e9:\u20ac",), 0),
    ],
)
def test_list_meta_context(uri: str, queries: tuple[str, ...], listed: int) -> None:
    replies = Client(uri).ask(Option.LIST_META_CONTEXT, meta("", *queries))
    context = (int(ReplyType.META_CONTEXT), bytes(4) + b"base:allocation")
    assert replies == [*[context] * listed, (ReplyType.ACK, b"")]


@pytest.mark.parametrize("queries", [(), ("base:",), ("base:nothing",), ("qemu:",), ("nobody:x",)])
def test_set_meta_context_ignores_wildcards_and_what_it_does_not_know(uri: str, queries: tuple[str, ...]) -> None:
    client = Client(uri)
    client.ask(Option.STRUCTURED_REPLY)
    assert client.ask(Option.SET_META_CONTEXT, meta("", *queries)) == [(ReplyType.ACK, b"")]


@pytest.fixture(scope="module")
def contexts(servers: NbdServers, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export with several contexts: allocation, depth, and two bitmaps."""
    image = create(tmp_path_factory.mktemp("contexts") / "disk.qcow2", 8 * MIB)
    run("qemu-img", "bitmap", "--add", image, "one")
    run("qemu-img", "bitmap", "--add", image, "two")
    return servers.process("-r", "-A", "-B", "one", "-B", "two", image).uri()


@pytest.mark.parametrize("style", CHUNKED)
def test_every_selected_context_has_its_own_id_and_one_chunk(contexts: str, style: Style) -> None:
    client = Client(contexts)
    client.ask(Option.STRUCTURED_REPLY if style is Style.STRUCTURED else Option.EXTENDED_HEADERS)
    names = ["qemu:dirty-bitmap:two", "base:allocation", "qemu:allocation-depth"]
    *selected, end = client.ask(Option.SET_META_CONTEXT, meta("", *names, "qemu:dirty-bitmap:three"))
    assert end == (ReplyType.ACK, b"")
    assert sorted(item[4:].decode() for _, item in selected) == sorted(names)
    ids = {item[:4] for _, item in selected}
    assert len(ids) == 3
    client.enter()
    client.style = style
    answer = client.do(BLOCK_STATUS, 0, 8 * MIB)
    kind = STATUS if style is Style.STRUCTURED else STATUS_EXT
    assert [chunk for chunk, _ in answer.chunks] == [kind] * 3
    assert {payload[:4] for _, payload in answer.chunks} == ids


def test_set_meta_context_replaces_what_was_selected(contexts: str) -> None:
    client = Client(contexts)
    client.ask(Option.EXTENDED_HEADERS)
    assert len(client.ask(Option.SET_META_CONTEXT, meta("", "base:allocation", "qemu:allocation-depth"))) == 3
    assert len(client.ask(Option.SET_META_CONTEXT, meta("", "qemu:dirty-bitmap:one"))) == 2
    client.enter()
    client.style = Style.EXTENDED
    assert len(client.do(BLOCK_STATUS, 0, MIB).chunks) == 1


def test_status_of_some_contexts(contexts: str) -> None:
    names = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:one"]
    client = Client(contexts).enter(Style.EXTENDED, contexts=names)
    for wanted in ([1], [3], [3, 1], [1, 2, 3]):
        answer = client.do(BLOCK_STATUS, 0, data=struct.pack(f">Q{len(wanted)}I", MIB, *wanted))
        assert {struct.unpack_from(">I", payload)[0] for _, payload in answer.chunks} == set(wanted)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patchy(servers: NbdServers) -> str:
    """Data and zeroes by turns of 64 KiB."""
    _, uri = servers.start(Patchy(file=Memory(SIZE)))
    client = Client(uri).enter(Style.STRUCTURED)
    for at in range(0, SIZE, 2 * CLUSTER):
        assert client.do(WRITE, at, data=bytes([1 + at // CLUSTER]) * CLUSTER).error == 0
    return uri


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_cookies_come_back_as_they_are(uri: str, style: Style) -> None:
    client = Client(uri).enter(style)
    for cookie in (0, 1, 0x2560951325609513, 0x6744669867446698, (1 << 64) - 1):
        client.send(request(style, READ, 512, 8, cookie=cookie))
        assert client.answer(512, 8, cookie).error == 0


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (1, SIZE - 1), (65535, 2), (CLUSTER, CLUSTER), (100, 1)])
def test_chunks_cover_what_was_asked_for_once(patchy: str, style: Style, offset: int, length: int) -> None:
    """`Client.answer` holds that they neither overlap nor leave gaps, that the last alone is marked so, and each one's
    cookie and offset."""
    answer = Client(patchy).enter(style).do(READ, offset, length)
    whole = b"".join(bytes([1 + at]) * CLUSTER if at % 2 == 0 else bytes(CLUSTER) for at in range(SIZE // CLUSTER))
    assert answer.data == whole[offset : offset + length]
    assert {kind for kind, _ in answer.chunks} <= {OFFSET_DATA, OFFSET_HOLE}
    for kind, payload in answer.chunks:
        assert len(payload) == 12 if kind == OFFSET_HOLE else len(payload) > 8


def test_a_sector_is_enough_for_a_hole(nbd_server: NbdServers, tmp_path: Path) -> None:
    """libnbd's test of structured reads expects so, with clusters of 512 bytes."""
    image = create(tmp_path / "disk.qcow2", 3072, cluster_size=512)
    qemu_io(image, "write -P 1 0 3k", "write -z -u 2k 512")
    client = Client(nbd_server(image, format="qcow2")).enter(Style.STRUCTURED)
    chunks = client.do(READ, 2048, 1024).chunks
    assert [(kind, payload[:8]) for kind, payload in chunks] == [
        (OFFSET_HOLE, (2048).to_bytes(8)),
        (OFFSET_DATA, (2560).to_bytes(8)),
    ]


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize("length", [1, 65536, 3 * CLUSTER, SIZE])
def test_df_is_one_content_chunk_of_data(patchy: str, style: Style, length: int) -> None:
    [(kind, payload)] = Client(patchy).enter(style).do(READ, 0, length, flags=DF).chunks
    assert (kind, len(payload)) == (OFFSET_DATA, 8 + length)


def test_simple_replies_where_nothing_else_was_negotiated(uri: str) -> None:
    client = Client(uri).enter(contexts=())
    for command, length in ((READ, 512), (TRIM, 512), (FLUSH, 0), (CACHE, 512), (WRITE_ZEROES, 512)):
        assert client.do(command, 0, length).error == 0


@pytest.mark.parametrize("style", CHUNKED)
def test_what_has_no_payload_is_answered_by_none(uri: str, style: Style) -> None:
    client = Client(uri).enter(style)
    for command, length in ((TRIM, 512), (FLUSH, 0), (CACHE, 512), (WRITE_ZEROES, 512)):
        assert client.do(command, 0, length).chunks == ((NONE, b""),)


@pytest.mark.parametrize("style", CHUNKED)
def test_an_error_is_one_chunk_with_a_number_and_a_message(uri: str, style: Style) -> None:
    [(kind, payload)] = Client(uri).enter(style).do(READ, SIZE, 512).chunks
    number, length = struct.unpack_from(">IH", payload)
    assert (kind, number) == (ERROR, 22)
    assert payload[6:].decode().isprintable() and len(payload) == 6 + length


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_nothing_is_done_with_success(uri: str, style: Style) -> None:
    client = Client(uri).enter(style)
    for offset in (0, 1, SIZE):
        for command in (READ, WRITE, TRIM, CACHE, WRITE_ZEROES):
            assert client.do(command, offset, 0).error == 0


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_fua_is_taken_with_every_command(uri: str, style: Style) -> None:
    client = Client(uri).enter(style, contexts=() if style is Style.SIMPLE else ["base:allocation"])
    commands = [READ, TRIM, CACHE, WRITE_ZEROES, *([] if style is Style.SIMPLE else [BLOCK_STATUS])]
    for command in commands:
        assert client.do(command, 0, 512, flags=FUA).error == 0
    assert client.do(WRITE, 0, data=b"fua", flags=FUA).error == 0
    assert client.do(FLUSH, flags=FUA).error == 0


@pytest.mark.parametrize("style", list(Style), ids=str)
@pytest.mark.parametrize("flags", [0, NO_HOLE, FUA, FUA | NO_HOLE])
def test_what_was_zeroed_reads_as_zeroes(uri: str, style: Style, flags: int) -> None:
    client = Client(uri).enter(style)
    assert client.do(WRITE, 0, data=b"x" * 20000).error == 0
    assert client.do(WRITE_ZEROES, 5, 10000, flags=flags).error == 0
    assert client.do(READ, 0, 20000).data == b"x" * 5 + bytes(10000) + b"x" * 9995


def test_a_fast_zero_is_done_where_it_is_fast(uri: str) -> None:
    client = Client(uri).enter(name="huge")
    assert client.do(WRITE, 0, data=b"x" * 4096).error == 0
    assert client.do(WRITE_ZEROES, 0, 1 << 31, flags=FAST_ZERO).error == 0
    assert client.do(READ, 0, 4096).data == bytes(4096)


@pytest.mark.parametrize("command", [TRIM, CACHE, WRITE_ZEROES])
def test_effects_may_be_longer_than_any_payload(uri: str, command: int) -> None:
    compact, extended = Client(uri).enter(name="huge"), Client(uri).enter(Style.EXTENDED, "huge")
    assert compact.do(command, 0, (1 << 32) - 1).error == 0
    assert extended.do(command, 0, 5 << 32 if command != CACHE else 1 << 32).error == 0


def test_caching_changes_nothing(uri: str) -> None:
    client = Client(uri).enter()
    assert client.do(WRITE, 0, data=b"cached").error == 0
    assert client.do(CACHE, 0, SIZE).error == 0
    assert client.do(READ, 0, 6).data == b"cached"


def test_effects_of_a_flush_are_seen_by_all_connections(uri: str) -> None:
    one, other = Client(uri).enter(), Client(uri).enter(Style.EXTENDED)
    for value in range(50):
        assert one.do(WRITE, 4096, data=bytes([value]), flags=FUA if value % 2 else 0).error == 0
        assert value % 2 or one.do(FLUSH).error == 0
        assert other.do(READ, 4096, 1).data == bytes([value])


# -- block status ------------------------------------------------------------------------------------------------------


def extents(chunk: tuple[int, bytes]) -> list[tuple[int, int]]:
    kind, payload = chunk
    skip, layout = (4, ">II") if kind == STATUS else (8, ">QQ")
    found = list(struct.iter_unpack(layout, payload[skip:]))
    assert kind == STATUS or struct.unpack_from(">I", payload, 4) == (len(found),)
    return found


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (1, 1), (CLUSTER - 1, 2), (512, SIZE - 512), (0, 3)])
def test_extents_follow_one_another_and_the_last_alone_may_say_more(
    patchy: str, style: Style, offset: int, length: int
) -> None:
    client = Client(patchy).enter(style, contexts=["base:allocation"])
    [chunk] = client.do(BLOCK_STATUS, offset, length).chunks
    found = extents(chunk)
    assert found and all(extent > 0 and status < 4 for extent, status in found)
    assert sum(extent for extent, _ in found[:-1]) < length
    assert offset + sum(extent for extent, _ in found) <= SIZE
    assert all(one[1] != other[1] for one, other in itertools.pairwise(found)), "neighbours differ"
    [chunk] = client.do(BLOCK_STATUS, offset, length, flags=REQ_ONE).chunks
    [(extent, _)] = extents(chunk)
    assert 0 < extent <= length


def test_where_zero_is_said_zeroes_are_read(patchy: str) -> None:
    client = Client(patchy).enter(Style.EXTENDED, contexts=["base:allocation"])
    at = 0
    while at < SIZE:
        [chunk] = client.do(BLOCK_STATUS, at, SIZE - at).chunks
        for extent, status in extents(chunk):
            assert not status & 2 or client.do(READ, at, extent).data == bytes(extent)
            assert status & 2 or any(client.do(READ, at, extent).data)
            at += extent


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", list(Style), ids=str)
def test_disc_ends_the_connection_after_everything_has_been_answered(uri: str, style: Style) -> None:
    client = Client(uri).enter(style)
    for at in range(20):
        client.issue(WRITE, 0, data=bytes([at]) * 4096)
    client.issue(DISC)
    assert all(client.answer().error == 0 for _ in range(20))
    client.is_cut_off()


# -- TLS and TCP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure_uri(servers: NbdServers, pki: Path) -> str:
    _, uri = servers.start(Memory(SIZE), tls=tls.TlsConfig(TlsMode.REQUIRED, certificates=str(pki)))
    return uri


def secured(uri: str, pki: Path, version: ssl.TLSVersion) -> Client:
    client = Client(uri)
    assert client.ask(Option.STARTTLS) == [(ReplyType.ACK, b"")]
    context = ssl.create_default_context(cafile=pki / tls.CA_CERT)
    context.load_cert_chain(pki / tls.CLIENT_CERT, pki / tls.CLIENT_KEY)
    context.minimum_version = context.maximum_version = version
    wrapped = context.wrap_socket(client.socket, server_hostname="localhost", suppress_ragged_eofs=False)
    return client.secured(wrapped)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_is_shut_down_before_the_connection(secure_uri: str, pki: Path, version: ssl.TLSVersion) -> None:
    """A stream that somebody else has cut off raises here."""
    client = secured(secure_uri, pki, version).enter()
    assert client.do(READ, 0, 512).error == 0
    client.issue(DISC)
    client.is_cut_off()
    client = secured(secure_uri, pki, version)
    assert client.ask(Option.ABORT) == [(ReplyType.ACK, b"")]
    client.is_cut_off()


def test_tls_is_shut_down_when_the_server_stops(nbd_server: NbdServers, pki: Path) -> None:
    server, uri = nbd_server.start(Memory(SIZE), tls=tls.TlsConfig(TlsMode.REQUIRED, certificates=str(pki)))
    client = secured(uri, pki, ssl.TLSVersion.TLSv1_3).enter()
    server.stop()
    client.is_cut_off()


def test_no_delay_is_set(nbd_server: NbdServers) -> None:
    client = Client(nbd_server(Memory(SIZE), tcp=True)).enter()
    ours = client.socket.getsockname()
    delays = []
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family == socket.AF_INET and found.getpeername() == ours:
                    delays.append(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        except OSError:
            continue  # no socket, or not a connected one
    assert delays == [1]
