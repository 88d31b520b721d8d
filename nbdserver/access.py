"""Who may have what: rules of listeners and exports, and the clients they are held to. Pure functions of both.

::

    Peer    where a client comes from (the system says so), and who it is (TLS says so)
      │
    Rule    addresses, users, groups, machines   one of them must be the client's; none given: anybody's
            deny                                 addresses that may not, whatever else is said
            subjects, identities                 one of them must be the client's, by TLS; none given: nobody is asked

A client that a rule does not admit sees no such export: it is not listed, and is answered as one that does not exist
(proto.md, "Option types": ERR_UNKNOWN; ERR_POLICY would say that it is there).
"""

from __future__ import annotations

import grp
import ipaddress
import pwd
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Final

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

#: User and group ids are unsigned 32-bit, the last of which means none; so are vsock's context ids, where it means any.
ID_MAX: Final = (1 << 32) - 2


@dataclass(frozen=True)
class Peer:
    """A client: where it comes from, and, with TLS, who it has shown itself to be.

    By TCP it has an ``address`` (an IPv4 address that was mapped into IPv6 is an IPv4 address), by a Unix socket a
    ``uid`` and ``groups``, those of the process that connected; by vsock the ``cid`` of its machine. ``subject``: its
    certificate's, RFC 4514; ``identity``: the name of its pre-shared key.
    """

    address: IpAddress | None = None
    uid: int | None = None
    groups: frozenset[int] = frozenset()
    cid: int | None = None
    subject: str | None = None
    identity: str | None = None


#: A client of which nothing is known.
UNKNOWN: Final = Peer()


@dataclass(frozen=True)
class Rule:
    """Who is admitted. ``subjects`` are patterns for all of a subject, in which ``*`` stands for any text."""

    addresses: tuple[IpNetwork, ...] = ()
    deny: tuple[IpNetwork, ...] = ()
    users: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    machines: tuple[int, ...] = ()
    subjects: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()

    @property
    def needs_tls(self) -> bool:
        """Whether a client must say by TLS who it is."""
        return bool(self.subjects or self.identities)

    def admits_origin(self, peer: Peer) -> bool:
        """Whether clients may come from where this one does."""
        if _is_in(peer.address, self.deny):
            return False
        if not (self.addresses or self.users or self.groups or self.machines):
            return True
        return (
            _is_in(peer.address, self.addresses)
            or peer.uid in self.users
            or not peer.groups.isdisjoint(self.groups)
            or peer.cid in self.machines
        )

    def admits_identity(self, peer: Peer) -> bool:
        """Whether it may be who this one is."""
        if not self.needs_tls or peer.identity in self.identities:
            return True
        return peer.subject is not None and any(_matches(peer.subject, pattern) for pattern in self.subjects)

    def admits(self, peer: Peer) -> bool:
        return self.admits_origin(peer) and self.admits_identity(peer)

    def as_json(self) -> dict[str, list[Any]]:
        """Its keys and values, as a configuration has them; nothing for what it does not ask."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: [value if isinstance(value, int | str) else str(value) for value in values]
            for key, values in found.items()
            if values
        }


#: Admits everybody.
ANYBODY: Final = Rule()


def _is_in(address: IpAddress | None, networks: Iterable[IpNetwork]) -> bool:
    return address is not None and any(address in network for network in networks)


def _matches(subject: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), subject, re.DOTALL) is not None


# -- values of a configuration: each raises ValueError, saying what is allowed ---------------------------------------


def network(value: object) -> IpNetwork:
    """An address, or a network such as 10.0.0.0/8; of IPv4 in IPv6 what is meant."""
    wanted = 'an IP address or network, such as "10.0.0.0/8" or "fd00::/8"'
    if not isinstance(value, str):
        raise ValueError(wanted)
    try:
        found = ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"{wanted}: {error}") from None
    mapped = getattr(found.network_address, "ipv4_mapped", None)
    if mapped is not None and found.prefixlen >= MAPPED_PREFIX:
        return ipaddress.IPv4Network((mapped, found.prefixlen - MAPPED_PREFIX))
    return found


#: Bits of an IPv6 address that say that it is an IPv4 address: RFC 4291, section 2.5.5.2.
MAPPED_PREFIX: Final = 96


def user(value: object) -> int:
    """A user's id, from that or the name."""
    return _id(value, lambda name: pwd.getpwnam(name).pw_uid, "user")


def group(value: object) -> int:
    """A group's id, from that or the name."""
    return _id(value, lambda name: grp.getgrnam(name).gr_gid, "group")


def machine(value: object) -> int:
    """A context id of vsock."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= ID_MAX:
        return value
    raise ValueError(f"a context id from 0 to {ID_MAX}")


def _id(value: object, find: Callable[[str], int], what: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= ID_MAX:
        return value
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"a {what}'s name, or its id from 0 to {ID_MAX}")
    try:
        return find(value)
    except (KeyError, UnicodeEncodeError):
        raise ValueError(f"a {what} that this machine knows, or its id") from None


def pattern(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError("a string that is not empty")
