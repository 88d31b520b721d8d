"""CVE-2013-6410, nbd-server: the list of those who may connect was compared by the length of its entries, so that a
beginning of an address was enough. Addresses are compared as such, and names whole: of exports, and of key holders."""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path

import nbd
import pytest

from layers.memory import Memory
from nbdserver import tls
from nbdserver.access import Rule
from nbdserver.handshake import Option, ReplyType, TlsMode
from nbdserver.testing import NbdServers
from nbdserver.uri import parse
from tests.protocol.kit import READ, SIZE, Client, go


@pytest.mark.parametrize("name", ["d", "dis", "disk1", "disk/", "DISK", "goldendisk", " disk"])
def test_the_beginning_of_an_exports_name_is_not_its_name(client: Client, name: str) -> None:
    client.refused(Option.GO, go(name), ReplyType.ERR_UNKNOWN, "no export is named")


def test_the_beginning_of_a_users_name_is_not_its_name(nbd_server: NbdServers, tmp_path: Path) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text(f"alice:{'11' * 32}\n")
    keys.chmod(0o600)
    _, uri = nbd_server.start(Memory(SIZE), tls=tls.TlsConfig(TlsMode.REQUIRED, psk=str(keys)))
    for name, may in (("alice", True), ("alic", False), ("alicea", False), ("Alice", False), ("bob", False)):
        mine = tmp_path / "mine.psk"
        mine.write_text(f"{name}:{'11' * 32}\n")
        handle = nbd.NBD()
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_username(name)
        handle.set_tls_psk_file(str(mine))
        with contextlib.nullcontext() if may else pytest.raises(nbd.Error):
            handle.connect_unix(parse(uri).socket)
            handle.shutdown()


@pytest.mark.parametrize(("source", "may"), [("127.0.0.1", True), ("127.0.0.12", False), ("127.0.0.10", False)])
def test_the_beginning_of_an_address_is_not_that_address(nbd_server: NbdServers, source: str, may: bool) -> None:
    server, uri = nbd_server.start(Memory(SIZE), tcp=True)
    server.export("mine", Memory(SIZE), access=Rule(addresses=(ipaddress.ip_network("127.0.0.1/32"),)))
    client = Client(uri, source=source)
    answer = client.ask(Option.INFO, go("mine"))[-1][0]
    assert answer == (ReplyType.ACK if may else ReplyType.ERR_UNKNOWN)
    assert client.enter().do(READ, 0, 4).error == 0, "the default export is for all"
