"""``file``: a regular file or block device, the layer that most stacks stand on.

::

    file ──> open file        every byte lives in the file where it lives in the layer

The configuration names the path; a file that an *image* names is opened by its format through the opener.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from nbdserver.errors import RequestError
from nbdserver.extent import BlockLimits, Extent, FileMode, Intent, OpenFile
from nbdserver.layer import Layer, Opener


@dataclasses.dataclass(eq=False)
class File(Layer):
    #: Where the file is.
    path: str
    #: Through the page cache ("writeback"; "writethrough": and durable when answered; "unsafe": never made durable) or
    #: past it ("none": O_DIRECT).
    cache: Literal["writeback", "writethrough", "none", "unsafe"] = "writeback"
    #: What carries out I/O that would block.
    aio: Literal["io_uring", "threads"] = "io_uring"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._file: OpenFile | None = None

    def open(self, opener: Opener) -> None:
        mode = FileMode(self.cache, self.aio)
        self._file = opener.file(self.path, read_only=opener.read_only, mode=mode, grant=self.grant)

    def reopen(self, opener: Opener) -> None:
        self._file = opener.reopen(self.open_file, read_only=opener.read_only)

    def close(self) -> None:
        if self._file is not None and self._opener is not None:
            self._opener.release(self._file)
        self._file = None

    @property
    def open_file(self) -> OpenFile:
        """The file; asserts that the layer is open."""
        assert self._file is not None, f"{self.path} is not open"
        return self._file

    @property
    def whole(self) -> OpenFile | None:
        return self._file if self.dirty_log is None else None

    @property
    def size(self) -> int:
        return self.open_file.size

    @property
    def read_only(self) -> bool:
        return self.open_file.read_only

    @property
    def limits(self) -> BlockLimits:
        return self.open_file.limits

    @property
    def stored(self) -> int:
        return self.open_file.stored

    @property
    def writethrough(self) -> bool:
        return self.cache == "writethrough"

    @property
    def in_place(self) -> bool:
        return True

    @property
    def filename(self) -> str:
        return self.path

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        file = self.open_file
        return (Extent(file.size - offset, file, offset, writable=not file.read_only),)

    def flush(self) -> None:
        self.open_file.sync()

    def resize(self, size: int) -> None:
        before = self.size
        try:
            self.open_file.resize(size)
        except OSError as error:
            raise RequestError.of(error) from error
        if size < before:
            self.changed(size, before - size)
