"""``[nodes.NAME]`` of exports.toml: layers that several exports share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from nbdserver import config
from nbdserver.config import Config
from nbdserver.errors import ConfigError
from nbdserver.layer import Layer
from nbdserver.testing import NbdServers
from tests.serving import run

Load = Callable[[str], Config]

NODE = '[nodes.disk]\nlayers = [{type = "raw"}, {type = "memory", size = "1M"}]\n'
EXPORT = '[exports.vm]\nlayers = [{node = "disk"}]\n'


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a text as ``exports.toml`` in the current directory."""
    monkeypatch.chdir(tmp_path)

    def load(text: str) -> Config:
        Path("exports.toml").write_text(text)
        return config.load("exports.toml")

    return load


def below(layer: Layer) -> Layer:
    """The layer's only child."""
    [(_, child)] = layer.children()
    return child


def test_a_node_is_there_once_for_all_who_name_it(load: Load) -> None:
    wanted = load(NODE + EXPORT + '[exports.part]\nlayers = [{type = "raw", size = "4K"}, {node = "disk"}]')
    built: dict[str, Layer] = {}
    (whole, _), (part, _) = (export.build(built) for export in wanted.exports)
    assert below(part) is whole
    assert built == {"disk": whole}


def test_every_building_is_anew_unless_it_is_shared(load: Load) -> None:
    [export] = load(NODE + EXPORT).exports
    assert export.build()[0] is not export.build()[0]


def test_a_node_may_stand_on_nodes_and_be_a_child_by_its_role(load: Load) -> None:
    wanted = load(
        """
        [nodes.guarded]
        layers = [{type = "copy-before-write", target = [{node = "old"}]}, {node = "disk"}]
        [nodes.old]
        layers = [{type = "memory", size = "1M"}]
        [exports.snap]
        layers = [{type = "snapshot-access"}, {node = "guarded"}]
        [exports.live]
        layers = [{node = "guarded"}]
        """
        + NODE
    )
    built: dict[str, Layer] = {}
    snap, live = (export.build(built)[0] for export in wanted.exports)
    assert below(snap) is live is built["guarded"]
    assert dict(live.children()) == {"file": built["disk"], "target": built["old"]}


def test_who_may_write_comes_first_so_that_a_shared_node_can_be_written(load: Load) -> None:
    wanted = load(NODE + '[exports.a]\nlayers = [{node = "disk"}]\nread_only = true\n' + EXPORT)
    assert [export.name for export in wanted.exports] == ["vm", "a"]


def test_without_nodes_exports_are_in_the_order_of_the_file(load: Load) -> None:
    wanted = load('[exports.a]\nimage = "a"\nread_only = true\n[exports.b]\nimage = "b"\n')
    assert [export.name for export in wanted.exports] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[nodes]\ndisk = 5\n" + EXPORT, "[nodes.disk]: found 5, allowed is a table"),
        ("[nodes.disk]\n" + EXPORT, "[nodes.disk]: layers: missing: a node is a list of layers"),
        ("[nodes.disk]\nlayers = 5\n" + EXPORT, "[nodes.disk]: layers: found 5, allowed is a list of layers"),
        ("[nodes.disk]\nlayers = []\n" + EXPORT, "[nodes.disk.layers]: is empty; a stack has at least one layer"),
        (
            '[nodes.disk]\nimage = "x"\n' + EXPORT,
            "[nodes.disk]: image: unknown key; Allowed are: layers",
        ),
        (
            '[nodes.disk]\nlayers = [{type = "raw"}]\n' + EXPORT,
            "[nodes.disk.layers[0]]: file: missing: the layer 'raw' needs a layer",
        ),
        (
            '[nodes.unused]\nlayers = [{type = "nothing"}]\n' + NODE + EXPORT,
            "[nodes.unused.layers[0]]: type: there is no layer 'nothing'",
        ),
        (
            NODE + '[exports.vm]\nlayers = [{node = "dis"}]',
            '[exports.vm.layers[0]]: node: found "dis"; did you mean disk? There are: disk',
        ),
        (NODE + "[exports.vm]\nlayers = [{node = 5}]", "[exports.vm.layers[0]]: node: found 5; There are: disk"),
        (NODE + "[exports.vm]\nlayers = [{node = []}]", "[exports.vm.layers[0]]: node: found a list; There are: disk"),
        (EXPORT, '[exports.vm.layers[0]]: node: found "disk"; There are: none; a node is a table such as [nodes.disk]'),
        (
            NODE + '[exports.vm]\nlayers = [{node = "disk", size = 5}]',
            "[exports.vm.layers[0]]: node: stands alone: the node's layers have their keys in its own table",
        ),
        (
            NODE + '[exports.vm]\nlayers = [{node = "disk"}, {type = "memory", size = "1M"}]',
            '[exports.vm.layers[0]]: node: the node "disk" has all its layers, but others follow it; it comes last',
        ),
        (
            '[nodes.a]\nlayers = [{type = "raw"}, {node = "b"}]\n[nodes.b]\nlayers = [{node = "a"}]\n' + NODE + EXPORT,
            "[nodes.b.layers[0]]: node: closes a circle: a -> b -> a",
        ),
        ('[nodes.a]\nlayers = [{node = "a"}]\n' + NODE + EXPORT, "[nodes.a.layers[0]]: node: closes a circle: a -> a"),
    ],
)
def test_refused(load: Load, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value).removeprefix("exports.toml: ").startswith(said)


def test_long_chains_of_nodes_are_refused_whatever_their_order(load: Load) -> None:
    nodes = [f'[nodes.n{index}]\nlayers = [{{node = "n{index + 1}"}}]' for index in range(40)]
    last = '[nodes.n40]\nlayers = [{type = "memory", size = "1M"}]'
    export = '[exports.vm]\nlayers = [{node = "n0"}]'
    for text in ([*nodes, last, export], [last, *reversed(nodes), export]):
        with pytest.raises(ConfigError, match="lists nest deeper than 16"):
            load("\n".join(text))


def test_what_one_export_writes_the_other_reads(nbd_server: NbdServers, tmp_path: Path) -> None:
    path = tmp_path / "exports.toml"
    path.write_text(NODE + EXPORT + '[exports.part]\nlayers = [{type = "raw", offset = 512}, {node = "disk"}]\n')
    with nbd_server.process(path) as server:
        whole, part = nbd.NBD(), nbd.NBD()
        whole.connect_uri(server.uri("vm"))
        part.connect_uri(server.uri("part"))
        assert part.pread(4, 0) == bytes(4)
        whole.pwrite(b"shared", 510)
        assert part.pread(4, 0) == b"ared"


def test_check_config_opens_each_export_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "exports.toml"
    path.write_text(NODE + EXPORT + '[exports.part]\nlayers = [{type = "raw", offset = 512}, {node = "disk"}]\n')
    said = run(sys.executable, "-m", "nbdserver", "check-config", "--open", path)
    assert said.endswith("2 exports, no errors\n")
