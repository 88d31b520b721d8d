"""What there is to say of a header: QEMU's ``QCryptoBlockInfoLUKS``."""

from __future__ import annotations

from typing import Any

from layers.luks.header import Header, KeySlot
from layers.ondisk.luks import STRIPES


def describe(header: Header, *, is_detached: bool = False, is_embedded: bool = False) -> dict[str, Any]:
    """Its facts, under QEMU's names and in the order in which it prints them. ``is_embedded``: it is in an image of
    another format, in which this is one of several."""
    scheme, slots = header.scheme, {slot.number: slot for slot in header.slots}
    bits = header.key_length * 8 // (2 if scheme.mode == "xts" else 1)
    return {
        "ivgen-alg": scheme.vectors,
        "detached-header": is_detached,
        "hash-alg": header.hash,
        "cipher-alg": f"aes-{bits}",
        "uuid": header.uuid,
        **({"ivgen-hash-alg": scheme.hash} if scheme.hash is not None else {}),
        **({"format": "luks"} if is_embedded else {}),
        "cipher-mode": scheme.mode,
        "slots": [_slot(slots.get(number), place) for number, place in enumerate(header.material_offsets)],
        "payload-offset": header.payload_offset,
        "master-key-iters": header.digest_iterations,
    }


def _slot(slot: KeySlot | None, place: int) -> dict[str, Any]:
    if slot is None:
        return {"active": False, "key-offset": place}
    return {"active": True, "iters": slot.iterations, "key-offset": place, "stripes": STRIPES}
