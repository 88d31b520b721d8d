"""Changing a header extension, so that a crash at any instant leaves the old ones or the new ones, never a mixture.

::

    header │ extension │ extension │ ... │ END │ (anything) │ backing file's name │ (nothing)

The extensions follow one another without a gap, and a disk writes only single sectors whole or not at all. So:

- What changes within one sector is written at once.
- What comes behind the last extension is written first, its own 8-byte head (which takes the place of END) last.
- All else in three steps: the new extensions are written behind the old ones; a head with the length of all that is
  old makes *one* extension of it, of a kind that nobody knows, behind which the new ones follow; they are written once
  more in the place of the old ones; and their first head takes that one's place.

There is a sync between any two steps. Specification: "Header extensions".
"""

from __future__ import annotations

import errno
from typing import Final

from layers.ondisk.qcow2 import (
    BACKING_FIELDS,
    BACKING_NAME_AT,
    BACKING_NAME_FIELD,
    EXTENSION,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_END,
    EXTENSION_SKIP,
    HEADER,
    HEADER3,
    HEADER_LENGTH_2,
    HeaderFields,
    HeaderFields3,
)
from layers.qcow2.cache import SECTOR
from nbdserver.errors import ImageError
from nbdserver.layer import Layer, finish

#: Extensions, and so all that changes in them, are aligned to this.
UNIT: Final = EXTENSION.size


def set_extension(file: Layer, kind: int, data: bytes | None) -> None:
    """Give the image in ``file`` a header extension of this kind with this content, durably; None takes it out.

    No one else may write the header meanwhile. Raises OSError, ENOSPC if the first cluster has no room; ImageError.
    """
    area = _Area(file)
    wanted = [(each, content) for each, content in area.extensions if each not in (kind, EXTENSION_SKIP)]
    if data is not None:
        known = [each for each, _ in area.extensions if each != EXTENSION_SKIP]
        wanted.insert(known.index(kind) if kind in known else len(wanted), (kind, data))
    area.replace(b"".join(map(_encoded, wanted)) + EXTENSION.pack(EXTENSION_END, 0))


def set_backing(file: Layer, name: bytes, format: bytes | None) -> None:
    """Have the image in ``file`` name another backing file, or (an empty name) none, durably and at one instant.

    As `set_extension`; ENOTSUP if the header is too long for that.
    """
    area = _Area(file)
    wanted = [(each, content) for each, content in area.extensions if each != EXTENSION_SKIP]
    at = next((index for index, (kind, _) in enumerate(wanted) if kind == EXTENSION_BACKING_FORMAT), 0)
    wanted = [(kind, content) for kind, content in wanted if kind != EXTENSION_BACKING_FORMAT]
    if format is not None:
        wanted.insert(at, (EXTENSION_BACKING_FORMAT, format))
    area.replace_with_name(b"".join(map(_encoded, wanted)) + EXTENSION.pack(EXTENSION_END, 0), name)


def _encoded(extension: tuple[int, bytes]) -> bytes:
    kind, content = extension
    return EXTENSION.pack(kind, len(content)) + content + bytes(-len(content) % 8)


class _Area:
    """What is behind the header in the first cluster, as the file has it."""

    def __init__(self, file: Layer) -> None:
        self._file = file
        fields = HeaderFields._make(HEADER.unpack(file.pread(0, HEADER.size)))
        size = 1 << fields.cluster_bits
        there = min(size, file.size)
        self._header = bytearray(file.pread(0, there) + bytes(size - there))
        self._start = HEADER_LENGTH_2
        if fields.version >= 3:
            self._start = HeaderFields3._make(HEADER3.unpack_from(self._header, HEADER.size)).header_length
        self._name_at, self._name_length = fields.backing_file_offset, fields.backing_file_size
        self.extensions: list[tuple[int, bytes]] = []
        #: Where END is; None if there is none.
        self._end: int | None = None
        self._parse()

    @property
    def _stop(self) -> int:
        """Where the extensions may reach to."""
        return self._name_at or len(self._header)

    def _parse(self) -> None:
        at = self._start
        while at + UNIT <= self._stop:
            kind, length = EXTENSION.unpack_from(self._header, at)
            if kind == EXTENSION_END:
                self._end = at
                return
            at += UNIT
            if length > self._stop - at:
                wanted = f"at most the {self._stop - at} bytes left"
                name = f"header extension {kind:#010x}: length"
                raise ImageError(name, path=self._file.filename, offset=at - 4, found=length, wanted=wanted)
            self.extensions.append((kind, bytes(self._header[at : at + length])))
            at += -(-length // 8) * 8

    def replace(self, new: bytes) -> None:
        """Have the extensions, with their END, be the bytes ``new``."""
        if self._start + len(new) > self._stop:
            self._move_name(self._start + len(new))
        old = self._header[self._start : self._start + len(new)]
        differing = [at for at in range(0, len(new), UNIT) if new[at : at + UNIT] != old[at : at + UNIT]]
        if not differing:
            return
        first, last = differing[0], differing[-1] + UNIT
        start, stop = self._start + first, self._start + last
        if start // SECTOR == (stop - 1) // SECTOR:
            self._write(start, new[first:last])
        elif start == self._end:
            self._write(start + UNIT, new[first + UNIT :])
            self._write(start, new[first : first + UNIT])
        else:
            self._replace_all(new)

    def replace_with_name(self, new: bytes, name: bytes) -> None:
        """Have the extensions be ``new``, and the backing file's name ``name``: both, from one instant on.

        That is a write of the first sector, in which the header says where the name is. What it cannot hold has been
        written before, to where there was nothing. Extensions that go on behind it take two more steps, as in
        `replace`.
        """
        start, stop = self._start, self._start + len(new)
        if start + UNIT > SECTOR:
            raise OSError(errno.ENOTSUP, "the header is longer than a sector", self._file.filename)
        if stop + len(name) <= SECTOR:
            self._switch(stop, name, new + name)
            return
        end = self._stop if self._end is None else self._end + UNIT
        behind = max(end, stop)
        if self._header[SECTOR:stop] == new[SECTOR - start :]:
            self._switch(self._put(behind, name), name, new[: SECTOR - start])
            return
        if behind + len(new) > self._stop:
            self._move_name(behind + len(new))
        place = self._put(behind + len(new), name)
        self._write(behind, new)
        self._switch(place, name, EXTENSION.pack(EXTENSION_SKIP, behind - start - EXTENSION.size))
        self._write(start + UNIT, new[UNIT:])
        self._write(start, new[:UNIT])

    def _put(self, floor: int, name: bytes) -> int:
        """Write a name somewhere from ``floor`` on where the present one is not: the place."""
        place = floor
        if floor + len(name) > self._stop:
            place = max(floor, self._name_at + self._name_length)
        if place + len(name) > len(self._header):
            raise self._no_room()
        if name:
            self._write(place, name)
        return place

    def _switch(self, place: int, name: bytes, head: bytes) -> None:
        """Have the header name the backing file at ``place``, and the extensions begin with ``head``."""
        fields = BACKING_FIELDS.pack(place, len(name)) if name else BACKING_FIELDS.pack(0, 0)
        between = self._header[BACKING_NAME_AT + len(fields) : self._start]
        self._write(BACKING_NAME_AT, fields + bytes(between) + head)
        self._name_at, self._name_length = BACKING_FIELDS.unpack(fields)

    def _replace_all(self, new: bytes) -> None:
        """The three steps."""
        end = self._stop if self._end is None else self._end + UNIT
        behind = max(end, self._start + len(new))
        if behind + len(new) > self._stop:
            self._move_name(behind + len(new))
        self._write(behind, new)
        self._write(self._start, EXTENSION.pack(EXTENSION_SKIP, behind - self._start - EXTENSION.size))
        self._write(self._start + UNIT, new[UNIT:])
        self._write(self._start, new[:UNIT])

    def _move_name(self, needed: int) -> None:
        """Move the backing file's name to the cluster's end, behind ``needed``."""
        place = len(self._header) - self._name_length
        # The old name stays until the new one is there, and must not be taken for extensions when it is.
        if not self._name_at or place < max(needed, self._name_at + self._name_length) or self._end is None:
            raise self._no_room()
        self._write(place, bytes(self._header[self._name_at : self._name_at + self._name_length]))
        self._write(BACKING_NAME_AT, BACKING_NAME_FIELD.pack(place))
        self._name_at = place

    def _no_room(self) -> OSError:
        return OSError(errno.ENOSPC, "the header cluster has no room for its extensions", self._file.filename)

    def _write(self, offset: int, data: bytes) -> None:
        """Write a step and make it durable."""
        self._file.pwrite(offset, data)
        finish(self._file.flush())
        self._header[offset : offset + len(data)] = data
