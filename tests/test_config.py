"""exports.toml: what it means, and one test with its exact message for each cause of a refusal."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.detect_zeroes import DetectZeroes
from layers.file import File
from layers.luks import Luks
from layers.qcow2 import Qcow2
from nbdserver import config
from nbdserver.access import Rule
from nbdserver.bounds import Bounds
from nbdserver.config import DETECT_ZEROES, Config, EngineConfig, ExportConfig
from nbdserver.errors import ConfigError, ImageError
from nbdserver.extent import AIOS, CACHES
from nbdserver.handshake import TlsMode
from nbdserver.layer import Layer
from nbdserver.limits import GIB, MIB
from nbdserver.listening import ListenConfig
from nbdserver.uri import NbdUri

TOP_KEYS = "listen, roots, tls, limits, control, control_mode, engine, nodes, exports"
EXPORT = '[exports.vm]\nimage = "vm.img"\n'
FILE_LAYER = '{type = "file", path = "disk.img"}'

Load = Callable[[str], Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a text as ``exports.toml`` in the current directory."""
    monkeypatch.chdir(tmp_path)

    def load(text: str) -> Config:
        Path("exports.toml").write_text(text)
        return config.load("exports.toml")

    return load


def message(load: Load, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text)
    return str(caught.value).removeprefix("exports.toml: ")


def sketch(layer: Layer) -> str:
    """A stack in short: ``raw(file=file)``."""
    children = ", ".join(f"{role}={sketch(child)}" for role, child in layer.children())
    return f"{layer.type}({children})" if children else layer.type


# -- what it means -----------------------------------------------------------------------------------------------


def test_least_configuration(load: Load) -> None:
    wanted = load(EXPORT)
    [export] = wanted.exports
    assert (export.name, export.image, export.format, export.layers) == ("vm", "vm.img", None, None)
    assert (export.read_only, export.description, export.default) == (None, "", False)
    assert (wanted.listen, wanted.roots, wanted.engine) == ((), (), EngineConfig())


def test_full_configuration(load: Load) -> None:
    wanted = load("""
        listen = ["nbd://127.0.0.1", "nbd+unix:///?socket=/run/nbd.sock"]
        roots = ["/srv/images", "images"]
        [engine]
        workers = 3
        pool = "1G"
        backend = "threads"
        fault_threads = 5
        record = "recording"
        [exports."a b"]
        image = "/srv/a.img"
        format = "raw"
        read_only = true
        description = "Ä"
        default = true
    """)
    assert wanted.listen == ("nbd://127.0.0.1:10809", "nbd+unix:///?socket=/run/nbd.sock")
    assert wanted.roots == ("/srv/images", "images")
    assert wanted.engine == EngineConfig("threads", 3, GIB, 5, "recording")
    [export] = wanted.exports
    assert (export.name, export.image, export.format) == ("a b", "/srv/a.img", "raw")
    assert (export.read_only, export.description, export.default) == (True, "Ä", True)


def test_pool_may_be_an_integer(load: Load) -> None:
    assert load(f"[engine]\npool = {64 * MIB}\n{EXPORT}").engine.pool == 64 * MIB


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "exports.toml"
    path.write_text(f"""
        listen = ["nbd+unix:///?socket=nbd.sock"]
        roots = ["images"]
        engine.record = "recording"
        exports.disk.layers = [{FILE_LAYER}]
        exports.vm.image = "vm.img"
    """)
    wanted = config.load(str(path))
    assert wanted.listen == (f"nbd+unix:///?socket={tmp_path}/nbd.sock",)
    assert wanted.roots == (f"{tmp_path}/images",)
    assert wanted.engine.record == f"{tmp_path}/recording"
    layer, _ = wanted.exports[0].build()
    assert layer.filename == f"{tmp_path}/disk.img"
    assert wanted.exports[1].image == f"{tmp_path}/vm.img"


def test_empty_name_is_an_export(load: Load) -> None:
    [export] = load('[exports.""]\nimage = "vm.img"\ndefault = true').exports
    assert (export.name, export.default) == ("", False)


@pytest.mark.parametrize(
    ("layers", "stack"),
    [
        ('[{type = "file", path = "x"}]', "file"),
        ('[{type = "raw", offset = "1M"}, {type = "file", path = "x"}]', "raw(file=file)"),
        ('[{type = "raw", file = [{type = "raw"}, {type = "file", path = "x"}]}]', "raw(file=raw(file=file))"),
        ('[{type = "raw"}, {type = "raw"}, {type = "memory", size = 512}]', "raw(file=raw(file=memory))"),
        ('[{type = "raw"}, [{type = "raw"}, [{type = "memory", size = "1M"}]]]', "raw(file=raw(file=memory))"),
    ],
)
def test_stacks(load: Load, layers: str, stack: str) -> None:
    layer, read_only = load(f"[exports.x]\nlayers = {layers}").exports[0].build()
    assert sketch(layer) == stack
    assert not read_only


def test_layer_keys_reach_the_layer(load: Load) -> None:
    layer, _ = load(f'[exports.x]\nlayers = [{{type = "raw", offset = "1M"}}, {FILE_LAYER}]').exports[0].build()
    assert getattr(layer, "offset") == MIB  # noqa: B009


def test_every_build_makes_new_layers(load: Load) -> None:
    [export] = load(f"[exports.x]\nlayers = [{FILE_LAYER}]").exports
    assert export.build()[0] is not export.build()[0]


# -- stacks with several children (layers made up for this) ------------------------------------------------------


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers ``pair`` (children top and bottom), ``many`` (a list) and ``mixed``."""
    from dataclasses import dataclass, field

    from nbdserver import registry

    @dataclass(eq=False)
    class Pair(Layer):
        top: Layer
        bottom: Layer | None = None

    @dataclass(eq=False)
    class Many(Layer):
        some: list[Layer] = field(default_factory=list)

    @dataclass(eq=False)
    class Mixed(Layer):
        first_one: Layer
        rest: list[Layer]

    # What the annotations name, for typing.get_type_hints.
    monkeypatch.setitem(globals(), "Layer", Layer)
    classes: dict[str, type[Layer]] = {"pair": Pair, "many": Many, "mixed": Mixed}
    original, names = registry.layer_type, registry.names

    def layer_type(name: str) -> type[Layer]:
        if name in classes:
            classes[name].type = name
            return classes[name]
        return original(name)

    monkeypatch.setattr(registry, "layer_type", layer_type)
    monkeypatch.setattr(registry, "names", lambda: sorted([*names(), *classes]))


A, B, C = ('[{type = "memory", size = 1}]', f"[{FILE_LAYER}]", '[{type = "raw"}, {type = "memory", size = 2}]')


@pytest.mark.parametrize(
    ("layers", "stack"),
    [
        (f'[{{type = "pair"}}, {FILE_LAYER}]', "pair(top=file)"),
        (f'[{{type = "pair"}}, {A}, {C}]', "pair(top=memory, bottom=raw(file=memory))"),
        (f'[{{type = "pair", bottom = {A}}}, {FILE_LAYER}]', "pair(top=file, bottom=memory)"),
        (f'[{{type = "raw"}}, {{type = "pair"}}, {A}, {B}]', "raw(file=pair(top=memory, bottom=file))"),
        (f'[{{type = "many"}}, {A}, {B}, {C}]', "many(some.0=memory, some.1=file, some.2=raw(file=memory))"),
        (f'[{{type = "many"}}, {FILE_LAYER}]', "many(some.0=file)"),
        (f'[{{type = "many", some = [{A}, {B}]}}]', "many(some.0=memory, some.1=file)"),
        (f'[{{type = "mixed"}}, {A}, {B}, {A}]', "mixed(first_one=memory, rest.0=file, rest.1=memory)"),
        (f'[{{type = "mixed", first-one = {A}, rest = [{B}]}}]', "mixed(first_one=memory, rest.0=file)"),
        (f'[{{type = "mixed", first_one = {A}, rest = []}}]', "mixed(first_one=memory)"),
    ],
)
@pytest.mark.usefixtures("family")
def test_stacks_with_several_children(load: Load, layers: str, stack: str) -> None:
    layer, _ = load(f"[exports.x]\nlayers = {layers}").exports[0].build()
    assert sketch(layer) == stack


@pytest.mark.parametrize(
    ("layers", "cause"),
    [
        (f'[{{type = "pair"}}, {A}, {B}, {C}]', "[0]]: the layer 'pair' has 2 children (top, bottom), 3 follow it"),
        (f'[{{type = "pair", top = {A}}}, {FILE_LAYER}]', "[0]]: top: is given by its key and again by what follows "),
        (f'[{{type = "mixed", first_one = {A}, first-one = {A}}}]', "[0]]: first-one: is given twice"),
        (f'[{{type = "many", some = {A}}}]', "[0].some[0]]: found a table, allowed is a list of layers"),
        ('[{type = "many", some = 5}]', "[0].some]: found 5, allowed is a list of stacks"),
        (f'[{{type = "pair"}}, {A}, {FILE_LAYER}]', "[2]]: a layer follows a nested list; the lists of a layer's "),
    ],
)
@pytest.mark.usefixtures("family")
def test_stacks_with_several_children_refused(load: Load, layers: str, cause: str) -> None:
    assert message(load, f"[exports.x]\nlayers = {layers}").startswith(f"[exports.x.layers{cause}")


# -- the file ----------------------------------------------------------------------------------------------------


def test_missing_file() -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("/nonexistent/exports.toml")
    assert str(caught.value) == "/nonexistent/exports.toml: cannot be read: No such file or directory"


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.load(str(tmp_path))


def test_not_toml(load: Load) -> None:
    assert message(load, "[exports").startswith("is not TOML: ")
    assert "line 1" in message(load, "= 5\n")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"# \xff")
    with pytest.raises(ConfigError) as caught:
        config.load(str(path))
    assert str(caught.value) == f"{path}: is not UTF-8: invalid start byte at byte 2"


def test_too_long(load: Load) -> None:
    assert message(load, "#" * (4 * MIB + 1)) == "is longer than 4194304 bytes, which is no configuration"


def test_deep_nesting(load: Load) -> None:
    assert message(load, "x = " + "[" * 100_000) == "is nested too deeply"


def test_enormous_integer(load: Load) -> None:
    assert message(load, "x = " + "9" * 5000).startswith("is not TOML: ")


ALLOWED_EXPORT = (
    "Allowed are: image, format, layers, read_only, description, default, tls, access, template, "
    "cache, aio, discard, detect_zeroes, bitmaps, allocation_depth, snapshot, key_file, key_env, key_fd"
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", 'exports nothing; an export is a table such as [exports.vm] with image = "vm.qcow2"'),
        ("[exports]", 'exports nothing; an export is a table such as [exports.vm] with image = "vm.qcow2"'),
        ("exports = 5", "[exports]: found 5, allowed is a table"),
        (
            f"[engin]\n{EXPORT}",
            f"engin: unknown key; did you mean engine? Allowed are: {TOP_KEYS}",
        ),
        (
            f"zzz = 1\n{EXPORT}",
            f"zzz: unknown key; Allowed are: {TOP_KEYS}",
        ),
        # listen
        (
            f'listen = "nbd://h"\n{EXPORT}',
            'listen: found "nbd://h", allowed is a list of strings, or of tables such as {uri = ...}',
        ),
        (
            f"listen = [10809]\n{EXPORT}",
            "listen: found 10809 in the list, allowed is a list of strings, or of tables such as {uri = ...}",
        ),
        (f"listen = []\n{EXPORT}", "listen: found an empty list; leave the key out for the default"),
        (
            f'listen = ["nbds://h"]\n{EXPORT}',
            "listen: 'nbds://h' asks for TLS, which is begun on any address: say nbd, and [tls] mode (or --tls)",
        ),
        (
            f'listen = ["nbd://h/vm"]\n{EXPORT}',
            "listen: 'nbd://h/vm' names the export 'vm': a listen address serves every export",
        ),
        (f"listen = {['nbd://h'] * 65}\n{EXPORT}", "has 65 listen, allowed are 64"),
        # roots
        (f"roots = true\n{EXPORT}", "roots: found true, allowed is a list of strings"),
        (f'roots = [""]\n{EXPORT}', 'roots: found "" in the list, allowed is a list of strings'),
        # engine
        (f"engine = 1\n{EXPORT}", "[engine]: found 1, allowed is a table"),
        (
            f"[engine]\nworker = 1\n{EXPORT}",
            "[engine]: worker: unknown key; did you mean workers? "
            "Allowed are: backend, workers, pool, fault_threads, record",
        ),
        (f"[engine]\nworkers = 0\n{EXPORT}", "[engine]: workers: found 0, allowed is an integer from 1 to 256"),
        (f"[engine]\nworkers = true\n{EXPORT}", "[engine]: workers: found true, allowed is an integer from 1 to 256"),
        (f"[engine]\nworkers = 2.0\n{EXPORT}", "[engine]: workers: found 2.0, allowed is an integer from 1 to 256"),
        (
            f"[engine]\nfault_threads = 257\n{EXPORT}",
            "[engine]: fault_threads: found 257, allowed is an integer from 1 to 256",
        ),
        (f'[engine]\npool = "1M"\n{EXPORT}', '[engine]: pool: found "1M", allowed is a size from 32M to 1T'),
        (f"[engine]\npool = 0\n{EXPORT}", "[engine]: pool: found 0, allowed is a size from 32M to 1T"),
        (
            f'[engine]\npool = "lots"\n{EXPORT}',
            '[engine]: pool: found "lots", allowed is a size in bytes (an integer from 0, or a string such as '
            '"64K", "1G")',
        ),
        (
            f'[engine]\nbackend = "uring"\n{EXPORT}',
            '[engine]: backend: found "uring", allowed is "auto" or "io_uring" or "threads"',
        ),
        (f"[engine]\nrecord = false\n{EXPORT}", "[engine]: record: found false, allowed is a string"),
        # exports
        ('exports.vm = "vm.qcow2"', '[exports.vm]: found "vm.qcow2", allowed is a table'),
        ("[exports.vm]", "[exports.vm]: has neither image nor layers; an export needs one of them"),
        (f"{EXPORT}layers = []", "[exports.vm]: has both image and layers; an export needs one of them"),
        (f"{EXPORT}imag = 1", f"[exports.vm]: imag: unknown key; did you mean image? {ALLOWED_EXPORT}"),
        (
            f"{EXPORT}read-only = true",
            f"[exports.vm]: read-only: unknown key; did you mean read_only? {ALLOWED_EXPORT}",
        ),
        (
            '[exports.vm.qcow2]\nimage = "vm.qcow2"',
            '[exports.vm]: qcow2: unknown table; a name with a dot in it is quoted, as in [exports."vm.qcow2"]',
        ),
        ("[exports.vm]\nimage = 5", "[exports.vm]: image: found 5, allowed is a string"),
        (
            '[exports.vm]\nimage = ""',
            '[exports.vm]: image: found "", allowed are 1 to 4096 characters, none of them NUL',
        ),
        (
            '[exports.vm]\nimage = "a\\u0000b"',
            r'[exports.vm]: image: found "a\u0000b", allowed are 1 to 4096 characters, none of them NUL',
        ),
        (f'{EXPORT}read_only = "yes"', '[exports.vm]: read_only: found "yes", allowed is true or false'),
        (f"{EXPORT}default = 1", "[exports.vm]: default: found 1, allowed is true or false"),
        (f"{EXPORT}description = 1979-05-27", '[exports.vm]: description: found "1979-05-27", allowed is a string'),
        (
            f"{EXPORT}description = '{'é' * 2049}'",
            "[exports.vm]: its description is 4098 bytes long in UTF-8; NBD allows 4096",
        ),
        (
            f"{EXPORT}format = 'memory'",
            "[exports.vm]: format: found \"memory\": the layer 'memory' is no image format "
            "(one needs a file and nothing else)",
        ),
        (
            f"[exports.vm]\nlayers = [{FILE_LAYER}]\nformat = 'raw'",
            '[exports.vm]: format: goes with image; in layers it is the layer\'s type, as in {type = "qcow2"}',
        ),
        (
            f'{EXPORT}default = true\n[exports.b]\nimage = "b"\ndefault = true',
            "[exports.b]: default: [exports.vm] is the default export already, there can be one",
        ),
        (
            f'{EXPORT}default = true\n[exports.""]\nimage = "b"',
            '[exports.""]: [exports.vm] is the default export already, there can be one',
        ),
        (
            f'[exports."{"n" * 4097}"]\nimage = "b"',
            f"[exports.{'n' * 4097}]: the export's name is 4097 bytes long in UTF-8; NBD allows 4096",
        ),
        (
            '[exports."a\\u0000b"]\nimage = "b"',
            r'[exports."a\u0000b"]: the export' + "'s name contains a NUL character",
        ),
        # layers
        ("[exports.x]\nlayers = 5", "[exports.x]: layers: found 5, allowed is a list of layers"),
        ("[exports.x]\nlayers = []", "[exports.x.layers]: is empty; a stack has at least one layer"),
        ('[exports.x]\nlayers = ["raw"]', '[exports.x.layers[0]]: found "raw", allowed is a table'),
        (
            f"[exports.x]\nlayers = [[{FILE_LAYER}]]",
            "[exports.x.layers[0]]: a stack begins with a layer, not with a list",
        ),
        (
            f"[exports.x]\nlayers = [{FILE_LAYER}, {FILE_LAYER}]",
            "[exports.x.layers[0]]: the layer 'file' has no children, but others follow it; it comes last",
        ),
        (
            f'[exports.x]\nlayers = [{{type = "raw", file = [{FILE_LAYER}]}}, {FILE_LAYER}]',
            "[exports.x.layers[0]]: file: is given by its key and again by what follows the layer",
        ),
        (
            f'[exports.x]\nlayers = [{{type = "raw", file = {FILE_LAYER}}}]',
            "[exports.x.layers[0].file]: found a table, allowed is a list of layers",
        ),
        (
            '[exports.x]\nlayers = [{type = "raw", file = []}]',
            "[exports.x.layers[0].file]: is empty; a stack has at least one layer",
        ),
        (
            '[exports.x]\nlayers = [{type = "raw"}]',
            "[exports.x.layers[0]]: file: missing: the layer 'raw' needs a layer",
        ),
        (
            f'[exports.x]\nlayers = [{{type = "raw", offset = "1X"}}, {FILE_LAYER}]',
            "[exports.x.layers[0]]: offset: found '1X', allowed is a size in bytes (an integer from 0, or a string "
            'such as "64K", "1G")',
        ),
        (
            f"[exports.x]\nlayers = {[{}] * 257}".replace("{}", FILE_LAYER),
            "[exports.x.layers]: has 257 layers, allowed are 256",
        ),
        (
            '[exports.x]\nimage = "x"\ncache = "directsync"',
            '[exports.x]: cache: found "directsync", allowed is "writeback" or "writethrough" or "none" or "unsafe"',
        ),
        (
            f'[exports.x]\ncache = "none"\nlayers = [{FILE_LAYER}]',
            "[exports.x]: cache: goes with image; in layers it is a key of the layer file",
        ),
        (
            f'[exports.x]\ndetect_zeroes = "on"\nlayers = [{FILE_LAYER}]',
            '[exports.x]: detect_zeroes: goes with image; in layers it is a layer, {type = "detect-zeroes"}',
        ),
        (
            '[exports.x]\nimage = "x"\nsnapshot = "s"\nread_only = false',
            "[exports.x]: read_only: found false, but a snapshot is served read-only",
        ),
        (
            f'[exports.x]\nsnapshot = "s"\nlayers = [{FILE_LAYER}]',
            "[exports.x]: snapshot: goes with image; in layers it is a key of the layer qcow2, or a layer, "
            '{type = "snapshot"}',
        ),
        (
            '[exports.x]\nimage = "x"\ndiscard = "ignore"\ndetect_zeroes = "unmap"',
            '[exports.x]: detect_zeroes: found "unmap", which goes with discard = "unmap" only',
        ),
        (
            '[exports.x]\nimage = "x"\naio = "io_uring"\n[engine]\nbackend = "threads"',
            '[exports.x]: aio: found "io_uring", but the engine\'s backend is "threads"',
        ),
        (
            '[exports."x*"]\ntemplate = {image = "x", directory = "d"}\ncache = "none"',
            '[exports."x*"]: cache: is not for a pattern; what its exports are is said in template',
        ),
    ],
)
def test_refused(load: Load, text: str, cause: str) -> None:
    assert message(load, text) == cause


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (
            f"{EXPORT}format = 'rwa'",
            "[exports.vm]: format: found \"rwa\": there is no layer 'rwa'; did you mean 'raw'?",
        ),
        (
            '[exports.x]\nlayers = [{type = "fil"}]',
            "[exports.x.layers[0]]: type: there is no layer 'fil'; did you mean 'file'?",
        ),
        ("[exports.x]\nlayers = [{}]", "[exports.x.layers[0]]: type: missing; allowed are "),
        ("[exports.x]\nlayers = [{type = 1}]", "[exports.x.layers[0]]: type: found 1; allowed are "),
        (
            f'[exports.x]\nlayers = [{{type = "raw", ofset = 1}}, {FILE_LAYER}]',
            "[exports.x.layers[0]]: ofset: the layer 'raw' has no such key; did you mean 'offset'?",
        ),
        (
            "[exports.x]\nlayers = " + '[{type = "raw", file = ' * 17 + f"[{FILE_LAYER}]" + "}]" * 17,
            "[exports.x.layers[0].file[0].file",
        ),
    ],
)
def test_refused_with_what_there_is(load: Load, text: str, start: str) -> None:
    assert message(load, text).startswith(start)


def test_lists_nest_only_so_deep(load: Load) -> None:
    text = "[exports.x]\nlayers = " + '[{type = "raw"}, ' * 20 + f"[{FILE_LAYER}]" + "]" * 20
    assert message(load, text).endswith("lists nest deeper than 16")


def test_too_many_exports(load: Load) -> None:
    text = "".join(f'[exports.e{number}]\nimage = "x"\n' for number in range(4097))
    assert message(load, text) == "has 4097 exports, allowed are 4096"


toml_values = st.recursive(
    st.one_of(
        st.booleans(), st.integers(-2, 1 << 70), st.floats(), st.text(max_size=8), st.sampled_from(["raw", "file"])
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "path", "file", "size", "offset", "image", "layers", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["image", "format", "layers", "read_only", "description", "default"]), toml_values)
)
def test_any_export_is_understood_or_a_config_error(values: dict[str, object]) -> None:
    try:
        list(config._exports({"x": values}, "exports.toml", {}))
    except ConfigError as error:
        assert str(error).startswith("exports.toml: ")


# -- probing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def raw_image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return str(path)


@pytest.mark.parametrize("read_only", [None, True])
def test_probed_raw_is_read_only(raw_image: str, read_only: bool | None) -> None:
    layer, is_read_only = ExportConfig("x", raw_image, read_only=read_only).build()
    assert (sketch(layer), is_read_only) == ("raw(file=file)", True)


def test_raw_that_was_asked_for_is_writable(raw_image: str) -> None:
    layer, is_read_only = ExportConfig("x", raw_image, "raw").build()
    assert (sketch(layer), is_read_only) == ("raw(file=file)", False)


def test_raw_that_was_asked_for_may_be_read_only(raw_image: str) -> None:
    assert ExportConfig("x", raw_image, "raw", read_only=True).build()[1]


def test_writable_probed_raw_is_refused(load: Load, raw_image: str) -> None:
    [export] = load('[exports.vm]\nimage = "disk.img"\nread_only = false').exports
    with pytest.raises(ConfigError) as caught:
        export.build()
    assert str(caught.value) == (
        "exports.toml: [exports.vm]: read_only: found false, but disk.img has no format and was probed as raw, which "
        'is served read-only: a guest could make it look like another format. If it is a raw disk, say format = "raw"'
    )


def test_format_that_no_layer_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.cloop"
    path.write_bytes(b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop".ljust(4096, b"\0"))
    with pytest.raises(ImageError) as caught:
        ExportConfig("x", str(path)).build()
    assert str(caught.value) == f"{path}: is a cloop image; no layer reads that yet"


def test_missing_image_is_found_out_when_it_is_built(load: Load) -> None:
    [export] = load(EXPORT).exports
    with pytest.raises(ImageError, match="No such file"):
        export.build()


# -- images on the command line ----------------------------------------------------------------------------------


def test_one_image_is_the_default_export() -> None:
    [export] = config.of_images(["/srv/a b.img"], format="raw", read_only=True).exports
    assert (export.name, export.image, export.default) == ("a b.img", "/srv/a b.img", True)
    assert (export.format, export.read_only) == ("raw", True)


def test_of_several_images_none_is_the_default_export() -> None:
    exports = config.of_images(["a/x", "a/y"]).exports
    assert [(export.name, export.default) for export in exports] == [("x", False), ("y", False)]


@pytest.mark.parametrize(
    ("paths", "cause"),
    [
        (
            ["a/x.img", "b/x.img"],
            "a/x.img and b/x.img are both called x.img: export them under different names, in a configuration file",
        ),
        (["images/"], "'images/' is no image: it ends with a slash"),
        (
            [os.fsdecode(b"\xff")],
            f"{os.fsdecode(b'%c' % 255)}: the file's name is not valid Unicode, and so cannot be sent as UTF-8",
        ),
        ([f"i{number}" for number in range(4097)], "has 4097 images, allowed are 4096"),
    ],
)
def test_images_refused(paths: list[str], cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.of_images(paths)
    assert str(caught.value) == cause


# -- how an image is used ------------------------------------------------------------------------------------------


def test_an_image_is_used_as_its_keys_say(load: Load, raw_image: str) -> None:
    text = f'image = "{raw_image}"\nformat = "raw"\ncache = "none"\naio = "threads"\ndetect_zeroes = "unmap"'
    (export,) = load(f"[exports.x]\n{text}").exports
    layer, _ = export.build()
    assert sketch(layer) == "detect-zeroes(file=raw(file=file))"
    assert isinstance(layer, DetectZeroes) and layer.detect_zeroes == "unmap"
    file = layer.file.file  # type: ignore[attr-defined]
    assert (file.cache, file.aio) == ("none", "threads")
    assert export.discard == "unmap"


def test_the_key_of_an_image(load: Load, tmp_path: Path, raw_image: str) -> None:
    (export,) = load('[exports.x]\nimage = "x"\nformat = "qcow2"\nkey_file = "x.key"').exports
    layer, _ = export.build()
    assert isinstance(layer, Qcow2) and layer.key_file in ("x.key", str(tmp_path / "x.key"))
    (export,) = load('[exports.x]\nimage = "x"\nformat = "luks"\nkey_fd = 3').exports
    layer, _ = export.build()
    assert isinstance(layer, Luks) and (layer.key_file, layer.key_fd) == (None, 3)
    (export,) = load(f'[exports.x]\nimage = "{raw_image}"\nformat = "raw"\nkey_env = "KEY"').exports
    with pytest.raises(ConfigError, match=r"\[exports.x\]: key_env: .* 'raw' image, which is not encrypted"):
        export.build()


def test_a_snapshot_is_served_read_only(load: Load, raw_image: str) -> None:
    (export,) = load('[exports.x]\nimage = "x"\nformat = "qcow2"\nsnapshot = "before"').exports
    layer, read_only = export.build()
    assert isinstance(layer, Qcow2) and layer.snapshot == "before" and read_only and export.read_only
    (export,) = load(f'[exports.x]\nimage = "{raw_image}"\nformat = "raw"\nsnapshot = "before"').exports
    with pytest.raises(ConfigError, match=r"\[exports.x\]: snapshot: .* 'raw' image, which has no internal snapshots"):
        export.build()


def test_what_is_not_said_is_as_the_layers_have_it(load: Load, raw_image: str) -> None:
    text = f'image = "{raw_image}"\nformat = "raw"\ndetect_zeroes = "off"\ndiscard = "ignore"'
    (export,) = load(f"[exports.x]\n{text}").exports
    layer, _ = export.build()
    assert sketch(layer) == "raw(file=file)"
    file = layer.file  # type: ignore[attr-defined]
    assert (file.cache, file.aio) == (File("").cache, File("").aio)
    assert export.discard == "ignore"


def test_the_words_are_those_of_the_layers() -> None:
    file, zeroes = typing.get_type_hints(File), typing.get_type_hints(DetectZeroes)
    assert typing.get_args(file["cache"]) == CACHES
    assert typing.get_args(file["aio"]) == AIOS
    assert typing.get_args(zeroes["detect_zeroes"]) == DETECT_ZEROES


# -- ways in, rules, limits ----------------------------------------------------------------------------------------


def test_listeners_with_rules(load: Load, tmp_path: Path) -> None:
    wanted = load(f"""
        [tls]
        psk = "keys.psk"
        [[listen]]
        uri = "nbd+unix:///?socket=nbd.sock"
        mode = 0o660
        owner = "root"
        group = 36
        tls = "off"
        access = {{ users = ["root", 1000], groups = [36] }}
        [[listen]]
        uri = "nbd://[::]"
        access = {{ addresses = ["10.0.0.0/8", "fd00::/8"], deny = ["10.0.0.13"], identities = ["alice"] }}
        {EXPORT}
        """)
    socket, tcp = wanted.listen
    assert socket == ListenConfig(
        NbdUri(socket="nbd.sock"), 0o660, 0, 36, TlsMode.OFF, Rule(users=(0, 1000), groups=(36,))
    )
    assert isinstance(tcp, ListenConfig)
    assert (tcp.address, tcp.mode, tcp.tls) == (NbdUri("::"), None, None)
    assert tcp.access.as_json() == {
        "addresses": ["10.0.0.0/8", "fd00::/8"],
        "deny": ["10.0.0.13/32"],
        "identities": ["alice"],
    }


def test_an_address_and_a_table_may_stand_side_by_side(load: Load) -> None:
    plain, table = load(f'listen = ["nbd://h", {{uri = "nbd+vsock:///"}}]\n{EXPORT}').listen
    assert (plain, table) == ("nbd://h:10809", ListenConfig(NbdUri(cid=(1 << 32) - 1)))


def test_whom_an_export_is_for(load: Load) -> None:
    [export] = load(f'[tls]\npsk = "keys"\n{EXPORT}access = {{users = [7], subjects = ["CN=*"]}}').exports
    assert export.access == Rule(users=(7,), subjects=("CN=*",))
    assert export.needs_tls


def test_limits(load: Load) -> None:
    assert load(EXPORT).bounds == Bounds()
    wanted = load(f"""
        [limits]
        connections = 100
        connections_per_peer = 10
        requests_per_connection = 16
        memory_per_connection = "8M"
        reply_memory = "16M"
        handshake_timeout = 2.5
        idle_timeout = 600
        keepalive = 60
        {EXPORT}""")
    assert wanted.bounds == Bounds(100, 10, 16, 8 * MIB, 16 * MIB, 2.5, 600.0, 60)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[[listen]]\nmode = 0o600\n", "[listen[0]]: uri: missing: where to listen, as an NBD URI"),
        ('[[listen]]\nuri = "nbd://h"\nmode = 0o600\n', "[listen[0]]: mode: is for a Unix socket"),
        ('[[listen]]\nuri = "nbd://h/x"\n', "[listen[0]]: uri: 'nbd://h/x' names the export 'x'"),
        (
            '[[listen]]\nuri = "nbd+unix:///?socket=s"\nmode = 660\n',
            "[listen[0]]: mode: found 660, allowed is an integer from 0 to 511",
        ),
        (
            '[[listen]]\nuri = "nbd+unix:///?socket=s"\nowner = "nobody-of-this-name"\n',
            '[listen[0]]: owner: found "nobody-of-this-name", allowed is a user that this machine knows, or its id',
        ),
        ('[[listen]]\nuri = "nbd://h"\ntls = "required"\n', '[listen[0]]: tls: found "required", but the server does'),
        (
            '[[listen]]\nuri = "nbd://h"\naccess = {subjects = ["*"]}\n',
            "[listen[0]]: access: has subjects or identities, but the server does not use TLS",
        ),
        (
            '[[listen]]\nuri = "nbd://h"\naccess = {adresses = ["::1"]}\n',
            "[listen[0].access]: adresses: unknown key; did you mean addresses?",
        ),
        (
            '[[listen]]\nuri = "nbd://h"\naccess = {addresses = ["10.0.0.1/8"]}\n',
            '[listen[0].access]: addresses: found "10.0.0.1/8", allowed is an IP address or network',
        ),
        (
            '[[listen]]\nuri = "nbd://h"\naccess = {users = []}\n',
            "[listen[0].access]: users: found an empty list, which nobody is in",
        ),
        ('listen = [{uri = "nbd://h", key = 1}]\n', "[listen[0]]: key: unknown key"),
        ("[limits]\nconnections = 0\n", "[limits]: connections: found 0, allowed is an integer from 1 to 1048576"),
        (
            "[limits]\nidle_timeout = 0\n",
            "[limits]: idle_timeout: found 0, allowed is a number of seconds, more than 0",
        ),
        ("[limits]\nidle_timeout = nan\n", "[limits]: idle_timeout: found NaN, allowed is a number of seconds"),
        ('[limits]\nreply_memory = "1K"\n', '[limits]: reply_memory: found "1K", allowed is a size from 1M to 1T'),
        ("[limits]\nidle = 5\n", "[limits]: idle: unknown key"),
    ],
)
def test_ways_and_limits_refused(load: Load, text: str, cause: str) -> None:
    assert message(load, text + EXPORT).startswith(cause)


def test_an_export_for_subjects_needs_tls(load: Load) -> None:
    cause = "[exports.vm]: access: has subjects or identities, but the server does not use TLS: see [tls]"
    assert message(load, f'{EXPORT}access = {{subjects = ["*"]}}') == cause
