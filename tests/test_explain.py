"""``nbdserver explain``: the hops of a request, what becomes of the flag, and where the engine would fault."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nbdserver import explain
from nbdserver.cli import main
from nbdserver.explain import Unwritten, parse_range
from nbdserver.request import Vector
from tests.layers import luks_kit
from tests.serving import create, qemu_io

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """An overlay: 64 KiB from its base, 64 KiB of its own, 64 KiB of zeroes, and the base again."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * MIB)
    top = create(tmp_path / "top.qcow2", MIB, backing=base, backing_format="raw")
    qemu_io(top, "write -P 1 64k 64k", "write -z 128k 64k")
    return top


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, words)])


def told(*words: object) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def config(directory: Path, layers: str, more: str = "") -> Path:
    path = directory / "exports.toml"
    path.write_text(f"[exports.disk]\nlayers = [{layers}]\n{more}\n")
    return path


def test_a_read_goes_down_to_files_and_keeps_the_flag(chain: Path) -> None:
    answer = told(chain, "", "read", "60K+256K")
    hops = answer["hops"]
    assert [(hop["depth"], hop["role"], hop["layer"]) for hop in hops] == [
        (0, "", "qcow2"),
        (1, "backing", "raw"),
        (2, "file", "file"),
        (1, "file", "file"),
        (1, "backing", "raw"),
        (2, "file", "file"),
    ]
    assert all(hop["flags"] == ["REGISTERED_BUF"] for hop in hops)
    steps = [(step["offset"], step["length"], step["target"], step["flag"]) for step in hops[0]["steps"]]
    assert steps == [
        (60 * KIB, 4 * KIB, "backing", "kept"),
        (64 * KIB, 64 * KIB, "file", "kept"),
        (128 * KIB, 64 * KIB, "ZERO", "ends"),
        (192 * KIB, 124 * KIB, "backing", "kept"),
    ]
    assert hops[2]["steps"][0]["target"] == str(chain.with_name("base.raw"))
    assert sum(part["length"] for part in answer["engine"]) == 256 * KIB
    assert not any(part["faults"] for part in answer["engine"])


def test_a_write_faults_where_code_must_allocate(chain: Path) -> None:
    before = chain.read_bytes()
    answer = told(chain, chain.name, "write", "60K+256K")
    assert [(part["offset"], part["length"], part["faults"]) for part in answer["engine"]] == [
        (60 * KIB, 4 * KIB, True),
        (64 * KIB, 64 * KIB, False),
        (128 * KIB, 188 * KIB, True),
    ]
    first, second, _ = answer["hops"][0]["steps"]
    assert (first["target"], first["flag"], first["writable"]) == ("CODE", "bounced", False)
    assert (second["target"], second["flag"], second["writable"]) == ("file", "kept", True)
    assert chain.read_bytes() == before


def test_a_zero_request_has_no_memory_and_always_faults(chain: Path) -> None:
    answer = told(chain, "", "zero", "128K+64K")
    (hop,) = answer["hops"]
    assert hop["flags"] == ["MAY_UNMAP"]
    assert hop["steps"][0]["flag"] == "no memory"
    assert all(part["faults"] for part in answer["engine"])


def test_a_layer_with_code_throughout(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(MIB))
    path = config(tmp_path, '{type="blkverify"}, [{type="file",path="a"}], [{type="file",path="b"}]')
    answer = told(path, "disk", "write", "0+4K")
    (step,) = answer["hops"][0]["steps"]
    assert (step["target"], step["flag"]) == ("CODE", "kept")
    assert answer["engine"][0]["why"] == "CODE of blkverify"


def test_a_transform_is_run_by_the_engine_but_for_parts_of_sectors(tmp_path: Path) -> None:
    image = luks_kit.create(tmp_path / "disk.luks")
    luks_kit.secret(tmp_path)
    path = config(tmp_path, f'{{type="luks", key-file="{tmp_path / "key"}"}}, {{type="file", path="{image}"}}')
    whole = told(path, "disk", "write", "0+4K")
    assert whole["hops"][0]["steps"][0]["through"] == "aes-xts-plain64"
    assert whole["hops"][1]["steps"][0]["flag"] == "bounced"
    assert not whole["engine"][0]["faults"]
    assert told(path, "disk", "read", "1+4K")["engine"][0]["faults"]


def test_what_is_read_only_refuses_writes(disk: Path) -> None:
    answer = told(disk, "", "write", "0+512")  # probed as raw
    assert "EPERM" in answer["refused"]
    assert answer["hops"] == []
    assert "refused: " in run(disk, "", "zero", "0+512").stdout
    assert told(disk, "", "write", "0+512", "--format", "raw")["refused"] is None


def test_the_table_has_a_row_for_each_extent(chain: Path) -> None:
    lines = run(chain, "", "read", "0x10000+128K").stdout.splitlines()
    assert lines[0] == f"read of {128 * KIB} bytes at 0x10000 of export 'top.qcow2' ({MIB} bytes)"
    assert lines[2].split() == ["LAYER", "RANGE", "FLAGS", "LIVES", "AT", "FLAG", "WHY"]
    assert "qcow2" in lines[3]
    assert "writable" in lines[3]
    assert "ZERO" in lines[4]
    assert any("no fault" in line for line in lines)


def test_more_extents_than_anybody_reads_are_cut_off(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "EXTENTS_SHOWN_COUNT_MAX", 2)
    assert told(chain, "", "read", "0+512K")["is_cut_off"]
    assert "and more" in run(chain, "", "read", "0+512K").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("", "read", "1M+1"), "pass the end"),
        (("", "read", "0+0"), "at least 1 byte"),
        (("", "read", "4096"), "OFFSET+LENGTH"),
        (("", "read", "x+1"), "OFFSET+LENGTH"),
        (("", "trim", "0+1"), "trim"),
    ],
)
def test_requests_that_nobody_may_make(chain: Path, words: tuple[str, ...], message: str) -> None:
    done = run(chain, *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_an_unknown_export_is_refused_with_the_names_there_are(chain: Path) -> None:
    done = run(chain, "other", "read", "0+1")
    assert done.exit_code == 1
    assert "'top.qcow2'" in done.stderr


def test_running_servers_cannot_be_asked(chain: Path) -> None:
    done = run("nbd://localhost", "", "read", "0+1")
    assert done.exit_code == 2
    assert "running server" in done.stderr


@pytest.mark.parametrize(
    ("text", "wanted"), [("0+1", (0, 1)), ("1M+4K", (MIB, 4 * KIB)), ("0x10+0x20", (16, 32)), ("1KiB+1", (KIB, 1))]
)
def test_ranges(text: str, wanted: tuple[int, int]) -> None:
    assert parse_range(text) == wanted


def test_an_unwritten_file_shows_what_was_written_and_changes_nothing(disk: Path) -> None:
    before = disk.read_bytes()
    with disk.open("rb") as source:
        file = Unwritten(os.dup(source.fileno()), str(disk), False)
    model = bytearray(before)
    for offset, data in ((0, b"x" * 100), (50, b"y" * 10), (MIB, b"end")):
        file.write(offset, Vector.of(data))
        model[offset : offset + len(data)] = data
    file.zero(20, 40, may_unmap=True, no_fallback=False)
    model[20:60] = bytes(40)
    file.resize(MIB - 10)
    file.resize(MIB + 100)
    del model[MIB - 10 :]
    model += bytes(110)
    file.discard(0, 10)
    file.sync()
    vector = Vector.of(file.size)
    file.read(0, vector)
    assert vector.tobytes() == model
    assert sum(length for length, _ in file.status(0, file.size)) == file.size
    assert file.status(MIB + 1, 10) == [(10, True)]
    file.close()
    assert disk.read_bytes() == before
