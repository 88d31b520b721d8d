"""Every image of the matrix (`qcow2_matrix`): what QEMU makes is read over NBD, and what is made here QEMU reads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from layers.file import File
from layers.qcow2 import Qcow2
from tests.image.kit import image, qemu_img
from tests.interop.qcow2_matrix import (
    MATRIX,
    Exports,
    Kind,
    Picture,
    check_by_qemu,
    check_over_nbd,
    draw,
    draw_by_qemu,
    drawn_on,
    exports,
    make_chain,
    options,
    read,
)
from tests.serving import SEED, check, content, run

__all__ = ["exports"]


def test_the_matrix_is_large_enough() -> None:
    assert len(MATRIX) >= 60


# -- made by QEMU -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRIX)
def test_what_qemu_makes_is_read(exports: Exports, tmp_path: Path, name: str) -> None:
    kind = MATRIX[name]
    path, picture, snapshots = _make_by_qemu(tmp_path, kind, name)
    with exports.serving(Qcow2(File(str(path))), read_only=True) as handle:
        assert handle.get_size() == kind.size
        check_over_nbd(handle, picture)
        if kind.is_small:
            assert read(handle, 0, kind.size) == content(path)
    for snapshot, shown in snapshots.items():
        with exports.serving(Qcow2(File(str(path)), snapshot=snapshot), read_only=True) as handle:
            check_over_nbd(handle, shown)
    assert (
        image("map", "-f", "qcow2", "--json", path).stdout == qemu_img("map", "-f", "qcow2", "--output=json", path).out
    )


def _make_by_qemu(folder: Path, kind: Kind, name: str) -> tuple[Path, Picture, dict[str, Picture]]:
    """The image, what its disk shows, and what its snapshots do."""
    path = folder / "image"
    arguments, picture = make_chain(folder, kind, name)
    if kind.compress:
        raw = _raw(folder, kind, name, picture)
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *options(kind.options, path), raw, path)
        return path, picture, {}
    words = [*options(kind.options, path), *arguments]
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, path, str(kind.size))
    snapshots = {}
    for number in range(kind.snapshots + 1):
        if number:
            run("qemu-img", "snapshot", "-c", f"s{number}", path)
            snapshots[f"s{number}"] = picture.copy()
        drawn = drawn_on(kind, name, number)
        draw_by_qemu(path, "qcow2", drawn)
        picture.draw(drawn)
    return path, picture, snapshots


def _raw(folder: Path, kind: Kind, name: str, picture: Picture) -> Path:
    """A raw image that has been drawn on."""
    raw = folder / "raw"
    raw.touch()
    picture.draw(drawn_on(kind, name))
    raw.write_bytes(picture.bytes(0, kind.size))
    return raw


# -- made here --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRIX)
def test_what_is_made_here_is_read_by_qemu(exports: Exports, tmp_path: Path, name: str) -> None:
    kind, path = MATRIX[name], tmp_path / "image"
    arguments, picture = make_chain(tmp_path, kind, name)
    snapshots = {}
    if kind.compress:
        raw = _raw(tmp_path, kind, name, picture)
        image("convert", "-c", "-f", "raw", "-O", "qcow2", *options(kind.options, path), raw, path)
    else:
        image("create", "-q", "-f", "qcow2", *options(kind.options, path), *arguments, path, kind.size)
        snapshots = _draw(exports, path, kind, name, picture)
    check(path)
    check_by_qemu(path, picture)
    if kind.is_small:
        assert content(path) == picture.bytes(0, kind.size)
    for snapshot, shown in snapshots.items():
        run("qemu-img", "convert", "-l", snapshot, "-O", "raw", path, tmp_path / "shown")
        assert (tmp_path / "shown").read_bytes() == shown.bytes(0, kind.size)


def _draw(exports: Exports, path: Path, kind: Kind, name: str, picture: Picture) -> dict[str, Picture]:
    """Over NBD, with snapshots in between; what they show."""
    pick, snapshots = random.Random(f"{SEED} {name}"), {}
    layer = Qcow2(File(str(path)))
    with exports.serving(layer, read_only=False) as handle:
        for number in range(kind.snapshots + 1):
            if number:
                with exports.server.drained(layer):
                    layer.create_snapshot(f"s{number}")
                snapshots[f"s{number}"] = picture.copy()
            draw(handle, drawn_on(kind, name, number), picture, pick)
        check_over_nbd(handle, picture)
        handle.flush()
    return snapshots
