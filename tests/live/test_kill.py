"""kill -9 at random moments of snapshots, commits and streams: by its own name, the disk shows what was flushed."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from pathlib import Path

from nbdserver.control import ControlClient, RemoteError
from nbdserver.errors import ConfigError
from nbdserver.image import allocation
from nbdserver.image.opening import Images
from nbdserver.testing import NbdServers
from tests.live.kit import MIB
from tests.oracle.model import Kind, Model
from tests.oracle.storm import Storm, Weather
from tests.serving import SEED, amount, check, content, create, qemu_io

SIZE = 16 * MIB
KILLS = amount(2, 60)

#: More flushes than usual: they are what is tested.
WEATHER = Weather(
    weights={Kind.READ: 10, Kind.WRITE: 40, Kind.ZERO: 10, Kind.TRIM: 8, Kind.STATUS: 2, Kind.FLUSH: 4},
    fua=0.1,
    depth=4,
)


class Changes:
    """Snapshots, commits and streams, one after the other, until the server is gone."""

    def __init__(self, directory: Path, control: str, life: int) -> None:
        self.directory, self._control, self._life = directory, control, life
        self._pick = random.Random(SEED * 1000 + life)
        self.done: Counter[str] = Counter()
        #: The overlays that were asked for, whether they came to be or not.
        self.overlays: list[Path] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with (
                contextlib.suppress(ConnectionError, ConfigError, ValueError),  # it is gone
                contextlib.closing(ControlClient(self._control, 30)) as client,
            ):
                while True:
                    self._change(client)
                    self._wait_for_jobs(client)
        except BaseException as error:
            self._failure = error

    def _change(self, client: ControlClient) -> None:
        files = [layer["filename"] for layer in client.execute("query-block-exports")[0]["layers"]]
        chain = list(dict.fromkeys(files))
        kinds = ["snapshot"] * (len(chain) < 5)
        kinds += ["commit", "commit", "stream"] * (len(chain) > 1) + ["between"] * (len(chain) > 2)
        kind = self._pick.choice(kinds)
        if kind == "snapshot":
            path = self.directory / f"s{self._life}-{len(self.overlays)}.qcow2"
            self.overlays.append(path)
            client.execute("blockdev-snapshot-sync", export="vm", snapshot_file=str(path))
        elif kind == "commit":
            client.execute("block-commit", export="vm")
        elif kind == "between":
            client.execute("block-commit", export="vm", top=chain[1])
        else:
            client.execute("block-stream", export="vm", **({"base": chain[-1]} if len(chain) > 2 else {}))
        self.done[kind] += 1

    def _wait_for_jobs(self, client: ControlClient) -> None:
        while running := [job for job in client.execute("query-jobs") if job["status"] != "concluded"]:
            for job in running:
                if job["status"] == "ready":
                    with contextlib.suppress(RemoteError):  # it has been told already
                        client.execute("job-complete", id=job["id"])
            time.sleep(0.003)
        for job in client.execute("query-jobs"):
            assert "error" not in job, job
            client.execute("job-dismiss", id=job["id"])


def whole_chain(path: Path) -> list[Path]:
    with Images() as images:
        layer = images.open(str(path), "qcow2")
        return [Path(str(image.filename)) for image in allocation.chain(layer)]


def test_kill(nbd_server: NbdServers, tmp_path: Path, backend: str) -> None:
    """Again and again: each life begins with what the last one left."""
    base = create(tmp_path / "base.qcow2", SIZE)
    qemu_io(base, "write -q -P 5 0 9M")
    path = create(tmp_path / "vm.qcow2", SIZE, backing=base, cluster_size=4096)
    qemu_io(path, "write -q -P 6 3M 1M")
    model = Model(SIZE, initial=content(path), crashes=True)
    control = str(Path(str(nbd_server.socket().socket)).parent / "ctl")
    config, pick, done = tmp_path / "exports.toml", random.Random(SEED), Counter[str]()
    for life in range(KILLS):
        config.write_text(
            f'control = "{control}"\n[engine]\nbackend = "{backend}"\n'
            f'[exports.vm]\nimage = "{path}"\nformat = "qcow2"\n'
        )
        server = nbd_server.process(config)
        changes = Changes(tmp_path, control, life)
        with Storm(server.uri("vm"), model, seed=SEED * 1000 + life, weather=WEATHER) as storm:
            storm.run_until_killed(threading.Timer(pick.uniform(0.1, 1.2), server.kill))
        changes.join()
        done += changes.done
        # Who has asked for a snapshot knows the overlay's name; whether it has been put in or not, it shows the disk.
        path = next((overlay for overlay in reversed(changes.overlays) if overlay.exists()), path)
        for image in whole_chain(path):
            check(image, leaks_allowed=True)
        model.recover(content(path))
    assert sum(done.values()) > KILLS, done
