"""Contests: servers take turns at the same work, and what each does is told as a ratio to the others.

Rates vary from machine to machine and from minute to minute, so no figure stands alone: every round has a sample of
each contestant, in turns, and ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.clients import Work
from tests.bench.idle import idle_connections
from tests.bench.servers import Disk, Running, Server, running


def nothing() -> None:
    """What most samples need done before them."""


@dataclass(frozen=True)
class Contestant:
    """A server on a disk, and what a client does with it."""

    name: str
    server: Server
    #: The disk; asked for each sample if ``fresh``, and the server is then started for each.
    disk: Callable[[], Disk]
    work: Work
    fresh: bool = False
    #: What is done once, so that the server knows all of the disk: what it costs is not looked at.
    warm: Work | None = None
    before: Callable[[], None] = nothing
    #: Further connections that say nothing meanwhile.
    idle: int = 0


@dataclass(frozen=True)
class Sample:
    """Requests a second, and the server's CPU seconds for one."""

    rate: float
    cpu: float


@dataclass(frozen=True)
class Measured:
    """The samples of one contestant, one a round."""

    name: str
    samples: Sequence[Sample]

    @property
    def rate(self) -> float:
        return statistics.median(sample.rate for sample in self.samples)

    @property
    def cpu(self) -> float:
        return statistics.median(sample.cpu for sample in self.samples)


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, one a round, and the least and the greatest of them; to whom they are."""

    median: float
    low: float
    high: float
    to: str


def ratio(of: Measured, to: Measured, what: Callable[[Sample], float]) -> Ratio:
    ratios = [what(mine) / what(other) for mine, other in zip(of.samples, to.samples, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), to.name)


def rate_over_best(of: Measured, peers: Sequence[Measured]) -> Ratio:
    """To the fastest of the peers."""
    return ratio(of, max(peers, key=lambda peer: peer.rate), lambda sample: sample.rate)


def cpu_over_best(of: Measured, peers: Sequence[Measured]) -> Ratio:
    """To the thriftiest of the peers, which may be another."""
    return ratio(of, min(peers, key=lambda peer: peer.cpu), lambda sample: sample.cpu)


@dataclass
class Contest:
    """Servers that run side by side, each asked in turn. A context: it stops them at the end."""

    contestants: Sequence[Contestant]
    directory: Path
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _running: dict[str, Running] = field(default_factory=dict)

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *what: object) -> None:
        self._stack.close()

    def trial(self, kept: int) -> None:
        """A round that warms up and does not count. Of all but the first contestant, the ``kept`` best go on.

        The best are the fastest, then the thriftiest.
        """
        trials = [Measured(one.name, [self._sample(one)]) for one in self.contestants]
        peers = trials[1:]
        order = [max(peers, key=lambda peer: peer.rate), min(peers, key=lambda peer: peer.cpu)] if peers else []
        names = [trials[0].name, *dict.fromkeys([peer.name for peer in order][:kept])]
        self.contestants = [one for one in self.contestants if one.name in names]

    def rounds(self, count: int) -> list[Measured]:
        """Samples of all, in turns. Who was first is last in the next round: each may pay for what another left."""
        samples: dict[str, list[Sample]] = {one.name: [] for one in self.contestants}
        for number in range(count):
            for one in self.contestants if number % 2 else reversed(self.contestants):
                samples[one.name].append(self._sample(one))
        return [Measured(name, found) for name, found in samples.items()]

    def _sample(self, one: Contestant) -> Sample:
        if one.fresh:
            with running(one.server, one.disk(), self._place(one)) as server:
                return self._measure(one, server)
        if one.name not in self._running:
            disk = one.disk()
            server = self._stack.enter_context(running(one.server, disk, self._place(one)))
            self._stack.enter_context(idle_connections(disk, server.address, one.idle))
            if one.warm:
                one.warm.run(server.uri, self.directory)
            self._running[one.name] = server
        return self._measure(one, self._running[one.name])

    def _measure(self, one: Contestant, server: Running) -> Sample:
        one.before()
        before = server.cpu()
        done = one.work.run(server.uri, self.directory)
        return Sample(done.rate, (server.cpu() - before) / done.requests)

    def _place(self, one: Contestant) -> Path:
        return self.directory / f"run-{self.contestants.index(one)}"
