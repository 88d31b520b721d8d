"""``memory``: a disk of zeroes in memory, gone when it is closed.

::

    memory ──> anonymous memory        sparse: what was never written, zeroed or trimmed takes none
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from nbdserver.errors import ConfigError, RequestError
from nbdserver.extent import Extent, Intent, OpenFile, Size
from nbdserver.layer import Layer, Opener


@dataclasses.dataclass(eq=False)
class Memory(Layer):
    #: The disk's size.
    size: Size = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._memory: OpenFile | None = None

    def open(self, opener: Opener) -> None:
        if self.size <= 0:
            raise ConfigError(f'found {self.size}, but a memory disk needs a size, such as "1G"', key="size")
        self._memory = opener.memory(self.size, "memory")

    def close(self) -> None:
        if self._memory is not None and self._opener is not None:
            self._opener.release(self._memory)
        self._memory = None

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        assert self._memory is not None, "not open"
        return (Extent(self.size - offset, self._memory, offset, writable=True),)

    def flush(self) -> None:
        """Nothing is durable, so nothing needs to be."""

    def resize(self, size: int) -> None:
        assert self._memory is not None, "not open"
        try:
            self._memory.resize(size)
        except OSError as error:
            raise RequestError.of(error) from error
        before, self.size = self.size, size
        if size < before:
            self.changed(size, before - size)
