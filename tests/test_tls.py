"""Files of keys and certificates: what is read, what is refused and why, what is made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nbdserver import tls
from nbdserver.errors import ConfigError
from nbdserver.handshake import TlsMode
from nbdserver.tls import TlsConfig


def keys(path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path = path / "keys.psk"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


def test_keys_by_name(tmp_path: Path) -> None:
    path = keys(tmp_path, "# ours\nalice:0aFF\n\nbob:with:colon:00\n")
    assert tls.read_psk(path) == {"alice": b"\x0a\xff", "bob:with:colon": b"\0"}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "has no keys"),
        ("alice", "line 1: no NAME:KEY"),
        ("a:00\nalice:0", "line 2: no NAME:KEY"),
        ("alice:secretkey", "line 1: no NAME:KEY"),
        (b"\xff:00", "line 1: no NAME:KEY"),
        (":00", "line 1: a name has 1 to 128 bytes"),
        ("x" * 129 + ":00", "line 1: a name has 1 to 128 bytes"),
        ("alice:", "line 1: the key has 0 bytes"),
        ("alice:" + "00" * 257, "line 1: the key has 257 bytes; allowed are 1 to 256"),
        ("a:00\na:11", "line 2: a second key for 'a'"),
        ("#" * ((1 << 20) + 1), "is longer than 1048576 bytes"),
    ],
)
def test_keys_refused(tmp_path: Path, text: str | bytes, cause: str) -> None:
    path = keys(tmp_path, text)
    with pytest.raises(ConfigError, match=cause) as caught:
        tls.read_psk(path)
    assert path in str(caught.value)
    assert "secretkey" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602, 0o644])
def test_keys_that_others_can_read_are_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        tls.read_psk(keys(tmp_path, "a:00", mode))


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        tls.read_psk(str(tmp_path / "nosuch"))


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (TlsConfig(TlsMode.REQUIRED), "TLS needs certificates"),
        (TlsConfig(TlsMode.ALLOWED), "TLS needs certificates"),
        (TlsConfig(TlsMode.OFF, "pki"), 'found "off" beside certificates'),
        (TlsConfig(TlsMode.OFF, None, "keys.psk"), 'found "off" beside certificates'),
    ],
)
def test_settings_that_contradict_each_other(config: TlsConfig, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        config.check()


@pytest.mark.parametrize("missing", [tls.SERVER_CERT, tls.SERVER_KEY, tls.CA_CERT])
def test_missing_certificate_is_named(tmp_path: Path, missing: str) -> None:
    tls.init(tmp_path, hosts=["localhost"], client="c")
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        TlsConfig(TlsMode.REQUIRED, str(tmp_path)).files()


def test_what_is_made_verifies_and_secrets_are_secret(tmp_path: Path) -> None:
    made = tls.init(tmp_path / "pki", hosts=["disk.example", "10.0.0.1"], client="vm 1")
    directory = tmp_path / "pki"
    assert {path.name for path in made} == set(os.listdir(directory))
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o600 if "key" in path.name else 0o644)
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", str(directory / tls.CA_CERT)]
    server, client = str(directory / tls.SERVER_CERT), str(directory / tls.CLIENT_CERT)
    for arguments in (
        ["-purpose", "sslserver", "-verify_hostname", "disk.example", server],
        ["-purpose", "sslserver", "-verify_ip", "10.0.0.1", server],
        ["-purpose", "sslclient", client],
    ):
        subprocess.run([*verify, *arguments], check=True, capture_output=True)
    wrong = [*verify, "-purpose", "sslserver", client]
    assert subprocess.run(wrong, check=False, capture_output=True).returncode != 0


def test_what_is_there_is_kept_and_what_is_missing_is_signed(tmp_path: Path) -> None:
    tls.init(tmp_path, hosts=["localhost"], client="one")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / tls.CLIENT_CERT).unlink()
    made = tls.init(tmp_path, hosts=["localhost"], client="two")
    assert [path.name for path in made] == [tls.CLIENT_KEY, tls.CLIENT_CERT]
    for name, data in before.items():
        assert ((tmp_path / name).read_bytes() == data) == (name not in (tls.CLIENT_KEY, tls.CLIENT_CERT))
    verify = ["openssl", "verify", "-CAfile", str(tmp_path / tls.CA_CERT), str(tmp_path / tls.CLIENT_CERT)]
    subprocess.run(verify, check=True, capture_output=True)


def test_half_an_authority_signs_nothing(tmp_path: Path) -> None:
    tls.init(tmp_path, hosts=["localhost"], client="one")
    (tmp_path / tls.CA_KEY).unlink()
    (tmp_path / tls.CLIENT_CERT).unlink()
    with pytest.raises(ConfigError, match="other half of the authority"):
        tls.init(tmp_path, hosts=["localhost"], client="one")
