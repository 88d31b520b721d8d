"""The control socket: commands to a running server, a JSON object a line, in the spirit of QEMU's QMP.

::

    server   {"nbdserver": {"version": "0.1.0", "protocol": 1}}
    client   {"execute": "disconnect", "arguments": {"client": 7}, "id": 1}
    server   {"return": {}, "id": 1}

The protocol is in docs/CONTROL.md; the commands are in `nbdserver.commands`. Here is who may connect (our own user and
root), and the bounds: on lines, on connections, on the time that a reply may take to be read. A connection has a thread
and one command at a time; what it sends ahead waits in its socket.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import select
import socket
import struct
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final

import nbdserver
from nbdserver.errors import ConfigError, ImageError, NbdserverError, RequestError
from nbdserver.limits import (
    CONTROL_CONNECTIONS_COUNT_MAX,
    CONTROL_LINE_MAX,
    CONTROL_REPLY_MAX,
    CONTROL_SEND_TIMEOUT,
    CONTROL_STOP_TIMEOUT,
    SHOWN_COUNT_MAX,
)
from nbdserver.listening import unix_socket
from nbdserver.registry import convert

#: Goes up when what a client may rely on changes; commands and members that are added do not count.
PROTOCOL: Final = 1

Command = Callable[..., Any]

#: Seconds to wait when the process is out of descriptors: the client stays in the backlog.
EXHAUSTED_PAUSE: Final = 0.1

_log = logging.getLogger("nbdserver")

_UCRED: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


class CommandError(NbdserverError):
    """A command cannot be carried out. ``kind``: the class that the client is told."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Control:
    """A control socket at ``path`` for ``commands``, by their names. A context manager.

    A command is called with its arguments, whose names and types are those of its signature, and returns what JSON can
    say. What is wrong with a client ends that client at most.
    """

    def __init__(
        self, path: str, commands: Mapping[str, Command], *, mode: int = 0o600, log: Callable[[str], None]
    ) -> None:
        self.path, self._commands, self._mode, self._log = os.path.abspath(path), commands, mode, log
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()

    def start(self) -> None:
        """Raises ConfigError."""
        try:
            self._listener = unix_socket(self.path, self._mode)
        except OSError as error:
            raise ConfigError(f"cannot listen on {self.path}: {error.strerror or error}", key="control") from error
        status = os.stat(self.path)
        self._identity = (status.st_dev, status.st_ino)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_all, name="nbd-control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more commands. Those that run are answered, if they end within CONTROL_STOP_TIMEOUT."""
        self._wake.close()
        self._thread.join()
        self._listener.close()
        self._woken.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.hush()
        deadline = time.monotonic() + CONTROL_STOP_TIMEOUT
        for connection in connections:
            connection.ended.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self.path)

    def __enter__(self) -> Control:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _accept_all(self) -> None:
        poll = select.poll()
        for polled in (self._listener, self._woken):
            poll.register(polled, select.POLLIN)
        while self._woken.fileno() not in dict(poll.poll()):
            try:
                accepted, _ = self._listener.accept()
                self._admit(accepted)
            except (BlockingIOError, ConnectionError):
                pass  # the client has gone again
            except OSError:
                time.sleep(EXHAUSTED_PAUSE)  # we are out of descriptors

    def _admit(self, accepted: socket.socket) -> None:
        """Serve a connection on a thread, if it may be."""
        connection = _Connection(accepted, self._answer)
        uid = _UCRED.unpack(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
        if uid not in (0, os.geteuid()):
            self._log(f"control: user {uid} has been refused")
            connection.refuse(f"user {uid} may not control this server")
            return
        if not self._make_room():
            connection.refuse(f"{CONTROL_CONNECTIONS_COUNT_MAX} control connections are busy")
            return
        with self._lock:
            self._connections.add(connection)
        threading.Thread(target=self._serve, args=(connection,), name="nbd-control-client", daemon=True).start()

    def _make_room(self) -> bool:
        """Hang up on whoever has been idle for longest, if there is no room for another. False: all are at work."""
        with self._lock:
            if len(self._connections) < CONTROL_CONNECTIONS_COUNT_MAX:
                return True
            idle = [connection for connection in self._connections if not connection.is_busy]
            if not idle:
                return False
            longest = min(idle, key=lambda connection: connection.since)
            self._connections.remove(longest)
        longest.hang_up()
        return True

    def _serve(self, connection: _Connection) -> None:
        try:
            connection.serve()
        finally:
            connection.ended.set()
            with self._lock:
                self._connections.discard(connection)

    def _answer(self, request: Mapping[str, Any]) -> Any:
        """What the request's command returns. Raises CommandError, and what the command raises."""
        unknown = sorted(set(request) - {"execute", "arguments", "id"})
        if unknown:
            raise CommandError("GenericError", f"a request has execute, arguments and id, found {_shown(unknown[0])}")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str):
            raise CommandError("GenericError", "execute is missing: the name of a command")
        command = self._commands.get(name)
        if command is None:
            raise CommandError("CommandNotFound", f"there is no command {_shown(name)}")
        if not isinstance(arguments, dict):
            raise CommandError("GenericError", f"arguments of {name} are an object")
        return command(**_bind(name, command, arguments))


def _bind(name: str, command: Command, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the command's signature has them. Raises CommandError."""
    parameters = inspect.signature(command).parameters
    hints = typing.get_type_hints(command, include_extras=True)
    bound: dict[str, Any] = {}
    for spelled, value in arguments.items():
        key = spelled.replace("-", "_")
        if key not in parameters or key in bound:
            known = ", ".join(parameters) or "none"
            raise CommandError("GenericError", f"{name} has no argument {_shown(spelled)}; there are: {known}")
        try:
            bound[key] = convert(value, hints[key])
        except ValueError as error:
            raise CommandError("GenericError", f"{name}: {key}: found {_shown(value)}, allowed is {error}") from error
    for key, parameter in parameters.items():
        if key not in bound and parameter.default is inspect.Parameter.empty:
            raise CommandError("GenericError", f"{name}: the argument {key} is missing")
    return bound


class _Connection:
    """One client of the socket. ``is_busy``: it has a command running; ``since``: when that last began or ended."""

    def __init__(self, accepted: socket.socket, answer: Callable[[Mapping[str, Any]], Any]) -> None:
        self._socket, self._answer = accepted, answer
        self.is_busy = False
        self.since = time.monotonic()
        self.ended = threading.Event()

    def refuse(self, why: str) -> None:
        with self._socket:
            self._send({"error": {"class": "GenericError", "desc": why}})

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def hush(self) -> None:
        """Hear no more; who waits for a reply still gets it."""
        with contextlib.suppress(OSError):  # it has gone already
            self._socket.shutdown(socket.SHUT_RD)

    def serve(self) -> None:
        with self._socket, contextlib.suppress(OSError):  # whatever is wrong with the socket, nobody is left to be told
            self._send({"nbdserver": {"version": nbdserver.__version__, "protocol": PROTOCOL}})
            for line in self._lines():
                self.is_busy, self.since = True, time.monotonic()
                self._send(self._reply(line))
                self.is_busy, self.since = False, time.monotonic()

    def _lines(self) -> Iterator[bytes]:
        """What the client sends, line by line; ends with the connection, and after a line that is too long."""
        kept = b""
        while True:
            self._socket.settimeout(None)
            received = self._socket.recv(CONTROL_LINE_MAX)
            if not received:
                return
            *lines, kept = (kept + received).split(b"\n")
            yield from filter(bytes.strip, lines)
            if len(kept) > CONTROL_LINE_MAX:
                what = f"a line of more than {CONTROL_LINE_MAX} bytes: the connection ends"
                self._send({"error": {"class": "GenericError", "desc": what}})
                return

    def _reply(self, line: bytes) -> dict[str, Any]:
        reply: dict[str, Any] = {}
        try:
            request = _parse(line)
            if "id" in request:
                reply["id"] = request["id"]
            return {"return": self._answer(request), **reply}
        except (NbdserverError, OSError) as error:
            return {"error": error_object(error), **reply}
        except Exception as error:
            _log.exception("a control command failed")
            return {"error": {"class": "InternalError", "desc": f"{type(error).__name__}: {error}"}, **reply}

    def _send(self, message: Mapping[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        self._socket.settimeout(CONTROL_SEND_TIMEOUT)
        self._socket.sendall(data)


def _parse(line: bytes) -> dict[str, Any]:
    """A request. Raises CommandError."""
    if len(line) > CONTROL_LINE_MAX:
        raise CommandError("GenericError", f"a line of more than {CONTROL_LINE_MAX} bytes")
    try:
        request = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or brackets by the thousand
        raise CommandError("GenericError", f"a line is no JSON: {error}") from None
    if not isinstance(request, dict):
        raise CommandError("GenericError", "a request is an object")
    return request


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def error_object(error: NbdserverError | OSError) -> dict[str, Any]:
    """An error as a client is told it."""
    told: dict[str, Any] = {"class": "GenericError", "desc": str(error) or type(error).__name__}
    if isinstance(error, CommandError):
        told["class"] = error.kind
    elif isinstance(error, ConfigError):
        told |= {"class": "ConfigError", "file": error.file, "table": error.table, "key": error.key}
    elif isinstance(error, ImageError):
        told |= {"class": "ImageError", "path": error.path}
    elif isinstance(error, RequestError | OSError):
        told |= {"class": "OSError", "errno": error.errno}
    return told


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN_COUNT_MAX else text[:SHOWN_COUNT_MAX] + "..."


# -- the other side ------------------------------------------------------------------------------------------------


class RemoteError(NbdserverError):
    """The server has refused a command. ``details``: all that it said."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        self.details = details
        super().__init__(str(details.get("desc", "the command has failed")))


class ControlClient:
    """A connection to the control socket at ``path``. Raises ConfigError if nobody answers there as we do."""

    def __init__(self, path: str, timeout: float | None = None) -> None:
        self._numbers = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
            self._file = self._socket.makefile("rb")
            greeting = self._receive()
        except (OSError, ValueError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"no server can be controlled at {path}: {reason}", key="control") from error
        if "error" in greeting:
            self.close()
            raise RemoteError(greeting["error"])
        if greeting.get("nbdserver", {}).get("protocol") != PROTOCOL:
            self.close()
            raise ConfigError(f"what answers at {path} does not speak version {PROTOCOL} of the control protocol")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Have a command carried out and return what it returns. Raises RemoteError, OSError, ValueError (no answer of
        ours)."""
        self._numbers += 1
        request = {"execute": command, "arguments": arguments, "id": self._numbers}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        reply = self._receive()
        if "error" in reply:
            raise RemoteError(reply["error"])
        return reply["return"]

    def _receive(self) -> dict[str, Any]:
        line = self._file.readline(CONTROL_REPLY_MAX)
        if not line.endswith(b"\n"):
            raise ConnectionResetError("too long a reply" if len(line) == CONTROL_REPLY_MAX else "the server hung up")
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ValueError("a reply is an object")
        return reply

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
