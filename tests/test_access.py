"""Rules and the clients they are held to: each kind of condition, alone and with others."""

from __future__ import annotations

import grp
import ipaddress
import pwd
from collections.abc import Callable

import pytest

from nbdserver import access
from nbdserver.access import ANYBODY, UNKNOWN, Peer, Rule


def at(address: str) -> Peer:
    return Peer(address=ipaddress.ip_address(address))


def nets(*texts: str) -> tuple[access.IpNetwork, ...]:
    return tuple(access.network(text) for text in texts)


ALICE = Peer(uid=1000, groups=frozenset({1000, 36}))


@pytest.mark.parametrize("peer", [UNKNOWN, at("192.0.2.1"), ALICE, Peer(cid=3)])
def test_no_rule_admits_anybody(peer: Peer) -> None:
    assert ANYBODY.admits(peer)


@pytest.mark.parametrize(
    ("rule", "admitted", "refused"),
    [
        (Rule(addresses=nets("10.0.0.0/8")), at("10.1.2.3"), at("11.0.0.1")),
        (Rule(addresses=nets("10.0.0.0/8", "::1")), at("::1"), at("::2")),
        (Rule(addresses=nets("10.0.0.0/8")), at("10.0.0.1"), at("::ffff:a00:1")),
        (Rule(addresses=nets("::/0")), at("fe80::1"), at("10.0.0.1")),
        (Rule(addresses=nets("10.0.0.0/8"), deny=nets("10.0.0.13")), at("10.0.0.12"), at("10.0.0.13")),
        (Rule(deny=nets("10.0.0.0/8")), at("11.0.0.1"), at("10.0.0.1")),
        (Rule(deny=nets("10.0.0.0/8")), ALICE, at("10.0.0.1")),
        (Rule(addresses=nets("10.0.0.0/8")), at("10.0.0.1"), ALICE),
        (Rule(users=(1000,)), ALICE, Peer(uid=1001)),
        (Rule(users=(1000,)), ALICE, at("10.0.0.1")),
        (Rule(users=(0,)), Peer(uid=0), UNKNOWN),
        (Rule(groups=(36,)), ALICE, Peer(uid=1000, groups=frozenset({1000}))),
        (Rule(users=(7,), groups=(36,)), ALICE, Peer(uid=8, groups=frozenset({8}))),
        (Rule(users=(1000,), addresses=nets("10.0.0.0/8")), at("10.0.0.1"), at("11.0.0.1")),
        (Rule(users=(1000,), addresses=nets("10.0.0.0/8")), ALICE, Peer(uid=1)),
        (Rule(machines=(3,)), Peer(cid=3), Peer(cid=4)),
        (Rule(machines=(3,)), Peer(cid=3), ALICE),
        (Rule(subjects=("CN=alice",)), Peer(subject="CN=alice"), Peer(subject="CN=alice,O=other")),
        (Rule(subjects=("CN=*,O=us",)), Peer(subject="CN=bob,O=us"), Peer(subject="CN=bob,O=them")),
        (Rule(subjects=("CN=a.c",)), Peer(subject="CN=a.c"), Peer(subject="CN=abc")),
        (Rule(subjects=("*",)), Peer(subject="CN=x\n"), Peer(identity="alice")),
        (Rule(identities=("alice",)), Peer(identity="alice"), Peer(subject="alice")),
        (Rule(subjects=("CN=bob",), identities=("alice",)), Peer(identity="alice"), Peer(subject="CN=eve")),
        (Rule(users=(1000,), subjects=("CN=*",)), Peer(uid=1000, subject="CN=a"), ALICE),
        (Rule(users=(1000,), subjects=("CN=*",)), Peer(uid=1000, subject="CN=a"), Peer(uid=1, subject="CN=a")),
    ],
)
def test_who_is_admitted(rule: Rule, admitted: Peer, refused: Peer) -> None:
    assert rule.admits(admitted)
    assert not rule.admits(refused)


def test_an_ipv4_network_written_in_ipv6_is_what_is_meant() -> None:
    assert access.network("::ffff:10.0.0.0/104") == ipaddress.ip_network("10.0.0.0/8")
    assert access.network("::ffff:192.0.2.1") == ipaddress.ip_network("192.0.2.1/32")


def test_users_and_groups_by_name_and_number() -> None:
    assert access.user("root") == access.user(0) == pwd.getpwnam("root").pw_uid
    assert access.group("root") == access.group(0) == grp.getgrnam("root").gr_gid


@pytest.mark.parametrize(
    ("make", "value", "allowed"),
    [
        (access.network, "10.0.0.1/8", "10.0.0.1/8 has host bits set"),
        (access.network, "localhost", "an IP address or network"),
        (access.network, 10, "an IP address or network"),
        (access.user, "nobody-of-this-name", "a user that this machine knows"),
        (access.user, True, "a user's name, or its id"),
        (access.user, -1, "a user's name, or its id"),
        (access.user, "ro\0ot", "a user's name, or its id"),
        (access.user, "\udcff\ud800", "a user that this machine knows"),
        (access.group, 1 << 32, "a group's name, or its id"),
        (access.machine, "3", "a context id"),
        (access.machine, (1 << 32) - 1, "a context id"),
        (access.pattern, "", "a string that is not empty"),
    ],
)
def test_values_that_are_refused(make: Callable[[object], object], value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        make(value)


def test_a_rule_as_json_says_what_it_asks() -> None:
    assert ANYBODY.as_json() == {}
    rule = Rule(addresses=nets("10.0.0.0/8"), users=(0,), subjects=("CN=*",))
    assert rule.as_json() == {"addresses": ["10.0.0.0/8"], "users": [0], "subjects": ["CN=*"]}
