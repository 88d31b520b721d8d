"""docs/REGISTERED_BUF.md: what becomes of the flag at every layer, as it is found here.

NBDSERVER_WRITE_DOCS=1 writes the file instead of comparing it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import pytest

import nbdserver
from nbdserver import registry
from nbdserver.explain import buffers_of
from nbdserver.layer import Layer
from nbdserver.request import Operation
from tests.layers.flag_kit import STACKS, VARIANTS, Hops, is_payload, run

DOCUMENT: Final = Path(nbdserver.__path__[0]).parent / "docs" / "REGISTERED_BUF.md"

OPERATIONS: Final = (Operation.READ, Operation.WRITE, Operation.ZERO)

#: Layers that stand on nothing: there is no child to pass memory on to, and so nothing to be seen.
LEAVES: Final = ("file", "memory")
LEAF: Final = {
    Operation.READ: "kept: I/O on it",
    Operation.WRITE: "kept: I/O on it",
    Operation.ZERO: "no memory: the file zeroes",
}

TEXT: Final = """\
# What becomes of REGISTERED_BUF

Written by the test suite: `NBDSERVER_WRITE_DOCS=1 pytest tests/layers/test_flag_table.py`; without that variable the
same test holds that it is up to date. *Kept* and *lost* are what the children of each layer saw when the layer was
asked with registered memory, its own metadata aside; the reasons are the layers' (`Layer.buffers`). Kept: all that came
out below was registered, be it the request's own memory or other memory of the pool. Lost: some was not. Not seen, but
said by the layers alone: `file` and `memory`, which have no children, and compressed clusters of `qcow2`.

Bounce memory is of the pool as long as that has room. When even its reserve is used up it is ordinary memory, and the
flag is lost with it. A request for zeroes has no memory; what a layer writes for one has.

## Every layer

{layers}

## QEMU's block layer

Functions and drivers of QEMU's that handle a request's memory, the layer that does the same here, and that layer's row.
(`blocks` is no layer: it is what `nbdserver/blocks.py` does to requests on their way to any layer that has limits.)

{functions}
"""

#: Functions and drivers of QEMU's block layer that handle a request's memory; the layer and operation that do the same
#: here, whose cell in the table of layers says what becomes of the flag; None: there is none yet.
FUNCTIONS: Final[tuple[tuple[str, tuple[str, Operation] | None], ...]] = (
    ("`bdrv_aligned_preadv`: aligned reads", ("raw", Operation.READ)),
    ("`bdrv_aligned_pwritev`: aligned writes", ("raw", Operation.WRITE)),
    ("`bdrv_aligned_pwritev`: zeroes detected", ("detect-zeroes", Operation.WRITE)),
    ("`bdrv_pad_request`: unaligned reads, and too long ones", ("blocks", Operation.READ)),
    ("`bdrv_pad_request`: unaligned writes, and too long ones", ("blocks", Operation.WRITE)),
    ("`bdrv_co_do_zero_pwritev`: unaligned zeroes", ("blocks", Operation.ZERO)),
    ("`bdrv_co_do_pwrite_zeroes`: zeroes written out", ("luks", Operation.ZERO)),
    ("`bdrv_co_do_copy_on_readv`, `copy-on-read`", ("copy-on-read", Operation.READ)),
    ("`blkverify`: reads", ("blkverify", Operation.READ)),
    ("`blkverify`: writes", ("blkverify", Operation.WRITE)),
    ("`crypto`: reads", ("luks", Operation.READ)),
    ("`crypto`: writes", ("luks", Operation.WRITE)),
    ("`compress`: writes", ("compress", Operation.WRITE)),
    ("`copy-before-write` and `block_copy`: writes", ("copy-before-write", Operation.WRITE)),
    ("`raw`: reads", ("raw", Operation.READ)),
    ("`raw`: writes", ("raw", Operation.WRITE)),
    ("`qcow2_co_preadv_task`", ("qcow2", Operation.READ)),
    ("`qcow2_co_pwritev_task`", ("qcow2", Operation.WRITE)),
    ("`quorum`: reads", ("quorum", Operation.READ)),
    ("`quorum`, fifo: reads (`read_fifo_child`)", ("quorum fifo", Operation.READ)),
    ("`quorum`: writes", ("quorum", Operation.WRITE)),
    ("`snapshot-access`", ("snapshot-access", Operation.READ)),
    ("`throttle`", ("throttle", Operation.READ)),
    ("`file-posix`", ("file", Operation.READ)),
    ("`bdrv_co_copy_range`", None),
    *((f"`{name}`", None) for name in ("mirror", "commit", "stream", "preallocate", "replication")),
    *((f"`{name}`", None) for name in ("blkdebug", "blklogwrites", "blkreplay", "nbd", "ssh", "curl", "iscsi", "nfs")),
    *((f"`{name}`", None) for name in ("rbd", "gluster", "nvme", "blkio", "null", "vpc", "vhdx", "vmdk", "vdi", "qed")),
    *((f"`{name}`", None) for name in ("qcow", "parallels", "bochs", "cloop", "dmg", "vvfat")),
)


def found(hops: Hops, operation: Operation, layer: type[Layer]) -> str:
    """What became of the flag below a layer that was asked with registered memory: read from what its children saw.

    Asserts that what the layer says about it (`Layer.buffers`) is so.
    """
    said, _, why = getattr(buffers_of(layer), operation.value).partition(": ")
    payload = [seen.is_registered for spy in hops.seen[operation] for seen in spy if is_payload(seen)]
    if not payload:
        assert said == "none", f"{layer.type}, {operation.value}: what it says, {said!r}, was not seen"
        return f"no memory: {why}"
    assert said != "none" or operation is not Operation.ZERO, f"{layer.type}: zeroing wrote"
    word = "kept" if all(payload) else "lost"
    assert (word == "lost") == (said == "loses"), f"{layer.type}, {operation.value}: {word}, but it says {said!r}"
    return f"{word}: {why}"


def found_at_all(directory: Path) -> dict[str, dict[Operation, str]]:
    """By layer and operation; for those that stand on others, and variants."""
    answers = dict.fromkeys(LEAVES, LEAF)
    for name, make in (STACKS | VARIANTS).items():
        (directory / name).mkdir()
        stack = make(directory / name)
        hops = run(stack)
        answers[name] = {operation: found(hops, operation, type(stack.layer)) for operation in OPERATIONS}
    return answers


def document(directory: Path) -> str:
    answers = found_at_all(directory)
    layers = ((f"`{name}`", *answers[name].values()) for name in registry.names())
    functions = (
        (name, f"`{ours[0]}`", answers[ours[0]][ours[1]]) if ours else (name, "", "not built yet")
        for name, ours in FUNCTIONS
    )
    tables = "\n".join(_table(("layer", "read", "write", "zero"), layers))
    return TEXT.format(layers=tables, functions="\n".join(_table(("in QEMU", "here", "the flag"), functions)))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def test_the_table_in_the_documentation_is_what_is_found(tmp_path: Path) -> None:
    text = document(tmp_path)
    if os.environ.get("NBDSERVER_WRITE_DOCS"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text, "NBDSERVER_WRITE_DOCS=1 writes it anew"


def test_every_layer_is_in_it() -> None:
    assert set(registry.names()) == {*LEAVES, *STACKS}


@pytest.mark.parametrize("name", registry.names())
def test_every_layer_says_it_in_the_words_there_are(name: str) -> None:
    for said in buffers_of(registry.layer_type(name)):
        assert said.partition(":")[0] in ("keeps", "bounces", "loses", "none"), said
