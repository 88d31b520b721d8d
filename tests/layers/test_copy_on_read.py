"""The layer ``copy-on-read``, and the allocation depth that it goes by."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from layers.copy_before_write import CopyBeforeWrite
from layers.copy_on_read import CopyOnRead
from layers.file import File
from layers.memory import Memory
from layers.qcow2 import Qcow2
from layers.raw import Raw
from layers.snapshot_access import SnapshotAccess
from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import CODE, Intent, OpenFile, Special
from nbdserver.graph import flatten
from nbdserver.layer import ALLOCATION_DEPTH
from nbdserver.reference import open_stack
from nbdserver.request import Flag, Operation, Request
from nbdserver.testing import NbdServers
from tests.conftest import Run
from tests.oracle.model import Model
from tests.oracle.storm import Storm
from tests.registered import Spy, open_registered, registered
from tests.serving import SEED, amount, backend, check, content, create, qemu_io, run_json
from tests.serving import run as tool

__all__ = ["backend"]

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """4 MiB, clusters of 64 KiB: 'a' all over the base but for zeroes in [1 MiB, 2 MiB); 'b' in [3 MiB, 3.5 MiB)."""
    base = create(tmp_path / "base.qcow2", 4 * MIB)
    qemu_io(base, "write -q -P 97 0 1M", "write -q -P 97 2M 2M")
    top = create(tmp_path / "top.qcow2", 4 * MIB, backing=base)
    qemu_io(top, "write -q -P 98 3M 512k")
    return top


def qcow2(path: Path) -> Qcow2:
    return Qcow2(File(str(path)))


# -- what is copied ------------------------------------------------------------------------------------------------


def test_what_is_read_is_local_from_then_on(overlay: Path) -> None:
    with open_stack(CopyOnRead(qcow2(overlay)), roots=[overlay.parent]) as export:
        assert export.status(0, 4 * MIB, ALLOCATION_DEPTH) == [
            (MIB, 2),
            (MIB, 0),
            (MIB, 2),
            (512 * KIB, 1),
            (512 * KIB, 2),
        ]
        assert export.read(100 * KIB, 3 * KIB) == b"a" * 3 * KIB
        assert export.status(0, 256 * KIB, ALLOCATION_DEPTH) == [(64 * KIB, 2), (64 * KIB, 1), (128 * KIB, 2)]
        assert export.read(0, 4 * MIB) == b"a" * MIB + bytes(MIB) + b"a" * MIB + b"b" * 512 * KIB + b"a" * 512 * KIB
        assert {depth for _, depth in export.status(0, 4 * MIB, ALLOCATION_DEPTH)} == {1, 0}
    check(overlay)
    (overlay.parent / "base.qcow2").unlink()
    tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", overlay)
    assert content(overlay) == b"a" * MIB + bytes(MIB) + b"a" * MIB + b"b" * 512 * KIB + b"a" * 512 * KIB


def test_the_direct_path_is_mapped(overlay: Path) -> None:
    """What is local lies in the image's file, readable and writable with no code; what nobody has is zeroes."""
    image = qcow2(overlay)
    with open_stack(CopyOnRead(image)) as export:

        def targets(offset: int, length: int, intent: Intent) -> list[OpenFile | Special]:
            return [leaf.target for leaf in flatten(export.root, offset, length, intent)][:1]

        file = image.file.layer.open_file  # type: ignore[attr-defined]
        assert targets(3 * MIB, 4096, Intent.READ) == targets(3 * MIB, 4096, Intent.WRITE) == [file]
        assert (
            targets(0, 4096, Intent.READ) == targets(0, 4096, Intent.WRITE) == targets(0, 4096, Intent.ZERO) == [CODE]
        )
        export.read(0, 1)
        assert targets(0, 4096, Intent.READ) == targets(0, 4096, Intent.WRITE) == targets(5, 6, Intent.ZERO) == [file]
        assert targets(64 * KIB, 1, Intent.READ) == [CODE]


def test_a_read_of_both_is_cut_where_it_must(overlay: Path) -> None:
    with open_stack(CopyOnRead(qcow2(overlay))) as export:
        assert export.read(3 * MIB - 10, 512 * KIB + 20) == b"a" * 10 + b"b" * 512 * KIB + b"a" * 10


def test_zeroes_are_copied_as_zeroes(overlay: Path) -> None:
    qemu_io(overlay.parent / "base.qcow2", "write -q -P 0 0 1M")
    spy = Spy(qcow2(overlay))
    with open_registered(CopyOnRead(spy)) as export:
        export.execute(Request.read(0, registered(512 * KIB)))
        assert [(seen.operation, seen.flags) for seen in spy.take()] == [
            (Operation.READ, Flag.REGISTERED_BUF),
            (Operation.ZERO, Flag.WRITE_UNCHANGED),
        ]
    assert overlay.stat().st_size < 1536 * KIB


def test_a_read_that_asks_to_be_copied_only_copies_with_prefetch(overlay: Path) -> None:
    """It goes through code as a whole; prefetched, what is local already is not even read."""
    flags = Flag.COPY_ON_READ | Flag.PREFETCH
    with open_registered(CopyOnRead(spy := Spy(qcow2(overlay)))) as export:
        for _ in range(2):
            export.execute(Request.read(3 * MIB - 64 * KIB, registered(128 * KIB), flags))
        assert spy.take() == [
            (Operation.READ, 3 * MIB - 64 * KIB, 64 * KIB, Flag.REGISTERED_BUF),
            (Operation.WRITE, 3 * MIB - 64 * KIB, 64 * KIB, Flag.REGISTERED_BUF | Flag.WRITE_UNCHANGED),
        ]
        data = registered(128 * KIB)
        export.execute(Request.read(3 * MIB - 64 * KIB, data, Flag.COPY_ON_READ))
        assert data.tobytes() == b"a" * 64 * KIB + b"b" * 64 * KIB


def test_the_flag_is_kept_from_the_read_to_the_copy(overlay: Path) -> None:
    above = Spy(CopyOnRead(spy := Spy(qcow2(overlay))))
    with open_registered(above) as export:
        export.execute(Request.read(2 * MIB + 5, registered(MIB + 512 * KIB)))
        assert above.take() == [(Operation.READ, 2 * MIB + 5, MIB + 512 * KIB, Flag.REGISTERED_BUF)]
        assert spy.take() == [
            (Operation.READ, 2 * MIB + 5, MIB - 5, Flag.REGISTERED_BUF),
            (Operation.WRITE, 2 * MIB + 5, MIB - 5, Flag.REGISTERED_BUF | Flag.WRITE_UNCHANGED),
            (Operation.READ, 3 * MIB, 512 * KIB, Flag.REGISTERED_BUF),
            (Operation.READ, 3 * MIB + 512 * KIB, 5, Flag.REGISTERED_BUF),
            (Operation.WRITE, 3 * MIB + 512 * KIB, 5, Flag.REGISTERED_BUF | Flag.WRITE_UNCHANGED),
        ]
        export.read(0, 1)
        assert not any(seen.is_registered for seen in spy.take())
        export.execute(Request.write(MIB, registered(b"new")))
        assert [seen.is_registered for seen in spy.take()] == [True]


def test_what_is_written_is_not_copied(overlay: Path) -> None:
    spy = Spy(qcow2(overlay))
    with open_registered(CopyOnRead(spy)) as export:
        export.write(0, b"new")
        export.zero(64 * KIB, 64 * KIB)
        export.trim(128 * KIB, 64 * KIB)
        assert [seen.operation for seen in spy.take()] == [Operation.WRITE, Operation.ZERO, Operation.TRIM]
        assert export.read(0, 192 * KIB) == b"new" + b"a" * (64 * KIB - 3) + bytes(128 * KIB)
        assert not [seen for seen in spy.take() if seen.operation is not Operation.READ]


def test_a_copy_that_cannot_be_written_fails_the_read(overlay: Path) -> None:
    """As in QEMU, in all cases: else the image would silently stay dependent on what is below."""
    spy = Spy(qcow2(overlay))
    with open_registered(CopyOnRead(spy)) as export:
        spy.fails[Operation.WRITE] = errno.ENOSPC
        with pytest.raises(RequestError) as caught:
            export.read(0, 512)
        assert caught.value.errno == errno.ENOSPC
        spy.fails.clear()
        assert export.read(0, 512) == b"a" * 512


def test_with_nothing_below_nothing_is_copied(disk: Path, tmp_path: Path) -> None:
    alone = create(tmp_path / "alone.qcow2", MIB)
    for layer in (CopyOnRead(Raw(File(str(disk)))), CopyOnRead(Memory(MIB)), CopyOnRead(qcow2(alone))):
        with open_stack(layer) as export:
            assert CODE not in [leaf.target for leaf in flatten(layer, 0, MIB, Intent.READ)]
            assert len(export.read(0, MIB)) == MIB


def test_what_is_broken_ahead_does_not_matter_here(overlay: Path) -> None:
    with overlay.open("r+b") as file:
        file.seek(40)
        l1_offset = int.from_bytes(file.read(8))
        file.seek(l1_offset)
        l2_offset = int.from_bytes(file.read(8)) & 0x00FFFFFFFFFFFE00
        file.seek(l2_offset + 50 * 8)
        file.write((0x8000_0000_0000_0200 | 1 << 20).to_bytes(8))  # no whole cluster
    with open_stack(CopyOnRead(qcow2(overlay)), read_only=False) as export:
        assert export.read(0, 512) == b"a" * 512
        assert list(flatten(export.root, 3 * MIB, 1, Intent.READ))
        with pytest.raises(RequestError):
            export.read(50 * 64 * KIB, 1)


def test_a_read_only_export_copies_all_the_same(overlay: Path) -> None:
    """As in QEMU: the filter has the permission "write unchanged", whoever is above."""
    with open_stack(CopyOnRead(qcow2(overlay)), read_only=True) as export:
        assert export.read(0, 512) == b"a" * 512
        assert export.status(0, 64 * KIB, ALLOCATION_DEPTH) == [(64 * KIB, 1)]
        with pytest.raises(RequestError) as caught:
            export.write(0, b"x")
        assert caught.value.errno == errno.EPERM
    check(overlay)


def test_what_cannot_be_written_is_refused(overlay: Path) -> None:
    snapshot = SnapshotAccess(CopyBeforeWrite(qcow2(overlay), Memory(4 * MIB)))
    with pytest.raises(ConfigError, match="file: is read-only, but"), open_stack(CopyOnRead(snapshot)):
        pass


# -- races ---------------------------------------------------------------------------------------------------------


class Halfway(CopyOnRead):
    """Does something between the reading and the writing of a copy."""

    halfway: Callable[[], None] = staticmethod(lambda: None)

    def _keep(self, part: Request) -> None:
        self.halfway()
        super()._keep(part)


@pytest.mark.parametrize("kind", ["write", "zero"])
def test_a_copy_does_not_overwrite_what_is_written_meanwhile(overlay: Path, kind: str) -> None:
    """A write next to the copy makes the whole cluster local: but not writable past the copy that is under way."""
    layer = Halfway(qcow2(overlay))
    with open_stack(layer) as export:

        def change() -> None:
            export.write(0, b"new!" * 1024) if kind == "write" else export.zero(0, 4096)

        late = threading.Thread(target=change)

        def halfway() -> None:
            export.write(8192, b"next")
            assert {depth for _, depth in export.status(0, 64 * KIB, ALLOCATION_DEPTH)} == {1}
            late.start()
            late.join(0.2)
            assert late.is_alive(), "it did not wait for the copy"

        layer.halfway = halfway
        assert export.read(0, 4096) == b"a" * 4096
        late.join(10)
        assert not late.is_alive()
        assert export.read(0, 4096) == (b"new!" * 1024 if kind == "write" else bytes(4096))
        assert export.read(8192, 5) == b"nexta"
        assert CODE not in [leaf.target for leaf in flatten(layer, 0, 64 * KIB, Intent.WRITE)][:1]
    check(overlay)


def test_only_what_is_being_copied_is_held_up(overlay: Path) -> None:
    layer = Halfway(qcow2(overlay))
    with open_stack(layer) as export:

        def halfway() -> None:
            export.write(0, b"before")
            export.write(12 * KIB, b"behind")
            assert [leaf.length for leaf in flatten(layer, 0, 16 * KIB, Intent.WRITE) if leaf.target is CODE][:1] == [
                4096
            ]

        layer.halfway = halfway
        export.read(4096, 4096)


def test_two_reads_copy_once(overlay: Path) -> None:
    spy = Spy(qcow2(overlay))
    layer = Halfway(spy)
    with open_registered(layer) as export:
        second = threading.Thread(target=lambda: export.read(0, 4096))

        def halfway() -> None:
            second.start()
            second.join(0.1)

        layer.halfway = halfway
        export.read(0, 4096)
        second.join(10)
        assert len(spy.take(Operation.WRITE)) == 1


# -- compared with QEMU --------------------------------------------------------------------------------------------


def test_the_same_clusters_are_local_as_with_qemu(overlay: Path, tmp_path: Path, run: Run) -> None:
    theirs = tmp_path / "theirs.qcow2"
    theirs.write_bytes(overlay.read_bytes())
    pick = random.Random(SEED)
    reads = [(pick.randrange(2 * MIB, 4 * MIB - 70_000) // 512 * 512, pick.randrange(1, 128) * 512) for _ in range(9)]
    node = {"driver": "copy-on-read", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(theirs)}}}
    commands = [word for offset, length in reads for word in ("-c", f"read -q {offset} {length}")]
    run("qemu-io", *commands, f"json:{json.dumps(node)}")
    with open_stack(CopyOnRead(qcow2(overlay))) as export:
        for offset, length in reads:
            export.read(offset, length)
    assert _depths(overlay) == _depths(theirs)


def _depths(path: Path) -> list[tuple[int, int]]:
    """(start, depth) of QEMU's map, where it changes."""
    runs = [(run["start"], run["depth"]) for run in run_json("qemu-img", "map", "--output=json", path)]
    return [run for before, run in zip([(-1, -1), *runs], runs, strict=False) if before[1] != run[1]]


@pytest.mark.parametrize("cluster_size", [512, 64 * KIB])
def test_the_allocation_depth_is_what_qemu_says(nbd_server: NbdServers, tmp_path: Path, cluster_size: int) -> None:
    """A chain of three with short images in it, and one with none below."""
    raw = tmp_path / "base.raw"
    raw.write_bytes(b"r" * 700_000)
    middle = create(tmp_path / "middle.qcow2", MIB, backing=raw, backing_format="raw", cluster_size=cluster_size)
    qemu_io(middle, "write -q 100k 200k", "write -q -z 400k 64k")
    top = create(tmp_path / "top.qcow2", 2 * MIB, backing=middle, cluster_size=4096)
    qemu_io(top, "write -q 128k 100k", "write -q -z 1500k 64k", "discard -q 0 4k")
    alone = create(tmp_path / "alone.qcow2", MIB)
    qemu_io(alone, "write -q 100k 1k")
    for path in (top, middle, alone):
        with open_stack(qcow2(path), read_only=True, roots=[tmp_path]) as export:
            ours = export.status(0, export.size, ALLOCATION_DEPTH)
        socket = nbd_server.socket()
        server = _QemuNbd(path, str(socket.socket))
        try:
            theirs = run_json("nbdinfo", "--map=qemu:allocation-depth", "--json", str(socket))
        finally:
            server.stop()
        merged: list[tuple[int, int]] = []
        for extent in theirs:
            if merged and merged[-1][1] == extent["type"]:
                merged[-1] = (merged[-1][0] + extent["length"], extent["type"])
            else:
                merged.append((extent["length"], extent["type"]))
        assert ours == merged, path.name


def test_filters_pass_the_allocation_depth_on(overlay: Path) -> None:
    with open_stack(Raw(qcow2(overlay), offset=MIB - 512)) as export:
        assert export.status(0, MIB + 512, ALLOCATION_DEPTH) == [(512, 2), (MIB, 0)]


# -- through the engine --------------------------------------------------------------------------------------------


def test_no_python_once_all_is_local(nbd_server: NbdServers, overlay: Path, backend: str) -> None:
    server, uri = nbd_server.start(CopyOnRead(qcow2(overlay)), backend=backend)

    def calls() -> int:
        counters = server.stats()["exports"][""]
        return sum(count for name, count in counters.items() if name == "faults" or name.endswith("_calls"))

    handle = nbd.NBD()
    handle.connect_uri(uri)
    for _ in range(2):  # copy, then resolve
        handle.pread(4 * MIB, 0)
    before = calls()
    assert before > 0
    assert bytes(handle.pread(MIB, 3 * MIB - 5)[:7]) == b"aaaaabb"
    handle.pread(4 * MIB, 0)
    assert calls() == before
    handle.pwrite(b"new", 3 * MIB)  # makes it writable in the cache
    before = calls()
    handle.pwrite(b"new", 3 * MIB + 4096)
    assert calls() == before
    handle.shutdown()


def test_storm(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    """Reads that copy, and writes beside and over them, by code and past it."""
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(SEED).randbytes(8 * MIB))
    top = create(tmp_path / "top.qcow2", 8 * MIB, backing=base, backing_format="raw")
    server, uri = nbd_server.start(CopyOnRead(qcow2(top)), backend=backend)
    with Storm(uri, Model(8 * MIB, initial=base.read_bytes()), seed=SEED) as storm:
        storm.run(seconds=amount(3, 30))
        data = storm.verify()
    server.stop()
    check(top)
    tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", top)
    assert content(top) == data  # it was all read, so it is all local


class _QemuNbd:
    """qemu-nbd showing an image's allocation depth."""

    def __init__(self, path: Path, socket: str) -> None:
        self._pid_file = Path(socket + ".pid")
        options = ("--fork", f"--pid-file={self._pid_file}", "-r", "-A", "-t", "-f", "qcow2", "-k", socket)
        tool("qemu-nbd", *options, path)

    def stop(self) -> None:
        os.kill(int(self._pid_file.read_text()), signal.SIGTERM)
