"""CVE-2017-15119, QEMU: options of 4 GiB were read to their end, one after the other, by the thread that served all
others. What is worth skipping is bounded, and whoever sends it holds up nobody."""

from __future__ import annotations

import struct

from nbdserver.handshake import Option
from tests.protocol.kit import MIB, Client, is_served


def test_gigabytes_end_the_connection(uri: str) -> None:
    for option in (Option.LIST, Option.STARTTLS, Option.GO, 99):
        client = Client(uri)
        client.send(struct.pack(">8sII", b"IHAVEOPT", option, 0xFFFFFFFF))
        client.is_cut_off()


def test_megabytes_that_never_come_hold_up_nobody(uri: str) -> None:
    waiting = [Client(uri) for _ in range(20)]
    for client in waiting:
        client.send(struct.pack(">8sII", b"IHAVEOPT", Option.LIST, 4 * MIB) + bytes(100))
    is_served(uri)
    for client in waiting:
        client.close()
