"""What tests of the protocol share: servers that outlast each of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver import tls
from nbdserver.limits import MIB
from nbdserver.testing import NbdServers


@pytest.fixture(scope="session")
def servers() -> Iterator[NbdServers]:
    """Servers for all tests: that they outlast every one of them is part of what is tested."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as directory, contextlib.ExitStack() as stack:
        yield NbdServers(Path(directory), stack)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, pki: Path) -> Path:
    """Of a server with the exports "clients" (the default) and "witness", which nobody else names. TLS is allowed."""
    directory = tmp_path_factory.mktemp("images")
    for name in ("clients", "witness"):
        with (directory / f"{name}.raw").open("wb") as file:
            file.truncate(32 * MIB)
    path = directory / "exports.toml"
    path.write_text(
        f'tls = {{ mode = "allowed", certificates = "{pki}" }}\n'
        '[exports.clients]\nimage = "clients.raw"\nformat = "raw"\ndefault = true\n'
        '[exports.witness]\nimage = "witness.raw"\nformat = "raw"\n'
    )
    return path


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    tls.init(directory, hosts=["localhost"], client="alice")
    return directory
