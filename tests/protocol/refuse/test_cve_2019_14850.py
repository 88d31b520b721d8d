"""CVE-2019-14850, nbdkit: connecting opened the back end before the client had asked for anything, so that little
traffic cost much. Here only GO and EXPORT_NAME make what has to be made."""

from __future__ import annotations

from pathlib import Path

from nbdserver.handshake import Option, ReplyType
from nbdserver.testing import NbdServers
from tests.protocol.kit import SIZE, Client, go, meta
from tests.serving import create


def test_nothing_is_made_before_it_is_entered(nbd_server: NbdServers, tmp_path: Path) -> None:
    create(tmp_path / "golden.qcow2", SIZE)
    (tmp_path / "made").mkdir()
    config = tmp_path / "exports.toml"
    config.write_text('[exports."box-*".template]\nimage = "golden.qcow2"\ndirectory = "made"\nephemeral = true\n')
    server = nbd_server.process(config, cwd=tmp_path)
    for number in range(50):
        client = Client(server.uri())
        assert client.ask(Option.STRUCTURED_REPLY)[-1][0] == ReplyType.ACK
        for option, data in (
            (Option.LIST, b""),
            (Option.INFO, go(f"box-{number}")),
            (Option.LIST_META_CONTEXT, meta(f"box-{number}")),
            (Option.SET_META_CONTEXT, meta(f"box-{number}", "base:allocation")),
        ):
            assert client.ask(option, data)[-1][0] == ReplyType.ACK
        client.close()
    assert list((tmp_path / "made").iterdir()) == []
    entered = Client(server.uri()).enter(name="box-1")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["box-1@ephemeral.qcow2"]
    entered.close()
