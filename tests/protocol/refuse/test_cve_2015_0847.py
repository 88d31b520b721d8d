"""CVE-2015-0847, nbd-server: its signal handlers did what must not be done in one, so that a signal at the wrong
moment hung it. Signals by the thousand, while clients come and go, hold up nobody."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from pathlib import Path

from nbdserver.testing import NbdServers
from tests.protocol.kit import is_served
from tests.serving import amount


def test_a_storm_of_signals(nbd_server: NbdServers, tmp_path: Path) -> None:
    config = tmp_path / "exports.toml"
    config.write_text('[exports.disk]\nlayers = [{ type = "memory", size = "1M" }]\ndefault = true\n')
    server = nbd_server.process(config)
    stop = threading.Event()

    def disturb() -> None:
        numbers = itertools.cycle((signal.SIGCHLD, signal.SIGUSR1, signal.SIGCHLD, signal.SIGHUP))
        while not stop.wait(0.001):
            os.kill(server.pid, next(numbers))

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        for _ in range(amount(20, 500)):
            is_served(server.uri())
    finally:
        stop.set()
        disturbing.join()
    assert server.terminate() == 0
    assert "Traceback" not in server.log
