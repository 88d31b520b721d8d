"""Filters come and go under a storm of clients, which notice nothing."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from pathlib import Path

import pytest

from nbdserver.config import of_images
from nbdserver.graph import walk
from nbdserver.service import Service
from nbdserver.testing import NbdServers
from nbdserver.uri import NbdUri
from tests.oracle.model import Model
from tests.oracle.storm import Storm
from tests.serving import SEED, amount, check, content, create, qemu_io

MIB = 1 << 20
SIZE = 8 * MIB

FILTERS = (
    {"type": "throttle", "bps_total": "200M", "iops_total": 20000},
    {"type": "detect-zeroes", "detect_zeroes": "unmap"},
    {"type": "copy-on-read"},
    {"type": "compress"},
    {"type": "copy-before-write", "target": [{"type": "memory", "size": SIZE}]},
)


def serve(path: Path, nbd_server: NbdServers, backend: str) -> tuple[Service, NbdUri]:
    wanted = of_images([str(path)], format="qcow2")
    address = nbd_server.socket()
    wanted = dataclasses.replace(
        wanted, listen=(str(address),), engine=dataclasses.replace(wanted.engine, backend=backend)
    )
    service = Service(wanted, log=print)
    service.start()
    return service, address


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_filters_come_and_go_under_a_storm(
    nbd_server: NbdServers, tmp_path: Path, backend: str, cluster_size: int
) -> None:
    base = create(tmp_path / "base.qcow2", SIZE)
    qemu_io(base, "write -P 7 0 3M", "write -P 9 5M 1M")
    path = create(tmp_path / "top.qcow2", SIZE, backing=base, cluster_size=cluster_size)
    model = Model(SIZE, initial=content(path))
    service, address = serve(path, nbd_server, backend)
    over, counts = threading.Event(), {"added": 0, "removed": 0}
    export = service.server.exports[path.name]
    bottom = export.root
    failures: list[BaseException] = []

    def change() -> None:
        pick = random.Random(SEED)
        while not over.is_set():
            filters = sum(layer.is_filter for _, layer in walk(export.root))
            if filters < 3 and (filters == 0 or pick.random() < 0.5):
                service.add_filter(path.name, pick.choice(FILTERS), "")
                counts["added"] += 1
            else:
                service.remove_filter(path.name)
                counts["removed"] += 1
            time.sleep(pick.random() * 0.02)
        while export.root is not bottom:
            service.remove_filter(path.name)

    def run() -> None:
        try:
            change()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    with Storm(str(address.with_export(path.name)), model, seed=SEED) as storm:
        thread.start()
        storm.run(seconds=amount(4, 60))
        over.set()
        thread.join()
        assert not failures, failures
        final = storm.verify()
        assert min(counts.values()) > 3, counts
        assert sum(storm.done.values()) > 200, storm.done
    service.stop()
    check(path)
    assert content(path) == final
