"""Checking and repairing qcow2 images: what QEMU finds, and no less than QEMU mends."""

from __future__ import annotations

import errno
import json
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from layers.file import File
from layers.qcow2 import Qcow2, check
from layers.qcow2.tally import Refcounts, Tally
from nbdserver.errors import ImageError, RequestError
from nbdserver.files import FileOpener, Files
from nbdserver.format import Checks, ImageCheck, Repair
from nbdserver.graph import Graph
from nbdserver.reference import open_stack
from tests.layers import qcow2_check
from tests.layers.qcow2_broken import IMAGES, PLACE, Anatomy, make, mutate
from tests.layers.qcow2_kit import RecordedFile, crash_states
from tests.serving import SEED, amount, create, run

KIB, MIB = 1 << 10, 1 << 20

#: What both count: our name and QEMU's.
COUNTS = {
    "corruptions": "corruptions",
    "leaks": "leaks",
    "check_errors": "check-errors",
    "image_end_offset": "image-end-offset",
    "total_clusters": "total-clusters",
    "allocated_clusters": "allocated-clusters",
    "fragmented_clusters": "fragmented-clusters",
    "compressed_clusters": "compressed-clusters",
}


def checked(path: Path, repair: Repair = Repair.NONE) -> ImageCheck:
    file = File(str(path))
    with open_stack(file, read_only=repair is Repair.NONE):
        return Qcow2.check(file, repair=repair, opener=FileOpener(Graph(), Files()))


def checked_by_qemu(path: Path, *options: str) -> dict[str, Any] | None:
    """None: QEMU cannot check it to the end."""
    command = ["qemu-img", "check", "--output=json", *options, path]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    report = json.loads(done.stdout or b"null")
    return None if report is None or report["check-errors"] else dict(report)


def differences(ours: ImageCheck, theirs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    pairs = {name: (getattr(ours, name), theirs.get(key, 0)) for name, key in COUNTS.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    return {name: make(folder, name) for name in IMAGES}


@pytest.fixture
def image(images: dict[str, Path], tmp_path: Path) -> Path:
    """An image with clusters of 4 KiB and two snapshots."""
    path = tmp_path / "image"
    path.write_bytes(images["4K"].read_bytes())
    return path


def test_qcow2_can_be_checked() -> None:
    assert isinstance(Qcow2, Checks)


@pytest.mark.parametrize("name", IMAGES)
def test_sound_images_are_sound(images: dict[str, Path], name: str) -> None:
    ours, theirs = checked(images[name]), checked_by_qemu(images[name])
    assert theirs is not None and differences(ours, theirs) == {}
    assert not (ours.corruptions or ours.leaks or ours.messages)


def test_an_encryption_header_is_in_use(tmp_path: Path) -> None:
    """It is counted by nobody who does not know of it."""
    path = tmp_path / "image"
    secret = ("--object", "secret,id=key,data=password")
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,cluster_size=4096"
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, path, "1M")
    opened = ("--image-opts", f"driver=qcow2,encrypt.key-secret=key,file.filename={path}")
    run("qemu-io", *secret, *opened, "-c", "write 0 64k")
    theirs = json.loads(run("qemu-img", "check", "--output=json", *secret, *opened))
    ours = checked(path)
    assert differences(ours, theirs) == {} and not (ours.corruptions or ours.leaks)


# -- broken images, against QEMU ---------------------------------------------------------------------------------------


def broken(images: dict[str, Path], path: Path, seed: int, *names: str) -> list[str]:
    """Write a broken image to ``path``; what was done to which."""
    pick = random.Random(f"{SEED} {seed}")
    name = pick.choice(names or list(IMAGES))
    data = bytearray(images[name].read_bytes())
    notes = mutate(data, pick)
    path.write_bytes(data)
    return [f"seed {seed}: {name}", *notes]


def test_what_is_wrong_with_broken_images_is_what_qemu_finds(images: dict[str, Path], tmp_path: Path) -> None:
    path, compared = tmp_path / "image", 0
    for seed in range(amount(100, 3000)):
        notes = broken(images, path, seed)
        theirs = checked_by_qemu(path)
        try:
            ours = checked(path)
        except ImageError:
            assert theirs is None, notes
            continue
        if theirs is None:
            # Where snapshots would be does not matter if there are none.
            assert ours.check_errors or any("header at 0x40" in note for note in notes), (notes, ours.messages)
            continue
        assert differences(ours, theirs) == {}, (notes, ours.messages)
        compared += 1
    assert compared > seed * 0.8


@pytest.mark.parametrize("repair", [Repair.LEAKS, Repair.ALL])
def test_broken_images_are_repaired_as_far_as_qemu_repairs_them(
    repair: Repair, images: dict[str, Path], tmp_path: Path
) -> None:
    path, theirs_path, repaired = tmp_path / "image", tmp_path / "theirs", 0
    # Not those with bitmaps: when QEMU repairs one, it forgets its snapshots, broken or not.
    names = [name for name in IMAGES if name != "bitmaps"]
    for seed in range(amount(40, 2000)):
        notes = broken(images, path, 10_000 + seed, *names)
        theirs_path.write_bytes(path.read_bytes())
        theirs = checked_by_qemu(theirs_path, "-r", repair.value)
        try:
            ours = checked(path, repair)
        except ImageError:
            # A snapshot table that passes all bounds is nothing that we would cut off.
            assert theirs is None or any("snapshots" in note or "header" in note for note in notes), notes
            continue
        left = checked_by_qemu(path)
        if left is None:
            assert ours.check_errors or any("header at 0x40" in note for note in notes), (notes, ours.messages)
            continue
        if not ours.check_errors:
            assert differences(ours, left) == {}, (notes, ours.messages)
        # The header, or data, would be taken for a table, and changed.
        places = [PLACE & int(note.split()[-1], 16) for note in notes if note.startswith("L1")]
        names_other = any(place == 0 or place % Anatomy(path.read_bytes()).cluster for place in places)
        if theirs is not None and not names_other:
            ours_left, theirs_left = (
                (ours.corruptions, ours.leaks),
                (theirs.get("corruptions", 0), theirs.get("leaks", 0)),
            )
            assert ours_left <= theirs_left, (notes, ours.messages)
            repaired += ours_left == (0, 0)
    assert repaired > seed / 6


def test_snapshots_survive_the_repair_of_an_image_with_bitmaps(images: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(images["bitmaps"].read_bytes())
    _poke(path, Anatomy(path.read_bytes()).kinds["refcounts"][-1], 0xFF)
    assert checked(path, Repair.ALL).leaks == 0
    assert "s0" in run("qemu-img", "snapshot", "-l", path)
    report = checked_by_qemu(path)
    assert report is not None and not (report.get("corruptions") or report.get("leaks"))


@pytest.mark.parametrize("name", IMAGES)
def test_the_file_in_parts(images: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are too large to be counted at once: nothing changes but the time that it takes."""
    path, again = tmp_path / "image", tmp_path / "again"
    for seed in range(3):
        notes = broken(images, path, 20_000 + seed, name)
        again.write_bytes(path.read_bytes())
        try:
            whole, repaired = checked(path), checked(path, Repair.ALL)
        except ImageError:
            continue
        monkeypatch.setattr(check, "CHECKED_COUNT", 1)
        parts = checked(again)
        assert differences(parts, {key: getattr(whole, name) for name, key in COUNTS.items()}) == {}, notes
        assert sorted(parts.messages) == sorted(whole.messages)
        parts = checked(again, Repair.ALL)
        assert (parts.corruptions, parts.leaks) == (repaired.corruptions, repaired.leaks), notes
        assert again.read_bytes() == path.read_bytes()
        monkeypatch.undo()


# -- what is told ------------------------------------------------------------------------------------------------------


def _poke(path: Path, at: int, value: int, format: str = ">Q") -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(format, value))


def _l2_entry(path: Path, number: int = 0) -> tuple[int, int]:
    """(where, what) an entry of the first L2 table of the active state is."""
    anatomy = Anatomy(path.read_bytes())
    table = anatomy.word(anatomy.kinds["L1"][0]) & PLACE
    return table + number * 8, anatomy.word(table + number * 8)


def test_places_are_told(image: Path) -> None:
    at, entry = _l2_entry(image, 4)
    _poke(image, at, entry | 1 << 60)
    (message,) = checked(image).messages
    assert message == f"L2 table at {at - 32:#x}, entry 4 is {entry | 1 << 60:#018x}: reserved bits"


def test_findings_are_told_as_long_as_anybody_reads(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layers.qcow2.findings.FINDINGS_COUNT_MAX", 3)
    anatomy = Anatomy(image.read_bytes())
    for at in anatomy.kinds["L2"][:10]:
        _poke(image, at, anatomy.word(at) | 1 << 60)
    report = checked(image)
    assert report.corruptions >= 10
    assert len(report.messages) == 4 and report.messages[-1].startswith("and more")


def test_progress_is_told(image: Path) -> None:
    told: list[tuple[int, int]] = []
    file = File(str(image))
    with open_stack(file, read_only=True):
        Qcow2.check(file, opener=FileOpener(Graph(), Files()), progress=lambda *done: told.append(done))
    assert told and told == sorted(told) and told[-1][0] == told[-1][1]


def test_progress_of_a_repair_never_goes_back(image: Path) -> None:
    told: list[float] = []
    _poke(image, Anatomy(image.read_bytes()).kinds["refcount table"][0], 0)
    file = RecordedFile(bytearray(image.read_bytes()))
    opener = FileOpener(Graph(), Files())
    Qcow2.check(file, repair=Repair.ALL, opener=opener, progress=lambda done, total: told.append(done / total))
    assert told == sorted(told) and told[-1] == 1


def test_a_file_too_large_is_refused(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(4096 << 31)
    with pytest.raises(ImageError, match="too large to be checked: found 2147483648, wanted at most 2147483647"):
        checked(image)


# -- repairing ---------------------------------------------------------------------------------------------------------


def test_a_check_writes_nothing(images: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "image"
    for seed in range(20):
        broken(images, path, 30_000 + seed)
        before = path.read_bytes()
        try:
            checked(path)
        except ImageError:
            continue
        assert path.read_bytes() == before


def test_a_sound_image_is_left_alone(image: Path) -> None:
    before = image.read_bytes()
    checked(image, Repair.ALL)
    assert image.read_bytes() == before


@pytest.mark.parametrize("bit", [0, 1])
def test_bits_are_cleared_when_nothing_is_wrong_any_more(image: Path, bit: int) -> None:
    _poke(image, 72, 1 << bit)
    checked(image, Repair.LEAKS)
    assert image.read_bytes()[72:80] == bytes(8)
    _poke(image, 72, 1 << bit)
    at, entry = _l2_entry(image)
    _poke(image, at, entry | 1 << 60)
    assert checked(image, Repair.ALL).corruptions == 1
    assert image.read_bytes()[72:80] == struct.pack(">Q", 1 << bit), "a bit in an entry is not ours to clear"


def test_unknown_autoclear_bits_go_before_anything_changes(image: Path) -> None:
    _poke(image, 88, 0xFF00)
    checked(image, Repair.ALL)
    assert image.read_bytes()[88:96] == struct.pack(">Q", 0xFF00), "nothing had to change"
    _poke(image, Anatomy(image.read_bytes()).kinds["refcounts"][3], 0x0001000100010005)
    file = RecordedFile(bytearray(image.read_bytes()))
    Qcow2.check(file, repair=Repair.ALL, opener=FileOpener(Graph(), Files()))
    changes = [operation for operation in file.log if operation.name != "sync"]
    assert (changes[0].offset, changes[0].data) == (88, bytes(8))
    assert len(changes) > 1 and file.log[1].name == "sync"


def test_leaks_are_not_repaired_where_refcounts_are_missing(image: Path) -> None:
    _poke(image, Anatomy(image.read_bytes()).kinds["refcount table"][0], 0)
    before = image.read_bytes()
    report = checked(image, Repair.LEAKS)
    assert report.check_errors == 1 and "made anew" in report.messages[-1]
    assert image.read_bytes() == before


def test_data_that_is_taken_for_a_table_is_left_alone(image: Path) -> None:
    """A snapshot's L1 entry names it. As a table it would need repairs: its entries name misplaced clusters."""
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 6M 4k", image)
    data = image.read_bytes()
    place = data.index(bytes([9]) * 4096)
    table = struct.unpack_from(">Q", data, 64)[0]
    _poke(image, struct.unpack_from(">Q", data, table)[0], place)
    with open_stack(Qcow2(File(str(image))), read_only=True) as disk:
        before = disk.read(0, disk.size)
    assert checked(image, Repair.ALL).corruptions, "what is wrong with it cannot be mended"
    with open_stack(Qcow2(File(str(image))), read_only=True) as disk:
        assert disk.read(0, disk.size) == before


def test_what_cannot_grow_is_rebuilt_within(image: Path) -> None:
    """As on a block device: there has to be room behind what is in use."""
    data = bytearray(image.read_bytes())
    end = len(data)
    struct.pack_into(">Q", data, Anatomy(data).kinds["refcount table"][0], 0)
    small = _Fixed(data[:])
    with pytest.raises(OSError, match="No space left"):
        Qcow2.check(small, repair=Repair.ALL, opener=FileOpener(Graph(), Files()))
    assert small.data == data
    large = _Fixed(data + bytes(64 * KIB))
    report = Qcow2.check(large, repair=Repair.ALL, opener=FileOpener(Graph(), Files()))
    assert (report.corruptions, report.leaks) == (0, 0)
    assert qcow2_check.check(large.data).errors == []
    assert end < report.image_end_offset <= end + 64 * KIB


class _Fixed(RecordedFile):
    def resize(self, size: int) -> None:
        raise RequestError(95, "a block device cannot be resized")


@pytest.mark.parametrize("kind", ["refcounts", "refcount table", "L2"])
def test_a_crash_while_repairing_makes_nothing_worse(images: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """From every state that it can leave, the data is what it was, and repairing again ends well."""
    pick = random.Random(f"{SEED} {kind}")
    for _ in range(amount(2, 100)):
        data = bytearray(images[pick.choice(["4K", "64K", "4 bits"])].read_bytes())
        anatomy = Anatomy(data)
        for at in pick.sample(anatomy.kinds[kind], min(3, len(anatomy.kinds[kind]))):
            word = anatomy.word(at)
            broken_word = {"refcounts": word ^ 1 << pick.randrange(64), "refcount table": 0, "L2": word ^ 1 << 63}[kind]
            if not (kind == "L2" and word >> 62 & 1):
                struct.pack_into(">Q", data, at, broken_word)
        content = qcow2_check.read(data)
        file = RecordedFile(data[:])
        report = Qcow2.check(file, repair=Repair.ALL, opener=FileOpener(Graph(), Files()))
        assert (report.corruptions, report.leaks) == (0, 0)
        for _, state in crash_states(bytes(data), file.log, pick, 10):
            assert qcow2_check.read(state) == content
            again = RecordedFile(state)
            report = Qcow2.check(again, repair=Repair.ALL, opener=FileOpener(Graph(), Files()))
            assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)
            assert qcow2_check.check(again.data).errors == []
            assert qcow2_check.read(again.data) == content


def test_many_snapshots_count_further_than_a_byte(images: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(images["4K"].read_bytes())
    (entry,) = struct.unpack_from(">Q", data, 64)
    data += bytes(-len(data) % 4096)
    struct.pack_into(">IQ", data, 60, 300, len(data))
    one = data[entry : entry + 40 + 24 + 1 + 2]  # extra data, ID and name
    data += b"".join(one.ljust(72, b"\0") for _ in range(300))
    path = tmp_path / "image"
    path.write_bytes(data)
    ours, theirs = checked(path), checked_by_qemu(path)
    assert theirs is not None and differences(ours, theirs) == {}
    assert any("300 references" in message or "301 references" in message for message in ours.messages)
    assert checked(path, Repair.ALL).corruptions == 0
    theirs = checked_by_qemu(path)
    assert theirs is not None and not (theirs.get("corruptions") or theirs.get("leaks"))


def test_snapshots_get_what_version_3_needs(images: dict[str, Path], tmp_path: Path) -> None:
    """As version 2 did without it, and old programs changed no more than the version."""
    path = tmp_path / "image"
    path.write_bytes(images["version 2"].read_bytes())
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 64)
    id_size, name_size = struct.unpack_from(">HH", data, table + 12)
    extra = struct.unpack_from(">I", data, table + 36)[0]
    tail = data[table + 40 + extra : table + 40 + extra + id_size + name_size]
    struct.pack_into(">I", data, table + 36, 0)
    data[table + 40 : table + 40 + len(tail)] = tail
    struct.pack_into(">I", data, 4, 3)
    struct.pack_into(">QQQII", data, 72, 0, 0, 0, 4, 104)
    data[104:112] = bytes(8)
    ours, theirs = _checked(data, path), checked_by_qemu(path)
    assert theirs is not None and differences(ours, theirs) == {} and ours.corruptions == 1
    assert "0 bytes of extra data" in ours.messages[0]
    file = RecordedFile(bytearray(data))
    report = Qcow2.check(file, repair=Repair.ALL, opener=FileOpener(Graph(), Files()))
    assert (report.corruptions, report.leaks, report.corruptions_fixed) == (0, 0, 1)
    assert report.messages == [f"repaired: {ours.messages[0]}"]
    assert not _checked(file.data, path).leaks
    assert "s0" in run("qemu-img", "snapshot", "-l", path)
    pick = random.Random(SEED)
    for _, state in crash_states(bytes(data), file.log, pick, amount(20, 200)):
        assert qcow2_check.read(state) == qcow2_check.read(data)
        assert not any("refcount" in error for error in qcow2_check.check(state).errors)
    again = Qcow2.check(RecordedFile(file.data), opener=FileOpener(Graph(), Files()))
    assert not (again.corruptions or again.leaks)


def _checked(data: bytes | bytearray, path: Path) -> ImageCheck:
    path.write_bytes(data)
    return checked(path)


# -- hostile images ----------------------------------------------------------------------------------------------------


def test_whatever_an_image_contains_there_is_an_answer(images: dict[str, Path]) -> None:
    """Counts, or an ImageError; or there is no room for what an image says."""
    pick, known = random.Random(f"{SEED} bytes"), [path.read_bytes() for path in images.values()]
    answers = set()
    for _ in range(amount(200, 20_000)):
        data = bytearray(pick.choice(known))
        for _ in range(pick.choice((1, 2, 4, 16))):
            at = pick.randrange(pick.choice((112, 600, 4096, len(data))))
            garbage = pick.choice((bytes([data[at] ^ 1 << pick.randrange(8)]), b"\0", b"\xff", pick.randbytes(8)))
            data[at : at + len(garbage)] = garbage
        if pick.random() < 0.1:
            del data[pick.randrange(len(data)) :]
        try:
            Qcow2.check(RecordedFile(data), repair=pick.choice(list(Repair)), opener=FileOpener(Graph(), Files()))
            answers.add("counts")
        except ImageError:
            answers.add("refused")
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.EFBIG), error
    assert answers == {"counts", "refused"}


@pytest.mark.timeout(30)
def test_tables_that_overlap_do_not_take_forever(tmp_path: Path) -> None:
    """65536 snapshots whose L1 tables are most of the file, each at another place; and L2 tables likewise."""
    path = create(tmp_path / "image", MIB, cluster_size=512)
    data = bytearray(path.read_bytes()) + bytes(4 * MIB)
    at = -(-len(data) // 512) * 512
    struct.pack_into(">IQ", data, 60, 65536, at)
    entry = struct.Struct(">QIHHIIQII16x")
    data += bytes(at - len(data))
    data += b"".join(entry.pack(512 * number, 4 * MIB // 8, 0, 0, 0, 0, 0, 0, 16) for number in range(1, 65537))
    report = _checked(data, path)
    assert report.check_errors and "more than the file" in report.messages[-2]
    path = create(tmp_path / "other", 2048 * MIB, cluster_size=2 * MIB)
    data = bytearray(path.read_bytes())
    data += bytes(-len(data) % (2 * MIB)) + b"\x80" + bytes(7) * (2 * MIB)
    (l1,) = struct.unpack_from(">Q", data, 40)
    struct.pack_into(">I", data, 36, 4 * MIB // 8)
    for number in range(20_000):
        struct.pack_into(">Q", data, l1 + 8 * number, 1 << 63 | 512 * (number + 1))
    assert _checked(data, path).corruptions >= 20_000


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcounts_are_read_and_written(bits: int) -> None:
    pick, refcounts = random.Random(bits), Refcounts(bits)
    tally = Tally(100, 356)
    model = [0] * 256
    for _ in range(300):
        first = pick.randrange(256)
        stop = min(first + pick.choice((1, 1, 7, 100)), 256)
        times = pick.choice((1, 1, 1, 2, 100, 300))
        tally.add(100 + first, 100 + stop, times)
        for index in range(first, stop):
            model[index] += times
        if pick.random() < 0.3:
            tally.add_each([100 + index for index in (first, stop - 1)], 1)
            model[first] += 1
            model[stop - 1] += 1
    assert tally.values(100, 356) == model
    clipped = [min(count, refcounts.most) for count in model]
    block = bytes(refcounts.encode(tally, 100, 356))
    assert len(block) == 32 * bits
    assert refcounts.decode(block, 256) == clipped
    assert refcounts.pack(clipped) == block
    assert list(refcounts.small(block, 256)) == [min(count, 2) for count in clipped]
    assert dict(tally.excess(refcounts.most)) == {
        100 + index: count for index, count in enumerate(model) if count > refcounts.most
    }
