"""Open files: what `PlainFile` does to bytes, what `Files` shares and refuses, what a `FileOpener` lets images name."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.file import File
from layers.memory import Memory
from nbdserver import files as files_module
from nbdserver.errors import ConfigError, ImageError
from nbdserver.extent import FILE_MODE, FileMode
from nbdserver.files import FileOpener, Files, PlainFile, block_limits, resolve_name
from nbdserver.graph import Graph
from nbdserver.layer import Layer
from nbdserver.limits import IOV_COUNT_MAX, STATUS_COUNT_MAX, ZERO_PIECE
from nbdserver.probe import MAGICS, identify, probe
from nbdserver.reference import Reference, open_stack
from nbdserver.request import Memory as Buffer
from nbdserver.request import Segment, Vector
from tests.serving import loop_device

KIB = 1024


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PlainFile]:
    """An empty file, open."""
    path = tmp_path / "file"
    file = PlainFile(os.open(path, os.O_RDWR | os.O_CREAT), str(path), False)
    yield file
    file.close()


def pread(file: PlainFile, offset: int, length: int) -> bytes:
    vector = Vector.of(bytearray(b"\xee" * length))
    file.read(offset, vector)
    return vector.tobytes()


def pwrite(file: PlainFile, offset: int, data: bytes) -> None:
    file.write(offset, Vector.of(data))


# -- PlainFile: bytes ----------------------------------------------------------------------------------------------


def test_what_lies_past_the_end_reads_as_zeroes(file: PlainFile) -> None:
    pwrite(file, 0, b"abc")
    assert pread(file, 1, 5) == b"bc\0\0\0"
    assert pread(file, 1 << 40, 3) == b"\0\0\0"


def test_a_write_past_the_end_grows_the_file(file: PlainFile) -> None:
    pwrite(file, 10, b"abc")
    assert file.size == 13
    assert pread(file, 0, 13) == b"\0" * 10 + b"abc"


def test_vectors_longer_than_one_system_call_takes(file: PlainFile) -> None:
    data = os.urandom(3 * IOV_COUNT_MAX + 1)
    memory = Buffer(data)
    file.write(5, Vector(Segment(memory, i, 1) for i in range(len(data))))
    target = Buffer(len(data))
    file.read(5, Vector(Segment(target, i, 1) for i in range(len(data))))
    assert bytes(target.view) == data


def test_short_transfers_are_continued(file: PlainFile, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_read, whole_write = os.preadv, os.pwritev

    def short(call: Callable[..., int]) -> Callable[..., int]:
        return lambda fd, views, at: call(fd, [views[0][:3]], at)

    monkeypatch.setattr(os, "preadv", short(whole_read))
    monkeypatch.setattr(os, "pwritev", short(whole_write))
    memory = Buffer(b"0123456789")
    file.write(0, Vector([Segment(memory, 0, 4), Segment(memory, 4, 0), Segment(memory, 4, 6)]))
    assert pread(file, 0, 12) == b"0123456789\0\0"


@pytest.mark.parametrize("may_unmap", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(100, 50), (4 * KIB, 8 * KIB), (60 * KIB, 10 * KIB), (80 * KIB, 1)])
def test_zero_zeroes_exactly_the_range_and_grows_the_file(
    file: PlainFile, offset: int, length: int, may_unmap: bool
) -> None:
    content = bytearray(b"d" * 64 * KIB)
    pwrite(file, 0, bytes(content))
    file.zero(offset, length, may_unmap=may_unmap, no_fallback=False)
    content.extend(bytes(max(0, offset + length - len(content))))
    content[offset : offset + length] = bytes(length)
    assert file.size == len(content)
    assert pread(file, 0, len(content)) == bytes(content)


def test_zero_of_nothing_changes_nothing(file: PlainFile) -> None:
    file.zero(100, 0, may_unmap=True, no_fallback=True)
    assert file.size == 0


def test_zero_with_may_unmap_makes_a_hole(file: PlainFile) -> None:
    pwrite(file, 0, b"d" * 64 * KIB)
    file.zero(16 * KIB, 16 * KIB, may_unmap=True, no_fallback=True)
    assert file.status(0, 64 * KIB) == [(16 * KIB, True), (16 * KIB, False), (32 * KIB, True)]


def refuse_fallocate(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fallocate(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module, "fallocate", fallocate)


def test_zero_writes_zeroes_where_the_file_system_has_no_better(
    file: PlainFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_fallocate(monkeypatch, errno.EOPNOTSUPP)
    size = ZERO_PIECE + 10
    pwrite(file, 0, b"d" * (size + 2))
    file.zero(1, size, may_unmap=True, no_fallback=False)
    assert pread(file, 0, size + 2) == b"d" + bytes(size) + b"d"


@pytest.mark.parametrize("may_unmap", [False, True])
def test_zero_with_no_fallback_is_refused_there(
    file: PlainFile, monkeypatch: pytest.MonkeyPatch, may_unmap: bool
) -> None:
    refuse_fallocate(monkeypatch, errno.EOPNOTSUPP)
    pwrite(file, 0, b"dd")
    with pytest.raises(OSError) as caught:
        file.zero(0, 2, may_unmap=may_unmap, no_fallback=True)
    assert caught.value.errno == errno.ENOTSUP
    assert pread(file, 0, 2) == b"dd"


def test_zero_that_fails_for_another_reason_says_so(file: PlainFile, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fallocate(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError) as caught:
        file.zero(0, 2, may_unmap=False, no_fallback=False)
    assert caught.value.errno == errno.ENOSPC


def test_discard_makes_a_hole_and_never_grows_the_file(file: PlainFile) -> None:
    pwrite(file, 0, b"d" * 64 * KIB)
    file.discard(32 * KIB, 64 * KIB)
    assert file.size == 64 * KIB
    assert file.status(0, 64 * KIB) == [(32 * KIB, True), (32 * KIB, False)]


def test_discard_is_only_advice(file: PlainFile, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fallocate(monkeypatch, errno.EOPNOTSUPP)
    pwrite(file, 0, b"dd")
    file.discard(0, 2)
    file.discard(0, 0)


def test_a_failed_sync_is_never_followed_by_a_success(file: PlainFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(_: int) -> None:
        raise OSError(errno.EDQUOT, "full")

    file.sync()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(OSError):
            file.sync()
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            file.sync()
        assert caught.value.errno == errno.EDQUOT


def test_resize(file: PlainFile) -> None:
    pwrite(file, 0, b"abcdef")
    file.resize(3)
    file.resize(6)
    assert pread(file, 0, 6) == b"abc\0\0\0"


def test_writing_a_file_that_is_open_for_reading_fails(disk: Path) -> None:
    file = PlainFile(os.open(disk, os.O_RDONLY), str(disk), True)
    with pytest.raises(OSError) as caught:
        pwrite(file, 0, b"x")
    assert caught.value.errno == errno.EBADF
    file.close()


def test_close_is_idempotent(disk: Path) -> None:
    file = PlainFile(os.open(disk, os.O_RDONLY), str(disk), True)
    file.close()
    file.close()
    with pytest.raises(OSError):
        pread(file, 0, 1)


# -- PlainFile: status ---------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 60), st.integers(1, 60))
def test_status_covers_the_range_exactly(blocks: list[bool], start: int, length: int) -> None:
    file = PlainFile(os.memfd_create("status"), "status", False)
    file.resize(len(blocks) * 4 * KIB)
    for index, is_data in enumerate(blocks):
        if is_data:
            pwrite(file, index * 4 * KIB, b"d" * 4 * KIB)
    offset, size = start * KIB, length * KIB
    runs = file.status(offset, size)
    file.close()
    assert sum(run for run, _ in runs) == size
    told = [is_data for run, is_data in runs for _ in range(run // KIB)]
    expected = [at // 4 < len(blocks) and blocks[at // 4] for at in range(start, start + length)]
    assert told == expected
    assert all(a[1] != b[1] for a, b in itertools.pairwise(runs))


def test_status_of_a_file_that_cannot_tell_is_data_up_to_its_end(
    file: PlainFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "no SEEK_HOLE")

    file.resize(10)
    monkeypatch.setattr(os, "lseek", lseek)
    assert file.status(4, 16) == [(6, True), (10, False)]
    assert file.status(12, 4) == [(4, False)]


def test_status_is_bounded(file: PlainFile) -> None:
    count = STATUS_COUNT_MAX + 10
    step = 8 * KIB
    for index in range(count):
        pwrite(file, index * step, b"d")
    runs = file.status(0, count * step)
    assert len(runs) == STATUS_COUNT_MAX + 1
    assert sum(run for run, _ in runs) == count * step
    assert runs[-1][1]


# -- PlainFile: users of a range -----------------------------------------------------------------------------------


class Waiter:
    """A thread in ``wait_unused``."""

    def __init__(self, file: PlainFile, offset: int, length: int) -> None:
        self.thread = threading.Thread(target=file.wait_unused, args=(offset, length))
        self.thread.start()

    def is_done(self, timeout: float = 10) -> bool:
        self.thread.join(timeout)
        return not self.thread.is_alive()


def test_wait_unused_waits_for_uses_that_overlap(file: PlainFile) -> None:
    with file.use(100, 10):
        waiter = Waiter(file, 109, 5)
        assert not waiter.is_done(0.1)
    assert waiter.is_done()


def test_wait_unused_does_not_wait_for_neighbours(file: PlainFile) -> None:
    with file.use(100, 10), file.use(0, 50):
        file.wait_unused(50, 50)
        file.wait_unused(110, 5)


def test_wait_unused_does_not_wait_for_uses_that_begin_later(file: PlainFile) -> None:
    first = file.use(0, 10)
    first.__enter__()
    waiter = Waiter(file, 0, 10)
    assert not waiter.is_done(0.1)
    with file.use(0, 10):
        first.__exit__(None, None, None)
        assert waiter.is_done()


def test_a_use_that_fails_is_over(file: PlainFile) -> None:
    with pytest.raises(ZeroDivisionError), file.use(0, 10):
        raise ZeroDivisionError
    file.wait_unused(0, 10)


# -- Files ---------------------------------------------------------------------------------------------------------


def test_readers_share_one_file_and_the_last_closes_it(files: Files, disk: Path) -> None:
    other = disk.with_name("other")
    other.hardlink_to(disk)
    first = files.open(str(disk), read_only=True)
    second = files.open(str(other), read_only=True)
    assert first is second
    files.close(first)
    assert pread(first, 0, 1) == b"d"  # type: ignore[arg-type]
    files.close(second)
    files.close(files.open(str(disk), read_only=False))


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
def test_a_writer_must_be_alone(files: Files, disk: Path, first: bool, second: bool) -> None:
    link = disk.with_name("link")
    link.symlink_to(disk)
    file = files.open(str(disk), read_only=first, user="export 'a'")
    with pytest.raises(ImageError) as caught:
        files.open(str(link), read_only=second, user="export 'b'")
    wrong = "export 'b' writes it, which export 'a'" if not second else "export 'a' writes it, which export 'b'"
    assert str(caught.value) == f"{link}: {wrong} does not allow (one of them as {disk})"
    files.close(file, "export 'a'")
    files.close(files.open(str(link), read_only=second))


def test_a_refused_open_leaks_no_descriptor(files: Files, disk: Path) -> None:
    file = files.open(str(disk), read_only=False)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError):
        files.open(str(disk), read_only=False)
    assert len(os.listdir("/proc/self/fd")) == before
    files.close(file)


def test_descriptors_are_not_inherited(files: Files, disk: Path) -> None:
    seen: list[bool] = []

    def wrap(fd: int, name: str, read_only: bool, mode: object) -> PlainFile:
        seen.append(os.get_inheritable(fd))
        return PlainFile(fd, name, read_only)

    files = Files(wrap)
    for file in files.open(str(disk), read_only=True), files.memory(512, "memory"):
        files.close(file)
    assert seen == [False, False]


def test_a_directory_is_no_image(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory"):
        files.open(str(tmp_path), read_only=True)


def test_a_fifo_is_no_image(files: Files, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="is a FIFO"):
        files.open(str(tmp_path / "fifo"), read_only=True)


def test_a_character_device_is_no_image(files: Files) -> None:
    with pytest.raises(ImageError, match="is a character device"):
        files.open("/dev/zero", read_only=True)


def test_a_socket_is_no_image(files: Files, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(ImageError, match="is a socket"):
            files.open(str(tmp_path / "socket"), read_only=True)


def test_a_missing_file_is_named(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing.raw: cannot be opened .*No such file or directory"):
        files.open(str(tmp_path / "missing.raw"), read_only=True)


def test_a_path_with_a_null_byte_is_refused(files: Files) -> None:
    with pytest.raises(ImageError, match="is no path"):
        files.open("a\0b", read_only=True)


def test_memory_that_cannot_be_had(files: Files) -> None:
    with pytest.raises(ConfigError, match="no memory of"):
        files.memory(1 << 70, "memory")


# -- what images may name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("base.raw", "/vm/base.raw"),
        ("../base.raw", "/vm/../base.raw"),
        ("/gold/base.raw", "/gold/base.raw"),
        ("file:base.raw", "/vm/base.raw"),
        ("file:/gold/base.raw", "/gold/base.raw"),
        ("./a:b", "/vm/./a:b"),
        ("dir/a:b", "/vm/dir/a:b"),
    ],
)
def test_names_are_combined_as_qemu_combines_them(name: str, path: str) -> None:
    assert resolve_name(name, "/vm/overlay.qcow2") == path


@pytest.mark.parametrize(
    "name", ["nbd://host/x", "http://host/x", "json:{}", "nbd:unix:x", "a:b", ":", "host_device:x"]
)
def test_names_of_other_protocols_are_refused(name: str) -> None:
    with pytest.raises(ImageError, match="no other protocol"):
        resolve_name(name, "/vm/overlay.qcow2")


@pytest.mark.parametrize("name", ["", "file:", "a\0b"])
def test_names_that_are_no_paths_are_refused(name: str) -> None:
    with pytest.raises(ImageError, match="no path"):
        resolve_name(name, "/vm/overlay.qcow2")


def test_a_relative_name_needs_a_place() -> None:
    with pytest.raises(ImageError, match="relative to what"):
        resolve_name("base.raw", None)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """vm/top.raw, vm/below/base.raw, gold/base.raw: raw images that hold their own names."""
    for name in "vm/top.raw", "vm/below/base.raw", "gold/base.raw":
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode().ljust(512, b"\0"))
    return tmp_path


class Stack:
    """The top image of ``tree``, open, as what names other images."""

    def __init__(self, path: Path, *roots: Path, graph: Graph | None = None, files: Files | None = None) -> None:
        self.graph, self.files = graph or Graph(), files or Files()
        self.opener = FileOpener(self.graph, self.files, roots=roots, read_only=True)
        self.top = File(str(path))
        self.graph.open(self.top, self.opener)

    def image(self, name: str, format: str | None = "raw", read_only: bool = True) -> Layer:
        return self.opener.image(name, format, named_by=self.top, read_only=read_only)


def test_images_below_the_top_images_directory_may_be_named(tree: Path) -> None:
    layer = Stack(tree / "vm/top.raw").image("below/base.raw")
    assert layer.read_only
    assert layer.filename == str(tree / "vm/below/base.raw")


@pytest.mark.parametrize("name", ["../gold/base.raw", "below/../../gold/base.raw", "link.raw", "{tree}/gold/base.raw"])
def test_images_elsewhere_may_not(tree: Path, name: str) -> None:
    (tree / "vm/link.raw").symlink_to(tree / "gold/base.raw")
    with pytest.raises(ImageError, match="outside the roots") as caught:
        Stack(tree / "vm/top.raw").image(name.format(tree=tree))
    assert f'roots = ["{tree}/gold"]' in str(caught.value)
    assert f"({tree}/vm)" in str(caught.value)


def test_a_directory_whose_name_begins_alike_is_elsewhere(tree: Path) -> None:
    (tree / "vm2").mkdir()
    (tree / "vm2/base.raw").write_bytes(bytes(512))
    with pytest.raises(ImageError, match="outside the roots"):
        Stack(tree / "vm/top.raw").image("../vm2/base.raw")


def test_roots_allow_more(tree: Path) -> None:
    (tree / "alias").symlink_to(tree / "gold")
    stack = Stack(tree / "vm/top.raw", tree / "alias")
    assert Reference(stack.image("../gold/base.raw")).read(0, 4) == b"gold"
    assert Reference(stack.image("below/base.raw")).read(0, 8) == b"vm/below"


def test_a_symlinked_top_image_may_name_files_beside_the_link_and_beside_the_image(tree: Path) -> None:
    (tree / "links").mkdir()
    (tree / "links/top.raw").symlink_to(tree / "vm/top.raw")
    (tree / "links/base.raw").write_bytes(b"link".ljust(512))
    stack = Stack(tree / "links/top.raw")
    assert Reference(stack.image("base.raw")).read(0, 4) == b"link"
    assert Reference(stack.image(str(tree / "vm/below/base.raw"))).read(0, 2) == b"vm"


def test_an_image_that_names_itself_closes_a_loop(tree: Path) -> None:
    (tree / "vm/link.raw").symlink_to("top.raw")
    with pytest.raises(ImageError, match="closes a loop"):
        Stack(tree / "vm/top.raw").image("link.raw")


def test_a_missing_image_is_named_with_its_namer(tree: Path) -> None:
    with pytest.raises(ImageError, match=r"top.raw: names 'no.raw'; .*vm/no.raw cannot be opened: No such file"):
        Stack(tree / "vm/top.raw").image("no.raw")


def test_an_unknown_format_is_refused(tree: Path) -> None:
    with pytest.raises(ImageError, match="is a 'vmdk' image: there is no layer 'vmdk'"):
        Stack(tree / "vm/top.raw").image("below/base.raw", "vmdk")


@pytest.mark.parametrize("format", ["memory"])
def test_a_layer_that_is_no_format_is_refused(tree: Path, format: str) -> None:
    with pytest.raises(ImageError, match="is no image format"):
        Stack(tree / "vm/top.raw").image("below/base.raw", format)


def test_writable_images_are_never_probed(tree: Path) -> None:
    with pytest.raises(ImageError, match="only read-only images are probed"):
        Stack(tree / "vm/top.raw").image("below/base.raw", None, read_only=False)


def test_an_image_named_for_writing_is_writable(tree: Path) -> None:
    assert not Stack(tree / "vm/top.raw").image("below/base.raw", read_only=False).read_only


def test_readers_of_an_image_share_one_layer(tree: Path) -> None:
    first = Stack(tree / "vm/top.raw")
    second = Stack(tree / "vm/top.raw", graph=first.graph, files=first.files)
    layer = first.image("below/base.raw")
    assert second.image("below/../below/base.raw", None) is layer
    first.graph.close(layer)
    assert Reference(layer).read(0, 2) == b"vm"
    first.graph.close(layer)
    assert first.image("below/base.raw") is not layer


def test_a_shared_layer_is_held_to_the_roots_of_each_who_names_it(tree: Path) -> None:
    first = Stack(tree / "vm/top.raw", tree / "gold")
    (tree / "vm/below/alias.raw").hardlink_to(tree / "gold/base.raw")
    first.image("../gold/base.raw")
    with pytest.raises(ImageError, match="outside the roots"):
        Stack(tree / "vm/top.raw", graph=first.graph, files=first.files).image("below/alias.raw")


def test_an_image_whose_namer_is_no_file(tree: Path) -> None:
    graph, files = Graph(), Files()
    opener = FileOpener(graph, files, roots=[tree])
    memory = Memory(512)
    graph.open(memory, opener)
    layer = opener.image(str(tree / "gold/base.raw"), "raw", named_by=memory)
    assert Reference(layer).read(0, 4) == b"gold"
    with pytest.raises(ImageError, match="outside the roots"):
        opener.image("/etc/hostname", "raw", named_by=memory)


# -- probing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "magic", "format"), MAGICS)
def test_formats_are_told_by_their_magic(offset: int, magic: bytes, format: str) -> None:
    assert identify((bytes(offset) + magic).ljust(512, b"\0")) == format


@pytest.mark.parametrize("head", [b"", b"QFI", bytes(512), b"\0QFI\xfb"])
def test_what_has_no_magic_is_raw(head: bytes) -> None:
    assert identify(head) == "raw"


def test_a_format_without_a_layer_is_refused_by_name(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(b"KDMV")
    with pytest.raises(ImageError, match="is a vmdk image; no layer reads that yet"):
        files.probe(str(path))


def test_probing_gives_the_file_back(files: Files, disk: Path) -> None:
    assert files.probe(str(disk)) == "raw"
    files.close(files.open(str(disk), read_only=False))


@pytest.mark.parametrize("format", ["vmdk", "vhdx", "vdi", "vpc", "qed", "parallels", "qcow", "qcow2"])
def test_probing_agrees_with_qemu(run: Callable[..., object], tmp_path: Path, format: str) -> None:
    path = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", format, path, "1M")
    assert identify(path.read_bytes()[:512]) == format


def test_probe_of_an_empty_file(file: PlainFile) -> None:
    assert probe(file) == "raw"


def test_a_stack_gives_all_its_files_back(disk: Path) -> None:
    files = Files()
    with open_stack(File(str(disk)), files=files) as stack:
        assert stack.read(0, 1) == b"d"
    files.close(files.open(str(disk), read_only=False))


@pytest.mark.parametrize("name", ["file", "host_device"])
def test_a_protocol_where_a_backing_format_belongs_means_raw(tmp_path: Path, name: str) -> None:
    (tmp_path / "top.raw").write_bytes(bytes(512))
    (tmp_path / "base.raw").write_bytes(b"QFI\xfb" + bytes(508))
    graph = Graph()
    opener = FileOpener(graph, Files())
    top = File(path=str(tmp_path / "top.raw"))
    graph.open(top, opener)
    base = opener.image("base.raw", name, named_by=top)
    assert base.size == 512
    graph.close(base)
    graph.close(top)


def test_a_file_that_is_unsafe_is_never_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk"
    path.touch()
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    files = Files()
    for cache, count in (("unsafe", 0), ("writeback", 1)):
        file = files.open(str(path), read_only=False, mode=FileMode(cache))
        file.sync()
        files.close(file)
        assert len(synced) == count


def test_a_block_device_says_whether_it_is_rotational(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with loop_device(disk) as device:
        queue = Path(f"/sys/block/{Path(device).name}/queue/rotational")
        said = queue.read_text()
        fd = os.open(device, os.O_RDONLY)
        try:
            for value in ("1", "0"):
                queue.write_text(value)
                assert block_limits(fd, FILE_MODE).rotational == bool(int(value))
        finally:
            queue.write_text(said)
            os.close(fd)
    with disk.open("rb") as file:
        assert not block_limits(file.fileno(), FILE_MODE).rotational
