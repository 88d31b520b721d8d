"""``quorum``: several layers that are one disk; what enough of them agree about holds.

::

              ┌── children.0 ── vote: "A"
    quorum ───┼── children.1 ── vote: "A"     read: "A", with a vote threshold of 2
              └── children.2 ── vote: "B"     said in the log, and rewritten if rewrite-corrupted is on

Writes go to all children and succeed if as many as the threshold did. QEMU's ``quorum`` (BlockdevOptionsQuorum).
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal, NamedTuple

from nbdserver.errors import ConfigError, RequestError
from nbdserver.layer import BASE_ALLOCATION, STATE_HOLE, STATE_ZERO, Buffers, Layer, Opener, attempt
from nbdserver.limits import BOUNCE_MAX
from nbdserver.permissions import Grant, as_replica
from nbdserver.ranges import RangeLock
from nbdserver.request import Flag, Request, Vector

log = logging.getLogger(__name__)


class Version(NamedTuple):
    """What some children agree that a range contains."""

    vector: Vector
    #: The children, by their numbers.
    voters: list[int]


@dataclasses.dataclass(eq=False)
class Quorum(Layer):
    #: The disks, all of the same size.
    children_: list[Layer]
    #: How many of them must agree about what is read, and must have done what is written.
    vote_threshold: int
    #: For two children and a threshold of 2: stands for that in QEMU, whose process a difference ends. Here, as
    #: always, the request fails and the log says where they differ.
    blkverify: bool = False
    #: Whether what wins a vote is written to the children that read something else.
    rewrite_corrupted: bool = False
    #: "quorum" reads all children and lets them vote; "fifo" takes what the first one that can be read says.
    read_pattern: Literal["quorum", "fifo"] = "quorum"

    # Not NO_FALLBACK: some children may be able to and others not, and then they would differ.
    supported_write_flags: ClassVar[Flag] = Flag.MAY_UNMAP | Flag.WRITE_UNCHANGED
    buffers: ClassVar[Buffers] = Buffers(
        read="bounces: the first child fills it (fifo: whoever answers), the others fill pool memory",
        write="keeps: all children are given it",
        zero="none: all children zero",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Ranges with requests on their way to all: a second one must not overtake the first at some children alone.
        self._ranges = RangeLock()

    def open(self, opener: Opener) -> None:
        count = len(self.children_)
        if count == 0:
            raise ConfigError("found none, but a quorum has at least one child", key="children")
        sizes = [child.size for child in self.children_]
        if len(set(sizes)) > 1:
            raise ConfigError(f"found sizes of {sizes} bytes, but they must be the same", key="children")
        if not 1 <= self.vote_threshold <= count:
            raise ConfigError(f"found {self.vote_threshold}, allowed is 1 to {count}", key="vote-threshold")
        if self.blkverify and (count, self.vote_threshold) != (2, 2):
            raise ConfigError("goes with exactly two children and a vote-threshold of 2", key="blkverify")
        if self.rewrite_corrupted and (self.blkverify or self.read_pattern == "fifo"):
            raise ConfigError("needs a vote that can be won: neither blkverify nor fifo", key="rewrite-corrupted")

    def child_grant(self, role: str, own: Grant) -> Grant:
        return as_replica(own)

    @property
    def size(self) -> int:
        return self.children_[0].size

    @property
    def read_only(self) -> bool:
        return any(child.read_only for child in self.children_)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ()  # all is CODE, wherever the children keep it

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Zeroes where all children say so, as in QEMU."""
        if context != BASE_ALLOCATION:
            yield from super().status(context, offset, length)
            return
        runs = [next(child.status(context, offset, length)) for child in self.children_]
        data = [run for run, flags in runs if not flags & STATE_ZERO]
        is_hole = all(flags & STATE_HOLE for _, flags in runs)
        yield (max(data), 0) if data else (min(runs)[0], STATE_ZERO | (STATE_HOLE if is_hole else 0))

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, request: Request) -> None:
        # Rewriting is writing: what was voted on must not have been overwritten meanwhile.
        hold = self._ranges.exclusive if self.rewrite_corrupted else self._ranges.shared
        with hold(request.offset, request.length):
            if self.read_pattern == "fifo":
                self._read_first(request)
            else:
                for part in request.pieces(BOUNCE_MAX):
                    self._vote(part)

    def _read_first(self, request: Request) -> None:
        failed = {}
        for index, child in enumerate(self.children_):
            error = attempt(child.read, request)
            if error is None:
                break
            failed[index] = error
        self._judge(request, failed, wanted=1)

    def _vote(self, part: Request) -> None:
        """Read one piece from all children; what wins the vote is what was read."""
        versions: list[Version] = []
        failed: dict[int, RequestError] = {}
        free: Vector | None = part.vector
        for index, child in enumerate(self.children_):
            vector = free if free is not None else self.allocate(part.length)
            free = vector
            error = attempt(child.read, part.with_vector(vector))
            if error is not None:
                failed[index] = error
            elif same := [version for version in versions if version.vector.difference(vector) is None]:
                same[0].voters.append(index)
            else:
                versions.append(Version(vector, [index]))
                free = None
        self._judge(part, failed, wanted=self.vote_threshold)
        winner = max(versions, key=lambda version: len(version.voters))
        losers = [version for version in versions if version is not winner]
        self._check_winner(part, winner, losers)
        if self.rewrite_corrupted and not self.read_only:
            self._rewrite(part, winner, losers)
        if winner.vector is not part.vector:
            part.vector.fill(winner.vector.tobytes())

    def _check_winner(self, part: Request, winner: Version, losers: list[Version]) -> None:
        """Report those who read something else; raise RequestError unless enough agree."""
        if not losers:
            return
        differ = "; ".join(
            f"{_names(loser.voters)} first at {part.offset + (winner.vector.difference(loser.vector) or 0):#x}"
            for loser in losers
        )
        message = f"{_text(part)}: {_names(winner.voters)} agree, others differ: {differ}"
        log.warning("%s", message)
        if len(winner.voters) < self.vote_threshold:
            raise RequestError(errno.EIO, f"{message}; {self.vote_threshold} votes are needed")

    def _rewrite(self, part: Request, winner: Version, losers: list[Version]) -> None:
        """Write the winner over what lost. Only an attempt: a child that refuses stays as bad as it was."""
        rewrite = Request.write(part.offset, winner.vector)
        for index in (index for loser in losers for index in loser.voters):
            error = attempt(self.children_[index].write, rewrite)
            log.warning("%s: rewritten in %s: %s", _text(part), _names([index]), error or "done")

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(self, request: Request) -> None:
        with self._ranges.exclusive(request.offset, request.length):
            failed = {}
            for index, child in enumerate(self.children_):
                error = attempt(getattr(child, request.operation.value), request)
                if error is not None:
                    failed[index] = error
            self._judge(request, failed, wanted=self.vote_threshold)

    def zero(self, request: Request) -> None:
        self.write(request)

    def trim(self, request: Request) -> None:
        # Trimmed bytes are undefined, and each child would define them in its own way: they are to be alike.
        self.write(Request.zero(request.offset, request.length, Flag.MAY_UNMAP))

    def flush(self) -> None:
        if self.read_only:
            return
        failed = {}
        for index, child in enumerate(self.children_):
            error = attempt(child.flush)
            if error is not None:
                failed[index] = error
        self._judge(None, failed, wanted=self.vote_threshold)

    def _judge(self, request: Request | None, failed: Mapping[int, RequestError], *, wanted: int) -> None:
        """Report who failed; raise the most frequent error unless ``wanted`` children, at least, did not."""
        if not failed:
            return
        errors = "; ".join(f"{_names([index])}: {error}" for index, error in failed.items())
        message = f"{_text(request)}: failed at {errors}"
        log.warning("%s", message)
        if len(self.children_) - len(failed) < wanted:
            [(number, _)] = collections.Counter(error.errno for error in failed.values()).most_common(1)
            raise RequestError(number, message)


def _names(children: Iterable[int]) -> str:
    return ", ".join(f"children.{index}" for index in children)


def _text(request: Request | None) -> str:
    if request is None:
        return "quorum: flush"
    return f"quorum: {request.operation.value} of {request.length} bytes at {request.offset:#x}"
