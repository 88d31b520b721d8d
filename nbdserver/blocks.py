"""Requests made to fit what a file, or a layer's code, takes: cut, and padded to whole blocks (`extent.BlockLimits`).

::

               |.......block.......|.......block.......|.......block.......|
    request             [===================================]
    read       [pad     |              data                 |  pad]          thrown away
    write      [read    |              data                 | read]          alone on these blocks, then written whole
    zero                [==write==][=======zero=======][write]
    trim                           [=======trim=======]

What then is longer than may be done at once is cut up. The parts have the request's flags, and lie in its memory or in
that of `Layer.allocate`, so that a registered request stays registered. QEMU: block/io.c, BdrvRequestPadding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from nbdserver.extent import NO_LIMITS, BlockLimits
from nbdserver.layer import Layer
from nbdserver.limits import PAYLOAD_MAX, PREFERRED_BLOCK_DEFAULT
from nbdserver.request import NO_VECTOR, Flag, Operation, Request, Vector

#: Carries out a request that fits.
Carry = Callable[[Request], None]


def carry_out(request: Request, layer: Layer, code: Carry) -> None:
    """Have ``code``, which is that of ``layer``, carry out ``request`` in parts that fit the layer's limits."""
    block = layer.limits.request_alignment
    if block == 1:
        _carry_whole(request, layer, code)
        return
    start, end = _down(request.offset, block), min(_up(request.end, block), layer.size)
    fits = (start, end) == (request.offset, request.end)
    match request.operation:
        case Operation.READ:
            _carry_whole(request if fits else _padded(request, start, end, layer), layer, code)
        case Operation.WRITE:
            with layer.mutations.shared(start, end - start) if fits else layer.mutations.exclusive(start, end - start):
                _carry_whole(request if fits else _merged(request, start, end, layer, code), layer, code)
        case Operation.ZERO | Operation.TRIM:
            _carry_blocks(request, layer, code)


def parts(request: Request, limits: BlockLimits) -> Iterator[Request]:
    """The request in parts that are not too long, each within the alignment that suits it best but for the ends."""
    match request.operation:
        case Operation.READ | Operation.WRITE:
            return request.pieces(limits.max_transfer or request.length)
        case Operation.ZERO:
            return _aligned(request, limits.pwrite_zeroes_alignment or 1, limits.max_pwrite_zeroes)
        case Operation.TRIM:
            return _aligned(request, limits.pdiscard_alignment or 1, limits.max_pdiscard)


def preferred(layers: Iterable[Layer]) -> int:
    """The block size for requests that none of ``layers`` has to pad or to copy around: a power of two."""
    wishes = [limit for layer in layers for limit in (layer.limits.request_alignment, layer.limits.opt_transfer)]
    return min(max(PREFERRED_BLOCK_DEFAULT, *wishes), PAYLOAD_MAX)


def _carry_whole(request: Request, layer: Layer, code: Carry) -> None:
    """Carry out a request for whole blocks."""
    if layer.limits is NO_LIMITS:
        code(request)
        return
    for part in parts(request, layer.limits):
        code(part)


def _carry_blocks(request: Request, layer: Layer, code: Carry) -> None:
    """Zero or trim: whole blocks as such. The rest is zeroed by writing, and not trimmed at all."""
    block = layer.limits.request_alignment
    first = min(_up(request.offset, block), request.end)
    stop = request.end if request.end == layer.size else max(_down(request.end, block), first)
    for start, end in ((request.offset, first), (stop, request.end)):
        if start < end and request.operation is Operation.ZERO:
            zeroes = layer.allocate(end - start)
            zeroes.zero()
            flags = request.asked_flags & ~(Flag.ZERO_WRITE | Flag.MAY_UNMAP | Flag.NO_FALLBACK)
            carry_out(Request.write(start, zeroes, flags), layer, code)
    if first < stop:
        with layer.mutations.shared(first, stop - first):
            _carry_whole(request.slice(first - request.offset, stop - first), layer, code)


def _padded(request: Request, start: int, end: int, layer: Layer) -> Request:
    """The read of [start, end): what it adds to the request goes to memory that nobody looks at."""
    before, after = request.offset - start, end - request.end
    padding = layer.allocate(before + after)
    return _widened(request, padding.slice(0, before), padding.slice(before, after))


def _merged(request: Request, start: int, end: int, layer: Layer, code: Carry) -> Request:
    """The write of [start, end): with what its first and its last block hold around the request."""
    last = _down(end - 1, layer.limits.request_alignment)
    ends = ([start] if start < request.offset else []) + ([last] if request.end < end else [])
    held = {at: _block(at, layer, code) for at in dict.fromkeys(ends)}
    before = held[start].slice(0, request.offset - start) if start in held else NO_VECTOR
    after = held[last].slice(request.end - last, end - request.end) if request.end < end else NO_VECTOR
    return _widened(request, before, after)


def _widened(request: Request, before: Vector, after: Vector) -> Request:
    vector = before + request.vector + after
    return Request(request.operation, request.offset - before.length, vector.length, vector, request.asked_flags)


def _block(start: int, layer: Layer, code: Carry) -> Vector:
    """What the block at ``start`` holds."""
    vector = layer.allocate(min(layer.limits.request_alignment, layer.size - start))
    _carry_whole(Request.read(start, vector), layer, code)
    return vector


def _aligned(request: Request, alignment: int, length_max: int) -> Iterator[Request]:
    """The request cut at the first and at the last multiple of ``alignment`` in it, and between these into parts of
    at most ``length_max`` (0: of any length)."""
    first = min(_up(request.offset, alignment), request.end)
    stop = max(_down(request.end, alignment), first)
    if request.offset < first:
        yield request.slice(0, first - request.offset)
    if first < stop:
        between = request.slice(first - request.offset, stop - first)
        yield from between.pieces(_down(length_max, alignment) or between.length)
    if stop < request.end:
        yield request.slice(stop - request.offset, request.end - stop)


def _down(position: int, block: int) -> int:
    return position - position % block


def _up(position: int, block: int) -> int:
    return -(-position // block) * block
