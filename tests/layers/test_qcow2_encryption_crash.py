"""Encrypted images after a crash: sound, with all that was flushed, and no noise where there was none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from layers.luks.header import read_embedded
from layers.luks.keyslots import unlocked
from layers.qcow2.encryption import Part
from nbdserver.reference import open_stack
from tests.layers.luks_kit import KIB, PASSPHRASE, content, make_qcow2, qcow2, qemu_io, secret
from tests.layers.qcow2_check import Decrypt, Image, check, read
from tests.layers.qcow2_kit import Drive, RecordedFile, crash_states_of, open_recorded
from tests.serving import SEED, amount, run

#: Options of the image; and: has a backing file, a snapshot, and how large it is.
SCENARIOS: dict[str, dict[str, Any]] = {
    "small clusters": {"cluster_size": 512},
    "4k clusters": {"cluster_size": 4096, "size": 256 * KIB},
    "64k clusters": {"cluster_size": 65536, "size": 512 * KIB},
    "version 2": {"cluster_size": 512, "compat": "0.10"},
    "no transform": {"cluster_size": 1024, "encrypt_cipher_mode": "cbc"},
    "backing file": {"cluster_size": 1024, "backing": 99 * KIB + 512},
    "snapshot": {"cluster_size": 4096, "snapshot": True, "size": 256 * KIB},
    "subclusters": {"cluster_size": 16384, "extended_l2": True, "size": 400 * KIB},
    "subclusters, snapshot": {"cluster_size": 16384, "extended_l2": True, "snapshot": True, "size": 256 * KIB},
    "data file": {"cluster_size": 1024, "data_file": True},
    "preallocated": {"cluster_size": 1024, "preallocation": "metadata"},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_crash_states_are_sound_and_hold_what_was_flushed(name: str, tmp_path: Path) -> None:
    options, pick = dict(SCENARIOS[name]), random.Random(f"{SEED} {name}")
    size, cluster = options.pop("size", 128 * KIB), options["cluster_size"]
    below = pick.randbytes(options.pop("backing", 0))
    path, has_snapshot = tmp_path / "image", options.pop("snapshot", False)
    if options.get("data_file"):
        options["data_file"] = str(tmp_path / "data")
    make_qcow2(path, size, **options)
    qemu_io(path, "write -P 1 0 40k", "write -P 2 64k 33k", options=qcow2(path))
    if has_snapshot:
        key = ("--object", f"secret,id=s,file={secret(tmp_path)}")
        run("qemu-img", "snapshot", *key, "-c", "before", "--image-opts", qcow2(path))
    before = content(path, qcow2(path))
    initials = [path.read_bytes(), *((tmp_path / "data").read_bytes() for _ in range("data_file" in options))]
    decrypt = _decrypt(initials[0])
    assert read(initials[0], b"", *initials[1:], decrypt=decrypt) == before
    if below:  # what the image itself names is not opened
        before = read(initials[0], below, decrypt=decrypt)

    file, layer = open_recorded(
        *initials, backing=open_recorded(below)[0] if below else False, key_file=str(secret(tmp_path))
    )
    with open_stack(layer) as disk:
        ends = [file.data, *([layer.data_file.layer.data] if len(initials) > 1 else [])]  # type: ignore[union-attr]
        drive = Drive(file, disk, before, pick, cluster)
        for _ in range(40):
            drive.step(longest=max(8 * 4096 // cluster, 3))
    assert not check(ends[0]).errors and not check(ends[0]).leaks
    assert read(ends[0], below, *ends[1:], decrypt=decrypt) == drive.model

    for number, (position, state) in enumerate(crash_states_of(initials, file.log, pick, amount(40, 1000))):
        where = f"crash {number} before {position}: {[str(o) for o in file.log[max(position - 8, 0) : position]]}"
        assert not check(state[0]).errors, (check(state[0]).errors[:5], where)
        assert not drive.history.wrong(position, read(state[0], below, *state[1:], decrypt=decrypt)), where


def _decrypt(image: bytes) -> Decrypt:
    """With the key in the image's header."""
    place, length = Image(image).encryption
    part = Part(RecordedFile(bytearray(image)), place, length)
    cipher = unlocked(read_embedded(part, place), part, PASSPHRASE).cipher
    return lambda place, data: cipher.decrypt(place // 512, data)
