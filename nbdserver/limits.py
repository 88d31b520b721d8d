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

#: The same for a client that came by EXPORT_NAME and was not told: what nbdkit takes of any client. nbd-server takes as
#: much as memory holds, and its test suite sends 48 MiB.
PAYLOAD_UNTOLD_MAX: Final = 64 * MIB

#: The largest string (export name, description, meta context query) in the handshake. proto.md, "Strings".
STRING_MAX: Final = 4096

#: The largest option payload that is worth reading: a name, and as many meta context queries as QUERIES_MAX.
OPTION_MAX: Final = 64 * KIB

#: Options one client may send before it must begin transmission: no client needs more, and each costs a reply.
OPTIONS_COUNT_MAX: Final = 512

#: Dirty bitmaps that one export offers: more than anybody keeps, few enough to list.
BITMAPS_OFFERED_MAX: Final = 64

#: Meta context queries in one option: one for each context that there is, and some that there are not.
QUERIES_COUNT_MAX: Final = 2 * BITMAPS_OFFERED_MAX

#: proto.md, "Size constraints": the largest minimum block size, and the smallest preferred one.
MINIMUM_BLOCK_MAX: Final = 64 * KIB
PREFERRED_BLOCK_MIN: Final = 512

#: What clients are told to prefer at least: a page, which is what page caches and most disks deal in; as qemu-nbd.
PREFERRED_BLOCK_DEFAULT: Final = 4 * KIB

#: How much of a string that somebody else wrote (a client, a configuration) an error or a log line repeats.
SHOWN_COUNT_MAX: Final = 64

#: NBD sizes are unsigned 64-bit, files are signed: the largest disk.
DISK_MAX: Final = (1 << 63) - 1

#: Digits of a size: DISK_MAX has 19. Python refuses to convert thousands.
SIZE_DIGITS_COUNT_MAX: Final = 20

#: A longer URI is a mistake: an export name and a path, each byte percent-encoded, and a host name, fit.
URI_COUNT_MAX: Final = 16 * KIB

#: Linux's struct sockaddr_un holds 108 bytes, one of them the NUL at the end.
SOCKET_PATH_MAX: Final = 107

#: A longer file is no configuration; it is read into memory.
CONFIG_FILE_MAX: Final = 4 * MIB

#: What LIST answers must stay sendable: this many names and descriptions of STRING_MAX are 32 MiB.
EXPORTS_COUNT_MAX: Final = 4096

#: Shared stacks of layers: as many as there may be exports.
NODES_COUNT_MAX: Final = 4096

#: Addresses to listen on; each costs a descriptor.
LISTEN_COUNT_MAX: Final = 64

#: Directories that images may name files in; each is compared with every such name.
ROOTS_COUNT_MAX: Final = 1024

#: Layers in one list of a configuration, and lists in lists: more than anybody writes, less than Python's stack.
LAYERS_COUNT_MAX: Final = 256
NESTING_MAX: Final = 16

#: A secret: what cryptsetup reads of a key file by default.
SECRET_MAX: Final = 8 * MIB

#: A descriptor's number: what Linux lets a process have (fs.nr_open) unless it is told otherwise.
FD_MAX: Final = (1 << 20) - 1

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

#: The pool must hold the largest payload; and no machine has more memory.
POOL_MIN: Final = PAYLOAD_MAX
POOL_MAX: Final = TIB

#: Zeroes are written out in pieces of this where there is no better way: as long as a bounce.
ZERO_PIECE: Final = BOUNCE_MAX

#: Storage is reserved in pieces of this, so that progress can be shown where a file system has to write zeroes.
PREALLOCATION_PIECE: Final = 256 * MIB

#: Segments of one preadv or pwritev: Linux's UIO_MAXIOV.
IOV_COUNT_MAX: Final = 1024

#: Python threads that serve faults. Each may block in file I/O; Python itself runs on one at a time.
FAULT_THREADS: Final = 8

#: Threads that may be asked for: more than any machine's cores, few enough to be started.
WORKERS_COUNT_MAX: Final = 256
FAULT_THREADS_COUNT_MAX: Final = 256

#: Fruitless attempts to make a range writable in the cache before its data goes through Python: the mapping is changing
#: faster than it can be entered.
FILLS_COUNT_MAX: Final = 8

#: Extents one fault may bring beyond those it was asked for, where the layer has no table: some 4 us each.
EXTENTS_AHEAD_MAX: Final = 128

#: Block status descriptors in one reply. QEMU's NBD_MAX_BLOCK_STATUS_EXTENTS is 1 MiB / 8; a client asks again.
STATUS_COUNT_MAX: Final = 8192

#: Extents that ``nbdserver explain`` shows: more than anybody reads. A walk that goes on says so.
EXTENTS_SHOWN_COUNT_MAX: Final = 4096

#: Engine threads by default: one a processor, but no more than this; each holds a receive buffer and a ring.
WORKERS_MAX: Final = 16

#: Seconds a client may take for its handshake, TLS included; and as long as anybody would want times to be.
HANDSHAKE_TIMEOUT: Final = 30.0
SECONDS_MAX: Final = 24 * 60 * 60

#: Connections at once: each may hold some MiB of requests and replies. And the part of them that one peer may have:
#: more than any needs, and never all, so that others still find the door open.
CONNECTIONS_COUNT_DEFAULT: Final = 4096
CONNECTIONS_COUNT_MAX: Final = 1 << 20
PEER_PART: Final = 3 / 4

#: Requests of one connection under way at once; a client that sends more waits. Linux's own client has 128 tags.
CONNECTION_REQUESTS_DEFAULT: Final = 256
CONNECTION_REQUESTS_MAX: Final = 1 << 16

#: Bytes of the pool that the requests of one connection may hold (one request may always run). The engine holds it to a
#: quarter of the pool besides.
CONNECTION_MEMORY_DEFAULT: Final = 64 * MIB

#: Bytes that requests without a payload and their replies may take, over all connections: block status for some
#: thousand requests at once. Beyond it each connection may have one request under way.
REPLY_MEMORY_DEFAULT: Final = 256 * MIB
REPLY_MEMORY_MIN: Final = MIB

#: Lines about clients in the log, in so many seconds: enough to see what is wrong, too few to fill a disk.
CLIENT_LINES_COUNT_MAX: Final = 20
CLIENT_LINES_PERIOD: Final = 10.0

#: Unanswered questions after which TCP gives a silent client up.
KEEPALIVE_COUNT: Final = 4

#: Entries in one list of an access rule; each is compared with every client.
RULE_COUNT_MAX: Final = 1024

#: Pre-shared keys: a file of them, bytes; and a name and a key, bytes (OpenSSL's PSK_MAX_...).
PSK_FILE_MAX: Final = 1 << 20
PSK_NAME_MAX: Final = 128
PSK_MAX: Final = 256

#: Seconds that stopping waits for requests that were accepted.
STOP_TIMEOUT: Final = 30.0

#: Seconds that threads have to end once nothing is left for them to do.
THREADS_STOP_TIMEOUT: Final = 2.0

#: Seconds that a drained section waits for running requests.
DRAIN_TIMEOUT: Final = 60.0

#: Connections the kernel queues before they are accepted.
CONNECTIONS_BACKLOG: Final = 128

#: Names that a pattern stands for: a file name has 255 bytes at most, and the file's has more to say. How many overlays
#: one pattern makes unless it says another number. Threads that make them, each for milliseconds; and seconds that who
#: asks for one may wait for the end of the last that was called so.
TEMPLATE_NAME_MAX: Final = 128
TEMPLATE_COUNT_DEFAULT: Final = 1024
TEMPLATE_THREADS: Final = 4
TEMPLATE_TIMEOUT: Final = 10.0

#: Jobs at once, each of which has a thread; and concluded ones that are remembered until they are dismissed.
JOBS_COUNT_MAX: Final = 64
JOBS_CONCLUDED_COUNT_MAX: Final = 64

#: The control socket: the longest line, as a long list of layers; connections at once, each of which has a thread;
#: seconds that a reply may take to be read, and that a server which stops waits for commands to end. As a client of it:
#: the longest reply, as thousands of exports with clients.
CONTROL_LINE_MAX: Final = 64 * KIB
CONTROL_CONNECTIONS_COUNT_MAX: Final = 16
CONTROL_SEND_TIMEOUT: Final = 10.0
CONTROL_STOP_TIMEOUT: Final = 2.0
CONTROL_REPLY_MAX: Final = 64 * MIB

#: As a client (``nbdserver list URI``): seconds to wait for a server that says nothing; the largest reply, a name and a
#: description with the length between them; replies to one option, as no server has more exports.
CLIENT_TIMEOUT: Final = 10.0
CLIENT_REPLY_MAX: Final = 4 + 2 * STRING_MAX
CLIENT_REPLIES_COUNT_MAX: Final = 65536

#: In tests: seconds that a server process may take to begin to serve, and to stop when asked to.
PROCESS_START_TIMEOUT: Final = 30.0
PROCESS_STOP_TIMEOUT: Final = 60.0
