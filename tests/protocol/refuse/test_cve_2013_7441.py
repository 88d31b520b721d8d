"""CVE-2013-7441, nbd-server: what went wrong in a negotiation ended not the connection but the server, all the more
when the client had gone. Whoever leaves in its handshake, however, is the only one who goes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nbdserver.handshake import Option
from nbdserver.testing import NbdServers
from tests.interop.wire import Wire
from tests.protocol.kit import SIZE, Leave, half_close, is_served, reset

STAGES: list[bytes] = [
    b"",
    b"\0\0",
    struct.pack(">I", 3),
    struct.pack(">I", 0xFF),
    struct.pack(">I8sI", 3, b"IHAVEOPT", Option.GO),
    struct.pack(">I8sII", 3, b"IHAVEOPT", Option.GO, 6),
    struct.pack(">I8sII", 3, b"IHAVEOPT", Option.GO, 6) + bytes(6),
    struct.pack(">I8sII", 3, b"IHAVEOPT", Option.LIST, 0) * 20,
    struct.pack(">I8sII", 3, b"IHAVEOPT", Option.EXPORT_NAME, 6) + b"nobody",
    struct.pack(">I8sII", 3, b"IHAVEOPT", Option.STARTTLS, 0) + b"\x16\x03",
]


@pytest.mark.parametrize("leave", [half_close, reset, Wire.close])
def test_the_server_outlives_whoever_leaves(nbd_server: NbdServers, tmp_path: Path, leave: Leave) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(SIZE))
    server = nbd_server.process("-f", "raw", disk)
    pid = server.pid
    for stage in STAGES * 5:
        wire = Wire(server.uri())
        wire.send(stage)
        leave(wire)
        wire.close()
    assert server.pid == pid
    is_served(server.uri())
    assert server.terminate() == 0
