"""Every tool in every combination: on both backends, over TCP and Unix sockets, in plain text, with certificates and
with pre-shared keys. (What each tool does beyond that is in `test_tools`, `test_libnbd` and `test_tls`.)"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest

from nbdserver import tls
from nbdserver.testing import NbdServers, ServerProcess
from nbdserver.uri import parse
from tests.serving import BACKENDS, SEED, eventually, run, run_json

SIZE = 4 << 20
DATA = random.Random(SEED).randbytes(1 << 20)

#: How TLS is begun: not at all, with certificates, with keys.
SECURITY = ("plain", "x509", "psk")


@dataclasses.dataclass(frozen=True)
class Way:
    """A server, and how each kind of tool is told to reach it."""

    server: ServerProcess
    security: str
    pki: Path

    @property
    def libnbd(self) -> str:
        """As a URI for libnbd's tools, which may read local files."""
        if self.security == "plain":
            return self.server.uri()
        uri = self.default
        option = {"x509": f"tls-certificates={self.pki}", "psk": f"tls-psk-file={self.pki / tls.PSK}"}[self.security]
        return uri + ("&" if "?" in uri else "?") + option

    @property
    def default(self) -> str:
        """As a URI for programs that may not: what belongs to TLS is where libnbd looks by itself."""
        address = parse(self.server.uri())
        scheme = "nbd" if self.security == "plain" else "nbds"
        if address.socket is not None:
            return f"{scheme}+unix://client@/?socket={quote(address.socket)}"
        return f"{scheme}://client@localhost:{address.port}/"

    @property
    def qemu(self) -> list[str]:
        """As arguments of QEMU's tools."""
        address = parse(self.server.uri())
        where = f"path={address.socket}" if address.socket else f"host=localhost,port={address.port}"
        options = f"driver=nbd,{where}"
        if self.security == "plain":
            return ["--image-opts", options]
        secret = {"x509": "tls-creds-x509,endpoint=client", "psk": "tls-creds-psk,endpoint=client,username=client"}
        name = ",tls-hostname=localhost" if address.socket and self.security == "x509" else ""
        creds = ["--object", f"{secret[self.security]},id=tls0,dir={self.pki}"]
        return [*creds, "--image-opts", f"{options},tls-creds=tls0{name}"]


COMBINATIONS = list(itertools.product(BACKENDS, ("unix", "tcp"), SECURITY))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    tls.init(directory, hosts=["localhost"], client="client")
    return directory


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def way(request: pytest.FixtureRequest, pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    backend, transport, security = request.param
    disk = tmp_path_factory.mktemp("matrix") / "disk.raw"
    disk.write_bytes(DATA + bytes(SIZE - len(DATA)))
    options = {
        "plain": [],
        "x509": ["--tls-certificates", str(pki)],
        "psk": ["--tls-psk", str(pki / tls.PSK)],
    }
    with tempfile.TemporaryDirectory(prefix="nbd-") as directory, ExitStack() as stack:
        servers = NbdServers(Path(directory), stack)
        arguments = ("-f", "raw", "--backend", backend, *options[security], disk)
        yield Way(servers.process(*arguments, tcp=transport == "tcp"), security, pki)


def test_nbdinfo(way: Way) -> None:
    (export,) = run_json("nbdinfo", "--json", way.libnbd)["exports"]
    assert export["export-size"] == SIZE
    report = run_json("nbdinfo", "--json", way.libnbd)
    assert report["TLS"] == (way.security != "plain") and report["structured"]
    assert sum(extent["length"] for extent in run_json("nbdinfo", "--map", "--json", way.libnbd)) == SIZE


def test_nbdcopy_by_several_connections(way: Way, tmp_path: Path) -> None:
    copy, back = tmp_path / "copy", tmp_path / "back"
    run("nbdcopy", "--connections=4", way.libnbd, copy)
    data = copy.read_bytes()
    assert data[: len(DATA)] == DATA
    back.write_bytes(data[::-1])
    run("nbdcopy", "--connections=4", "--flush", back, way.libnbd)
    run("nbdcopy", copy, way.libnbd)
    run("nbdcopy", way.libnbd, back)
    assert back.read_bytes() == data


def test_nbdsh(way: Way) -> None:
    script = (
        "h.pwrite(b'from a shell', 3 << 20, nbd.CMD_FLAG_FUA)",
        "print(bytes(h.pread(12, 3 << 20)), h.get_tls_negotiated(), h.get_size())",
        "h.zero(4096, 3 << 20); h.flush(); h.shutdown()",
    )
    lines = ["h.set_uri_allow_local_file(True)", f"h.connect_uri({way.libnbd!r})", *script]
    arguments = [word for line in lines for word in ("-c", line)]
    # The distribution's Python has the distribution's bindings.
    output = run("nbdsh", *arguments, env={**os.environ, "PATH": "/usr/bin:/bin"})
    assert output.split("\n")[0] == f"b'from a shell' {way.security != 'plain'} {SIZE}"


def test_fio(way: Way, home: Path, tmp_path: Path) -> None:
    """With certificates where libnbd looks for them by itself; for keys there is no such place."""
    if way.security == "psk":
        return
    output = run(
        *_as_a_user(),
        *("fio", "--name=matrix", "--ioengine=nbd", f"--uri={way.default}", "--rw=randwrite", f"--randseed={SEED}"),
        *("--bsrange=512-128k", "--blockalign=512", "--iodepth=8", "--offset=2M", "--size=1M", "--verify=crc32c"),
        cwd=tmp_path,
        env={**os.environ, "HOME": str(home)},
    )
    assert "err= 0" in output, output


@pytest.fixture(scope="module")
def home(pki: Path) -> Iterator[Path]:
    """The home of somebody who has the certificates. All can get there: libnbd asks what the user may."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(pki, Path(directory) / ".pki" / "libnbd")
        for path in (Path(directory), *Path(directory).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(directory)


def _as_a_user() -> list[str]:
    """A command that runs another as somebody who is not root, for whom libnbd looks in his home."""
    if os.geteuid() != 0:
        return []
    keep = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return ["setpriv", f"--reuid={1_000_000 + os.getpid()}", "--clear-groups", *keep]


def test_qemu_img(way: Way, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-m", "8", "-W", "-O", "qcow2", *way.qemu, copy)
    raw = tmp_path / "copy.raw"
    run("qemu-img", "convert", "-O", "raw", copy, raw)
    assert raw.read_bytes()[: len(DATA)] == DATA
    assert run_json("qemu-img", "info", "--output=json", *way.qemu)["virtual-size"] == SIZE


def test_qemu_io(way: Way) -> None:
    commands = (
        "write -P 7 2M 64k",
        "write -z 2M 4k",
        "read -P 0 2M 4k",
        "read -P 7 2101248 60k",
        "discard 2M 64k",
        "flush",
    )
    output = run("qemu-io", *way.qemu, *(word for command in commands for word in ("-c", command)))
    assert "failed" not in output and "rror" not in output, output


def test_qemu_uses_extended_headers(way: Way) -> None:
    """As our server sees it."""
    client = subprocess.Popen(
        ["qemu-io", *way.qemu], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: [client["style"] for client in way.server.stats()["clients"]] == ["extended"])
    finally:
        client.send_signal(signal.SIGKILL)
        client.communicate()
