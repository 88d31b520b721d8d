"""How many huge pages of the kernel's pool nobody uses, for tests of what a server does with them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

#: vm.nr_hugepages, and how many of them are not in use; each of 2 MiB.
TOTAL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
FREE = TOTAL.with_name("free_hugepages")


#: Seconds until the pages of a server that has ended are back: the kernel ends its rings in its own time.
BACK_S = 10


@contextlib.contextmanager
def spare_pages(wanted: int) -> Iterator[None]:
    """Exactly so many huge pages are to be had, however many the machine has set aside; afterwards as before."""
    before = int(TOTAL.read_text())
    used = _used()
    TOTAL.write_text(str(used + wanted))
    try:
        assert int(TOTAL.read_text()) == used + wanted, "memory is too fragmented for this test"
        yield
    finally:
        # A page that is still in use would count as set aside by whoever asks next, and be free a moment later.
        until = time.monotonic() + BACK_S
        while _used() > used and time.monotonic() < until:
            time.sleep(0.01)
        TOTAL.write_text(str(before))


def _used() -> int:
    return int(TOTAL.read_text()) - int(FREE.read_text())
