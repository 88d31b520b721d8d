"""A header extension changes as a whole, at whatever instant the machine stops."""

from __future__ import annotations

import errno
import itertools
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.ondisk.qcow2 import EXTENSION_BACKING_FORMAT, EXTENSION_BITMAPS, EXTENSION_SKIP
from layers.qcow2.extensions import set_backing, set_extension
from layers.qcow2.header import read_header
from tests.layers.qcow2_kit import SECTOR, Operation, RecordedFile, apply
from tests.serving import SEED, amount, check, create, run, run_json

KIND = EXTENSION_BITMAPS


def make(
    pick: random.Random, bits: int, *, name: bytes = b"", apart: int = 0
) -> tuple[bytes, list[tuple[int, bytes]], bytes]:
    """A header cluster of version 3, its extensions, and its backing file's name, ``apart`` bytes behind them."""
    extensions = []
    for _ in range(pick.randrange(4)):
        extensions.append(
            (pick.randrange(1 << 31, 1 << 32), pick.randbytes(pick.choice((0, 5, 24, 40, 144, 376, 384))))
        )
    if pick.random() < 0.5:
        extensions.insert(pick.randint(0, len(extensions)), (KIND, pick.randbytes(24)))
    area = b"".join(
        struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0") for kind, data in extensions
    )
    area += bytes(8)
    at = 112 + len(area) + apart if name else 0
    head = struct.pack(">IIQIIQIIQQIIQ", 0x514649FB, 3, at, len(name), bits, 0, 0, 0, 0x30000, 0x10000, 1, 0, 0)
    head += struct.pack(">QQQII", 0, 0, 0, 4, 112) + bytes(8)
    cluster = (head + area + bytes(apart) + name).ljust(1 << bits, b"\0")
    return cluster, extensions, name


def parsed(data: bytes | bytearray) -> tuple[list[tuple[int, bytes]], bytes]:
    """The extensions and the backing file's name, read by the specification alone."""
    name_at, name_length, bits = struct.unpack_from(">QII", data, 8)
    at, found = 112, []
    while at + 8 <= (name_at or 1 << bits):
        kind, length = struct.unpack_from(">II", data, at)
        if not kind:
            break
        assert at + 8 + length <= (name_at or 1 << bits)
        if kind != EXTENSION_SKIP:
            found.append((kind, bytes(data[at + 8 : at + 8 + length])))
        at += 8 + -(-length // 8) * 8
    return found, bytes(data[name_at : name_at + name_length]) if name_at else b""


def every_state(initial: bytes, log: list[Operation]) -> Iterator[tuple[int, bytearray]]:
    """(position, file) for each operation, followed by a sync, and every choice of its sectors that got out."""
    state = bytearray(initial)
    for position, operation in enumerate(log):
        if operation.name == "sync":
            continue
        assert log[position + 1].name == "sync"
        first, last = operation.offset // SECTOR, (operation.offset + operation.length - 1) // SECTOR
        for count in range(last - first + 2):
            for sectors in itertools.combinations(range(first, last + 1), count):
                torn = bytearray(state)
                apply(torn, operation, lambda sector, sectors=sectors: sector in sectors)
                yield position, torn
        apply(state, operation)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_a_crash_leaves_the_old_extensions_or_the_new_ones(bits: int) -> None:
    pick = random.Random(f"{SEED} {bits}")
    refused, count = 0, amount(60, 2000)
    for _ in range(count):
        name = pick.choice((b"", b"", b"base.qcow2", b"/a/longer/name/" + b"x" * 100))
        initial, extensions, _ = make(pick, bits, name=name, apart=pick.choice((0, 0, 8, 200)))
        if len(initial) > 1 << bits:
            continue
        content = pick.choice((None, pick.randbytes(24), pick.randbytes(24), pick.randbytes(70)))
        known = [kind for kind, _ in extensions]
        expected = [(kind, data) for kind, data in extensions if kind != KIND]
        if content is not None:
            expected.insert(known.index(KIND) if KIND in known else len(expected), (KIND, content))
        file = RecordedFile(bytearray(initial))
        try:
            set_extension(file, KIND, content)
        except OSError as error:
            assert error.errno == errno.ENOSPC and bits == 10
            expected, refused = extensions, refused + 1
        assert parsed(file.data) == (expected, name)
        for position, state in every_state(initial, file.log):
            found = parsed(state)
            assert found in ((extensions, name), (expected, name)), (position, [str(o) for o in file.log])
    assert refused < count / 4


@pytest.mark.parametrize("bits", [9, 10, 12, 16])
def test_a_crash_leaves_the_old_backing_file_or_the_new_one(bits: int) -> None:
    """Name and format, and every other extension as it was."""
    pick = random.Random(f"{SEED} backing {bits}")
    refused, count, kinds = 0, amount(30, 1000), set()
    for _ in range(count):
        name = pick.choice((b"", b"base.qcow2", b"/a/longer/name/" + b"x" * 100))
        initial, extensions, _ = make(pick, bits, name=name, apart=pick.choice((0, 0, 8, 200)))
        if len(initial) > 1 << bits:
            continue
        for wanted, format in ((b"other", b"raw"), (b"", None), (b"y" * 300, b"qcow2"), (b"z" * 40, None)):
            expected = [(kind, data) for kind, data in extensions if kind != EXTENSION_BACKING_FORMAT]
            if format is not None:
                expected.insert(0, (EXTENSION_BACKING_FORMAT, format))
            before = parsed(initial)
            file = RecordedFile(bytearray(initial))
            try:
                set_backing(file, wanted, format)
            except OSError as error:
                assert error.errno == errno.ENOSPC and bits <= 10
                refused += 1
                continue
            assert parsed(file.data) == (expected, wanted)
            kinds.add(sum(operation.name == "write" for operation in file.log))
            for position, state in every_state(initial, file.log):
                assert parsed(state) in (before, (expected, wanted)), (position, [str(o) for o in file.log])
            initial, extensions = bytes(file.data), expected
    assert refused < count
    assert bits < 16 or kinds >= {1, 2, 5}, "every way is gone"


def test_backing_files_may_change_again_and_again() -> None:
    initial, _, _ = make(random.Random(3), 12, name=b"first")
    file = RecordedFile(bytearray(initial))
    for number in range(50):
        name = b"x" * (number * 37 % 500)
        set_backing(file, name, pick := (b"raw", b"qcow2", None)[number % 3] if name else None)
        found, named = parsed(file.data)
        assert named == name and dict(found).get(EXTENSION_BACKING_FORMAT) == pick


def test_nothing_is_written_where_nothing_changes() -> None:
    initial, _, _ = make(random.Random(1), 16)
    set_extension(file := RecordedFile(bytearray(initial)), KIND, b"x" * 24)
    written = len(file.log)
    set_extension(file, KIND, b"x" * 24)
    assert len(file.log) == written


def test_what_qemu_made_keeps_its_other_extensions(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base", "1M")
    path = create(tmp_path / "image", 1 << 20, backing=tmp_path / "base", backing_format="raw")
    before = read_header(RecordedFile(bytearray(path.read_bytes())))
    file = RecordedFile(bytearray(path.read_bytes()))
    set_extension(file, 0x12345678, bytes(range(200)))
    after = read_header(file)
    assert after.extensions == {**before.extensions, 0x12345678: bytes(range(200))}
    assert (after.backing_name, after.backing_format) == (before.backing_name, "raw")
    path.write_bytes(file.data)
    check(path)
    assert run_json("qemu-img", "info", "--output=json", path)["full-backing-filename"] == str(tmp_path / "base")
    set_extension(file, 0x12345678, None)
    assert read_header(file).extensions == before.extensions
