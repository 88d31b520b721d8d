"""Permissions: what the users of a layer do to it and let the others do; from the exports down to the files' locks."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from layers.blkverify import Blkverify
from layers.copy_before_write import CopyBeforeWrite
from layers.copy_on_read import CopyOnRead
from layers.detect_zeroes import DetectZeroes
from layers.file import File
from layers.luks import Luks
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.quorum import Quorum
from layers.raw import Raw
from layers.snapshot_access import SnapshotAccess
from layers.throttle import Throttle
from nbdserver.errors import ConfigError, ImageError
from nbdserver.files import FileOpener, Files
from nbdserver.graph import Child, Graph, Use
from nbdserver.layer import Layer
from nbdserver.permissions import ALL, ONLOOKER, READER, WRITER, Grant, Permission, as_file, refused, together
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Request
from nbdserver.server import Server
from tests.serving import check, content, create, qemu_io

KIB, MIB = 1 << 10, 1 << 20
NONE, READ, WRITE = Permission.NONE, Permission.CONSISTENT_READ, Permission.WRITE
UNCHANGED, RESIZE = Permission.WRITE_UNCHANGED, Permission.RESIZE
CLOSED: Final = READ | UNCHANGED


# -- what a layer does to its children ------------------------------------------------------------------------------


def qcow2_of(below: Layer) -> Layer:
    return Qcow2(below)


MEMORY: Final = Memory(MIB)


@pytest.mark.parametrize(
    ("layer", "role", "reader", "writer"),
    [
        # A filter passes on what it is granted.
        (Throttle(MEMORY), "file", READER, WRITER),
        (DetectZeroes(MEMORY), "file", READER, WRITER),
        (Raw(MEMORY), "file", READER, WRITER),
        (Raw(MEMORY, offset=512), "file", READER, WRITER),
        # The size of what a window looks at stays.
        (Raw(MEMORY, offset=512, size=512), "file", Grant(READ, ALL & ~RESIZE), Grant(READ | WRITE, ALL & ~RESIZE)),
        # A format reads and writes its metadata; nobody else does.
        (Qcow2(MEMORY), "file", Grant(READ, CLOSED), Grant(READ | WRITE | RESIZE, CLOSED)),
        (Qcow2(MEMORY), "data_file", Grant(READ, CLOSED), Grant(READ | WRITE | RESIZE, CLOSED)),
        (Qcow2(MEMORY), "backing", Grant(READ, CLOSED), Grant(READ, CLOSED)),
        (CopyOnRead(MEMORY), "file", Grant(READ | UNCHANGED, ALL), Grant(READ | WRITE | UNCHANGED, ALL)),
        (CopyBeforeWrite(MEMORY, MEMORY), "file", Grant(READ, CLOSED), Grant(READ | WRITE, CLOSED)),
        (CopyBeforeWrite(MEMORY, MEMORY), "target", Grant(READ | WRITE, CLOSED), Grant(READ | WRITE, CLOSED)),
        (SnapshotAccess(MEMORY), "file", READER, READER),
        # What is written to one of several that are to be alike makes them differ.
        (Quorum([MEMORY], 1), "children_.0", Grant(READ, CLOSED), Grant(READ | WRITE, CLOSED)),
        (Blkverify(MEMORY, MEMORY), "test", Grant(READ, CLOSED), Grant(READ | WRITE, CLOSED)),
        (Blkverify(MEMORY, MEMORY), "raw", Grant(READ, CLOSED), Grant(READ | WRITE, CLOSED)),
        (Luks(MEMORY), "file", Grant(READ, CLOSED), Grant(READ | WRITE, CLOSED)),
        (Luks(MEMORY), "header", Grant(READ, CLOSED), Grant(READ, CLOSED)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Layer) else value if isinstance(value, str) else "",
)
def test_what_a_layer_does_to_its_children(layer: Layer, role: str, reader: Grant, writer: Grant) -> None:
    assert layer.child_grant(role, READER) == reader
    assert layer.child_grant(role, WRITER) == writer


def test_a_format_that_is_open_for_writing_writes_whoever_is_above() -> None:
    """What the last writer has left in its tables goes to the file when it is flushed or closed."""
    layer = Qcow2(MEMORY)
    layer.is_open_for_writing = True
    assert layer.child_grant("file", READER).used == READ | WRITE | RESIZE
    assert layer.child_grant("backing", READER).used == READ


def test_a_file() -> None:
    assert as_file(READER, read_only=True) == Grant(READ, CLOSED)
    assert as_file(WRITER, read_only=True) == Grant(READ, CLOSED)
    assert as_file(READER, read_only=False) == Grant(READ | WRITE | RESIZE, CLOSED)
    assert as_file(Grant(UNCHANGED, ALL), read_only=False) == Grant(ALL, CLOSED)
    assert as_file(ONLOOKER, read_only=True) == ONLOOKER


def test_together() -> None:
    assert together([]) == ONLOOKER
    assert together([READER, WRITER]) == WRITER
    assert together([Grant(READ, CLOSED), WRITER]) == Grant(READ | WRITE, CLOSED)


def test_refused() -> None:
    assert refused(WRITER, Grant(READ, CLOSED)) is WRITE
    assert refused(Grant(READ, CLOSED), WRITER) is NONE
    assert refused(Grant(ALL, ALL), Grant(READ, WRITE)) is READ


# -- who excludes whom ----------------------------------------------------------------------------------------------


class Exports:
    """Exports that share a graph and files, as a server's do."""

    def __init__(self) -> None:
        self.graph, self.files = Graph(), Files()
        self.uses: dict[str, Use] = {}

    def open(self, name: str, layer: Layer, *, read_only: bool = False) -> Reference:
        user = f"export {name!r}"
        opener = FileOpener(self.graph, self.files, read_only=read_only, user=user)
        self.uses[name] = self.graph.open(layer, opener, user=user)
        return Reference(layer, read_only=read_only)

    def close(self, name: str) -> None:
        use = self.uses.pop(name)
        self.graph.close(use.layer, use)

    def refuse(self, name: str, layer: Layer, message: str, *, read_only: bool = False) -> None:
        """Opening is refused with the very message, and leaves nothing behind."""
        before = {node: [(use.name, use.grant) for use in uses] for node, uses in self.graph._uses.items()}
        with pytest.raises((ConfigError, ImageError)) as caught:
            self.open(name, layer, read_only=read_only)
        assert str(caught.value) == message
        assert before == {node: [(use.name, use.grant) for use in uses] for node, uses in self.graph._uses.items()}
        assert all(node.grant == together([use.grant for use in uses]) for node, uses in self.graph._uses.items())


@pytest.fixture
def exports() -> Exports:
    return Exports()


def test_several_exports_may_write_one_node(exports: Exports, disk: Path) -> None:
    node = File(str(disk))
    first, second = exports.open("a", Raw(node)), exports.open("b", node)
    first.write(0, b"1")
    second.write(1, b"2")
    assert first.read(0, 2) == second.read(0, 2) == b"12"


def test_windows_of_one_disk(exports: Exports, disk: Path) -> None:
    node = File(str(disk))
    for number in range(3):
        exports.open(f"p{number}", Raw(node, offset=number * 4096, size=4096)).write(0, b"%d" % number)
    assert [exports.open("disk", node).read(number * 4096, 1) for number in range(3)] == [b"0", b"1", b"2"]


def overlay(directory: Path, base: Layer, name: str = "top.qcow2") -> Qcow2:
    return Qcow2(File(str(create(directory / name, MIB))), backing=base)


def test_a_backing_file_is_not_written(exports: Exports, disk: Path, tmp_path: Path) -> None:
    node = File(str(disk))
    exports.open("a", node)
    top = tmp_path / "top.qcow2"
    allows = f"export 'a' writes {disk}, which export 'b' (backing of qcow2 {top}) does not allow"
    exports.refuse("b", overlay(tmp_path, node), allows)
    exports.close("a")
    exports.open("b", overlay(tmp_path, node))
    exports.refuse("a", node, f"export 'a' writes {disk}, which export 'b' (backing of qcow2 {top}) does not allow")
    exports.open("c", node, read_only=True)
    exports.open("d", overlay(tmp_path, node, "other.qcow2"))


def test_a_backing_file_is_open_for_reading_only(exports: Exports, disk: Path, tmp_path: Path) -> None:
    node = File(str(disk))
    top = exports.open("b", overlay(tmp_path, Raw(node)))
    assert node.read_only and not top.root.read_only
    top.write(0, b"x")
    assert disk.read_bytes()[:1] == b"d"
    exports.open("c", File(str(disk)), read_only=True)


def test_the_file_of_a_format_is_its_own(exports: Exports, tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    node = File(str(path))
    exports.open("a", Qcow2(node))
    where = f"{path}, which export"
    exports.refuse("b", Raw(node), f"export 'b' (file of raw) writes {where} 'a' (file of qcow2) does not allow")
    exports.refuse("c", Qcow2(node), f"export 'c' (file of qcow2) writes {where} 'a' (file of qcow2) does not allow")
    assert exports.open("d", Raw(node), read_only=True).read(0, 3) == b"QFI"


def test_only_copy_before_write_writes_its_file(exports: Exports, disk: Path) -> None:
    node = File(str(disk))
    live = CopyBeforeWrite(node, Memory(MIB))
    exports.open("live", live)
    exports.open("snap", SnapshotAccess(live))
    refused = f"export 'past' writes {disk}, which export 'live' (file of copy-before-write) does not allow"
    exports.refuse("past", node, refused)
    exports.open("too", live).write(0, b"x")
    exports.open("look", node, read_only=True)


def test_a_point_in_time_needs_the_disk_for_itself(exports: Exports, disk: Path) -> None:
    node = File(str(disk))
    exports.open("past", node)
    refused = f"export 'past' writes {disk}, which export 'live' (file of copy-before-write) does not allow"
    exports.refuse("live", CopyBeforeWrite(node, Memory(MIB)), refused)


def test_the_snapshot_may_be_exported_before_the_disk(exports: Exports, disk: Path) -> None:
    live = CopyBeforeWrite(File(str(disk)), Memory(MIB))
    snap = exports.open("snap", SnapshotAccess(live))
    exports.open("live", live).write(0, b"x" * MIB)
    assert snap.read(0, MIB) == b"d" * (MIB // 2) + bytes(MIB // 2)


def test_a_node_is_not_two_replicas(exports: Exports) -> None:
    node = Memory(MIB)
    for layer, one, other in (
        (Quorum([node, node], 2), "children.1 of quorum", "children.0 of quorum"),
        (Blkverify(node, node), "raw of blkverify", "test of blkverify"),
    ):
        exports.refuse("a", layer, f"export 'a' ({one}) writes memory, which export 'a' ({other}) does not allow")
    exports.open("b", Quorum([node, node], 2), read_only=True)


def test_a_file_that_two_exports_name_is_read_by_both_or_neither(exports: Exports, disk: Path) -> None:
    exports.open("a", File(str(disk)))
    exports.refuse("b", Raw(File(str(disk))), f"{disk}: export 'b' writes it, which export 'a' does not allow")
    exports.refuse(
        "b", File(str(disk)), f"{disk}: export 'a' writes it, which export 'b' does not allow", read_only=True
    )
    exports.close("a")
    for name in "cd":
        exports.open(name, File(str(disk)), read_only=True)


def test_who_leaves_takes_its_grant_along(exports: Exports, disk: Path) -> None:
    node = File(str(disk))
    filtered = Throttle(node)
    exports.open("a", filtered)
    exports.open("b", filtered, read_only=True)
    assert node.grant == filtered.grant == WRITER
    exports.close("a")
    assert node.grant == filtered.grant == READER


def test_what_a_writer_left_behind_is_written_after_it_has_gone(exports: Exports, tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    node = Qcow2(File(str(path)))
    exports.open("a", node).write(0, b"a" * MIB)
    look = exports.open("b", node, read_only=True)
    exports.close("a")
    assert look.read(0, MIB) == b"a" * MIB
    exports.close("b")
    check(path)
    assert content(path) == b"a" * MIB


def test_what_is_read_only_is_not_written_by_whoever_opens_it(exports: Exports, disk: Path) -> None:
    node = File(str(disk))
    exports.open("a", node, read_only=True)
    late = exports.open("b", node)
    assert late.root.read_only and node.grant == READER
    exports.open("c", Quorum([node], 1))


def test_the_users_of_a_golden_image(tmp_path: Path) -> None:
    """Overlays that name it share it; whoever wants to write it is refused as long as there is one."""
    base = create(tmp_path / "base.qcow2", MIB)
    exports = Exports()
    for number in range(5):
        exports.open(f"{number}", Qcow2(File(str(create(tmp_path / f"{number}.qcow2", MIB, backing=base)))))
    exports.refuse("w", Qcow2(File(str(base))), f"{base}: export 'w' writes it, which export '0' does not allow")
    for number in range(5):
        exports.close(f"{number}")
    exports.open("w", Qcow2(File(str(base)))).write(0, b"x")


@dataclasses.dataclass(eq=False)
class Intruder(Layer):
    """Writes a child that it has not asked to write."""

    backing: Layer

    @property
    def size(self) -> int:
        return self.backing.size

    @property
    def read_only(self) -> bool:
        return False

    def write(self, request: Request) -> None:
        assert isinstance(self.backing, Child)
        self.backing.write(request)


def test_a_layer_that_does_what_it_may_not_is_found_out() -> None:
    found = pytest.raises(AssertionError, match=r"intruder has Grant.* of its backing")
    with open_stack(Intruder(Memory(MIB))) as export, found:
        export.write(0, b"x")


# -- a server -------------------------------------------------------------------------------------------------------


def test_a_server_says_which_exports_exclude_each_other(tmp_path: Path, disk: Path) -> None:
    node = File(str(disk))
    with Server(listen=[f"nbd+unix:///?socket={tmp_path / 'socket'}"]) as server:
        server.export("live", CopyBeforeWrite(node, Memory(MIB)))
        with pytest.raises(ConfigError, match=r"export 'raw' writes .*disk.raw, which export 'live' \(file of copy-be"):
            server.export("raw", node)
        server.export("look", node, read_only=True)


# -- layers that are put in and taken out ---------------------------------------------------------------------------


def grants(graph: Graph) -> dict[str, list[tuple[str, Grant]]]:
    return {node.type: sorted((use.name, use.grant) for use in uses) for node, uses in graph._uses.items()}


def test_a_point_in_time_is_put_in_for_all_who_write(exports: Exports, disk: Path) -> None:
    """In one: one after the other, the first would keep the second out."""
    node = File(str(disk))
    exports.open("a", node), exports.open("b", Raw(node))
    before = grants(exports.graph)
    layer = CopyBeforeWrite(node, Memory(MIB))
    use = exports.graph.open(layer, FileOpener(exports.graph, exports.files), grant=ONLOOKER)
    assert node.grant == WRITER
    exports.graph.replace(node, layer, [exports.uses["a"]])
    assert layer.grant == WRITER
    assert node.grant == Grant(READ | WRITE, CLOSED)
    refused = f"export 'past' writes {disk}, which export 'a' (file of copy-before-write) does not allow"
    exports.refuse("past", node, refused)
    exports.graph.replace(layer, node, [exports.uses["a"]])
    exports.graph.close(layer, use)
    assert grants(exports.graph) == before


def test_who_would_be_in_the_way_is_not_put_in(exports: Exports, disk: Path) -> None:
    node = File(str(disk))
    exports.open("a", node), exports.open("b", Raw(node))
    layer = CopyBeforeWrite(node, Memory(MIB))
    exports.graph.open(layer, FileOpener(exports.graph, exports.files), grant=ONLOOKER)
    before = grants(exports.graph)
    refused = (
        rf"export 'b' \(file of raw\) writes {disk}, which export 'a' \(file of copy-before-write\) does not allow"
    )
    with pytest.raises(ConfigError, match=refused):
        exports.graph.replace(node, layer, [exports.uses["a"]], edges=False)
    assert grants(exports.graph) == before
    assert exports.uses["a"].layer is node


def test_a_point_in_time_that_is_looked_at_is_not_taken_out(exports: Exports, disk: Path) -> None:
    node = File(str(disk))
    layer = CopyBeforeWrite(node, Memory(MIB))
    exports.open("a", layer)
    exports.open("then", SnapshotAccess(layer))
    refused = rf"export 'a' writes {disk}, which export 'then' \(file of copy-before-write\) does not allow"
    with pytest.raises(ConfigError, match=refused):
        exports.graph.replace(layer, node, [exports.uses["a"]], edges=False)
    exports.close("then")
    exports.graph.replace(layer, node, [exports.uses["a"]], edges=False)
    assert not exports.graph.is_open(layer)
    exports.open("b", node).write(0, b"x")


def test_an_overlay_is_put_above_a_disk_that_is_written(exports: Exports, disk: Path, tmp_path: Path) -> None:
    node = File(str(disk))
    live = exports.open("a", node)
    live.write(0, b"below")
    top = overlay(tmp_path, node)
    use = exports.graph.open(top, FileOpener(exports.graph, exports.files), grant=ONLOOKER)
    exports.graph.replace(node, top, [exports.uses["a"]])
    exports.graph.close(top, use)
    assert node.grant == Grant(READ, CLOSED)
    Reference(top).write(0, b"above")
    assert Reference(top).read(0, 6) == b"aboved"
    assert disk.read_bytes()[:6] == b"belowd"


# -- locks ----------------------------------------------------------------------------------------------------------

FLOCK: Final = struct.Struct("hhqqi0q")


def locks(path: Path) -> Grant:
    """What others see: the permissions used, and those shared."""
    with path.open("r+b") as file:

        def is_locked(byte: int) -> bool:
            asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            return bool(FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)

        used, unshared = (
            Permission(sum(1 << bit for bit in range(len(Permission)) if is_locked(base + bit))) for base in (100, 200)
        )
    return Grant(used, ALL & ~unshared)


@pytest.mark.parametrize(
    ("make", "read_only", "expected"),
    [
        (lambda file, _: file, True, Grant(READ, CLOSED)),
        (lambda file, _: file, False, Grant(READ | WRITE | RESIZE, CLOSED)),
        (lambda file, _: CopyOnRead(Raw(file)), True, Grant(ALL, CLOSED)),
        (lambda file, _: CopyBeforeWrite(Memory(MIB), file), False, Grant(READ | WRITE | RESIZE, CLOSED)),
        (lambda file, _: SnapshotAccess(CopyBeforeWrite(file, Memory(MIB))), True, Grant(READ, CLOSED)),
        (lambda file, top: Qcow2(File(str(top)), backing=Raw(file)), False, Grant(READ, CLOSED)),
    ],
    ids=["reader", "writer", "copy-on-read", "target", "snapshot", "backing"],
)
def test_locks_are_the_outward_form(
    tmp_path: Path, disk: Path, make: Callable[[File, Path], Layer], read_only: bool, expected: Grant
) -> None:
    top = create(tmp_path / "top.qcow2", MIB)
    assert locks(disk) == ONLOOKER
    with open_stack(make(File(str(disk)), top), read_only=read_only):
        assert locks(disk) == expected
    assert locks(disk) == ONLOOKER


def test_an_onlooker_locks_nothing_and_is_kept_out_by_nobody(disk: Path) -> None:
    files, others = Files(), Files()
    writer = files.open(str(disk), read_only=False)
    for same in (files, others):
        looking = same.open(str(disk), read_only=True, grant=ONLOOKER)
        assert looking is not writer and looking.read_only
        assert locks(disk).used == READ | WRITE | RESIZE
        same.close(looking)
    files.close(writer)
    assert locks(disk) == ONLOOKER


def test_copy_on_read_on_a_read_only_export_keeps_writers_out(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", MIB)
    qemu_io(base, "write -q -P 97 0 1M")
    top = create(tmp_path / "top.qcow2", MIB, backing=base)
    with open_stack(CopyOnRead(Qcow2(File(str(top)))), read_only=True):
        assert locks(top) == Grant(READ | WRITE | RESIZE | UNCHANGED, CLOSED)
        assert locks(base) == Grant(READ, CLOSED)
