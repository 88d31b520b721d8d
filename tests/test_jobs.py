"""Jobs: their states, who may hold them, their speed, and their end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from layers.file import File
from nbdserver.cli import main
from nbdserver.commands import Commands
from nbdserver.config import of_images
from nbdserver.control import Control
from nbdserver.errors import ConfigError, RequestError
from nbdserver.jobs import CancelledError, Job, Jobs, Status
from nbdserver.limits import JOBS_CONCLUDED_COUNT_MAX, JOBS_COUNT_MAX
from nbdserver.server import Server
from nbdserver.service import Service
from nbdserver.testing import NbdServers
from tests.coherence.pages import LITTLE, SOON, Background
from tests.serving import eventually

MIB = 1 << 20


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.stop(SOON)


class Steps:
    """A body that goes on until it is told to end, a step at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.over = threading.Event()

    def __call__(self, job: Job) -> None:
        while not self.over.is_set():
            job.checkpoint()
            self.count += 1
            time.sleep(0.001)

    def goes_on(self) -> bool:
        before = self.count
        time.sleep(LITTLE)
        return self.count > before


def blocked(entered: threading.Event, released: threading.Event) -> Callable[[Job], None]:
    def body(job: Job) -> None:
        entered.set()
        assert released.wait(SOON)
        job.checkpoint()

    return body


# -- states --------------------------------------------------------------------------------------------------------


def test_a_job_does_its_work_and_concludes(jobs: Jobs) -> None:
    def body(job: Job) -> None:
        job.progress(5, 10)

    job = jobs.start("copy", body)
    assert job.wait(SOON)
    assert job.describe() == {
        "id": "copy1",
        "type": "copy",
        "status": "concluded",
        "speed": 0,
        "current-progress": 5,
        "total-progress": 10,
    }
    assert jobs.all == [job]
    jobs.dismiss("copy1")
    assert jobs.all == []


@pytest.mark.parametrize(
    ("error", "told"),
    [(RequestError(5, "the disk is gone"), "the disk is gone"), (KeyError("a bug"), "KeyError: 'a bug'")],
)
def test_a_job_that_fails_says_why(jobs: Jobs, error: Exception, told: str) -> None:
    def body(job: Job) -> None:
        raise error

    job = jobs.start("copy", body)
    assert job.wait(SOON)
    assert (job.status, job.error) == (Status.CONCLUDED, told)
    assert job.describe()["error"] == told


def test_a_job_is_cancelled_at_its_next_checkpoint(jobs: Jobs) -> None:
    entered, released = threading.Event(), threading.Event()
    job = jobs.start("copy", blocked(entered, released))
    assert entered.wait(SOON)
    job.cancel()
    assert job.status is Status.ABORTING
    released.set()
    assert job.wait(SOON)
    assert job.error == "the job has been cancelled"
    with pytest.raises(ConfigError, match="has concluded"):
        job.cancel()


def test_a_cancelled_job_can_clean_up(jobs: Jobs) -> None:
    cleaned = threading.Event()

    def body(job: Job) -> None:
        try:
            while True:
                job.sleep(SOON)
        except CancelledError:
            cleaned.set()
            raise

    job = jobs.start("copy", body)
    job.cancel()
    assert job.wait(SOON)
    assert cleaned.is_set()


def test_a_job_is_paused_and_goes_on(jobs: Jobs) -> None:
    steps = Steps()
    job = jobs.start("copy", steps)
    eventually(steps.goes_on)
    job.pause()
    assert job.status is Status.PAUSED
    eventually(lambda: not steps.goes_on())
    job.resume()
    assert job.status is Status.RUNNING
    assert steps.goes_on()
    job.pause()
    job.cancel()  # also one that is paused
    assert job.wait(SOON)


def test_a_job_that_is_ready_goes_on_until_it_is_completed(jobs: Jobs) -> None:
    followed = threading.Event()

    def body(job: Job) -> None:
        job.set_ready()
        while not job.is_completing:
            followed.set()
            job.sleep(0.01)

    job = jobs.start("mirror", body)
    assert followed.wait(SOON)
    assert job.status is Status.READY
    job.complete()
    assert job.wait(SOON)
    assert job.error is None
    with pytest.raises(ConfigError, match="job 'mirror1' is concluded, not ready"):
        job.complete()


def test_a_job_keeps_to_its_speed(jobs: Jobs) -> None:
    def body(job: Job) -> None:
        for done in range(20):
            job.progress(done, 20)
            job.checkpoint(MIB)

    begin = time.monotonic()
    job = jobs.start("copy", body, speed=100 * MIB)
    assert job.wait(SOON)
    assert 0.18 < time.monotonic() - begin < 2


def test_a_job_that_waits_for_its_speed_hears_of_another(jobs: Jobs) -> None:
    def body(job: Job) -> None:
        for _ in range(100):
            job.checkpoint(MIB)

    job = jobs.start("copy", body, speed=1)
    assert not job.wait(LITTLE)
    job.set_speed(0)
    assert job.wait(SOON)


# -- drained sections ----------------------------------------------------------------------------------------------


def test_a_drained_section_holds_jobs_that_work_on_its_layers(nbd_server: NbdServers, disk: Path) -> None:
    server, _ = nbd_server.start(File(path=str(disk)), name="disk")
    root = server.exports["disk"].root
    there, elsewhere = Steps(), Steps()
    job = server.jobs.start("copy", there, layers=[root])
    server.jobs.start("copy", elsewhere)
    eventually(there.goes_on)
    with server.drained(root):
        assert not there.goes_on()
        assert elsewhere.goes_on()
        assert job.status is Status.RUNNING, "nobody has paused it"
        with server.drained(root):
            pass
        assert not there.goes_on()
        job.cancel()
        assert not job.wait(LITTLE), "it is held"
    assert job.wait(SOON)
    elsewhere.over.set()


def test_a_drained_section_waits_for_a_step_to_end(nbd_server: NbdServers, disk: Path) -> None:
    server, _ = nbd_server.start(File(path=str(disk)), name="disk")
    root = server.exports["disk"].root
    entered, released = threading.Event(), threading.Event()
    job = server.jobs.start("copy", blocked(entered, released), layers=[root])
    assert entered.wait(SOON)
    with pytest.raises(TimeoutError, match="job 'copy1' has come to no checkpoint"), server.drained(root, LITTLE):
        raise AssertionError("drained, though the job is at work")

    def drain() -> None:
        with server.drained(root):
            pass

    draining = Background(drain)
    assert not draining.is_done()
    released.set()
    draining.finish()
    assert job.wait(SOON)


def test_a_job_drains_without_waiting_for_itself_or_another_that_drains(nbd_server: NbdServers, disk: Path) -> None:
    server, _ = nbd_server.start(File(path=str(disk)), name="disk")
    root = server.exports["disk"].root
    inside = []

    def body(job: Job) -> None:
        for _ in range(20):
            job.checkpoint()
            with server.drained(root):
                inside.append(job.id)
                assert len(inside) == 1
                inside.pop()

    jobs = [server.jobs.start("pivot", body, layers=[root]) for _ in range(4)]
    for job in jobs:
        assert job.wait(SOON), job.describe()
        assert job.error is None


def test_a_disk_that_a_job_works_on_is_not_resized(nbd_server: NbdServers, disk: Path) -> None:
    server, _ = nbd_server.start(File(path=str(disk)), name="disk")
    steps = Steps()
    server.jobs.start("copy", steps, layers=[server.exports["disk"].root])
    with pytest.raises(ConfigError, match="job 'copy1' works on export 'disk'"):
        server.resize("disk", MIB // 2)
    steps.over.set()
    assert server.jobs.get("copy1").wait(SOON)
    server.resize("disk", MIB // 2)


# -- all of them ---------------------------------------------------------------------------------------------------


def test_names_are_jobs_own(jobs: Jobs) -> None:
    steps = Steps()
    jobs.start("copy", steps, id="mine")
    with pytest.raises(ConfigError, match="there is a job 'mine' already"):
        jobs.start("copy", steps, id="mine")
    with pytest.raises(ConfigError, match="there is no job 'other'"):
        jobs.get("other")
    with pytest.raises(ConfigError, match="job 'mine' is running, and has not concluded"):
        jobs.dismiss("mine")


def test_there_are_so_many_at_once_and_so_many_remembered(jobs: Jobs) -> None:
    steps = Steps()
    for _ in range(JOBS_COUNT_MAX):
        jobs.start("copy", steps)
    with pytest.raises(ConfigError, match=f"{JOBS_COUNT_MAX} jobs run already"):
        jobs.start("copy", steps)
    steps.over.set()
    for job in jobs.all:
        assert job.wait(SOON)
    last = [jobs.start("copy", lambda job: None).id for _ in range(5)][-1]
    assert len(jobs.all) <= JOBS_CONCLUDED_COUNT_MAX + 1
    assert jobs.all[-1].id == last


def test_a_server_that_stops_cancels_its_jobs_and_waits_for_them(disk: Path) -> None:
    order = []

    def body(job: Job) -> None:
        try:
            while True:
                job.sleep(SOON)
        finally:
            assert file.size == MIB, "the layers are still open"
            order.append("job")

    file = File(path=str(disk))
    server = Server()
    server.export("disk", file)
    job = server.jobs.start("copy", body, layers=[file])
    server.stop()
    assert job.status is Status.CONCLUDED
    assert order == ["job"]
    with pytest.raises(ConfigError, match="the server is stopping"):
        server.jobs.start("copy", body)


def test_a_job_that_does_not_end_is_said(jobs: Jobs) -> None:
    entered, released = threading.Event(), threading.Event()
    jobs.start("copy", blocked(entered, released))
    assert entered.wait(SOON)
    with pytest.raises(TimeoutError, match="job 'copy1' has not ended within"):
        jobs.stop(LITTLE)
    released.set()


# -- by the control socket -----------------------------------------------------------------------------------------


@pytest.fixture
def service(nbd_server: NbdServers, disk: Path) -> Iterator[tuple[Service, str]]:
    path = str(nbd_server.socket().socket)
    service = Service(of_images([str(disk)], format="raw"), log=print)
    service.start()
    with Control(path, Commands(service, "").table(), log=print):
        yield service, path
    service.stop()


def test_ctl_shows_and_drives_jobs(service: tuple[Service, str]) -> None:
    jobs, path = service[0].server.jobs, service[1]
    go = threading.Event()

    def body(job: Job) -> None:
        for done in range(100):
            job.progress(done * MIB, 100 * MIB)
            job.checkpoint()
            if done == 50:
                while not go.is_set():
                    job.sleep(0.01)
        job.progress(100 * MIB, 100 * MIB)

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, ["ctl", "-s", path, *words])

    def told(*words: str) -> Any:
        return json.loads(run(*words, "--json").stdout)

    jobs.start("copy", body)
    eventually(lambda: told("jobs")["jobs"][0]["current-progress"] == 50 * MIB)
    assert run("job-pause", "copy1").exit_code == 0
    assert told("jobs")["jobs"][0]["status"] == "paused"
    assert run("job-resume", "copy1").exit_code == 0
    assert run("job-set-speed", "copy1", "1G").exit_code == 0
    assert told("jobs")["jobs"][0]["speed"] == 1 << 30
    assert run("job-complete", "copy1").stderr == "nbdserver: job 'copy1' is running, not ready\n"
    threading.Timer(LITTLE, go.set).start()
    waited = run("job-wait", "copy1")
    assert waited.exit_code == 0
    assert waited.stdout.splitlines()[1].split()[:4] == ["copy1", "copy", "concluded", str(100 * MIB)]
    assert run("job-dismiss", "copy1").exit_code == 0
    assert told("jobs") == {"jobs": []}
    assert "there is no job 'copy1'" in run("job-wait", "copy1").stderr


def test_ctl_tells_of_a_job_that_has_failed(service: tuple[Service, str]) -> None:
    jobs, path = service[0].server.jobs, service[1]
    jobs.start("copy", Steps(), id="j")
    assert CliRunner().invoke(main, ["ctl", "-s", path, "job-cancel", "j"]).exit_code == 0
    done = CliRunner().invoke(main, ["ctl", "-s", path, "job-wait", "j"])
    assert done.exit_code == 1
    assert "the job has been cancelled" in done.stdout
