"""What good clients have sent (``corpus``, a file each, named after the phase or style), and how it is spoilt."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"

#: Longer inputs have nothing more to say.
INPUT_MAX = 8192
#: Numbers near which lengths are judged otherwise.
EDGES = (0, 1, 255, 4096, 4097, 65536, 65537, (1 << 22) + 1, (1 << 25) + 1, (1 << 31), (1 << 32) - 1)


def corpus(kind: str) -> list[bytes]:
    """The sessions whose files' names begin so."""
    sessions = [path.read_bytes() for path in sorted(CORPUS.glob(f"{kind}-*"))]
    assert len(sessions) >= 3
    return sessions


def mutated(sessions: Sequence[bytes], pick: random.Random) -> bytes:
    """One of the sessions, with a few things wrong."""
    data = bytearray(pick.choice(sessions))
    for _ in range(pick.randrange(5)):
        _mutate(data, sessions, pick)
    return bytes(data[:INPUT_MAX])


def _mutate(data: bytearray, sessions: Sequence[bytes], pick: random.Random) -> None:
    if not data:
        return
    at = pick.randrange(len(data))
    end = at + pick.randrange(1, 32)
    match pick.randrange(7):
        case 0:
            data[at] ^= 1 << pick.randrange(8)
        case 1:
            data[at] = pick.randrange(256)
        case 2:
            del data[at:]
        case 3:
            del data[at:end]
        case 4:
            data[at:at] = data[at:end]
        case 5:
            other = pick.choice(sessions)
            data[at:] = other[pick.randrange(len(other)) :]
        case _:
            data[at : at + 4] = struct.pack(">I", pick.choice(EDGES))
