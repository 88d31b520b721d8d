"""Every test here runs on each backend that can be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.testing import NbdServers
from tests.live.kit import Live
from tests.serving import backend

__all__ = ["backend"]


@pytest.fixture
def live(nbd_server: NbdServers, tmp_path: Path, backend: str) -> Iterator[Live]:
    """A server with a disk "vm" that a test makes."""
    found = Live(nbd_server, tmp_path, backend)
    yield found
    found.stop()
