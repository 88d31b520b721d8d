"""``throttle``: holds requests to so many bytes and operations a second, with bursts, as QEMU's throttle groups do.

::

    throttle ──(meter)──> file        everything lives where the child says; requests wait for the meter on the way

Each limit is a leaky bucket: ``bps_total`` is its average; ``bps_total_max``, if given, the rate of a burst, which may
last ``bps_total_max_length`` seconds. 0 is no limit. The engine runs the meter, so that a throttled disk has no Python
on its way either. Semantics: QEMU's docs/throttle.txt and ``ThrottleLimits`` in qapi/block-core.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar

from nbdserver.errors import ConfigError
from nbdserver.extent import Extent, Intent, Limit, Meter, MeterLimits, Size
from nbdserver.layer import Buffers, Layer, Opener, finish
from nbdserver.request import Flag, Request


@dataclasses.dataclass(eq=False)
class Throttle(Layer):
    file: Layer
    #: Bytes a second.
    bps_total: Size = 0
    bps_read: Size = 0
    bps_write: Size = 0
    bps_total_max: Size = 0
    bps_read_max: Size = 0
    bps_write_max: Size = 0
    #: Seconds.
    bps_total_max_length: int = 1
    bps_read_max_length: int = 1
    bps_write_max_length: int = 1
    #: Requests a second.
    iops_total: int = 0
    iops_read: int = 0
    iops_write: int = 0
    iops_total_max: int = 0
    iops_read_max: int = 0
    iops_write_max: int = 0
    iops_total_max_length: int = 1
    iops_read_max_length: int = 1
    iops_write_max_length: int = 1
    #: A request longer than this counts as several (0: never).
    iops_size: Size = 0

    is_filter: ClassVar[bool] = True
    supported_write_flags: ClassVar[Flag] = Flag.FUA | Flag.WRITE_COMPRESSED

    buffers: ClassVar[Buffers] = Buffers(
        read="none: always mapped", write="keeps: mapped, or passed on to be compressed", zero="none: always mapped"
    )

    def open(self, opener: Opener) -> None:
        for group in ("bps", "iops"):
            if getattr(self, f"{group}_total") and (getattr(self, f"{group}_read") or getattr(self, f"{group}_write")):
                raise ConfigError(f"{group}_total and {group}_read or {group}_write exclude each other", key="throttle")
        self._meter = opener.meter(
            MeterLimits(
                bps_total=self._limit("bps_total"),
                bps_read=self._limit("bps_read"),
                bps_write=self._limit("bps_write"),
                iops_total=self._limit("iops_total"),
                iops_read=self._limit("iops_read"),
                iops_write=self._limit("iops_write"),
                iops_size=self.iops_size,
            )
        )

    def _limit(self, name: str) -> Limit:
        average, most, length = (getattr(self, name + suffix) for suffix in ("", "_max", "_max_length"))
        if min(average, most, self.iops_size) < 0:
            raise ConfigError(f"a limit is not negative: found {min(average, most)}", key=name)
        if most and not average:
            raise ConfigError(f"{name}_max needs {name} to be set", key=name)
        if most and most < average:
            raise ConfigError(f"found {most}; it must not be lower than {name}, {average}", key=f"{name}_max")
        if length < 1:
            raise ConfigError(f"found {length}; a burst lasts at least 1 second", key=f"{name}_max_length")
        if length > 1 and not most:
            raise ConfigError(f"{name}_max_length needs {name}_max to be set", key=f"{name}_max_length")
        return Limit(float(average), float(most), float(length))

    @property
    def meter(self) -> Meter:
        return self._meter

    @property
    def size(self) -> int:
        return self.file.size

    def resolve(self, offset: int, length: int, intent: Intent) -> Iterable[Extent]:
        return (Extent(self.size - offset, self.file, offset, writable=not self.read_only, through=self._meter),)

    def translate(self, child: Layer, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def write(self, request: Request) -> None:
        """Called for what is to be compressed below: everything else is mapped."""
        self._meter.charge(request.length, True)
        finish(self.file.write(request))

    def status(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self.file.status(context, offset, length)

    def resize(self, size: int) -> None:
        self.file.resize(size)
