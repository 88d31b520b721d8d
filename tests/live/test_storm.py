"""A storm of clients over a disk whose images come, go and change meanwhile; against a model of the disk."""

from __future__ import annotations

import contextlib
import random
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdserver.errors import ConfigError
from nbdserver.live import chain
from tests.live.kit import MIB, SIZE, Live
from tests.oracle.model import Model
from tests.oracle.storm import Storm, Weather
from tests.serving import FULL, SEED, amount, check, content

#: Seconds over each kind of image, on each backend: ten minutes in all, if all is done.
SECONDS = amount(1, 75)

#: Changes there are at least, however long these take on a machine that has much else to do.
CHANGES = 4

#: Images that there may be.
DEPTH_MAX = 5


#: What is done, each as often as it stands here.
KINDS = ("overlay", "overlay", "commit", "commit", "between", "stream", "cancel", "grow", "internal")


class Changes:
    """Snapshots, commits, streams and growth at random moments, on a thread."""

    def __init__(self, live: Live, seed: int, kinds: Sequence[str] = KINDS) -> None:
        self._live, self._pick, self._kinds = live, random.Random(seed), kinds
        self.done: Counter[str] = Counter()

        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._number = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._change()
                self._over.wait(self._pick.random() * 0.05)
        except BaseException as error:
            self._failure = error

    def _change(self) -> None:
        depth = len(self._live.files)
        needed = {"overlay": 1, "grow": 1, "internal": 1, "between": 3}
        kind = self._pick.choice([kind for kind in self._kinds if depth >= needed.get(kind, 2)])
        if kind == "overlay" and depth >= DEPTH_MAX:
            return
        getattr(self, f"_{kind}")(depth)
        self.done[kind] += 1

    def _overlay(self, depth: int) -> None:
        self._number += 1
        self._live.execute("blockdev-snapshot-sync", snapshot_file=f"s{self._number}.qcow2")

    def _grow(self, depth: int) -> None:
        export = self._live.export
        self._live.execute("block_resize", size=export.info.size + self._pick.choice((512, 65536, MIB)))

    def _internal(self, depth: int) -> None:
        self._live.execute("blockdev-snapshot-internal-sync", name="now")
        self._over.wait(self._pick.random() * 0.05)
        self._live.execute("blockdev-snapshot-delete-internal-sync", name="now")

    def _commit(self, depth: int) -> None:
        self._run_job("block-commit", base=self._live.files[self._pick.randrange(1, depth)])

    def _between(self, depth: int) -> None:
        top = self._pick.randrange(1, depth - 1)
        base = self._pick.randrange(top + 1, depth)
        files = self._live.files
        self._run_job("block-commit", top=files[top], base=files[base])

    def _stream(self, depth: int) -> None:
        base = self._pick.randrange(2, depth + 1)
        self._run_job("block-stream", **({} if base == depth else {"base": self._live.files[base]}))

    def _cancel(self, depth: int) -> None:
        job = self._live.job(self._live.execute(self._pick.choice(("block-commit", "block-stream")))["id"])
        self._over.wait(self._pick.random() * 0.05)
        with contextlib.suppress(ConfigError):  # it has concluded
            job.cancel()
        assert job.wait(60)

    def _run_job(self, command: str, **arguments: Any) -> None:
        job = self._live.run(command, **arguments)
        assert job.error is None, (command, arguments, job.error)


IMAGES: dict[str, dict[str, Any]] = {
    "64k": {},
    "4k": {"cluster_size": 4096},
    "subclusters": {"extended_l2": "on", "cluster_size": 65536},
    "v2": {"compat": "0.10", "cluster_size": 4096},
    "compressed": {"cluster_size": 16384},
}


@pytest.mark.parametrize("name", IMAGES if FULL else ("4k", "subclusters", "compressed"))
def test_nothing_is_lost_or_mixed_up_while_images_come_and_go(live: Live, name: str) -> None:
    path = live.chain(3, **IMAGES[name])[-1]
    model = Model(SIZE, initial=content(path))
    live.serve(path)
    if name == "compressed":  # by whatever images there are, of clusters of any size
        live.service.add_filter("vm", {"type": "compress"}, "")
    with Storm(live.uri(), model, seed=SEED, weather=Weather(length_max=128 << 10)) as storm:
        changes = Changes(live, SEED + zlib.crc32(live.engine.encode()))
        try:
            storm.run(seconds=SECONDS)
            while sum(changes.done.values()) < CHANGES:
                storm.run(seconds=0.2)
        finally:
            changes.stop()
        final = storm.verify()
        assert sum(storm.done.values()) > 20 * SECONDS, storm.done
    images = [Path(str(image.filename)) for image in chain.images(live.export.root)]
    live.stop()
    for image in images:
        check(image)
    assert content(images[0])[:SIZE] == final
