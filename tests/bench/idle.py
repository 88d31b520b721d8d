"""Connections that have done their handshake and say nothing."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

from tests.bench.servers import Address, Disk, connect

_GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
#: NBD_OPT_EXPORT_NAME of the default export, after the client's flags: fixed newstyle, no zeroes.
_CHOICE = struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0)
#: The export's size and its transmission flags.
_ANSWER = 10


@contextlib.contextmanager
def idle_connections(disk: Disk, address: Address, count: int) -> Iterator[None]:
    """Have ``count`` of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(connect(disk, address))
            greeting = client.recv(len(_GREETING))
            if greeting != _GREETING:
                raise RuntimeError(f"a greeting was expected, found {greeting!r}")
            client.sendall(_CHOICE)
            answer = client.recv(_ANSWER)
            if len(answer) != _ANSWER:
                raise RuntimeError(f"{_ANSWER} bytes about the export were expected, found {len(answer)}")
        yield
