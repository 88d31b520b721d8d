"""Which exports are offered under which names: changes in one step, and whose turn it is to end an export."""

from __future__ import annotations

import dataclasses

import pytest

from nbdserver.access import Peer, Rule
from nbdserver.errors import ConfigError
from nbdserver.handshake import ExportInfo, Unavailable
from nbdserver.offers import Client, Maker, Offers


@dataclasses.dataclass(eq=False)
class Disk:
    """An export that serves nothing."""

    name: str
    made_by: Maker | None = None
    clients: set[Client] = dataclasses.field(default_factory=set)
    is_leaving: bool = False
    is_ending: bool = False

    def __post_init__(self) -> None:
        self.info = ExportInfo(name=self.name, size=512)


class Connection:
    peer = "somewhere"
    process = (5, 1000, [1000])

    def counters(self) -> dict[str, int]:
        return {"requests": 3}

    def disconnect(self) -> None:
        pass


def client(number: int = 1) -> Client:
    return Client(number, Connection(), 0.0)


@pytest.fixture
def offers() -> Offers[Disk]:
    offers: Offers[Disk] = Offers()
    offers.change(add=[Disk("a"), Disk("b")], default="a")
    return offers


def test_names_and_the_default(offers: Offers[Disk]) -> None:
    assert (sorted(offers), len(offers)) == (["", "a", "b"], 3)
    assert offers[""].name == offers["a"].name == "a"
    assert offers.get("c") is None


def test_a_change_is_all_or_nothing(offers: Offers[Disk]) -> None:
    before = dict(offers.exports)
    with pytest.raises(ConfigError, match="there is an export 'b' already"):
        offers.change(add=[Disk("c"), Disk("b")], remove=[before["a"]], default=None)
    assert offers.exports == before
    assert offers.default == "a"
    assert not before["a"].is_leaving


def test_one_export_takes_the_place_of_another_of_its_name(offers: Offers[Disk]) -> None:
    old, new = offers.exports["a"], Disk("a")
    assert offers.change(add=[new], remove=[old]) == [old]
    assert offers.exports["a"] is new
    assert offers.default == "a"


def test_the_default_goes_with_its_export(offers: Offers[Disk]) -> None:
    offers.change(remove=[offers.exports["a"]])
    assert offers.default is None
    assert sorted(offers) == ["b"]


def test_the_empty_name_is_one_exports(offers: Offers[Disk]) -> None:
    with pytest.raises(ConfigError, match="the empty name"):
        offers.change(add=[Disk("")])
    offers.change(add=[Disk("")], default=None)
    with pytest.raises(ConfigError, match="the empty name"):
        offers.change(default="b")


def test_an_export_with_clients_is_ended_when_the_last_has_left(offers: Offers[Disk]) -> None:
    disk = offers.exports["a"]
    first, second = client(1), client(2)
    assert offers.enter(first, "a") is offers.enter(second, "") is disk
    assert offers.change(remove=[disk]) == []
    assert offers.leaving == [disk]
    assert offers.leave(second) is None
    assert offers.leave(first) is disk
    assert disk not in offers.take_all(), "the caller has it to end already"


def test_nobody_enters_what_has_been_removed(offers: Offers[Disk]) -> None:
    disk = offers.exports["a"]
    offers.change(remove=[disk])
    with pytest.raises(Unavailable):
        offers.enter(client(), "a")


def test_who_has_gone_does_not_enter(offers: Offers[Disk]) -> None:
    gone = client()
    offers.leave(gone)
    with pytest.raises(Unavailable):
        offers.enter(gone, "a")
    assert not offers.exports["a"].clients


def test_what_has_clients_is_not_removed_safely(offers: Offers[Disk]) -> None:
    disk = offers.exports["a"]
    there = client()
    offers.enter(there, "a")
    with pytest.raises(ConfigError, match="export 'a' has 1 client"):
        offers.change(remove=[disk], if_idle=True)
    offers.leave(there)
    assert offers.change(remove=[disk], if_idle=True) == [disk]


def test_an_export_is_given_to_be_ended_once(offers: Offers[Disk]) -> None:
    disk, there = offers.exports["a"], client()
    offers.enter(there, "a")
    offers.change(remove=[disk])
    assert offers.leave(there) is disk
    assert offers.leave(there) is None
    assert offers.change(remove=[disk]) == []
    assert disk not in offers.take_all()


def test_what_a_client_is(offers: Offers[Disk]) -> None:
    there = client(7)
    assert there.describe()["export"] is None
    offers.enter(there, "a")
    there.who = Peer(uid=1000, subject="CN=alice")
    assert there.describe() == {
        **{"id": 7, "address": "unix", "pid": 5, "uid": 1000, "subject": "CN=alice", "identity": None},
        **{"since": 0.0, "export": "a", "style": None, "requests": 3},
    }


def test_who_an_export_is_not_for_does_not_get_it(offers: Offers[Disk]) -> None:
    offers.exports["a"].info = ExportInfo(name="a", size=0, access=Rule(users=(1000,)))
    with pytest.raises(Unavailable, match="closed to you"):
        offers.enter(client(), "a")
    mine = client()
    mine.who = Peer(uid=1000)
    assert offers.enter(mine, "a") is offers.exports["a"]
