"""Jobs: long work on a running server, which people see, hold and cancel.

::

                      ┌──────────── paused <────────────┐
                      v                                 v
    created ──> running ──────────────────────────> ready       (jobs that follow a disk until they are completed)
                      └──> aborting ──> concluded <─────┘

States and verbs are those of QEMU's jobs (qapi/job.json), as far as they mean something here. A job's *body* is a
function that runs on a thread of its own. At every step it comes to `Job.checkpoint`, where it can be held: by people,
by its limit on speed, and by drained sections, in which nothing of it runs. Between checkpoints it may do I/O; where it
changes the graph it does so in `server.Server.drained`, which knows jobs.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from nbdserver.errors import ConfigError, NbdserverError
from nbdserver.layer import Layer
from nbdserver.limits import DRAIN_TIMEOUT, JOBS_CONCLUDED_COUNT_MAX, JOBS_COUNT_MAX, STOP_TIMEOUT

_log = logging.getLogger("nbdserver")


class Status(enum.Enum):
    """QEMU's ``JobStatus``."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    ABORTING = "aborting"
    CONCLUDED = "concluded"


class CancelledError(NbdserverError):
    """The job is to end without having done its work; raised by `Job.checkpoint`."""


class Job:
    """One job. ``layers``: those whose drained sections hold it; more may be added to `layers` while it runs.

    ``speed``: bytes a second that its body may do, 0: as many as it can. Thread-safe; the methods under "for the body"
    are for the body alone.
    """

    def __init__(
        self, id: str, type: str, body: Callable[[Job], None], layers: Collection[Layer], speed: int = 0
    ) -> None:
        self.id, self.type, self.layers = id, type, set(layers)
        self._body = body
        self._changed = threading.Condition()
        self._status = Status.CREATED
        self._current = self._total = 0
        self._error: str | None = None
        self._is_held = False  # by people
        self._holds = 0  # by drained sections
        self._is_parked = False
        self._is_cancelled = self._is_completing = False
        self._speed, self._due = speed, 0.0
        self._thread = threading.Thread(target=self._run, name=f"nbd-job-{id}", daemon=True)

    # -- for the body ----------------------------------------------------------------------------------------------

    def progress(self, current: int, total: int) -> None:
        """How much is done, of how much; both may go up, in any unit."""
        with self._changed:
            self._current, self._total = current, total

    def checkpoint(self, length: int = 0) -> None:
        """No I/O of the body's runs now, and it has done ``length`` bytes since the last time: wait as long as somebody
        holds the job, or it is ahead of its speed. Raises CancelledError."""
        with self._changed:
            if self._speed:
                self._due = max(self._due, time.monotonic()) + length / self._speed
            with self._parked():
                while not self._may_go():
                    self._changed.wait(self._pause())
            if self._is_cancelled:
                raise CancelledError("the job has been cancelled")

    def sleep(self, seconds: float) -> None:
        """A checkpoint that takes so long, unless something happens to the job. Raises CancelledError."""
        with self._changed, self._parked():
            self._changed.wait(seconds)
        self.checkpoint()

    def set_ready(self) -> None:
        """The work is done, and kept up with until `is_completing`."""
        with self._changed:
            self._status = Status.READY

    @property
    def is_completing(self) -> bool:
        """Whether a job that is ready is to come to its end."""
        return self._is_completing

    @property
    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    @contextlib.contextmanager
    def _parked(self) -> Iterator[None]:
        """Who holds the job need not wait for it. Called with the lock held."""
        self._is_parked = True
        self._changed.notify_all()
        try:
            yield
        finally:
            self._is_parked = False

    def _may_go(self) -> bool:
        if self._holds:
            return False
        return self._is_cancelled or not (self._is_held or (self._speed and self._due > time.monotonic()))

    def _pause(self) -> float | None:
        """How long to wait until it should be looked at again; None: until something happens."""
        if self._holds or self._is_held:
            return None
        return max(self._due - time.monotonic(), 0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time of the block the body only waits, for something that a drained section may have."""
        with self._changed:
            self._is_parked = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._is_parked = False

    # -- for others ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        with self._changed:
            self._status = Status.RUNNING
        try:
            self.checkpoint()
            self._body(self)
        except (NbdserverError, OSError) as error:
            self._conclude(str(error))
        except Exception as error:
            _log.exception("job %s failed", self.id)
            self._conclude(f"{type(error).__name__}: {error}")
        else:
            self._conclude(None)

    def _conclude(self, error: str | None) -> None:
        with self._changed:
            self._status, self._error = Status.CONCLUDED, error
            self.layers.clear()
            self._changed.notify_all()

    @property
    def status(self) -> Status:
        with self._changed:
            return self._state()

    def _state(self) -> Status:
        if self._status in (Status.RUNNING, Status.READY):
            if self._is_cancelled:
                return Status.ABORTING
            if self._is_held:
                return Status.PAUSED
        return self._status

    @property
    def error(self) -> str | None:
        """Why it has failed, if it has."""
        return self._error

    def describe(self) -> dict[str, Any]:
        """QMP's ``JobInfo``, with the speed."""
        with self._changed:
            told = {"id": self.id, "type": self.type, "status": self._state().value, "speed": self._speed}
            told |= {"current-progress": self._current, "total-progress": self._total}
            return told if self._error is None else {**told, "error": self._error}

    def cancel(self) -> None:
        """Have it end at its next checkpoint. One that has passed its last comes to its end."""
        self._set(is_cancelled=True)

    def pause(self) -> None:
        self._set(is_held=True)

    def resume(self) -> None:
        self._set(is_held=False)

    def complete(self) -> None:
        """Have a job that is ready come to its end. Raises ConfigError if it is not."""
        with self._changed:
            if self._status is not Status.READY or self._is_cancelled:
                raise ConfigError(f"job {self.id!r} is {self._state().value}, not ready")
            self._is_completing = True
            self._changed.notify_all()

    def set_speed(self, speed: int) -> None:
        with self._changed:
            self._speed, self._due = speed, 0.0
            self._changed.notify_all()

    def _set(self, *, is_cancelled: bool = False, is_held: bool | None = None) -> None:
        with self._changed:
            if self._status is Status.CONCLUDED:
                raise ConfigError(f"job {self.id!r} has concluded")
            self._is_cancelled |= is_cancelled
            self._is_held = self._is_held if is_held is None else is_held
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has concluded; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._status is Status.CONCLUDED, timeout)

    @contextlib.contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        """For the time of the block its body is at a checkpoint, or waits, or is over. Raises TimeoutError."""
        with self._changed:
            self._holds += 1
            done = self._changed.wait_for(lambda: self._is_parked or self._status is Status.CONCLUDED, timeout)
        try:
            if not done:
                raise TimeoutError(f"job {self.id!r} has come to no checkpoint within {timeout} s")
            yield
        finally:
            with self._changed:
                self._holds -= 1
                self._changed.notify_all()


class Jobs:
    """The jobs of a server, those that have concluded included, until they are dismissed or too many. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._numbers = itertools.count(1)
        self._is_stopping = False

    def start(
        self,
        type: str,
        body: Callable[[Job], None],
        *,
        id: str | None = None,
        layers: Collection[Layer] = (),
        speed: int = 0,
    ) -> Job:
        """Have ``body`` run as a job; see `Job`. Raises ConfigError."""
        with self._lock:
            if self._is_stopping:
                raise ConfigError("the server is stopping")
            self._forget_old()
            name = id if id is not None else f"{type}{next(self._numbers)}"
            if name in self._jobs:
                raise ConfigError(f"there is a job {name!r} already")
            if len([job for job in self._jobs.values() if job.status is not Status.CONCLUDED]) >= JOBS_COUNT_MAX:
                raise ConfigError(f"{JOBS_COUNT_MAX} jobs run already")
            job = self._jobs[name] = Job(name, type, body, layers, speed)
            job.start()
            return job

    def _forget_old(self) -> None:
        concluded = [id for id, job in self._jobs.items() if job.status is Status.CONCLUDED]
        for id in concluded[: max(0, len(concluded) - JOBS_CONCLUDED_COUNT_MAX + 1)]:
            del self._jobs[id]

    @property
    def all(self) -> list[Job]:
        """In the order in which they were started."""
        with self._lock:
            return list(self._jobs.values())

    def get(self, id: str) -> Job:
        """Raises ConfigError if there is none such."""
        with self._lock:
            job = self._jobs.get(id)
        if job is None:
            raise ConfigError(f"there is no job {id!r}")
        return job

    def dismiss(self, id: str) -> None:
        """Forget a job that has concluded. Raises ConfigError."""
        job = self.get(id)
        if job.status is not Status.CONCLUDED:
            raise ConfigError(f"job {id!r} is {job.status.value}, and has not concluded")
        with self._lock:
            self._jobs.pop(id, None)

    def on(self, layers: Iterable[Layer]) -> list[Job]:
        """Those that work on any of ``layers``, but for the one that calls."""
        asked = set(layers)
        return [job for job in self.all if not job.is_own_thread and not job.layers.isdisjoint(asked)]

    @contextlib.contextmanager
    def held(self, layers: Collection[Layer], timeout: float = DRAIN_TIMEOUT) -> Iterator[None]:
        """Hold all jobs that work on any of ``layers``, but for the one that calls. Raises TimeoutError."""
        with contextlib.ExitStack() as holding:
            for job in self.on(layers):
                holding.enter_context(job.held(timeout))
            yield

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """`Job.waiting` of the job on whose thread this is called, if it is one's."""
        for job in self.all:
            if job.is_own_thread:
                return job.waiting()
        return contextlib.nullcontext()

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Take no more, cancel all, and wait for them to end. Raises TimeoutError naming one that does not."""
        with self._lock:
            self._is_stopping = True
        for job in self.all:
            with contextlib.suppress(ConfigError):  # it has concluded meanwhile
                job.cancel()
        deadline = time.monotonic() + timeout
        for job in self.all:
            if not job.wait(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"job {job.id!r} has not ended within {timeout} s")
