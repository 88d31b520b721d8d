"""The buffer pool, for people: on what pages it lies, how much of it is registered, and what limits that."""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass

from nbdserver.limits import MIB


@dataclass(frozen=True)
class Pool:
    """Bytes, and the kind of ``pages``: normal, transparent or hugetlb; ``huge`` bytes are on huge ones.

    ``registered`` None: nothing is to be registered. ``refused``: the errno with which more was.
    """

    size: int
    registered: int | None
    pages: str
    huge: int
    refused: int | None

    def counts(self) -> dict[str, int | str]:
        return {"size": self.size, "registered": self.registered or 0, "pages": self.pages, "huge": self.huge}

    def __str__(self) -> str:
        huge = f", {_mebibytes(self.huge)} of it" if 0 < self.huge < self.size else ""
        words = f"{_mebibytes(self.size)}{huge} on {self.pages} {'huge ' if self.pages == 'transparent' else ''}pages"
        if self.registered is None:
            return words
        if self.registered == self.size:
            return f"{words}, registered"
        return f"{words}, {_mebibytes(self.registered)} of {_mebibytes(self.size)} registered: {self._limit()}"

    def _limit(self) -> str:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if self.refused != errno.ENOMEM or limit == resource.RLIM_INFINITY:
            return f"the kernel refuses more ({os.strerror(self.refused or errno.ENOMEM)})"
        return (
            f"RLIMIT_MEMLOCK is {_mebibytes(limit)} for all processes of this user; requests beyond it do without. "
            "To raise it: ulimit -l, LimitMEMLOCK= in a systemd unit, docker run --ulimit memlock=BYTES"
        )


def raise_limit(which: int) -> None:
    """Let the process have as much of something (``resource.RLIMIT_*``) as it may."""
    soft, hard = resource.getrlimit(which)
    if soft != hard:
        resource.setrlimit(which, (hard, hard))


def _mebibytes(count: int) -> str:
    """To a hundredth of a MiB, never more than it is."""
    return f"{count * 100 // MIB / 100:g} MiB"
