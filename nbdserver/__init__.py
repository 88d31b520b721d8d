"""An NBD server for layered disk images: layers written in Python, bytes moved by a small engine in Rust.

>>> with nbdserver.Server(listen=["nbd+unix:///?socket=/tmp/nbd.sock"]) as server:
...     server.export("disk", Qcow2(file=File("disk.qcow2")))

Importing this imports nothing else: the engine is loaded when `Server` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserver.server import Server

    __version__: str

__all__ = ["Server", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Server":
        from nbdserver.server import Server

        return Server
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """The installed version; "0" in a tree that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nbdserver")
    except PackageNotFoundError:
        return "0"
