"""TLS end to end: with libnbd's and QEMU's clients (GnuTLS), and with rude ones (Python's ssl)."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from nbdserver import tls
from nbdserver.testing import NbdServers, ServerProcess
from nbdserver.uri import parse
from tests.interop.wire import OPT_GO, REP_ACK, Wire
from tests.serving import run

SIZE = 8 << 20
OPT_STARTTLS = 5
ERR_TLS_REQD = 1 << 31 | 5
DATA = bytes(range(1, 256)) * 3

Connect = Callable[..., nbd.NBD]


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    tls.init(directory, hosts=["localhost", "127.0.0.1"], client="alice")
    return directory


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(DATA)
        file.truncate(SIZE)
    return path


@pytest.fixture
def server(nbd_server: NbdServers, disk: Path, pki: Path, backend: str, tcp: bool) -> ServerProcess:
    """Demands TLS; takes certificates and keys."""
    both = ["--tls-certificates", str(pki), "--tls-psk", str(pki / tls.PSK)]
    return nbd_server.process("-f", "raw", "--backend", backend, *both, str(disk), tcp=tcp)


def handle(server: ServerProcess, pki: Path, *, psk: bool = False, user: str = "alice", **settings: object) -> nbd.NBD:
    """A libnbd client with TLS, connected to the default export."""
    handle = nbd.NBD()
    handle.set_tls(nbd.TLS_REQUIRE)
    if psk:
        handle.set_tls_username(user)
        handle.set_tls_psk_file(str(pki / tls.PSK))
    else:
        handle.set_tls_certificates(str(pki))
    for method, value in settings.items():
        getattr(handle, method)(value)
    address = parse(server.uri())
    if address.socket is None:
        handle.connect_tcp("localhost", str(address.port))
    else:
        handle.connect_unix(address.socket)
    return handle


@pytest.mark.parametrize("psk", [False, True], ids=["x509", "psk"])
def test_read_and_write(server: ServerProcess, pki: Path, psk: bool) -> None:
    client = handle(server, pki, psk=psk)
    assert client.get_tls_negotiated()
    assert client.pread(len(DATA), 0) == DATA
    large = bytes(range(256)) * (4 << 12)  # beyond what one record, and what a socket, holds
    client.pwrite(large, 1 << 20)
    assert client.pread(len(large), 1 << 20) == large
    client.shutdown()
    assert "TLS could not" not in server.log


def test_qemu(server: ServerProcess, pki: Path, tmp_path: Path) -> None:
    address = parse(server.uri())
    where = f"path={address.socket}" if address.socket else f"host=localhost,port={address.port}"
    for kind in (f"tls-creds-x509,dir={pki}", f"tls-creds-psk,dir={pki},username=alice"):
        secret = ["--object", f"{kind},id=tls0,endpoint=client"]
        name = ",tls-hostname=localhost" if address.socket and "x509" in kind else ""
        options = f"driver=nbd,{where},tls-creds=tls0{name}"
        run("qemu-io", *secret, "--image-opts", options, "-c", "write -P 5 1M 3M", "-c", "read -P 5 1M 3M")
        run("qemu-img", "convert", *secret, "--image-opts", options, tmp_path / "copy.raw")
        data = (tmp_path / "copy.raw").read_bytes()
        assert data[: len(DATA)] == DATA
        assert data[1 << 20 : 4 << 20] == b"\5" * (3 << 20)


def test_nbdcopy_with_several_connections(server: ServerProcess, pki: Path, tmp_path: Path) -> None:
    uri = server.uri().replace("nbd", "nbds", 1).replace("127.0.0.1", "localhost")
    uri += ("&" if "?" in uri else "?") + f"tls-certificates={pki}"
    run("nbdcopy", "--connections=4", uri, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == DATA + bytes(SIZE - len(DATA))


def test_plain_client_is_told(server: ServerProcess) -> None:
    with pytest.raises(nbd.Error, match=r"TLS|requires|policy|not supported"):
        nbd.NBD().connect_uri(server.uri())
    wire = Wire(server.uri())
    wire.greet()
    wire.option(OPT_GO, b"\0\0\0\0\0\0")
    kind, message = wire.option_reply()
    assert kind == ERR_TLS_REQD
    assert b"STARTTLS" in message


# -- clients that are refused, and what the log says of it ---------------------------------------------------------


@pytest.fixture
def strict(nbd_server: NbdServers, disk: Path, pki: Path, tmp_path: Path) -> Iterator[tuple[ServerProcess, Path]]:
    """A server, and a copy of the certificates for a client to spoil."""
    server = nbd_server.process("-f", "raw", "--tls-certificates", str(pki), str(disk), tcp=True)
    mine = tmp_path / "mine"
    shutil.copytree(pki, mine)
    yield server, mine
    assert handle(server, pki).pread(4, 0) == DATA[:4], "the next client is served"


def refused(server: ServerProcess, pki: Path, why: str) -> None:
    with pytest.raises(nbd.Error):
        handle(server, pki).pread(1, 0)
    _wait_for(lambda: why in server.log)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_client_without_a_certificate(strict: tuple[ServerProcess, Path]) -> None:
    server, mine = strict
    (mine / tls.CLIENT_CERT).unlink()
    (mine / tls.CLIENT_KEY).unlink()
    refused(server, mine, "TLS could not begin: peer did not return a certificate")


def test_client_of_another_authority(strict: tuple[ServerProcess, Path], tmp_path: Path, pki: Path) -> None:
    server, _ = strict
    other = tmp_path / "other"
    tls.init(other, hosts=["localhost"], client="alice")
    shutil.copy(pki / tls.CA_CERT, other / tls.CA_CERT)
    refused(server, other, "certificate verify failed")


def test_client_whose_certificate_has_expired(strict: tuple[ServerProcess, Path]) -> None:
    server, mine = strict
    past = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
    _sign_again(mine, past, past + datetime.timedelta(days=1))
    refused(server, mine, "certificate has expired")


def test_client_with_a_servers_certificate(strict: tuple[ServerProcess, Path]) -> None:
    server, mine = strict
    shutil.copy(mine / tls.SERVER_CERT, mine / tls.CLIENT_CERT)
    shutil.copy(mine / tls.SERVER_KEY, mine / tls.CLIENT_KEY)
    refused(server, mine, "certificate purpose")


def _sign_again(directory: Path, start: datetime.datetime, end: datetime.datetime) -> None:
    """The client's certificate for another time."""
    authority = load_pem_private_key((directory / tls.CA_KEY).read_bytes(), None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    old = x509.load_pem_x509_certificate((directory / tls.CLIENT_CERT).read_bytes())
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), old.serial_number, start, end)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    new = builder.sign(authority, hashes.SHA256())
    (directory / tls.CLIENT_CERT).write_bytes(new.public_bytes(Encoding.PEM))


def test_client_whose_certificate_is_revoked(nbd_server: NbdServers, disk: Path, pki: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pki"
    shutil.copytree(pki, directory)
    authority = load_pem_private_key((pki / tls.CA_KEY).read_bytes(), None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate((pki / tls.CA_CERT).read_bytes()).subject
    client = x509.load_pem_x509_certificate((pki / tls.CLIENT_CERT).read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    entry = x509.RevokedCertificateBuilder(client.serial_number, now).build()
    crl = x509.CertificateRevocationListBuilder(issuer, now, now + datetime.timedelta(days=1))
    (directory / tls.CA_CRL).write_bytes(
        crl.add_revoked_certificate(entry).sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM)
    )
    server = nbd_server.process("-f", "raw", "--tls-certificates", str(directory), str(disk), tcp=True)
    refused(server, pki, "certificate revoked")
    fresh = tmp_path / "fresh"
    shutil.copytree(pki, fresh)
    (fresh / tls.CLIENT_CERT).unlink()
    tls.init(fresh, hosts=["localhost"], client="bob")
    assert handle(server, fresh).pread(4, 0) == DATA[:4]


@pytest.mark.parametrize("user", ["mallory", "alice"])
def test_client_without_the_key(nbd_server: NbdServers, disk: Path, pki: Path, tmp_path: Path, user: str) -> None:
    """A name nobody has, and a name with another key."""
    server = nbd_server.process("-f", "raw", "--tls-psk", str(pki / tls.PSK), str(disk), tcp=True)
    (tmp_path / tls.PSK).write_text(f"{user}:{'11' * 32}\n")
    with pytest.raises(nbd.Error):
        handle(server, tmp_path, psk=True, user=user)
    _wait_for(lambda: "TLS could not begin" in server.log)
    assert handle(server, pki, psk=True).pread(4, 0) == DATA[:4]


def test_clients_need_no_certificate_where_none_is_demanded(nbd_server: NbdServers, disk: Path, pki: Path) -> None:
    server = nbd_server.process("-f", "raw", "--tls-certificates", str(pki), "--no-tls-verify", str(disk), tcp=True)
    with _python_client(server, pki, certificate=False) as client:
        assert _first_bytes(client) == DATA[:4]


# -- rude clients ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _python_client(
    server: ServerProcess, pki: Path, *, certificate: bool = True, version: ssl.TLSVersion | None = None
) -> Iterator[ssl.SSLSocket]:
    """TLS begun by Python's ssl; nothing negotiated yet."""
    wire = Wire(server.uri())
    wire.greet()
    wire.option(OPT_STARTTLS)
    assert wire.option_reply() == (REP_ACK, b"")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki / tls.CA_CERT)
    if certificate:
        context.load_cert_chain(pki / tls.CLIENT_CERT, pki / tls.CLIENT_KEY)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    with context.wrap_socket(wire.socket, server_hostname="localhost") as client:
        yield client


def _first_bytes(client: ssl.SSLSocket) -> bytes:
    wire = Wire.of(client)
    wire.option(OPT_GO, b"\0\0\0\0\0\0")
    while wire.option_reply()[0] != REP_ACK:
        pass
    wire.request(0, 0, 4)
    assert wire.reply() == (0, 0)
    return wire.receive(4)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions(server: ServerProcess, pki: Path, version: ssl.TLSVersion) -> None:
    with _python_client(server, pki, version=version) as client:
        assert client.version() == version.name.replace("_", ".")
        assert _first_bytes(client) == DATA[:4]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_older_versions_are_refused(server: ServerProcess, pki: Path) -> None:
    with pytest.raises(ssl.SSLError), _python_client(server, pki, version=ssl.TLSVersion.TLSv1_1):
        pass


def test_options_sent_with_starttls_end_the_connection(server: ServerProcess, pki: Path) -> None:
    """They may be somebody else's: what has been sent in plain text must not count after TLS has begun."""
    wire = Wire(server.uri())
    wire.greet()
    go = struct.pack(">8sII", b"IHAVEOPT", OPT_GO, 6) + bytes(6)
    wire.send(struct.pack(">8sII", b"IHAVEOPT", OPT_STARTTLS, 0) + go)
    assert REP_ACK.to_bytes(4) not in wire.rest()[:16]
    _wait_for(lambda: "something was sent in plain text after STARTTLS" in server.log)
    assert handle(server, pki).pread(4, 0) == DATA[:4]


@pytest.mark.parametrize(
    "garbage", [b"\0" * 64, b"\x16\x03\x01\xff\xff" + b"a" * 300, struct.pack(">8sII", b"IHAVEOPT", 3, 0)]
)
def test_what_is_no_tls_ends_the_connection(server: ServerProcess, pki: Path, garbage: bytes) -> None:
    wire = Wire(server.uri())
    wire.greet()
    wire.option(OPT_STARTTLS)
    assert wire.option_reply() == (REP_ACK, b"")
    wire.send(garbage)
    wire.socket.shutdown(socket.SHUT_WR)
    wire.rest()
    _wait_for(lambda: "TLS could not begin" in server.log)
    assert handle(server, pki).pread(4, 0) == DATA[:4]


def test_tampered_record_ends_the_connection(server: ServerProcess, pki: Path) -> None:
    with _python_client(server, pki) as client:
        assert _first_bytes(client) == DATA[:4]
        plain = socket.socket(fileno=client.fileno())
        plain.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert client.recv(1) == b""
        plain.detach()
    assert handle(server, pki).pread(4, 0) == DATA[:4]


def test_handshake_byte_by_byte(server: ServerProcess, pki: Path) -> None:
    wire = Wire(server.uri())
    wire.greet()
    wire.option(OPT_STARTTLS)
    assert wire.option_reply() == (REP_ACK, b"")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki / tls.CA_CERT)
    context.load_cert_chain(pki / tls.CLIENT_CERT, pki / tls.CLIENT_KEY)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    while True:
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            for byte in outgoing.read():
                wire.send(bytes([byte]))
            incoming.write(wire.receive(1))
    client.write(struct.pack(">8sII", b"IHAVEOPT", OPT_GO, 6) + bytes(6))
    for byte in outgoing.read():
        wire.send(bytes([byte]))
    reply = b""
    while len(reply) < 20:
        with contextlib.suppress(ssl.SSLWantReadError):
            reply += client.read(20 - len(reply))
            continue
        incoming.write(wire.receive(1))
    assert struct.unpack(">QIII", reply)[:3] == (0x3E889045565A9, OPT_GO, 3)


def test_export_to_be_had_with_tls_alone(nbd_server: NbdServers, disk: Path, pki: Path, tmp_path: Path) -> None:
    config = tmp_path / "exports.toml"
    config.write_text(
        f'[tls]\nmode = "allowed"\ncertificates = "{pki}"\n'
        f'[exports.open]\nlayers = [{{type = "memory", size = "1M"}}]\ndefault = true\n'
        f'[exports.secret]\nimage = "{disk}"\nformat = "raw"\ntls = "required"\n'
    )
    server = nbd_server.process(str(config), tcp=True)
    plain = nbd.NBD()
    plain.set_opt_mode(True)
    plain.connect_uri(server.uri())
    names: list[str] = []
    plain.opt_list(lambda name, _: names.append(name))
    assert names == ["open"]
    plain.set_export_name("secret")
    with pytest.raises(nbd.Error):
        plain.opt_go()
    plain.set_export_name("open")
    plain.opt_go()
    assert plain.pread(4, 0) == bytes(4)
    secure = handle(server, pki, set_export_name="secret")
    assert secure.pread(4, 0) == DATA[:4]
