"""How many huge pages of the kernel's pool nobody uses, for tests of what a server does with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

#: vm.nr_hugepages, and how many of them are not in use; each of 2 MiB.
TOTAL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
FREE = TOTAL.with_name("free_hugepages")


@contextlib.contextmanager
def spare_pages(wanted: int) -> Iterator[None]:
    """Exactly so many huge pages are to be had, however many the machine has set aside; afterwards as before."""
    before = int(TOTAL.read_text())
    used = before - int(FREE.read_text())
    TOTAL.write_text(str(used + wanted))
    try:
        assert int(TOTAL.read_text()) == used + wanted, "memory is too fragmented for this test"
        yield
    finally:
        TOTAL.write_text(str(before))
