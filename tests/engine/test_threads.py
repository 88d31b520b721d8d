"""The thread backend leaves nothing behind."""

from __future__ import annotations

import os

from nbdserver.server import Server


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_server_that_is_never_started_leaves_no_threads() -> None:
    before = _threads()
    server = Server(backend="threads")
    assert _threads() > before
    del server
    assert _threads() <= before
