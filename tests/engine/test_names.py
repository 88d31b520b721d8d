"""Names and messages that are no UTF-8: file names are bytes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from layers.file import File
from nbdserver.errors import ImageError
from nbdserver.request import Request
from nbdserver.testing import NbdServers
from tests.coherence.pages import PAGE, Pages
from tests.interop.wire import READ, Wire


def _path(tmp_path: Path) -> str:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.raw")
    Path(path).write_bytes(b"x" * PAGE)
    return path


def test_a_file_whose_name_is_not_utf8_is_served(nbd_server: NbdServers, tmp_path: Path) -> None:
    client = Wire(nbd_server(File(path=_path(tmp_path))))
    client.go()
    client.request(READ, 0, PAGE)
    assert client.reply() == (0, 0)
    assert client.receive(PAGE) == b"x" * PAGE


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full", "\udcff"), ImageError("broken", path="\udcff")])
def test_an_error_that_is_not_utf8_ends_one_request_and_no_thread(
    nbd_server: NbdServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(PAGE))
    pages = Pages(file=File(path=str(path)), pages=1)
    pages.code.add(0)

    def fail(request: Request) -> None:
        raise error

    monkeypatch.setattr(pages, "read", fail)
    client = Wire(nbd_server(pages, fault_threads=1))
    client.go()
    client.socket.settimeout(5)
    expected = errno.ENOSPC if isinstance(error, OSError) else errno.EIO
    for cookie in range(2):
        client.request(READ, 0, PAGE, cookie=cookie)
        assert client.reply() == (cookie, expected)
