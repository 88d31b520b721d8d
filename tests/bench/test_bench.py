"""scripts/bench itself: what it makes of what clients say, its ratios, its table and its picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.amounts import Amount
from tests.bench.clients import Done, fio_result
from tests.bench.contest import Measured, Sample, cpu_over_best, rate_over_best
from tests.bench.plot import svg, x_of
from tests.bench.processes import cpu_seconds, resident
from tests.bench.report import Compared, Grown, Results, as_json, markdown
from tests.bench.rows import Wanted
from tests.bench.servers import ROOT, SERVERS, Disk

OURS = Measured("nbdserver", [Sample(300, 2e-6), Sample(100, 4e-6), Sample(200, 3e-6)])
FAST = Measured("fast", [Sample(100, 9e-6), Sample(100, 8e-6), Sample(150, 9e-6)])
THRIFTY = Measured("thrifty", [Sample(50, 4e-6), Sample(50, 4e-6), Sample(50, 4e-6)])


def test_fio_is_understood() -> None:
    job = {"error": 0, "read": {"total_ios": 500, "iops": 250.0}, "write": {"total_ios": 0, "iops": 0}}
    output = "fio: a line of its own\n" + json.dumps({"jobs": [job]})
    assert fio_result(output, read=True) == Done(500, 2)
    with pytest.raises(RuntimeError, match="did nothing"):
        fio_result(output, read=False)
    with pytest.raises(RuntimeError, match="error 5"):
        fio_result(json.dumps({"jobs": [{**job, "error": 5}]}), read=True)


def test_ratios_are_taken_round_by_round() -> None:
    rate = rate_over_best(OURS, [FAST, THRIFTY])
    # 3, 1 and 1.33: not the medians' ratio, which is 2.
    assert (rate.to, rate.low, rate.high) == ("fast", 1, 3)
    assert rate.median == pytest.approx(4 / 3)


def test_the_cheapest_peer_need_not_be_the_fastest() -> None:
    cpu = cpu_over_best(OURS, [FAST, THRIFTY])
    assert (cpu.to, cpu.median) == ("thrifty", 0.75)


def test_the_table_says_what_is_not_met() -> None:
    results = Results(rounds=3, seconds=1)
    results.compared.append(Compared("good", OURS, [FAST], Wanted(1.2, 0.5)))
    assert results.are_met()
    results.compared.append(Compared("slow", OURS, [FAST, THRIFTY], Wanted(2, 0.8)))
    results.grown.append(Grown("growing", [OURS, FAST], 0.9))
    results.amounts.append(Amount("memory", 70, "MiB", 60))
    text = markdown(results)
    assert "| good | 1.33 (1.00-3.00) | >= 1.2 | 0.33 (0.22-0.50) | <= 0.5 | fast | 200/s | 3.0 us |" in text
    assert "| slow | **1.33 (1.00-3.00)** | >= 2 | 0.75 (0.50-1.00) | <= 0.8 | fast; CPU: thrifty |" in text
    assert "|  | fast | **0.75 (0.33-1.00)** | >= 0.90 |" in text
    assert "| memory | **70 MiB** | 60 MiB |" in text
    assert not results.are_met()
    told = json.loads(json.dumps(as_json(results)))
    assert [row["met"] for row in told["compared"]] == [True, False]
    assert told["compared"][0]["ours"]["samples"][0] == {"rate": 300, "cpu": 2e-6}


def test_the_plot_is_a_picture() -> None:
    picture = ElementTree.fromstring(svg([Compared("a < b", OURS, [FAST]), Compared("b", OURS, [THRIFTY])]))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    circles = [float(circle.get("cx", "nan")) for circle in picture.iter("{http://www.w3.org/2000/svg}circle")]
    assert x_of(4 / 3) == pytest.approx(circles[2], abs=0.1)  # after the two of the legend
    # What is beyond the scale is still in the picture.
    assert x_of(0.001) == x_of(1 / 16) < x_of(1) < x_of(16) == x_of(1000)


def test_cpu_time_counts_threads_and_children() -> None:
    spin = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    code = f"{spin}import subprocess, sys\nsubprocess.run([sys.executable, '-c', {spin!r}])\nprint()\ninput()\n"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.4 <= cpu_seconds(process.pid) < 2
        assert 1 << 20 < resident(process.pid) < 100 << 20
        process.communicate(b"\n")


def test_cpu_time_is_finer_than_ticks() -> None:
    before = cpu_seconds(os.getpid())
    end = time.thread_time() + 0.001
    while time.thread_time() < end:
        pass
    assert 0.001 <= cpu_seconds(os.getpid()) - before


@pytest.mark.parametrize(
    ("disk", "servers"),
    [
        (Disk(Path("d")), {"nbdserver", "qemu-nbd threads", "qemu-nbd io_uring", "nbdkit", "nbd-server"}),
        (Disk(Path("d"), direct=True), {"nbdserver", "qemu-nbd threads", "qemu-nbd io_uring", "qemu-nbd native"}),
        (Disk(Path("d"), "qcow2"), {"nbdserver", "qemu-nbd threads", "qemu-nbd io_uring"}),
        (Disk(Path("d"), "toml"), {"nbdserver"}),
    ],
)
def test_servers_are_asked_for_what_they_can(disk: Disk, servers: set[str]) -> None:
    assert {server.name for server in SERVERS if server.serves(disk)} == servers & {
        server.name for server in SERVERS if server.is_installed()
    }


def test_one_row(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "--quick", "--rounds=1", "--size=16", "--row=raw-4k-read-d16"]
    places = ["--directory", str(tmp_path), "--json", str(tmp_path / "json"), "--svg", str(tmp_path / "svg")]
    done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    # 1: the row is slower than is wanted of it, which one short round cannot tell.
    assert done.returncode in (0, 1), done.stderr
    (row,) = json.loads((tmp_path / "json").read_text())["compared"]
    assert row["ours"]["samples"][0]["rate"] > 0
    assert f"| {row['name']} |" in done.stdout
    ElementTree.parse(tmp_path / "svg")
    assert not list(tmp_path.glob("nbdserver-bench-*"))


def test_a_row_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "--row=nonsense", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "no row is called nonsense" in done.stderr
