"""NBD URIs: where a server listens and which export is meant, in one line of text.

    nbd://127.0.0.1:10809/disk                  TCP; the port is 10809 if not given
    nbd://[::1]/disk                            the same over IPv6
    nbd+unix:///disk?socket=/run/nbd.sock       a Unix socket; its path may be relative
    nbd+vsock://3:10809/disk                    a virtual machine's or host's context id (vsock)
    nbds://vm.example/disk?tls-certificates=pki with TLS, and so nbds+unix, nbds+vsock: where the client's files are

Specification: uri.md of the NBD project ("The NBD URI format"), on top of RFC 3986: ASCII only, and whatever has a
meaning of its own is percent-encoded. A plus sign is a plus sign. vsock: as libnbd has it (nbd_connect_uri(3)); no
context id stands for the host, and for a listener for any.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from nbdserver.errors import ConfigError
from nbdserver.limits import SOCKET_PATH_MAX, URI_COUNT_MAX

#: The port assigned by IANA; uri.md, "NBD URI authority".
PORT_DEFAULT: Final = 10809
PORT_MAX: Final = (1 << 16) - 1

#: RFC 3986, appendix B: scheme, authority, path, query, fragment.
_PARTS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(?:#(.*))?", re.DOTALL)
#: An authority without user: a bracketed address or a name, and perhaps a port.
_AUTHORITY: Final = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::([0-9]*))?")
#: RFC 3986, section 2: the characters a URI is made of.
_FOREIGN: Final = re.compile(r"[^A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]")
_BROKEN_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}", re.DOTALL)
#: What a reg-name of RFC 3986 is once decoded, as far as host names go.
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*)")

#: The schemes, and whether they mean TLS.
_SCHEMES: Final = {
    "nbd": False,
    "nbd+unix": False,
    "nbd+vsock": False,
    "nbds": True,
    "nbds+unix": True,
    "nbds+vsock": True,
}

#: Linux's VMADDR_CID_HOST and VMADDR_CID_ANY.
CID_HOST: Final = 2
CID_ANY: Final = (1 << 32) - 1
#: vsock's ports are 32-bit numbers, of which the last means any.
VSOCK_PORT_MAX: Final = (1 << 32) - 2

#: The authority of a vsock URI.
_MACHINE: Final = re.compile(r"([0-9]{1,10})(?::([0-9]{0,10}))?")


@dataclass(frozen=True)
class NbdUri:
    """A server's address, TCP (``host`` and ``port``), Unix (``socket``) or vsock (``cid`` and ``port``), and an
    export's name.

    ``host`` has no brackets. ``str()`` gives the URI.
    """

    host: str = ""
    port: int = PORT_DEFAULT
    socket: str | None = None
    export: str = ""
    #: With TLS, and the directory of the client's certificates.
    tls: bool = False
    certificates: str | None = None
    cid: int | None = None

    def with_export(self, name: str) -> NbdUri:
        """The same server, another export."""
        return replace(self, export=name)

    def __str__(self) -> str:
        name = quote(self.export, safe="/:@")
        scheme = "nbds" if self.tls else "nbd"
        if self.socket is not None:
            return f"{scheme}+unix:///{name}?socket={quote(os.fsencode(self.socket), safe='/:@')}"
        if self.cid is not None:
            return f"{scheme}+vsock://{self.cid}:{self.port}" + (f"/{name}" if name else "")
        host = "[" + self.host.replace("%", "%25") + "]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}" + (f"/{name}" if name else "")


def parse(text: str) -> NbdUri:
    """The server and export that ``text`` names. Raises ConfigError, which quotes the text."""
    try:
        return _parse(text)
    except ValueError as error:
        shown = text if len(text) <= 200 else text[:200] + "..."
        raise ConfigError(f"{shown!r} is not a usable NBD URI: {error}") from None


def parse_listen(text: str) -> NbdUri:
    """An address to listen on: port 0 means any free one, an export name is refused. Raises ConfigError."""
    address = parse(text)
    if address.export:
        raise ConfigError(f"{text!r} names the export {address.export!r}: a listen address serves every export")
    if address.cid is not None and not urlsplit(text).netloc:
        address = replace(address, cid=CID_ANY)
    if address.tls:
        raise ConfigError(f"{text!r} asks for TLS, which is begun on any address: say nbd, and [tls] mode (or --tls)")
    length = len(os.fsencode(address.socket or ""))
    if length > SOCKET_PATH_MAX:
        raise ConfigError(f"{text!r} names a socket {length} bytes long: the system allows {SOCKET_PATH_MAX}")
    return address


def _parse(text: str) -> NbdUri:
    """`parse`, raising ValueError with the cause."""
    _check_characters(text)
    parts = _PARTS.fullmatch(text)
    scheme = parts[1].lower() if parts else ""
    if parts is None or scheme not in _SCHEMES:
        raise ValueError(_wrong_scheme(text, scheme))
    _, authority, path, query, fragment = parts.groups()
    if fragment is not None:
        raise ValueError("it has a fragment (write # as %23)")
    if authority is None and scheme in ("nbd", "nbds"):
        raise ValueError("it names no host; write nbd://127.0.0.1 for this machine alone")
    export = _export(path)
    parameters = _parameters(query)
    tls = _SCHEMES[scheme]
    certificates = parameters.pop("tls-certificates", None) if tls else None
    socket = _socket(parameters, scheme)
    if socket is not None:
        if authority:
            raise ValueError(f"it names a host, {authority}, and a socket; write nbd+unix:///?socket=PATH")
        return NbdUri(socket=socket, export=export, tls=tls, certificates=certificates)
    if scheme.endswith("+vsock"):
        cid, port = _machine_and_port(authority or "")
        return NbdUri(cid=cid, port=port, export=export, tls=tls, certificates=certificates)
    host, port = _host_and_port(authority)
    return NbdUri(host=host, port=port, export=export, tls=tls, certificates=certificates)


def _check_characters(text: str) -> None:
    if len(text) > URI_COUNT_MAX:
        raise ValueError(f"it is {len(text)} characters long, at most {URI_COUNT_MAX} are allowed")
    foreign = _FOREIGN.search(text)
    if foreign:
        escaped = quote(foreign[0].encode(errors="surrogatepass"), safe="")
        raise ValueError(f"it has the character {foreign[0]!r}, which a URI writes as {escaped}")
    broken = _BROKEN_ESCAPE.search(text)
    if broken:
        raise ValueError(f"{broken[0]!r} is no percent-encoding (write % itself as %25)")


def _wrong_scheme(text: str, scheme: str) -> str:
    if text.startswith(("/", ".")):
        return f"for a Unix socket write nbd+unix:///?socket={text}"
    if not text.partition("://")[1]:
        return f"for TCP write nbd://{text}"
    return f"its scheme is {scheme!r}, allowed are {', '.join(_SCHEMES)}"


def _export(path: str) -> str:
    if path and not path.startswith("/"):
        raise ValueError(f"its path, {path!r}, does not begin with a slash")
    try:
        name = unquote(path[1:], errors="strict")
    except UnicodeDecodeError:
        raise ValueError("its export name is not UTF-8") from None
    if "\0" in name:
        raise ValueError("its export name contains a NUL character")
    return name


def _socket(parameters: dict[str, str], scheme: str) -> str | None:
    """The path of the Unix socket, None for TCP."""
    socket = parameters.pop("socket", None)
    for name in parameters:
        raise ValueError(f"its parameter {name!r} is unknown; there are socket (nbd+unix) and tls-certificates (nbds)")
    if not scheme.endswith("+unix"):
        if socket is not None:
            raise ValueError("a socket goes with the scheme nbd+unix")
        return None
    if not socket:
        raise ValueError("it names no socket; write nbd+unix:///?socket=PATH")
    if "\0" in socket:
        raise ValueError("its socket is in the abstract namespace, which is not supported")
    return socket


def _parameters(query: str | None) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for item in (query or "").split("&"):
        name, _, value = item.partition("=")
        if not item:
            continue
        name = unquote(name)
        if name in parameters:
            raise ValueError(f"its parameter {name!r} is given twice")
        parameters[name] = os.fsdecode(unquote_to_bytes(value))
    return parameters


def _host_and_port(authority: str) -> tuple[str, int]:
    if "@" in authority:
        raise ValueError("it names a user: pre-shared keys are not supported here")
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise ValueError(f"{authority!r} is not HOST:PORT (an IPv6 address goes in brackets)")
    literal, name, digits = match.groups()
    if literal is not None:
        host = _ipv6(unquote(literal))
    else:
        host = unquote(name)
        if not host:
            raise ValueError("it names no host; write nbd://127.0.0.1 for this machine alone, nbd://0.0.0.0 for all")
        if not _HOST_NAME.fullmatch(host):
            raise ValueError(f"{host!r} is not a host name")
    return host, _port(digits) if digits else PORT_DEFAULT


def _machine_and_port(authority: str) -> tuple[int, int]:
    if not authority:
        return CID_HOST, PORT_DEFAULT
    match = _MACHINE.fullmatch(authority)
    if match is None:
        raise ValueError(f"{authority!r} is not CID:PORT, both of them numbers")
    cid, port = int(match[1]), int(match[2] or PORT_DEFAULT)
    if cid > CID_ANY or port > VSOCK_PORT_MAX:
        raise ValueError(f"{authority!r} is not CID:PORT: allowed are up to {CID_ANY} and {VSOCK_PORT_MAX}")
    return cid, port


def _port(digits: str) -> int:
    if len(digits) > 5 or int(digits) > PORT_MAX:
        raise ValueError(f"its port is {digits}, at most {PORT_MAX} is allowed")
    return int(digits)


def _ipv6(text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv6 address") from None
