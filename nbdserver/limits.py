"""Every limit, with its reason, together in one place. Bytes unless the suffix says otherwise."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

#: The largest READ or WRITE payload. proto.md, "Size constraints": a server that does not say otherwise is
#: expected to take 32 MiB; QEMU's NBD_MAX_BUFFER_SIZE.
PAYLOAD_MAX: Final = 32 * MIB

#: The largest string (export name, description, meta context query) in the handshake. proto.md, "Strings".
STRING_MAX: Final = 4096

#: The largest option payload that is worth reading: a name, and as many meta context queries as QUERIES_MAX.
OPTION_MAX: Final = 64 * KIB

#: Options one client may send before it must begin transmission: no client needs more, and each costs a reply.
OPTIONS_COUNT_MAX: Final = 512

#: Meta context queries in one option. No client sends more than a few.
QUERIES_COUNT_MAX: Final = 32

#: NBD sizes are unsigned 64-bit, files are signed: the largest disk.
DISK_MAX: Final = (1 << 63) - 1

#: How deep a graph may be (layers on one path), against loops and stack exhaustion. QEMU users rarely pass 200.
DEPTH_MAX: Final = 1000

#: Python frames that opening and closing a chain of DEPTH_MAX images may take: each opens the next from within its
#: own opening. Frames are heap memory, about 200 bytes each.
FRAMES_COUNT_MAX: Final = 32 * DEPTH_MAX

#: The default size of the buffer pool: 2 requests of PAYLOAD_MAX each way at once, and hundreds of usual ones.
POOL_DEFAULT: Final = 128 * MIB

#: A layer that bounces a request (a copy to compare with) does so in pieces of this. Each fault thread may hold a few
#: such pieces, which the pool's reserve has room for; longer ones are hardly faster.
BOUNCE_MAX: Final = MIB

#: Python threads that serve faults. Each may block in file I/O; Python itself runs on one at a time.
FAULT_THREADS: Final = 8

#: Extents one fault may bring beyond those it was asked for: read-ahead that costs below a millisecond.
EXTENTS_AHEAD_MAX: Final = 512

#: Block status descriptors in one reply. QEMU's NBD_MAX_BLOCK_STATUS_EXTENTS is 1 MiB / 8; a client asks again.
STATUS_COUNT_MAX: Final = 8192

#: Engine threads by default: one a processor, but no more than this; each holds a receive buffer and a ring.
WORKERS_MAX: Final = 16

#: Seconds a client may take for its handshake.
HANDSHAKE_TIMEOUT: Final = 30.0

#: Seconds that stopping waits for requests that were accepted.
STOP_TIMEOUT: Final = 30.0

#: Seconds that a drained section waits for running requests.
DRAIN_TIMEOUT: Final = 60.0

#: Connections the kernel queues before they are accepted.
CONNECTIONS_BACKLOG: Final = 128
