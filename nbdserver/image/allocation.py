"""Who holds what of a disk: block status along a chain of images, as QEMU sees it.

::

    top      [data  ][        ][zero ][          ]     depth 0
    backing  [      ][data    ]                        depth 1     shorter: behind its end, zeroes of nobody's
                                      └ zeroes, at depth 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from nbdserver.extent import Intent, Special
from nbdserver.format import MapEntry, Maps
from nbdserver.graph import Child
from nbdserver.layer import Layer

#: QEMU measures disks in these.
SECTOR: Final = 512


class Run(NamedTuple):
    """A range of a disk that is alike throughout."""

    start: int
    length: int
    entry: MapEntry
    #: Which image of the chain says so, 0 being the topmost.
    depth: int
    #: Whether that image holds it, rather than no image at all.
    present: bool

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def state(self) -> tuple[bool, bool, bool]:
        """(reads as zeroes, has data, held): what most care about."""
        return self.entry.zero, self.entry.data, self.present


def chain(layer: Layer) -> list[Layer]:
    """An open image and its backing files, topmost first."""
    images = [bare(layer)]
    while True:
        backing = dict(images[-1].children()).get("backing")
        if backing is None:
            return images
        images.append(bare(backing))


def bare(layer: Layer) -> Layer:
    """The layer itself, where a parent holds an edge to it."""
    while isinstance(layer, Child):
        layer = layer.layer
    return layer


def runs(images: Sequence[Layer], start: int, end: int, *, depth: int = 0) -> Iterator[Run]:
    """The bytes [start, end) of the topmost of ``images``, in order; neighbours may be alike.

    What none of them has is zero and not present: at the depth of the last one, or of one whose backing file is too
    short. Raises ImageError, OSError.
    """
    for entry in own(images[depth], start, end - start):
        stop = start + entry.length
        if entry.data or entry.zero:
            yield Run(start, entry.length, entry, depth, True)
        else:
            edge = min(images[depth + 1].size, stop) if depth + 1 < len(images) else start
            if start < edge:
                yield from runs(images, start, edge, depth=depth + 1)
            if max(start, edge) < stop:
                yield _nobodys(entry, start, max(start, edge), stop, depth)
        start = stop


def _nobodys(entry: MapEntry, start: int, edge: int, stop: int, depth: int) -> Run:
    """The rest, from ``edge`` on, of a range that an image leaves to others, and there are none."""
    offset = entry.offset + edge - start if entry.child is not None else 0
    return Run(edge, stop - edge, entry._replace(zero=True, length=stop - edge, offset=offset), depth, False)


def joined(found: Iterator[Run]) -> Iterator[Run]:
    """The same runs, those joined that are alike in all that `Run.state` says, wherever their bytes are."""
    last: Run | None = None
    for run in found:
        if last is not None and run.state == last.state:
            last = last._replace(length=last.length + run.length)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def own(layer: Layer, offset: int, length: int) -> Iterator[MapEntry]:
    """What one layer itself says, covering the range exactly; of layers that are no `Maps`, as far as can be told."""
    layer = bare(layer)
    if isinstance(layer, Maps):
        yield from layer.map(offset, length)
        return
    end = offset + length
    for extent in layer.resolve(offset, length, Intent.READ):
        if offset >= end:
            return
        take = min(extent.length, end - offset)
        if isinstance(extent.target, Special) or extent.through is not None:
            is_zero = extent.target is Special.ZERO and extent.through is None
            yield MapEntry(take, data=not is_zero, zero=is_zero)
        elif isinstance(extent.target, Layer):
            for entry in own(extent.target, extent.offset, take):
                yield entry if entry.data or entry.zero else entry._replace(zero=True)
        else:
            place = extent.offset
            for run, is_data in extent.target.status(place, take):
                yield MapEntry(run, data=is_data, zero=not is_data, child=layer, offset=place)
                place += run
        offset += take
