"""Taking clusters in a row, for tables that must be in one piece."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserver.reference import open_stack
from tests.layers.qcow2_check import check
from tests.layers.qcow2_kit import open_recorded
from tests.serving import SEED, create, run

KIB = 1024


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_clusters_in_a_row_are_one_run_however_many_blocks_count_them(tmp_path: Path, refcount_bits: int) -> None:
    """With clusters of 512 bytes and 64 bits a block counts 64 clusters, and a refcount table 4096."""
    image = create(tmp_path / "image", 512 * KIB, cluster_size=512, refcount_bits=refcount_bits)
    file, layer = open_recorded(image.read_bytes())
    pick, taken = random.Random(SEED), set[int]()
    with open_stack(layer) as disk:
        refcounts = layer.writer.refcounts
        for _ in range(40):
            if pick.random() < 0.4:
                disk.write(pick.randrange(1000) * 512, bytes([1]) * pick.randrange(1, 40) * 512)
                continue
            count = pick.choice((1, 3, 63, 64, 65, 200, 700))
            with layer._lock:
                start = refcounts.take_contiguous(count)
                clusters = set(range(start, start + count))
                assert all(refcounts.get(cluster) == 1 for cluster in clusters)
            assert taken.isdisjoint(clusters)
            layer.reader.storage.reserve(start * 512, count * 512)
            taken |= clusters
    report = check(file.data)
    assert not report.errors
    assert report.leaks == len(taken), "what nothing refers to, and nothing else, is lost"


def test_given_back_they_are_taken_again(tmp_path: Path) -> None:
    file, layer = open_recorded(create(tmp_path / "image", 512 * KIB, cluster_size=512).read_bytes())
    with open_stack(layer), layer._lock:
        refcounts = layer.writer.refcounts
        start = refcounts.take_contiguous(600)
        refcounts.give_back(start, 600)
        assert refcounts.take_contiguous(500) in range(start, start + 101)
        refcounts.give_back(start, 600)
    report = check(file.data)
    assert not report.errors and not report.leaks


def test_clusters_in_use_are_passed_by_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full image has millions of them, and the first table that is allocated is looked for from the beginning."""
    image = create(tmp_path / "image", 2048 * KIB, cluster_size=512)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", image)
    file, layer = open_recorded(image.read_bytes())
    with open_stack(layer), layer._lock:
        refcounts, steps = layer.writer.refcounts, list[int]()
        whole = refcounts._first_used
        monkeypatch.setattr(refcounts, "_first_used", lambda start, stop: steps.append(start) or whole(start, stop))
        start = refcounts.take_contiguous(3)
        assert start * 512 > 2048 * KIB
        assert len(steps) < 4, "in so many steps behind more than 4096 clusters"
        refcounts.give_back(start, 3)
    assert not check(file.data).leaks
