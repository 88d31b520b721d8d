"""The backends at their bounds."""

from __future__ import annotations

import os
from pathlib import Path

from layers.file import File
from nbdserver.extent import Intent
from nbdserver.graph import flatten
from nbdserver.testing import NbdServers
from tests.coherence.pages import PAGE, Pages
from tests.interop.wire import READ, Wire

#: More pieces than a completion queue has entries (512).
SCATTERED = 4096


def _scattered(path: Path) -> Pages:
    """Pages in reverse order, so that none continues another, on a file that is not in the page cache."""
    with path.open("wb") as file:
        for page in range(SCATTERED):
            file.write(page.to_bytes(4, "big") * (PAGE // 4))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    pages = Pages(file=File(path=str(path)), pages=SCATTERED)
    pages.table.reverse()
    return pages


def test_a_read_of_more_pieces_than_the_completion_queue_holds(
    nbd_server: NbdServers, tmp_path: Path, backend: str
) -> None:
    path = tmp_path / "disk.raw"
    pages = _scattered(path)
    server, uri = nbd_server.start(pages, backend=backend, workers=1)
    client = Wire(uri)
    client.go()
    # Have everything mapped first, without reading it.
    export = server._exports[""]
    leaves = [export._effects.leaf(leaf) for leaf in flatten(pages, 0, pages.size, Intent.READ)]
    export.engine_export.fill(export.engine_export.sequence, 0, leaves)
    for start in range(0, pages.size, 8 << 20):
        client.request(READ, start, 8 << 20)
        assert client.reply()[1] == 0
        data = client.receive(8 << 20)
        for at in range(0, 8 << 20, PAGE):
            page = SCATTERED - 1 - (start + at) // PAGE
            assert data[at : at + PAGE] == page.to_bytes(4, "big") * (PAGE // 4)
    assert server.stats()["exports"][""]["hits"] == pages.size // (8 << 20)
