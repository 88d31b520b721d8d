"""What is printed: sizes, JSON and snapshots as qemu-img prints them."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from nbdserver.format import Snapshot

NANOSECONDS: Final = 10**9

#: The columns of a snapshot list.
_COLUMNS: Final = "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}"


def size_in_words(size: int) -> str:
    """ "1.5 GiB": three digits, in the largest unit that leaves at least 1 (from 1000 on, the next one)."""
    _, exponent = math.frexp(size / (1000 / 1024))
    power = max(exponent - 1, 0) // 10
    return f"{size / (1 << 10 * power):.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[power]}B"


def as_json(value: object) -> str:
    """JSON, indented as QEMU indents it."""
    return json.dumps(value, indent=4)


def snapshot_list(snapshots: Iterable[Mapping[str, Any]]) -> list[str]:
    """The lines of a list of internal snapshots (each a `snapshot_info`), headings first."""
    lines = ["Snapshot list:", _COLUMNS.format("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")]
    for snapshot in snapshots:
        seconds, milliseconds = snapshot["vm-clock-sec"], snapshot["vm-clock-nsec"] // 10**6
        columns = (
            snapshot["id"],
            snapshot["name"],
            size_in_words(snapshot["vm-state-size"]),
            datetime.datetime.fromtimestamp(snapshot["date-sec"]).strftime("%Y-%m-%d %H:%M:%S"),
            f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}",
            str(snapshot.get("icount", "--")),
        )
        lines.append(_COLUMNS.format(*columns))
    return lines


def snapshot_info(snapshot: Snapshot) -> dict[str, Any]:
    """QAPI: ``SnapshotInfo``."""
    info: dict[str, Any] = {"id": snapshot.id, "name": snapshot.name, "vm-state-size": snapshot.vm_state_size}
    info["date-sec"], info["date-nsec"] = divmod(snapshot.date_ns, NANOSECONDS)
    info["vm-clock-sec"], info["vm-clock-nsec"] = divmod(snapshot.vm_clock_ns, NANOSECONDS)
    if snapshot.icount is not None:
        info["icount"] = snapshot.icount
    return info


def in_words(value: object, indent: int = 0) -> list[str]:
    """The lines of nested data: as QEMU prints ``format-specific``."""
    if isinstance(value, Mapping):
        entries = [(str(key).replace("-", " "), item) for key, item in value.items()]
    elif isinstance(value, list):
        entries = [(f"[{index}]", item) for index, item in enumerate(value)]
    else:
        raise TypeError(f"{value!r} is neither a mapping nor a list")
    lines = []
    for name, item in entries:
        if isinstance(item, Mapping | list):
            lines += [f"{'    ' * indent}{name}:", *in_words(item, indent + 1)]
        else:
            word = str(item).lower() if isinstance(item, bool) else str(item)
            lines.append(f"{'    ' * indent}{name}: {word}")
    return lines
