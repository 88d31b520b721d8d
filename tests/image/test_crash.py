"""A crash at any instant of a commit and of a rebase, with what was not synced lost: the overlay shows what it did."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from layers.ondisk.qcow2 import HEADER, HeaderFields
from layers.qcow2 import Qcow2
from layers.raw import Raw
from nbdserver.image.commit import Chain, commit
from nbdserver.image.rebase import Rebasing
from nbdserver.layer import Layer, finish
from nbdserver.reference import open_stack
from nbdserver.request import Flag
from tests.image.kit import KIB
from tests.layers.qcow2_check import check, read
from tests.layers.qcow2_kit import RecordedFile, apply, crash_states
from tests.serving import SEED, amount, create, qemu_io

SIZE = 256 * KIB
CLUSTER = 1024


def _overlay(directory: Path, base: bytes, **options: object) -> bytes:
    """An overlay with data, zeroes and compressed clusters in it."""
    backing = directory / "base"
    backing.write_bytes(base)
    path = create(
        directory / "top", SIZE, backing=backing, backing_format="raw", cluster_size=CLUSTER, **options
    )  # fmt: skip
    qemu_io(path, "write -P 1 0 20k", "write -z 24k 5k", "write -P 2 64k 33k", "write -P 3 200k 1k", "write -z 220k 9k")
    qemu_io(path, *(f"write -c -P 4 {cluster}k 1k" for cluster in range(100, 110)))
    return path.read_bytes()


@contextmanager
def _opened(*layers: Layer) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(open_stack(layer))
        yield


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_nothing_is_given_up_before_it_is_durable_in_the_base(compat: str, tmp_path: Path) -> None:
    pick = random.Random(SEED)
    base = pick.randbytes(SIZE)
    initial = _overlay(tmp_path, base, compat=compat)
    before = read(initial, base)
    below, above = RecordedFile(bytearray(base)), RecordedFile(bytearray(initial))
    happened: list[RecordedFile] = []
    for file in (below, above):
        file.before = lambda operation, file=file: happened.append(file) if operation.name != "read" else None
    lower, upper = Raw(below), Qcow2(above, backing=False)
    with _opened(lower, upper):
        commit(Chain([upper], ["top"], lower, "base"), drop=False)
    assert read(above.data, b"") != before and bytes(below.data) == before

    ends = [index for index, file in enumerate(happened) if file is above]
    for end in pick.sample(ends, min(len(ends), amount(60, 1000))):
        # Of the base only what is durable, of the overlay whatever may have got out.
        log = below.log[: happened[:end].count(below)]
        durable = bytearray(base)
        for operation in log[: max((at + 1 for at, each in enumerate(log) if each.name == "sync"), default=0)]:
            apply(durable, operation)
        count = happened[: end + 1].count(above)
        for position, state in crash_states(initial, above.log[:count], pick, 3):
            assert not check(state).errors, position
            assert read(state, durable) == before, (end, position)


def test_the_name_changes_when_all_that_differs_is_durable(tmp_path: Path) -> None:
    pick = random.Random(SEED)
    old = pick.randbytes(SIZE - 5 * KIB)
    new = old[: 50 * KIB] + pick.randbytes(50 * KIB) + bytes(20 * KIB) + old[120 * KIB :] + b"x" * 9 * KIB
    initial = _overlay(tmp_path, old)
    before = read(initial, old)
    file = RecordedFile(bytearray(initial))
    layers = [RecordedFile(bytearray(old)), RecordedFile(bytearray(new))]
    with _opened(*layers):
        image = Qcow2(file, backing=layers[1])
        with _opened(image):
            Rebasing(image, layers[0], layers[1], Flag.NONE).copy()
            image.set_backing("other", "raw")
            finish(image.flush())
    assert read(file.data, new) == before

    for position, state in crash_states(initial, file.log, pick, amount(200, 5000)):
        assert not check(state).errors, position
        fields = HeaderFields._make(HEADER.unpack_from(state))
        name = bytes(state[fields.backing_file_offset : fields.backing_file_offset + fields.backing_file_size])
        assert name in (b"base", b"other"), position
        assert read(state, new if name == b"other" else old) == before, (position, name)
