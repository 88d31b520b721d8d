"""TLS as it is configured: which files, and which keys; and files to begin with.

A directory of certificates has the layout of QEMU's ``tls-creds-x509`` and libnbd's ``tls-certificates``::

    ca-cert.pem       who signs certificates        both sides
    ca-crl.pem        which are revoked             server, if there
    server-cert.pem   server-key.pem                server
    client-cert.pem   client-key.pem                client

A file of pre-shared keys has a line ``NAME:KEY`` for each, KEY in hexadecimal: what ``psktool`` makes, and QEMU, nbdkit
and libnbd take.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdserver.errors import ConfigError
from nbdserver.handshake import TlsMode
from nbdserver.limits import PSK_FILE_MAX, PSK_MAX, PSK_NAME_MAX

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA_CERT: Final = "ca-cert.pem"
CA_KEY: Final = "ca-key.pem"
CA_CRL: Final = "ca-crl.pem"
SERVER_CERT, SERVER_KEY = "server-cert.pem", "server-key.pem"
CLIENT_CERT, CLIENT_KEY = "client-cert.pem", "client-key.pem"
PSK: Final = "keys.psk"

#: How long what `init` makes is good for, days: it is for a trial and for a cluster's own use, and easily made again.
VALID_DAYS: Final = 3650
#: How far clocks may disagree, days.
SKEW_DAYS: Final = 1


@dataclass(frozen=True)
class TlsConfig:
    """The table ``[tls]``. ``certificates``: a directory; ``psk``: a file of keys. ``verify_clients``: a client with a
    certificate's TLS must have one too, signed by ca-cert.pem."""

    mode: TlsMode = TlsMode.OFF
    certificates: str | None = None
    psk: str | None = None
    verify_clients: bool = True

    def files(self) -> dict[str, str]:
        """What `_engine.TlsContext` takes, of files. ConfigError: one that is needed is not there."""
        if self.certificates is None:
            return {}
        files = {"certificate": self._file(SERVER_CERT), "key": self._file(SERVER_KEY)}
        if self.verify_clients:
            files["authority"] = self._file(CA_CERT)
            if os.path.exists(os.path.join(self.certificates, CA_CRL)):
                files["revoked"] = self._file(CA_CRL)
        return files

    def keys(self) -> dict[str, bytes]:
        """The pre-shared keys by name. ConfigError."""
        return {} if self.psk is None else read_psk(self.psk)

    def sources(self) -> list[str]:
        """The directory and the file that TLS is done with; none if it is off."""
        return [path for path in (self.certificates, self.psk) if path is not None and self.mode is not TlsMode.OFF]

    def check(self) -> None:
        """ConfigError: TLS is wanted and there is nothing to do it with, or the other way round."""
        given = self.certificates is not None or self.psk is not None
        if self.mode is not TlsMode.OFF and not given:
            raise ConfigError("TLS needs certificates (a directory) or psk (a file of keys)", key="mode")
        if self.mode is TlsMode.OFF and given:
            raise ConfigError('found "off" beside certificates or psk, which are then not used', key="mode")

    def _file(self, name: str) -> str:
        assert self.certificates is not None
        path = os.path.join(self.certificates, name)
        try:
            with open(path, "rb"):
                return path
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}", key="certificates") from error


NO_TLS: Final = TlsConfig()


def read_psk(path: str) -> dict[str, bytes]:
    """The pre-shared keys in a file, by name. ConfigError, naming the line."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(PSK_FILE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from error
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(
            f"holds keys, and others may read or change it (mode {stat.S_IMODE(mode):04o}): chmod 600 it", file=path
        )
    if len(data) > PSK_FILE_MAX:
        raise ConfigError(f"is longer than {PSK_FILE_MAX} bytes", file=path)
    keys: dict[str, bytes] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip() and not line.startswith(b"#"):
            name, key = _psk_line(line, number, path)
            if name in keys:
                raise ConfigError(f"line {number}: a second key for {name!r}", file=path)
            keys[name] = key
    if not keys:
        raise ConfigError("has no keys: a line is NAME:KEY, the key in hexadecimal", file=path)
    return keys


def _psk_line(line: bytes, number: int, path: str) -> tuple[str, bytes]:
    """A key's name and the key. What a message says of the line is never the key."""
    raw_name, colon, digits = line.strip().rpartition(b":")
    try:
        name, key = raw_name.decode(), bytes.fromhex(digits.decode())
    except ValueError:
        raise ConfigError(f"line {number}: no NAME:KEY with the key in hexadecimal", file=path) from None
    if not colon or not 0 < len(raw_name) <= PSK_NAME_MAX:
        raise ConfigError(f"line {number}: a name has 1 to {PSK_NAME_MAX} bytes", file=path)
    if not 0 < len(key) <= PSK_MAX:
        raise ConfigError(f"line {number}: the key has {len(key)} bytes; allowed are 1 to {PSK_MAX}", file=path)
    return name, key


# -- files to begin with ---------------------------------------------------------------------------------------------


def init(directory: Path, *, hosts: Sequence[str], client: str) -> list[Path]:
    """Make an authority, a certificate for a server called ``hosts`` and one for ``client``, and a pre-shared key.

    Files that are there are kept; the authority signs what is missing. Returns what was made. Raises
    ConfigError, OSError.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made: list[Path] = []
    authority = _authority(directory, made)
    _certificate(directory / SERVER_CERT, directory / SERVER_KEY, hosts[0], hosts, authority, made)
    _certificate(directory / CLIENT_CERT, directory / CLIENT_KEY, client, (), authority, made)
    if not (directory / PSK).exists():
        _write(directory / PSK, f"{client}:{secrets.token_hex(32)}\n".encode(), made, secret=True)
    return made


_Pair = tuple["x509.Certificate", "ec.EllipticCurvePrivateKey"]


def _authority(directory: Path, made: list[Path]) -> _Pair:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    cert_path, key_path = directory / CA_CERT, directory / CA_KEY
    if cert_path.exists() != key_path.exists():
        missing = key_path if cert_path.exists() else cert_path
        raise ConfigError("is missing beside the other half of the authority: nothing can be signed", file=str(missing))
    if cert_path.exists():
        key = load_pem_private_key(key_path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError("is not an authority's key that was made here", file=str(key_path))
        return x509.load_pem_x509_certificate(cert_path.read_bytes()), key
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("nbdserver authority")
    builder = _builder(name, name, key.public_key(), key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    certificate = _signed(builder, key)
    _write_pair(cert_path, key_path, certificate, key, made)
    return certificate, key


def _certificate(
    cert_path: Path, key_path: Path, name: str, hosts: Sequence[str], authority: _Pair, made: list[Path]
) -> None:
    """``hosts`` none: a client's."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if cert_path.exists() and key_path.exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = _builder(_name(name), authority[0].subject, key.public_key(), authority[1].public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    _write_pair(cert_path, key_path, _signed(builder, authority[1]), key, made)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=SKEW_DAYS))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA256())


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    except ValueError as error:
        raise ConfigError(f"{common_name!r} cannot be a certificate's name: {error}") from error


def _host(host: str) -> x509.GeneralName:
    from cryptography import x509

    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        return x509.DNSName(host.encode("idna").decode())
    except ValueError as error:
        raise ConfigError(f"{host!r} is no host name: {error}") from error


def _usage(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=not signs,  # QEMU demands it
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(
    cert_path: Path,
    key_path: Path,
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    made: list[Path],
) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    _write(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), made, secret=True)
    _write(cert_path, certificate.public_bytes(Encoding.PEM), made)


def _write(path: Path, data: bytes, made: list[Path], *, secret: bool = False) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    made.append(path)
