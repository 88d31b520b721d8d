"""What a check has found so far: counted, and told in words as long as anybody would read them."""

from __future__ import annotations

from layers.qcow2.limits import FINDINGS_COUNT_MAX
from nbdserver.format import ImageCheck


class Findings:
    """The result of a check as it grows."""

    def __init__(self) -> None:
        self.result = ImageCheck()
        #: Whether refcounts can be mended only by making all of them anew.
        self.rebuild = False
        #: Whether the refcount table names blocks behind the end of the file.
        self.has_stray = False
        #: Of the corruptions, those that are flags COPIED.
        self.copied = 0
        #: Whether there are entries that name misplaced host clusters in which there is nothing.
        self.has_idle = False
        #: Whether the snapshot table lacks what version 3 needs.
        self.has_incomplete = False
        #: Whether the check ended before everything was counted.
        self.is_cut_short = False

    def corrupt(self, message: str, times: int = 1, values: tuple[object, ...] = ()) -> None:
        """An error that means wrong data, or danger of it. ``message % values`` says which."""
        self.result.corruptions += times
        self.tell(message, values)

    def miscopied(self, message: str, times: int, values: tuple[object, ...]) -> None:
        """Flags COPIED that refcounts contradict."""
        self.copied += times
        self.corrupt(message, times, values)

    def leaked(self, message: str, times: int) -> None:
        """Space that is lost."""
        self.result.leaks += times
        self.tell(message)

    def unread(self, message: str, times: int = 1) -> None:
        """Something that could not be checked."""
        self.result.check_errors += times
        self.tell(message)

    def tell(self, message: str, values: tuple[object, ...] = ()) -> None:
        """Words, as long as there is room for them, and put together only then: garbage is wrong at every entry."""
        messages = self.result.messages
        if len(messages) < FINDINGS_COUNT_MAX:
            messages.append(message % values if values else message)
        elif len(messages) == FINDINGS_COUNT_MAX:
            messages.append("and more, of which nothing is said")


class Unchecked(Exception):
    """The check cannot go on: what it would say from here on would be wrong."""
