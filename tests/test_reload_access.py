"""Reload of who may come: rules, sockets' permissions, limits, certificates and keys."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver import tls
from nbdserver.errors import ConfigError
from nbdserver.offers import Removal
from nbdserver.uri import parse
from tests.interop.wire import OPT_GO, READ, REP_ACK, REP_ERR_UNKNOWN, Wire
from tests.serving import eventually
from tests.test_reload import A, Deployment, deployment, export, read

__all__ = ["deployment"]

OPT_STARTTLS = 5
ERR_TLS_REQD = 1 << 31 | 5
ERR_POLICY = 1 << 31 | 2
MINE, OTHERS = f"access = {{users = [{os.geteuid()}]}}", f"access = {{users = [{os.geteuid() + 1}]}}"


# -- rules -----------------------------------------------------------------------------------------------------------


def test_a_changed_rule_is_for_new_connections(deployment: Deployment) -> None:
    layers = deployment.start(export("a", more=MINE)).state()["layers"]
    client = deployment.connect("a")
    report = deployment.reload(export("a", more=OTHERS))
    assert (report.unchanged, report.access, report.changed) == (["a"], ["a"], [])
    assert deployment.state()["layers"] == layers
    assert read(client) == b"a"
    assert deployment.answer("a") == REP_ERR_UNKNOWN
    assert deployment.reload(export("a", more=OTHERS)).access == []
    assert deployment.reload(A).access == ["a"]
    assert deployment.is_served("a")


def test_a_hard_reload_disconnects_whom_an_export_is_not_for_any_more(deployment: Deployment) -> None:
    deployment.start(export("a", more=MINE) + export("b"))
    gone, stays = deployment.connect("a"), deployment.connect("b")
    deployment.reload(export("a", more=OTHERS) + export("b"), Removal.HARD)
    assert gone.rest() == b""
    assert read(stays) == b"b"


def test_the_rule_of_a_pattern_is_that_of_its_exports_too(deployment: Deployment) -> None:
    def pattern(more: str) -> str:
        return f'[exports."x-*"]\ntemplate = {{image = "a.raw", format = "raw", directory = "x"}}\n{more}\n'

    deployment.start(pattern(MINE))
    client = deployment.connect("x-1")
    assert deployment.reload(pattern(OTHERS)).access == ["x-*"]
    assert read(client) == b"a"
    assert [deployment.answer(name) for name in ("x-1", "x-2")] == [REP_ERR_UNKNOWN] * 2
    deployment.reload(pattern(""))
    assert deployment.is_served("x-2")


def entry(deployment: Deployment, more: str) -> str:
    return f'[{{uri = "{deployment.listen}", {more}}}]'


def test_a_listener_is_for_others_and_is_bound_as_it_was(deployment: Deployment) -> None:
    deployment.start(A, listen=entry(deployment, MINE))
    path = Path(str(parse(deployment.listen).socket))
    client, inode = deployment.connect("a"), path.stat().st_ino
    report = deployment.reload(A, listen=entry(deployment, OTHERS))
    assert (report.access, report.listening, report.refusing) == ([deployment.listen], [], [])
    assert Wire(deployment.listen).rest() == b""
    assert read(client) == b"a"
    deployment.reload(A)
    deployment.connect("a")
    assert path.stat().st_ino == inode


def test_a_socket_has_its_new_permissions(deployment: Deployment) -> None:
    deployment.start(A, listen=entry(deployment, "mode = 0o600"))
    path = Path(str(parse(deployment.listen).socket))
    deployment.reload(A, listen=entry(deployment, "mode = 0o666"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_permissions_are_as_they_were_when_a_reload_fails(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment.start(A, listen=entry(deployment, "mode = 0o600"))
    path = Path(str(parse(deployment.listen).socket))

    def chown(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", chown)
    with pytest.raises(ConfigError, match=r"listen: nbd\+unix.*: Operation not permitted"):
        deployment.reload(A, listen=entry(deployment, "mode = 0o666, group = 7"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert deployment.is_served("a")


def test_limits_are_for_who_comes_next(deployment: Deployment) -> None:
    deployment.start(A)
    clients = [deployment.connect("a") for _ in range(3)]
    assert not deployment.reload(A, head="[limits]\nconnections_per_peer = 2").restart
    assert Wire(deployment.listen).rest() == b""
    assert [read(client) for client in clients] == [b"a"] * 3
    eventually(lambda: any("one too many: [limits] connections_per_peer" in line for line in deployment.log))
    assert deployment.service.server.stats()["turned_away"] == 1
    assert deployment.reload(A, head="[limits]\nkeepalive = 9").restart == ["limits.keepalive"]
    deployment.connect("a")


# -- certificates and keys -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pkis(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sets, of authorities of their own."""
    made = [tmp_path_factory.mktemp("pki") for _ in range(2)]
    for directory in made:
        tls.init(directory, hosts=["localhost"], client="alice")
    return made


@contextlib.contextmanager
def secured(deployment: Deployment, pki: Path) -> Iterator[Wire]:
    """A client that trusts this authority, and has its certificate."""
    plain = Wire(deployment.listen)
    plain.greet()
    plain.option(OPT_STARTTLS)
    assert plain.option_reply() == (REP_ACK, b"")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki / tls.CA_CERT)
    context.load_cert_chain(pki / tls.CLIENT_CERT, pki / tls.CLIENT_KEY)
    with context.wrap_socket(plain.socket, server_hostname="localhost") as connection:
        client = Wire.of(connection)
        client.option(OPT_GO, b"\0\0\0\x01a\0\0")
        while client.option_reply()[0] != REP_ACK:
            pass
        yield client


def first(client: Wire) -> bytes:
    client.request(READ, 0, 1)
    assert client.reply() == (0, 0)
    return client.receive(1)


TLS = '[tls]\ncertificates = "pki"'


def test_renewed_certificates_are_for_new_connections(deployment: Deployment, pkis: list[Path]) -> None:
    mine = deployment.directory / "pki"
    shutil.copytree(pkis[0], mine)
    deployment.start(A, head=TLS)
    with secured(deployment, pkis[0]) as before:
        shutil.rmtree(mine)
        shutil.copytree(pkis[1], mine)
        report = deployment.reload(A, head=TLS)
        assert (report.reread, report.restart, report.unchanged) == ([str(mine)], [], ["a"])
        with secured(deployment, pkis[1]) as after:
            assert first(after) == b"a"
        with pytest.raises(ssl.SSLError), secured(deployment, pkis[0]):
            pass
        assert first(before) == b"a"


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        (tls.SERVER_CERT, "nonsense", r"exports.toml: \[tls\]: TLS cannot be used: .*server-cert.pem"),
        (tls.SERVER_KEY, None, r"exports.toml: \[tls\]: certificates: .*server-key.pem cannot be read: No such file"),
        (tls.CA_CERT, "", r"exports.toml: \[tls\]: TLS cannot be used: .*ca-cert.pem"),
    ],
)
def test_certificates_that_cannot_be_used_change_nothing(
    deployment: Deployment, pkis: list[Path], name: str, text: str | None, cause: str
) -> None:
    mine = deployment.directory / "pki"
    shutil.copytree(pkis[0], mine)
    deployment.start(A, head=TLS)
    before = deployment.state()
    if text is None:
        (mine / name).unlink()
    else:
        (mine / name).write_text(text)
    with pytest.raises(ConfigError, match=cause):
        deployment.reload(A + export("b"), head=TLS)
    assert deployment.state() == before
    with secured(deployment, pkis[0]) as client:
        assert first(client) == b"a"


def test_a_key_that_others_may_read_changes_nothing(deployment: Deployment) -> None:
    keys = deployment.directory / "keys.psk"
    keys.touch(0o600)
    keys.write_text("alice:00ff\n")
    head = '[tls]\npsk = "keys.psk"'
    deployment.start(A, head=head)
    keys.chmod(0o644)
    with pytest.raises(ConfigError, match=r"keys\.psk: holds keys, and others may read"):
        deployment.reload(A, head=head)


def test_the_mode_changes_for_new_connections(deployment: Deployment, pkis: list[Path]) -> None:
    shutil.copytree(pkis[0], deployment.directory / "pki")
    deployment.start(A)
    early = Wire(deployment.listen)
    early.greet()
    client = deployment.connect("a")
    deployment.reload(A, head=TLS)
    assert deployment.answer("a") == ERR_TLS_REQD
    with secured(deployment, pkis[0]):
        pass
    early.option(OPT_STARTTLS)
    assert early.option_reply()[0] == ERR_POLICY, "its handshake goes on by the rules that it began by"
    deployment.reload(A)
    assert deployment.is_served("a")
    assert read(client) == b"a"
