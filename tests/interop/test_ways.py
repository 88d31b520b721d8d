"""Ways in that are no listening of ours: a connected descriptor, and systemd's socket activation; and who may come."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbd
import pytest

from nbdserver import tls
from nbdserver.access import Rule, network
from nbdserver.handshake import TlsMode
from nbdserver.listening import ListenConfig
from nbdserver.testing import NbdServers
from nbdserver.tls import TlsConfig
from nbdserver.uri import parse
from tests.interop.wire import OPT_GO, REP_ACK, REP_ERR_UNKNOWN, Wire
from tests.serving import eventually, run

SERVE = [sys.executable, "-m", "nbdserver", "serve", "--format", "raw", "--backend", "threads"]
OPT_LIST, OPT_INFO, OPT_LIST_META_CONTEXT, OPT_EXPORT_NAME = 3, 6, 9, 1
REP_SERVER = 2
DATA = b"a disk's first bytes"
SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(DATA.ljust(SIZE, b"\0"))
    return path


# -- a connected descriptor ------------------------------------------------------------------------------------------


def test_libnbd_starts_a_server_of_its_own(disk: Path) -> None:
    client = nbd.NBD()
    client.connect_command([*SERVE, "--fd", "0", str(disk)])
    client.pwrite(b"x", 0)
    assert client.pread(4, 0) == b"x" + DATA[1:4]
    client.shutdown()
    assert disk.read_bytes()[:4] == b"x" + DATA[1:4]


@contextlib.contextmanager
def served(disk: Path, ours: socket.socket, theirs: socket.socket, *, inetd: bool = False) -> Iterator[Wire]:
    """A client at ``ours``, served by a process that has ``theirs``: as a descriptor, or as all that it has."""
    fd = theirs.fileno()
    streams = {"stdin": fd, "stdout": fd, "stderr": fd} if inetd else {"stdout": subprocess.PIPE, "pass_fds": (fd,)}
    command = [*SERVE, "--fd", "0" if inetd else str(fd), str(disk)]
    with subprocess.Popen(command, **streams) as process:  # type: ignore[call-overload]
        theirs.close()
        ours.settimeout(20)
        yield Wire.of(ours)
        ours.close()
        printed, _ = process.communicate(timeout=30)
        assert (process.returncode, printed or b"") == (0, b"")


def go(client: Wire) -> None:
    client.export = "disk.raw"
    client.go()
    client.request(0, 0, len(DATA))
    assert client.reply() == (0, 0)
    assert client.receive(len(DATA)) == DATA


def test_a_client_over_a_unix_socket_and_the_server_ends_when_it_leaves(disk: Path) -> None:
    with served(disk, *socket.socketpair()) as client:
        go(client)


def test_as_inetd_starts_servers_and_no_log_is_sent_to_the_client(disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with served(disk, ours, theirs, inetd=True) as client:
        go(client)


def test_a_client_that_vanishes_in_its_handshake_ends_the_server_too(disk: Path) -> None:
    with served(disk, *socket.socketpair()) as client:
        client.greet()


@pytest.mark.parametrize(
    ("fd", "cause"),
    [
        ("0", "this is no connected socket: Socket operation on non-socket"),
        ("99", "this is no connected socket: Bad file"),
    ],
)
def test_what_is_no_connection_is_refused(disk: Path, fd: str, cause: str) -> None:
    done = subprocess.run([*SERVE, "--fd", fd, str(disk)], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 2
    assert f"--fd {fd}: {cause}" in done.stderr.decode()


def test_a_socket_that_is_not_connected_is_refused(disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = subprocess.run([*SERVE, "--fd", "0", str(disk)], stdin=listener, capture_output=True, check=False)
    assert (done.returncode, b"is not connected" in done.stderr) == (2, True)


# -- socket activation -----------------------------------------------------------------------------------------------


def test_nbdinfo_activates_a_server(disk: Path) -> None:
    assert str(SIZE) in run("nbdinfo", "--", "[", *SERVE, disk, "]")


def test_libnbd_activates_a_server(disk: Path) -> None:
    client = nbd.NBD()
    client.connect_systemd_socket_activation([*SERVE, str(disk)])
    assert client.pread(len(DATA), 0) == DATA
    client.shutdown()


#: What a service manager does: gives sockets the numbers from 3 on, says so, and becomes the server.
LAUNCHER = """
import os, sys
numbers, names, *command = sys.argv[1:]
spare = [os.dup2(int(number), 100 + index) for index, number in enumerate(numbers.split(","))]
for index, number in enumerate(spare):
    os.dup2(number, 3 + index)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(spare)), LISTEN_FDNAMES=names)
os.execv(command[0], command)
"""


@contextlib.contextmanager
def activated(sockets: Sequence[socket.socket], names: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    numbers = [bound.fileno() for bound in sockets]
    command = [sys.executable, "-c", LAUNCHER, ",".join(map(str, numbers)), names, *SERVE, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=numbers) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_several_sockets_are_handed_over(disk: Path, nbd_server: NbdServers) -> None:
    path = nbd_server.socket().socket
    assert path is not None
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen()
        port = tcp.getsockname()[1]
        waiting = Wire(f"nbd://127.0.0.1:{port}/disk.raw")  # before the server is there
        with activated([tcp, unix], "tcp:unix", str(disk)) as process:
            assert process.stdout is not None
            printed = [process.stdout.readline().decode().strip() for _ in range(5)]
            assert printed[-1] == "ready"
            assert f"nbd://127.0.0.1:{port}/disk.raw" in printed
            assert f"nbd+unix:///disk.raw?socket={path}" in printed
            waiting.go()
            Wire(f"nbd+unix:///disk.raw?socket={path}").go()
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            assert b"LISTEN_FDS=2" in environment, "it was told of them"
        assert os.path.exists(path), "the path is whose it was"


def test_a_configuration_says_more_about_a_socket_that_is_handed_over(disk: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        address = f"nbd://127.0.0.1:{tcp.getsockname()[1]}"
        config = tmp_path / "exports.toml"
        config.write_text(f"""
            listen = [{{uri = "{address}", access = {{deny = ["127.0.0.1"]}}}}]
            [exports.disk]
            image = "{disk}"
            format = "raw"
            """)
        command = [sys.executable, "-m", "nbdserver", "serve"]
        with contextlib.ExitStack() as patched:
            patched.callback(SERVE.__setitem__, slice(None), SERVE[:])
            SERVE[:] = command
            with activated([tcp], "tcp", str(config)) as process:
                assert process.stdout is not None
                assert process.stdout.readline().decode().strip() == f"{address}/disk"
                assert Wire(address).rest() == b""


# -- who may come ----------------------------------------------------------------------------------------------------


def hidden(server_uri: str, wire: Wire) -> None:
    """The export is answered like one that is not there, by each option."""
    wire.option(OPT_LIST)
    listed = []
    while (reply := wire.option_reply())[0] != REP_ACK:
        listed.append(reply[1])
    assert not any(b"secret" in name for name in listed), server_uri
    for name in (b"secret", b"nothing"):
        asked = struct.pack(">I", len(name)) + name
        answers = []
        for option, more in ((OPT_INFO, b"\0\0"), (OPT_GO, b"\0\0"), (OPT_LIST_META_CONTEXT, bytes(4))):
            wire.option(option, asked + more)
            kind, said = wire.option_reply()
            answers.append((kind, said.replace(name, b"NAME")))
        assert answers == [(REP_ERR_UNKNOWN, b"no export is named 'NAME'")] * 3
    wire.option(OPT_EXPORT_NAME, b"secret")
    assert wire.rest() == b""


def uid() -> int:
    return os.geteuid()


@pytest.mark.parametrize(
    ("rule", "unix", "tcp"),
    [
        (Rule(users=(uid(),)), True, False),
        (Rule(users=(uid() + 1,)), False, False),
        (Rule(groups=(os.getegid(),)), True, False),
        (Rule(addresses=(network("127.0.0.0/8"),)), False, True),
        (Rule(addresses=(network("10.0.0.0/8"),), users=(uid(),)), True, False),
        (Rule(deny=(network("127.0.0.1"),)), True, False),
    ],
)
def test_an_export_is_there_for_those_whom_it_is_for(
    nbd_server: NbdServers, disk: Path, rule: Rule, unix: bool, tcp: bool
) -> None:
    from layers.file import File

    listen = [nbd_server.socket(), parse("nbd://127.0.0.1")]
    both = [str(listen[0]), "nbd://127.0.0.1:0"]
    server, _ = nbd_server.start(disk, format="raw", read_only=True, listen=both)
    server.export("secret", File(path=str(disk)), access=rule, read_only=True)
    for address, admitted in zip(server.listening, (unix, tcp), strict=True):
        client = Wire(str(parse(address).with_export("secret")))
        if admitted:
            client.go()
        else:
            client.greet()
            hidden(address, client)


def test_supplementary_groups_count(nbd_server: NbdServers, disk: Path) -> None:
    from layers.file import File

    if uid() != 0:
        group = next(iter(set(os.getgroups()) - {os.getegid()}), os.getegid())
        command: list[str] = []
    else:
        group = 54321
        command = ["setpriv", f"--groups={group}", "--"]
    server, _ = nbd_server.start(disk, format="raw", read_only=True)
    server.export("secret", File(path=str(disk)), access=Rule(groups=(group,)), read_only=True)
    address = str(parse(server.listening[0]).with_export("secret"))
    assert str(SIZE) in run(*command, "nbdinfo", "--size", address)
    if command:
        run("nbdinfo", "--size", address, status=1)


def test_who_may_not_connect_is_told_nothing(nbd_server: NbdServers, disk: Path) -> None:
    lines: list[str] = []
    listen = ListenConfig(nbd_server.socket(), access=Rule(users=(uid() + 1,)))
    server, _ = nbd_server.start(
        disk, format="raw", read_only=True, listen=[listen, "nbd://127.0.0.1:0"], log=lines.append
    )
    for _ in range(100):
        assert Wire(server.listening[0]).rest() == b""
    stays = Wire(server.listening[1])
    stays.go()
    eventually(lambda: len(server.clients) == 1)
    stays.close()
    said = [line for line in lines if "may not connect" in line]
    assert 0 < len(said) <= 20, "whoever tries again and again does not fill the log"
    assert f"unix (user {uid()}, process {os.getpid()}) may not connect to {listen.address}" in said


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    tls.init(directory, hosts=["localhost", "127.0.0.1"], client="alice")
    for name in (tls.CLIENT_CERT, tls.CLIENT_KEY):
        (directory / name).rename(directory / f"alice-{name}")
    tls.init(directory, hosts=["localhost"], client="bob")
    return directory


def connect(address: str, pki: Path, user: str) -> nbd.NBD:
    """A libnbd client with ``user``'s certificate."""
    mine = pki / user
    mine.mkdir(exist_ok=True)
    prefix = "alice-" if user == "alice" else ""
    for name in (tls.CLIENT_CERT, tls.CLIENT_KEY):
        (mine / name).write_bytes((pki / (prefix + name)).read_bytes())
    (mine / tls.CA_CERT).write_bytes((pki / tls.CA_CERT).read_bytes())
    client = nbd.NBD()
    client.set_tls(nbd.TLS_REQUIRE)
    client.set_tls_certificates(str(mine))
    where = parse(address)
    client.set_export_name(where.export)
    client.set_opt_mode(True)
    if where.socket is None:
        client.connect_tcp("localhost", str(where.port))
    else:
        client.connect_unix(where.socket)
    return client


def test_an_export_for_one_subject(nbd_server: NbdServers, disk: Path, pki: Path) -> None:
    from layers.file import File

    wanted = TlsConfig(TlsMode.ALLOWED, certificates=str(pki))
    server, _ = nbd_server.start(disk, format="raw", read_only=True, tls=wanted)
    server.export("secret", File(path=str(disk)), access=Rule(subjects=("CN=alice",)), read_only=True)
    address = str(parse(server.listening[0]).with_export("secret"))

    alice = connect(address, pki, "alice")
    names: list[str] = []
    alice.opt_list(lambda name, _: names.append(name))
    alice.opt_go()
    assert (alice.pread(len(DATA), 0), names) == (DATA, ["", "secret"])
    assert server.clients[0].describe()["subject"] == "CN=alice"

    bob = connect(address, pki, "bob")
    names = []
    bob.opt_list(lambda name, _: names.append(name))
    with pytest.raises(nbd.Error, match="No such file or directory"):
        bob.opt_go()
    assert names == [""]

    plain = Wire(address)
    plain.greet()
    plain.option(OPT_GO, struct.pack(">I", 6) + b"secret" + bytes(2))
    assert plain.option_reply()[0] == 1 << 31 | 5, "without TLS it is not known who one is: ERR_TLS_REQD"


def test_a_listener_for_one_subject(nbd_server: NbdServers, disk: Path, pki: Path) -> None:
    wanted = TlsConfig(TlsMode.ALLOWED, certificates=str(pki))
    listen = ListenConfig(nbd_server.socket(), access=Rule(subjects=("CN=alice",)))
    server, _ = nbd_server.start(
        disk, format="raw", read_only=True, listen=[listen, str(nbd_server.socket())], tls=wanted
    )
    connect(server.listening[0], pki, "alice").opt_go()
    with pytest.raises(nbd.Error):
        connect(server.listening[0], pki, "bob").opt_go()
    connect(server.listening[1], pki, "bob").opt_go()
    Wire(server.listening[1]).go()  # elsewhere plain clients are taken


def test_a_listener_says_what_it_wants_of_tls(nbd_server: NbdServers, disk: Path, pki: Path) -> None:
    wanted = TlsConfig(TlsMode.REQUIRED, certificates=str(pki))
    plain = ListenConfig(nbd_server.socket(), tls=TlsMode.OFF)
    server, _ = nbd_server.start(disk, format="raw", read_only=True, listen=[plain, "nbd://127.0.0.1:0"], tls=wanted)
    Wire(server.listening[0]).go()
    with pytest.raises(AssertionError, match="0x80000005"):
        Wire(server.listening[1]).go()
