"""QEMU's meta contexts, dirty bitmaps and allocation depth: as libnbd, nbdinfo and qemu-img see them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nbdserver.testing import NbdServers
from tests.layers.bitmap_kit import AUTO, IN_USE, granules, joined, qemu_dirty, qemu_flags, stored
from tests.serving import SEED, amount, check, create, qemu_io, run, run_json

nbd = pytest.importorskip("nbd")

KIB, MIB = 1 << 10, 1 << 20
DIRTY = "qemu:dirty-bitmap:"
DEPTH = "qemu:allocation-depth"


def bitmap(path: Path, *arguments: str) -> None:
    run("qemu-img", "bitmap", "-f", "qcow2", *arguments[:-1], path, arguments[-1])


def nbdinfo(uri: str, context: str) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of all of a disk."""
    extents = run_json("nbdinfo", f"--map={context}", "--json", uri)
    return [(extent["offset"], extent["length"], extent["type"]) for extent in extents]


def dirty(uri: str, name: str) -> list[tuple[int, int]]:
    return [(offset, length) for offset, length, flags in nbdinfo(uri, DIRTY + name) if flags & 1]


def qemu_map(socket: Path, export: str, name: str) -> list[tuple[int, int]]:
    """The same by qemu-img: with x-dirty-bitmap, what is dirty is shown as a hole."""
    options = f"driver=nbd,server.type=unix,server.path={socket},export={export},x-dirty-bitmap={DIRTY}{name}"
    extents = run_json("qemu-img", "map", "--output=json", "--image-opts", options)
    return [(extent["start"], extent["length"]) for extent in extents if not extent["data"]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image on a base, with bitmaps of several granularities, one of them disabled."""
    pick = random.Random(SEED)
    base = create(tmp_path / "base", 6 * MIB)
    qemu_io(base, "write 3M 100k")
    path = create(tmp_path / "image", 8 * MIB, backing=base)
    bitmap(path, "--add", "-g", "512", "fine")
    qemu_io(path, *(f"write {pick.randrange(16000) * 512} {pick.randrange(1, 40) * 512}" for _ in range(30)))
    bitmap(path, "--add", "-g", "64k", "coarse")
    bitmap(path, "--add", "--disable", "off")
    qemu_io(path, "write 5M 200k")
    return path


def test_what_nbdinfo_and_qemu_see_is_what_qemu_nbd_shows(nbd_server: NbdServers, image: Path) -> None:
    names = ("fine", "coarse", "off")
    expected = {name: qemu_dirty(image, name) for name in names}
    depth = run_json(
        "nbdinfo", f"--map={DEPTH}", "--json", "--", "[", "qemu-nbd", "-r", "-A", "-f", "qcow2", image, "]"
    )
    options = [word for name in names for word in ("--bitmap", name)]
    server = nbd_server.process(image, "--read-only", "-A", *options)
    for name in names:
        assert dirty(server.uri(), name) == expected[name]
        assert qemu_map(server.listen.socket, "", name) == expected[name]
    assert nbdinfo(server.uri(), DEPTH) == [(row["offset"], row["length"], row["type"]) for row in depth]
    assert expected["fine"] and not expected["off"]


def test_all_contexts_come_with_one_request(nbd_server: NbdServers, image: Path) -> None:
    server = nbd_server.process(image, "-r", "-A", "-B", "coarse", "-B", "fine")
    client = nbd.NBD()
    contexts = ["base:allocation", DEPTH, DIRTY + "coarse", DIRTY + "fine", DIRTY + "off"]
    for context in contexts:
        client.add_meta_context(context)
    client.connect_uri(server.uri())
    assert [client.can_meta_context(context) for context in contexts] == [True, True, True, True, False]
    found: dict[str, list[tuple[int, int]]] = {}

    def note(context: str, offset: int, entries: list[int], error: Any) -> None:
        assert offset == 5 * MIB and error.value == 0 and context not in found
        found[context] = list(zip(entries[::2], entries[1::2], strict=True))

    client.block_status(MIB, 5 * MIB, note)
    assert list(found) == contexts[:4]
    assert found[DIRTY + "coarse"] == [(256 * KIB, 1), (768 * KIB, 0)]
    assert all(sum(length for length, _ in entries) == MIB for entries in found.values())
    found.clear()
    client.block_status(MIB, 5 * MIB, note, nbd.CMD_FLAG_REQ_ONE)
    assert {context: len(entries) for context, entries in found.items()} == dict.fromkeys(contexts[:4], 1)
    assert all(entries[0][0] <= MIB for entries in found.values())
    client.shutdown()


@pytest.mark.parametrize(
    ("query", "listed"),
    [
        ("qemu:", [DEPTH, DIRTY + "coarse", DIRTY + "fine"]),
        (DIRTY, [DIRTY + "coarse", DIRTY + "fine"]),
        (DIRTY + "fine", [DIRTY + "fine"]),
        (DEPTH, [DEPTH]),
        ("base:", ["base:allocation"]),
        (DIRTY + "off", []),
        ("qemu:dirty", []),
    ],
)
def test_they_are_listed_as_qemu_lists_them(nbd_server: NbdServers, image: Path, query: str, listed: list[str]) -> None:
    ours = nbd_server.process(image, "-r", "-A", "-B", "coarse", "-B", "fine").uri()
    for uri in (ours, None):
        client = nbd.NBD()
        client.set_opt_mode(True)
        client.add_meta_context(query)
        if uri is not None:
            client.connect_uri(uri)
        else:
            options = ["-r", "-A", "-B", "fine", "-B", "coarse", "-f", "qcow2"]
            client.connect_systemd_socket_activation(["qemu-nbd", *options, str(image)])
        names: list[str] = []
        client.opt_list_meta_context(names.append)
        assert names == listed
        client.opt_abort()


def test_a_bitmap_is_followed_while_it_records(nbd_server: NbdServers, tmp_path: Path) -> None:
    size = 4 * MIB
    path = create(tmp_path / "image", size)
    bitmap(path, "--add", "-g", "4096", "b0")
    server = nbd_server.process(path, "-B", "b0")
    client = nbd.NBD()
    client.connect_uri(server.uri())
    pick, marked = random.Random(SEED), set[int]()
    for _ in range(amount(40, 400)):
        offset = pick.randrange(size)
        length = min(pick.randrange(1, 100_000), size - offset)
        what = pick.choice(("write", "write", "write", "zero", "trim"))
        if what == "write":
            client.pwrite(pick.randbytes(length), offset)
        else:
            (client.zero if what == "zero" else client.trim)(length, offset)
        marked |= granules(4096, (offset, length))
        if pick.random() < 0.2:
            assert dirty(server.uri(), "b0") == joined(marked, 4096, size)
    client.shutdown()
    assert stored(path.read_bytes())["b0"].flags == AUTO | IN_USE
    assert server.terminate() == 0
    assert qemu_flags(path) == {"b0": (4096, {"auto"})}
    assert qemu_dirty(path, "b0") == joined(marked, 4096, size)
    check(path)


def test_after_a_kill_it_is_inconsistent(nbd_server: NbdServers, tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    bitmap(path, "--add", "b0")
    server = nbd_server.process(path, "-B", "b0")
    run("qemu-io", "-f", "raw", "-c", "write 0 64k", server.uri())
    server.kill()
    assert qemu_flags(path) == {"b0": (65536, {"auto", "in-use"})}
    with pytest.raises(RuntimeError, match="bitmap 'b0' is inconsistent"):
        nbd_server.process(path, "-B", "b0")
    bitmap(path, "--remove", "b0")


def test_a_reply_is_bounded_and_the_client_asks_again(nbd_server: NbdServers, tmp_path: Path) -> None:
    size, count = 16 * MIB, 12_000
    path = create(tmp_path / "image", size)
    bitmap(path, "--add", "-g", "512", "b0")
    server = nbd_server.process(path, "-B", "b0")
    client = nbd.NBD()
    client.connect_uri(server.uri())
    for number in range(count):
        client.pwrite(b"x" * 512, number * 1024)
    client.shutdown()
    client = nbd.NBD()
    client.add_meta_context(DIRTY + "b0")
    client.connect_uri(server.uri())
    replies: list[int] = []
    client.block_status(size, 0, lambda context, offset, entries, error: replies.append(len(entries) // 2))
    assert replies == [8192]
    client.shutdown()
    assert dirty(server.uri(), "b0") == [(number * 1024, 512) for number in range(count)]
    server.terminate()
    assert qemu_dirty(path, "b0") == [(number * 1024, 512) for number in range(count)]


CONFIG = """
[nodes.disk]
layers = [{type = "qcow2"}, {type = "file", path = "image"}]

[exports.whole]
layers = [{node = "disk"}]
bitmaps = true
allocation_depth = true

[exports.part]
layers = [{type = "raw", offset = "1M", size = "2M"}, {type = "throttle", iops_total = 1000000}, {node = "disk"}]
bitmaps = ["b0"]

[exports.seen]
layers = [{node = "disk"}]
read_only = true
bitmaps = ["off"]
"""


def test_exports_of_one_disk_share_its_bitmaps_at_their_own_offsets(nbd_server: NbdServers, tmp_path: Path) -> None:
    path = create(tmp_path / "image", 4 * MIB)
    bitmap(path, "--add", "b0")
    bitmap(path, "--add", "--disable", "off")
    (tmp_path / "exports.toml").write_text(CONFIG)
    server = nbd_server.process(tmp_path / "exports.toml")
    for _ in range(3):  # the later ones where the engine knows the places
        run("qemu-io", "-f", "raw", "-c", "write 100k 1k", "-c", "write 1200k 5k", server.uri("part"))
        run("qemu-io", "-f", "raw", "-c", "write 0 1k", server.uri("whole"))
    written = [(0, KIB), (MIB + 100 * KIB, KIB), (MIB + 1200 * KIB, 5 * KIB)]
    assert dirty(server.uri("whole"), "b0") == joined(granules(65536, *written), 65536, 4 * MIB)
    assert dirty(server.uri("part"), "b0") == [(64 * KIB, 64 * KIB), (1152 * KIB, 64 * KIB)]
    assert dirty(server.uri("seen"), "off") == [] and dirty(server.uri("whole"), "off") == []
    assert nbdinfo(server.uri("whole"), DEPTH)[0][2] == 1
    server.terminate()
    assert qemu_dirty(path, "b0") == joined(granules(65536, *written), 65536, 4 * MIB)
    check(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ('bitmaps = ["b1"]', "[exports.vm]: bitmaps: there is no bitmap 'b1'; there are: 'b0'"),
        ('bitmaps = "b0"', 'bitmaps: found "b0", allowed is true, or a list of strings'),
        ("bitmaps = false", "bitmaps: found false, allowed is true, or a list of strings"),
        ("allocation_depth = 1", "allocation_depth: found 1, allowed is true or false"),
    ],
)
def test_a_configuration_is_told_what_is_wrong(nbd_server: NbdServers, tmp_path: Path, key: str, message: str) -> None:
    bitmap(create(tmp_path / "image", MIB), "--add", "b0")
    (tmp_path / "exports.toml").write_text(f'[exports.vm]\nimage = "image"\n{key}\n')
    with pytest.raises(RuntimeError) as refusal:
        nbd_server.process(tmp_path / "exports.toml")
    assert message in str(refusal.value)


def test_an_incremental_backup_is_what_has_changed(nbd_server: NbdServers, tmp_path: Path) -> None:
    """A full copy, a bitmap from then on, and a copy of what it says: the same disk."""
    pick, size = random.Random(SEED), 8 * MIB
    path = create(tmp_path / "image", size)
    qemu_io(path, "write -P 1 0 3M")
    backup = tmp_path / "backup"
    run("qemu-img", "convert", "-O", "raw", path, backup)
    bitmap(path, "--add", "since")
    server = nbd_server.process(path, "-B", "since")
    client = nbd.NBD()
    client.connect_uri(server.uri())
    for _ in range(50):
        client.pwrite(pick.randbytes(pick.randrange(1, 9000)), pick.randrange(size - 9000))
    client.trim(MIB, MIB)
    data = backup.read_bytes()
    for offset, length in dirty(server.uri(), "since"):
        data = data[:offset] + bytes(client.pread(length, offset)) + data[offset + length :]
    assert data == bytes(client.pread(size, 0))
    client.shutdown()


def test_an_export_that_a_client_asks_for_by_its_name_tells_its_depth(nbd_server: NbdServers, tmp_path: Path) -> None:
    qemu_io(create(tmp_path / "golden", MIB), "write 0 64k")
    (tmp_path / "exports.toml").write_text(
        '[exports."vm-*"]\nallocation_depth = true\ntemplate = {image = "golden", directory = "overlays"}\n'
    )
    (tmp_path / "overlays").mkdir()
    server = nbd_server.process(tmp_path / "exports.toml")
    assert nbdinfo(server.uri("vm-1"), DEPTH) == [(0, 64 * KIB, 2), (64 * KIB, MIB - 64 * KIB, 0)]
