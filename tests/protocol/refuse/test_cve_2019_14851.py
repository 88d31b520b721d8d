"""CVE-2019-14851, nbdkit: options in an order that had not been thought of (information about one export, contexts of
another, twice) failed an assertion. Any order of any options is answered."""

from __future__ import annotations

import itertools
import random

from nbdserver.handshake import Option
from tests.protocol.kit import Client, go, meta
from tests.serving import SEED, amount

OPTIONS: list[tuple[int, bytes]] = [
    (Option.LIST, b""),
    (Option.STRUCTURED_REPLY, b""),
    (Option.EXTENDED_HEADERS, b""),
    *((option, go(name)) for option in (Option.INFO,) for name in ("", "disk", "golden", "nobody")),
    (Option.GO, go("nobody")),
    *((Option.SET_META_CONTEXT, meta(name, "base:allocation")) for name in ("", "golden", "nobody")),
    *((Option.LIST_META_CONTEXT, meta(name)) for name in ("", "golden", "nobody")),
]


def test_any_two_options(uri: str) -> None:
    for first, second in itertools.product(OPTIONS, repeat=2):
        client = Client(uri)
        for option, data in (first, second):
            client.ask(option, data)
        client.enter().close()


def test_a_long_walk(uri: str) -> None:
    pick = random.Random(SEED)
    for _ in range(amount(20, 500)):
        client = Client(uri)
        for option, data in pick.choices(OPTIONS, k=40):
            client.ask(option, data)
        client.enter().close()
