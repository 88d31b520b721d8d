"""The table ``[limits]``: what clients may have at the most, and how long they may take."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any

from nbdserver.limits import (
    CONNECTION_MEMORY_DEFAULT,
    CONNECTION_REQUESTS_DEFAULT,
    CONNECTIONS_COUNT_DEFAULT,
    HANDSHAKE_TIMEOUT,
    PEER_PART,
    REPLY_MEMORY_DEFAULT,
)


@dataclass(frozen=True)
class Bounds:
    """``connections``: at once, None: as many as CONNECTIONS_COUNT_DEFAULT, but half of the descriptors at most, as
    images need some too; ``connections_per_peer``: of one address, Unix user or virtual machine, None: three quarters
    of those. Of one connection: ``requests_per_connection`` under way, which hold ``memory_per_connection`` bytes of
    the buffer pool. ``reply_memory``: bytes of replies without payload, of all connections. Seconds:
    ``handshake_timeout``; ``idle_timeout``, after which a client that does nothing is disconnected, and ``keepalive``,
    after which TCP asks whether a silent one is still there (None: never).
    """

    connections: int | None = None
    connections_per_peer: int | None = None
    requests_per_connection: int = CONNECTION_REQUESTS_DEFAULT
    memory_per_connection: int = CONNECTION_MEMORY_DEFAULT
    reply_memory: int = REPLY_MEMORY_DEFAULT
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    idle_timeout: float | None = None
    keepalive: int | None = None

    def of_engine(self) -> dict[str, Any]:
        """What `_engine.Engine.set_limits` takes."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        half = descriptors // 2 if descriptors != resource.RLIM_INFINITY else CONNECTIONS_COUNT_DEFAULT
        connections = self.connections or min(CONNECTIONS_COUNT_DEFAULT, half)
        return {
            "connections": connections,
            "connections_per_peer": self.connections_per_peer or max(1, int(connections * PEER_PART)),
            "requests_per_connection": self.requests_per_connection,
            "memory_per_connection": self.memory_per_connection,
            "reply_memory": self.reply_memory,
            "handshake_timeout": self.handshake_timeout,
            "idle_timeout": self.idle_timeout,
        }


DEFAULTS = Bounds()
