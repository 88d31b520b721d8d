"""NBD URIs: what is meant, what is written, and one test for each cause of a refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.errors import ConfigError
from nbdserver.uri import NbdUri, parse, parse_listen


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("nbd://127.0.0.1:10809", NbdUri("127.0.0.1", 10809)),
        ("nbd://127.0.0.1", NbdUri("127.0.0.1", 10809)),
        ("nbd://localhost:/", NbdUri("localhost", 10809)),
        ("NBD://example.com:1", NbdUri("example.com", 1)),
        ("nbd://[::1]:10810", NbdUri("::1", 10810)),
        ("nbd://[::]", NbdUri("::", 10809)),
        ("nbd://[fe80::1%25eth0]", NbdUri("fe80::1%eth0", 10809)),
        ("nbd://0.0.0.0:0", NbdUri("0.0.0.0", 0)),
        ("nbd://example.com/disk", NbdUri("example.com", export="disk")),
        ("nbd://example.com//disk", NbdUri("example.com", export="/disk")),
        ("nbd://example.com/hello%20world", NbdUri("example.com", export="hello world")),
        ("nbd://example.com/a/b%2Fc", NbdUri("example.com", export="a/b/c")),
        ("nbd://example.com/a+b", NbdUri("example.com", export="a+b")),
        ("nbd://example.com/d%C3%A9j%C3%A0", NbdUri("example.com", export="déjà")),
        ("nbd://example.com?", NbdUri("example.com")),
        ("nbd+unix:///?socket=/run/nbd.sock", NbdUri(socket="/run/nbd.sock")),
        ("nbd+unix://?socket=nbd.sock", NbdUri(socket="nbd.sock")),
        ("nbd+unix:?socket=nbd.sock", NbdUri(socket="nbd.sock")),
        ("nbd+unix:///disk?socket=run/a%20b", NbdUri(socket="run/a b", export="disk")),
        ("nbd+unix:///?socket=/run/a+b=c", NbdUri(socket="/run/a+b=c")),
        ("nbd+unix:///?socket=/run/%FF", NbdUri(socket="/run/\udcff")),
        ("nbd+vsock://3:1234/disk", NbdUri(cid=3, port=1234, export="disk")),
        ("nbd+vsock://1", NbdUri(cid=1)),
        ("nbd+vsock:///disk", NbdUri(cid=2, export="disk")),
        ("nbds+vsock://3", NbdUri(cid=3, tls=True)),
    ],
)
def test_parse(text: str, meant: NbdUri) -> None:
    assert parse(text) == meant


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (NbdUri("127.0.0.1", 10809), "nbd://127.0.0.1:10809"),
        (NbdUri("::1", 1), "nbd://[::1]:1"),
        (NbdUri("fe80::1%eth0", 1), "nbd://[fe80::1%25eth0]:1"),
        (NbdUri("h", 1, export="vm.qcow2"), "nbd://h:1/vm.qcow2"),
        (NbdUri("h", 1, export="/a b?#%&"), "nbd://h:1//a%20b%3F%23%25%26"),
        (NbdUri("h", 1, export="déjà"), "nbd://h:1/d%C3%A9j%C3%A0"),
        (NbdUri(socket="/run/nbd.sock"), "nbd+unix:///?socket=/run/nbd.sock"),
        (NbdUri(socket="a&b+c \udcff"), "nbd+unix:///?socket=a%26b%2Bc%20%FF"),
        (NbdUri(cid=3, port=1), "nbd+vsock://3:1"),
        (NbdUri(cid=3, export="disk", tls=True), "nbds+vsock://3:10809/disk"),
        (NbdUri(socket="s", export="x?socket=y"), "nbd+unix:///x%3Fsocket%3Dy?socket=s"),
    ],
)
def test_format(uri: NbdUri, text: str) -> None:
    assert str(uri) == text


def test_with_export() -> None:
    assert str(parse("nbd+unix:///?socket=/s").with_export("a b")) == "nbd+unix:///a%20b?socket=/s"


names = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=30)


@given(names, st.one_of(st.none(), names.filter(bool)))
def test_what_is_written_is_read_back(export: str, socket: str | None) -> None:
    uri = NbdUri("", 10809, socket, export) if socket else NbdUri("::1", 10809, None, export)
    assert str(uri).isascii()
    assert parse(str(uri)) == uri


@given(st.text(max_size=60) | st.text(max_size=60).map(lambda text: f"nbd://{text}"))
def test_any_text_is_a_uri_or_a_config_error(text: str) -> None:
    try:
        uri = parse(text)
    except ConfigError:
        return
    assert parse(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "nbd://example.com?tls-certificates=pki",
            "its parameter 'tls-certificates' is unknown; there are socket (nbd+unix) and tls-certificates (nbds)",
        ),
        (
            "nbds://example.com?tls-psk-file=keys",
            "its parameter 'tls-psk-file' is unknown; there are socket (nbd+unix) and tls-certificates (nbds)",
        ),
        ("nbds://user@example.com", "it names a user: pre-shared keys are not supported here"),
        (
            "http://example.com",
            "its scheme is 'http', allowed are nbd, nbd+unix, nbd+vsock, nbds, nbds+unix, nbds+vsock",
        ),
        ("127.0.0.1:10809", "for TCP write nbd://127.0.0.1:10809"),
        ("localhost:10809", "for TCP write nbd://localhost:10809"),
        ("", "for TCP write nbd://"),
        ("/run/nbd.sock", "for a Unix socket write nbd+unix:///?socket=/run/nbd.sock"),
        ("nbd:10809", "it names no host; write nbd://127.0.0.1 for this machine alone"),
        ("nbd:///disk", "it names no host; write nbd://127.0.0.1 for this machine alone, nbd://0.0.0.0 for all"),
        ("nbd://:10809", "it names no host; write nbd://127.0.0.1 for this machine alone, nbd://0.0.0.0 for all"),
        ("nbd://::1", "'::1' is not HOST:PORT (an IPv6 address goes in brackets)"),
        ("nbd://h:12a", "'h:12a' is not HOST:PORT (an IPv6 address goes in brackets)"),
        ("nbd://h:65536", "its port is 65536, at most 65535 is allowed"),
        ("nbd://[::g]", "'::g' is not an IPv6 address"),
        ("nbd://a%20b", "'a b' is not a host name"),
        ("nbd://h#x", "it has a fragment (write # as %23)"),
        ("nbd://h/%", "'%' is no percent-encoding (write % itself as %25)"),
        ("nbd://h/%zz", "'%zz' is no percent-encoding (write % itself as %25)"),
        ("nbd://h/a b", "it has the character ' ', which a URI writes as %20"),
        ("nbd://h/é", "it has the character 'é', which a URI writes as %C3%A9"),
        ("nbd://h/\n", r"it has the character '\n', which a URI writes as %0A"),
        ("nbd://h/%FF", "its export name is not UTF-8"),
        ("nbd://h/a%00", "its export name contains a NUL character"),
        ("nbd://h?socket=/s", "a socket goes with the scheme nbd+unix"),
        (
            "nbd://h?backlog=5",
            "its parameter 'backlog' is unknown; there are socket (nbd+unix) and tls-certificates (nbds)",
        ),
        ("nbd+unix:///disk", "it names no socket; write nbd+unix:///?socket=PATH"),
        ("nbd+unix:///?socket=", "it names no socket; write nbd+unix:///?socket=PATH"),
        ("nbd+unix:///?socket=a&socket=b", "its parameter 'socket' is given twice"),
        ("nbd+unix://h/?socket=a", "it names a host, h, and a socket; write nbd+unix:///?socket=PATH"),
        ("nbd+unix:disk?socket=a", "its path, 'disk', does not begin with a slash"),
        ("nbd+unix:///?socket=%00a", "its socket is in the abstract namespace, which is not supported"),
    ],
)
def test_refused(text: str, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value) == f"{text!r} is not a usable NBD URI: {cause}"


def test_overlong_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("nbd://h/" + "a" * 20_000)
    assert str(caught.value).endswith("it is 20008 characters long, at most 16384 are allowed")
    assert len(str(caught.value)) < 400


def test_listening_takes_a_uri_without_export() -> None:
    assert parse_listen("nbd://[::1]:0") == NbdUri("::1", 0)


def test_listening_with_no_context_id_is_for_any_machine() -> None:
    assert parse_listen("nbd+vsock:///") == NbdUri(cid=(1 << 32) - 1)
    assert parse_listen("nbd+vsock://2") == NbdUri(cid=2)


@pytest.mark.parametrize("authority", ["host", "1:x", "-1", "[::1]", "4294967296", "1:4294967295", "1:2:3"])
def test_a_machine_is_a_number(authority: str) -> None:
    with pytest.raises(ConfigError, match="is not CID:PORT"):
        parse(f"nbd+vsock://{authority}/")


def test_listening_refuses_an_export() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_listen("nbd://h/disk")
    assert str(caught.value) == "'nbd://h/disk' names the export 'disk': a listen address serves every export"


def test_listening_takes_the_longest_path_the_system_takes() -> None:
    assert parse_listen(f"nbd+unix:///?socket={'a' * 107}").socket == "a" * 107


def test_listening_refuses_a_longer_path() -> None:
    text = f"nbd+unix:///?socket={'a' * 106}%C3%A9"
    with pytest.raises(ConfigError) as caught:
        parse_listen(text)
    assert str(caught.value) == f"{text!r} names a socket 108 bytes long: the system allows 107"
