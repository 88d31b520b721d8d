"""``image`` commands on disks that NBD servers export: nbdkit's, QEMU's, and our own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.image import remote
from nbdserver.testing import NbdServers
from tests.image.kit import KIB, MIB, Sample, image, image_json
from tests.serving import content, run


@contextlib.contextmanager
def _nbdkit(directory: Path, *words: object) -> Iterator[str]:
    """The URI of an export of nbdkit's."""
    with contextlib.ExitStack() as stack:
        socket, ready = directory / "socket", directory / "pid"
        command = ["nbdkit", "--exit-with-parent", "-f", "-U", socket, "-P", ready, *map(str, words)]
        process = stack.enter_context(subprocess.Popen(command))
        stack.callback(process.terminate)
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"


def test_a_disk_is_copied_from_a_server(zoo: dict[str, Sample], nbd_server: NbdServers, tmp_path: Path) -> None:
    source = zoo["qcow2"].path
    uri = nbd_server(source, read_only=True)
    target = tmp_path / "target.qcow2"
    image("convert", "-O", "qcow2", uri, target)
    assert content(target) == content(source)
    assert target.stat().st_size < 2 * MIB, "holes stay holes"
    assert image("compare", uri, source).stdout == "Images are identical.\n"
    info = image_json("info", uri)
    assert (info["filename"], info["format"], info["virtual-size"]) == (uri, "raw", 8 * MIB)
    expected = [(entry["start"], entry["length"], entry["zero"]) for entry in image_json("map", source)]
    found = [(entry["start"], entry["length"], entry["zero"]) for entry in image_json("map", uri)]
    assert _joined(found) == _joined(expected)


def _joined(entries: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    joined: list[tuple[int, int, bool]] = []
    for start, length, is_zero in entries:
        if joined and joined[-1][2] == is_zero:
            joined[-1] = (joined[-1][0], joined[-1][1] + length, is_zero)
        else:
            joined.append((start, length, is_zero))
    return joined


def test_a_disk_is_copied_to_a_server(zoo: dict[str, Sample], nbd_server: NbdServers, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * 9 * MIB)
    uri = nbd_server(target, format="raw")
    image("convert", "-n", "-t", "writeback", zoo["qcow2"].path, uri)
    assert target.read_bytes() == content(zoo["qcow2"].path) + b"\xaa" * MIB
    assert "--no-create" in image("convert", zoo["qcow2"].path, uri, status=1).stderr
    assert "--no-create" in image("create", uri, "1M", status=1).stderr


def test_an_image_that_a_server_exports_as_a_file(zoo: dict[str, Sample], tmp_path: Path) -> None:
    path = zoo["small clusters"].path
    with _nbdkit(tmp_path, "-r", "file", path) as uri:
        assert image("compare", "-f", "qcow2", uri, path).stdout == "Images are identical.\n"
        assert image_json("check", "-f", "qcow2", uri)["check-errors"] == 0


def test_block_sizes_and_missing_abilities(tmp_path: Path) -> None:
    """Requests are padded and cut; a server that tells nothing of holes is read throughout."""
    sizes = ("blocksize-minimum=4k", "blocksize-maximum=64k", "blocksize-error-policy=error")
    filters = ("--filter=blocksize-policy", "--filter=nozero", "--filter=noextents")
    with _nbdkit(tmp_path, *filters, "memory", MIB, *sizes) as uri:
        source = tmp_path / "source"
        source.write_bytes(b"a" * 100 * KIB + bytes(500 * KIB) + b"b" * 3000)
        image("convert", "-n", source, uri)
        target = tmp_path / "target"
        image("convert", uri, target)
        assert target.read_bytes() == source.read_bytes().ljust(MIB, b"\0")


def test_errors_of_the_server(tmp_path: Path) -> None:
    with _nbdkit(tmp_path, "--filter=error", "pattern", "1M", "error-pread-rate=100%") as uri:
        assert "cannot be read at byte 0" in image("convert", uri, tmp_path / "target", status=1).stderr
    assert "cannot be connected to" in image("info", f"nbd+unix:///?socket={tmp_path}/none", status=1).stderr


def test_without_libnbd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbd", None)
    assert "python3-libnbd" in image("info", "nbd://localhost", status=1).stderr
    assert remote.is_remote("nbds+unix:///x?socket=y") and not remote.is_remote("nbd.qcow2")


def test_qemus_server(zoo: dict[str, Sample], tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    run("qemu-nbd", "--fork", "-r", "-f", "qcow2", "-k", socket, zoo["chain"].path)
    assert image("compare", f"nbd+unix:///?socket={socket}", zoo["chain"].path).stdout == "Images are identical.\n"
