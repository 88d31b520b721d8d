"""What becomes of a request's flags at a layer: the same rules for reads and for all that writes.

A layer says which flags its code honours (`Layer.supported_read_flags`, `Layer.supported_write_flags`). What it lacks
is met above it, by `graph.execute`, which asks here:

============================================== =====================================================================
REGISTERED_BUF                                 exempt: derived from the memory, never asked for and never taken away
FUA                                            emulated: the request, then a flush; of a read there is nothing to flush
NO_FALLBACK                                    a zero request fails with ENOTSUP; no other operation has a fallback
MAY_UNMAP, WRITE_UNCHANGED, PREFETCH           dropped: each only permits something that the layer then does not do
ZERO_WRITE                                     dropped from a zero request, which is one; elsewhere refused
WRITE_COMPRESSED                               refused (ENOTSUP), naming layer and flag
COPY_ON_READ, SERIALISING, NO_WAIT, NO_QUEUE,  refused (EINVAL), naming layer and flag: who asks for one of these relies
and bits that are no flag                      on it
============================================== =====================================================================

So it is in QEMU (block/io.c, bdrv_driver_pwritev, bdrv_co_do_pwrite_zeroes), but for what QEMU drops from writes in
silence, and asserts of reads. SERIALISING, which its block layer provides for every driver, is here for the layers that
hold ranges themselves to declare.
"""

from __future__ import annotations

import errno
from typing import Final

from nbdserver.errors import RequestError
from nbdserver.layer import Layer
from nbdserver.request import Flag, Operation, Request

#: What only permits something, so that a layer may do without.
PERMISSIONS: Final = Flag.MAY_UNMAP | Flag.WRITE_UNCHANGED | Flag.PREFETCH

#: What is met above a layer that lacks it.
EMULATED: Final = Flag.FUA | Flag.NO_FALLBACK

#: The write flags of a filter that passes what it writes on to its child as it came.
PASSED_ON: Final = Flag.FUA | Flag.MAY_UNMAP | Flag.NO_FALLBACK | Flag.WRITE_COMPRESSED | Flag.WRITE_UNCHANGED

#: Every flag there is.
ALL: Final = Flag(sum(Flag))


def supported(layer: Layer, operation: Operation) -> Flag:
    """The flags that the layer's code honours on such requests."""
    return layer.supported_read_flags if operation is Operation.READ else layer.supported_write_flags


def demanded(layer: Layer, request: Request) -> Flag:
    """The flags of ``request``, arriving at ``layer``, that only the layer's own code can honour, wherever its bytes
    live. Raises RequestError (EINVAL; ENOTSUP if all it cannot do is compress) if it has not all of them.
    """
    if not request.asked_flags:
        return Flag.NONE
    implied = Flag.ZERO_WRITE if request.operation is Operation.ZERO else Flag.NONE
    demands = without(request.asked_flags, PERMISSIONS | EMULATED | implied)
    lacking = without(demands, supported(layer, request.operation))
    if lacking:
        raise RequestError(
            errno.ENOTSUP if lacking == Flag.WRITE_COMPRESSED else errno.EINVAL,
            f"{layer.type} does not have the flag {names(lacking)} for {request.operation.value} requests",
        )
    return demands


def passed(layer: Layer, request: Request) -> Request:
    """``request`` as the code of ``layer`` is to be given it, with the flags it honours. Raises RequestError (ENOTSUP)
    if it cannot zero without a fallback.
    """
    asked = request.asked_flags
    if not asked:
        return request
    kept = asked & supported(layer, request.operation)
    if request.operation is not Operation.ZERO:
        kept &= ~Flag.NO_FALLBACK
    elif Flag.NO_FALLBACK in asked & ~kept:
        raise RequestError(errno.ENOTSUP, f"{layer.type} has no fast way to zero")
    return request if kept == asked else request.with_flags(kept)


def is_fua(request: Request) -> bool:
    """Whether what the request writes is to be durable when it is done."""
    return bool(request.asked_flags) and request.operation is not Operation.READ and Flag.FUA in request.asked_flags


def has_fallback(request: Request) -> bool:
    """Whether the request may be met by writing zeroes out."""
    return request.operation is Operation.ZERO and Flag.NO_FALLBACK not in request.asked_flags


def without(flags: Flag, others: Flag) -> Flag:
    """``flags`` but for ``others``; unlike with ``~``, bits that are no flag stay."""
    return Flag(int(flags) & ~int(others))


def names(flags: Flag) -> str:
    """The flags by their names, those that have none as a number."""
    known = [flag.name or "" for flag in Flag if flag and flag in flags]
    unknown = without(flags, ALL)
    return ", ".join([*known, *([hex(unknown)] if unknown else [])])
