"""The registered-buffer flag through the engine: what a layer passes on has it wherever what came to it had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from layers.blkverify import Blkverify
from layers.copy_on_read import CopyOnRead
from layers.detect_zeroes import DetectZeroes
from layers.file import File
from layers.qcow2 import Qcow2
from layers.quorum import Quorum
from nbdserver.layer import Layer
from nbdserver.request import Operation
from nbdserver.server import Server
from nbdserver.testing import NbdServers
from tests.registered import Spy
from tests.serving import backend, create

__all__ = ["backend"]

MIB = 1 << 20

STACKS: dict[str, Callable[[list[Spy]], Layer]] = {
    "blkverify": lambda below: Blkverify(*below[:2]),
    "copy-on-read": lambda below: CopyOnRead(below[0]),
    "detect-zeroes": lambda below: DetectZeroes(below[0]),
    "quorum": lambda below: Quorum([*below], 3),
    "quorum-fifo": lambda below: Quorum([*below], 2, read_pattern="fifo"),
}


@pytest.mark.parametrize("name", STACKS)
def test_every_hop(nbd_server: NbdServers, tmp_path: Path, backend: str, name: str) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 4 * MIB)
    images = [create(tmp_path / f"{n}.qcow2", 4 * MIB, backing=base, backing_format="raw") for n in range(3)]
    below = [Spy(Qcow2(File(str(path)))) for path in images]
    above = Spy(STACKS[name](below))
    handle = nbd.NBD()
    handle.connect_uri(nbd_server(above, backend=backend))
    assert bytes(handle.pread(3 * MIB, 512)) == b"b" * 3 * MIB  # longer than a bounce
    handle.pwrite(b"new" * 1000, 100_000)
    assert bytes(handle.pread(3001, 100_000)) == b"new" * 1000 + b"b"
    handle.shutdown()
    top = above.take()
    assert {hop.operation for hop in top} == {Operation.READ, Operation.WRITE}
    # The backend registers its pool, or it does not; no layer makes a difference to that.
    (is_registered,) = {hop.is_registered for hop in top}
    for spy in below:
        assert {hop.is_registered for hop in spy.take()} <= {is_registered}
    if backend == "threads":
        assert not is_registered


def test_the_server_counts_what_layers_and_files_did(tmp_path: Path, backend: str) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 4 * MIB)
    image = create(tmp_path / "top.qcow2", 4 * MIB, backing=base, backing_format="raw")
    with Server(listen=[f"nbd+unix:///?socket={tmp_path / 'socket'}"], backend=backend) as server:
        server.export("disk", CopyOnRead(Qcow2(File(str(image)))), default=True)
        handle = nbd.NBD()
        handle.connect_unix(str(tmp_path / "socket"))
        handle.pread(64 * 1024, MIB)
        handle.pwrite(b"new" * 1000, 100_000)
        handle.shutdown()
        stats = server.stats()["exports"]["disk"]
    layers, files = stats["layers"], stats["files"]
    assert {path: counts["type"] for path, counts in layers.items()} == {
        "/": "copy-on-read",
        "/file": "qcow2",
        "/file/file": "file",
        "/file/backing": "raw",
        "/file/backing/file": "file",
    }
    top = layers["/"]
    assert top["requests"] >= 2
    assert top["registered"] == (top["requests"] if backend == "io_uring" else 0)
    # A read that is copied goes on twice.
    assert top["kept"] > top["registered"] if backend == "io_uring" else top["kept"] == 0
    assert all(counts["lost"] == {} for counts in layers.values()), layers
    assert set(files) == {str(image), str(base)}
    assert files[str(base)]["reads"] >= 1
    assert files[str(image)]["writes"] >= 2
