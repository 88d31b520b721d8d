"""What is open is opened anew for other access: locks and grants follow, and what fails changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from layers.raw import Raw
from nbdserver.errors import ConfigError, ImageError, RequestError
from nbdserver.files import BusyError, Files
from nbdserver.layer import Opener
from nbdserver.permissions import ONLOOKER, Grant, Permission
from nbdserver.reference import Reference
from nbdserver.request import Vector
from tests.serving import check, create, qemu_io
from tests.test_permissions import CLOSED, Exports, locks

MIB = 1 << 20
READS = Grant(Permission.CONSISTENT_READ, CLOSED)
WRITES = Grant(Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE, CLOSED)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"d" * MIB)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = create(tmp_path / "image.qcow2", MIB, backing=create(tmp_path / "base.qcow2", MIB))
    qemu_io(path, "write -q -P 97 0 64k")
    return path


@pytest.fixture
def exports() -> Exports:
    return Exports()


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_opened_anew_and_its_lock_follows(disk: Path) -> None:
    files = Files()
    descriptors = len(os.listdir("/proc/self/fd"))
    file = files.open(str(disk), read_only=False)
    for read_only in (True, False, True):
        before, file = file, files.reopen(file, read_only=read_only)
        assert file is not before and file.read_only == read_only
        assert locks(disk) == (READS if read_only else WRITES)
        with pytest.raises(OSError, match="Bad file descriptor"):
            before.read(0, Vector.of(1))
    files.close(file)
    assert locks(disk) == ONLOOKER
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_file_that_has_been_renamed_is_still_the_same(disk: Path) -> None:
    files = Files()
    file = files.open(str(disk), read_only=True)
    disk.rename(disk.with_name("other"))
    disk.write_bytes(b"another")
    file = files.reopen(file, read_only=False)
    file.write(0, Vector.of(b"x"))
    files.close(file)
    assert disk.with_name("other").read_bytes()[:2] == b"xd"


def test_another_process_that_reads_it_is_in_the_way_of_writing(disk: Path) -> None:
    files, others = Files(), Files()
    other = others.open(str(disk), read_only=True)
    file = files.open(str(disk), read_only=True)
    with pytest.raises(ImageError, match=r"disk: cannot be opened for writing: it is held by another process"):
        files.reopen(file, read_only=False)
    assert locks(disk) == READS
    file.read(0, Vector.of(1))
    others.close(other)
    files.close(files.reopen(file, read_only=False))


def test_so_is_another_user_here(disk: Path) -> None:
    files = Files()
    file = files.open(str(disk), read_only=True, user="export 'a'")
    assert files.open(str(disk), read_only=True, user="export 'b'") is file
    with pytest.raises(BusyError, match="disk: export 'a' has it open, too"):
        files.reopen(file, read_only=False, user="export 'b'")


# -- layers --------------------------------------------------------------------------------------------------------


def reads_as(export: Reference, data: bytes) -> bool:
    return export.read(0, len(data)) == data


def test_an_image_is_opened_anew(exports: Exports, image: Path) -> None:
    layer = Qcow2(File(str(image)))
    export = exports.open("a", layer)
    export.write(0, b"written")
    exports.graph.hold(layer)
    exports.graph.reopen(layer, read_only=True)
    assert (layer.read_only, locks(image)) == (True, READS)
    assert reads_as(export, b"writtenaa")
    with pytest.raises(RequestError, match="read-only"):
        export.write(0, b"x")
    exports.graph.reopen(layer, read_only=False)
    assert (layer.read_only, locks(image)) == (False, WRITES)
    export.write(7, b" again")
    export.flush()
    assert reads_as(export, b"written againa")
    exports.close("a")
    check(image)


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, read_only: bool) -> None:
    """Have opening for this access fail, once the layer has let go of what it had."""
    method = getattr(owner, name)

    def fail(self: object, opener: Opener) -> None:
        if opener.read_only == read_only:
            raise OSError(5, "no luck")
        method(self, opener)

    monkeypatch.setattr(owner, name, fail)


def test_an_image_that_cannot_be_opened_for_writing_is_read_as_before(
    exports: Exports, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Qcow2(File(str(image)))
    export = exports.open("a", layer, read_only=True)
    before = (layer.grant, locks(image))
    failing(monkeypatch, Qcow2, "open", read_only=False)
    with pytest.raises(OSError, match="no luck"):
        exports.graph.reopen(layer, read_only=False)
    assert (layer.grant, locks(image), layer.read_only) == (*before, True)
    assert reads_as(export, b"aaa")
    exports.close("a")


@pytest.mark.parametrize(("owner", "name"), [(Qcow2, "open"), (File, "reopen")])
def test_an_image_that_cannot_be_opened_for_reading_only_is_written_as_before(
    exports: Exports, image: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    layer = Qcow2(File(str(image)))
    export = exports.open("a", layer)
    export.write(0, b"one")
    exports.graph.hold(layer)
    failing(monkeypatch, owner, name, read_only=True)
    with pytest.raises(OSError, match="no luck"):
        exports.graph.reopen(layer, read_only=True)
    assert (locks(image), layer.read_only) == (WRITES, False)
    export.write(3, b"two")
    export.flush()
    assert reads_as(export, b"onetwoa")
    exports.close("a")
    check(image)


def test_a_file_that_others_write_stays_open_for_that(exports: Exports, disk: Path) -> None:
    file = File(str(disk))
    window, other = Raw(file, offset=0, size=MIB // 2), Raw(file, offset=MIB // 2, size=MIB // 2)
    exports.open("a", window)
    writer = exports.open("b", other)
    exports.graph.hold(window)
    exports.graph.reopen(window, read_only=True)
    writer.write(0, b"x")
    assert disk.read_bytes()[MIB // 2 :][:2] == b"xd"


def test_who_reads_it_for_good_is_in_the_way_of_writing(exports: Exports, image: Path) -> None:
    layer = Qcow2(File(str(image)))
    exports.open("a", layer, read_only=True)
    exports.open("b", File(str(image)), read_only=True)
    with pytest.raises((ConfigError, ImageError)):
        exports.graph.reopen(layer, read_only=False)
    assert layer.read_only
