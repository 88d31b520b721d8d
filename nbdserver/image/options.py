"""Secrets and images that are named by options, as qemu-img's ``--object`` and ``--image-opts`` name them.

::

    --object secret,id=sec0,file=PATH                     the passphrase is all that the file holds
    --object secret,id=sec0,env=NAME                      ... an environment variable; fd=N: an inherited descriptor
    --image-opts driver=qcow2,encrypt.key-secret=sec0,file.filename=vm.qcow2,backing.encrypt.key-secret=sec1

A passphrase itself is never on the command line, where everybody on the machine could read it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import click

from nbdserver.errors import ConfigError
from nbdserver.files import Source, resolve_name
from nbdserver.format import HasBacking
from nbdserver.image.opening import NO_SECRETS, UNREAD, Images
from nbdserver.image.parameters import Command, roots_option, words

#: The keys of image options, of each image of a chain, and the other names that they have.
IMAGE_KEYS: Final = ("driver", "file.filename", "encrypt.key-secret")
OTHER_NAMES: Final = {"filename": "file.filename", "key-secret": "encrypt.key-secret"}

#: What says nothing that is not so here anyway.
TAKEN: Final = {"file.driver": ("file", "host_device"), "encrypt.format": ("luks",)}

#: What QEMU calls the layers of plain files, which are raw images.
PROTOCOLS: Final = ("file", "host_device")

BACKING: Final = "backing."


class Node(NamedTuple):
    """An image as options name it. ``key``: the name of the secret that opens it; ``backing``: what is said of its
    backing file, whose name the image has."""

    path: str | None
    format: str | None
    key: str | None
    backing: Node | None


class Access(NamedTuple):
    """How a command gets at images: the directories in which they may name files, the secrets that it was told of, by
    ID, and whether FILE is image options."""

    roots: tuple[str, ...] = ()
    secrets: Mapping[str, Source] = NO_SECRETS
    by_options: bool = False

    def images(self, *, force_share: bool = False) -> Images:
        """The images of one command."""
        return Images(self.roots, secrets=self.secrets, force_share=force_share)

    def named(self, images: Images, text: str, format: str | None) -> tuple[str, str | None]:
        """(path, format) of the image that FILE means, whose keys ``images`` has from now on. Raises ConfigError,
        ImageError, OSError."""
        return by_options(images, text, format) if self.by_options else (text, format)


#: With no options at all.
PLAIN: Final = Access()


def access_options(command: Command) -> Command:
    """Give a command ``--root``, ``--object`` and ``--image-opts``, as the keyword ``access``."""

    @roots_option
    @click.option(
        "--object",
        "objects",
        multiple=True,
        metavar="secret,id=ID,file=PATH",
        help="The passphrase of an encrypted image: all that the file holds (or env=NAME, fd=N). May be given several "
        "times.",
    )
    @click.option(
        "--image-opts",
        "by_options",
        is_flag=True,
        help="FILE is options: driver=qcow2,encrypt.key-secret=ID,file.filename=PATH; for a backing file, "
        "backing.encrypt.key-secret=ID.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, roots: tuple[str, ...], objects: tuple[str, ...], by_options: bool, **kwargs: Any) -> Any:
        return command(*args, access=Access(roots, secrets(objects), by_options), **kwargs)

    return wrapped  # type: ignore[return-value]


def by_options(images: Images, text: str, format: str | None) -> tuple[str, str | None]:
    """(path, format) of the image that image options name; its keys, and those of its backing files, are set in
    ``images``. Raises ConfigError, ImageError, OSError."""
    node = parse(text)
    if format is not None:
        raise ConfigError("the format of image options is their driver", key="--format")
    assert node.path is not None
    _set_keys(images, node.path, node)
    return node.path, node.format


def _set_keys(images: Images, path: str, node: Node) -> None:
    if node.key is not None:
        images.keys.set(path, node.key)
    if node.backing is None:
        return
    layer = images.open(path, node.format, keys=UNREAD)
    try:
        name = layer.backing_name if isinstance(layer, HasBacking) else None
    finally:
        images.close(layer)
    if name is None:
        raise ConfigError(f"{path} has no backing file", key="--image-opts")
    _set_keys(images, resolve_name(name, path), node.backing)


def secrets(objects: Sequence[str]) -> dict[str, Source]:
    """Where secrets are, by ID, from ``--object`` texts. Raises ConfigError."""
    found: dict[str, Source] = {}
    for text in objects:
        name, source = _secret(text)
        if name in found:
            raise ConfigError(f"there are two secrets {name!r}", key="--object")
        found[name] = source
    return found


def _secret(text: str) -> tuple[str, Source]:
    kind, *options = words(text) or [""]
    if kind not in ("secret", "qom-type=secret"):
        raise ConfigError(f"found {kind!r}, allowed is secret,id=ID,file=PATH", key="--object")
    values = dict(option.partition("=")[::2] for option in options)
    name = values.pop("id", "")
    if not name:
        raise ConfigError(f"{text!r} has no id", key="--object")
    if "data" in values:
        raise ConfigError(
            f"secret {name!r} is on the command line, where everybody on the machine can read it: put it into a file, "
            "and name that (file=PATH)",
            key="--object",
        )
    if values.pop("format", "raw") != "raw":
        raise ConfigError(f"secret {name!r}: only format=raw is allowed", key="--object")
    given = [key for key in ("file", "env", "fd") if values.get(key)]
    unknown = sorted(values.keys() - {"file", "env", "fd"})
    if unknown:
        raise ConfigError(f"secret {name!r}: {unknown[0]} is not known; there are: file, env, fd", key="--object")
    if len(given) != 1:
        raise ConfigError(f"secret {name!r} needs one of file, env, fd", key="--object")
    try:
        fd = int(values["fd"]) if given == ["fd"] else None
    except ValueError as error:
        raise ConfigError(f"secret {name!r}: fd={values['fd']} is no descriptor", key="--object") from error
    return name, {"key_file": values.get("file"), "key_env": values.get("env"), "key_fd": fd}


def parse(text: str) -> Node:
    """The image that image options name. Raises ConfigError."""
    values: dict[str, str] = {}
    for word in words(text):
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"found {word!r}, allowed is KEY=VALUE", key="--image-opts")
        values[key] = value
    node = _node(values, "")
    if node.path is None:
        raise ConfigError(f"{text!r} names no file.filename", key="--image-opts")
    return node


def _node(values: Mapping[str, str], prefix: str) -> Node:
    own = {OTHER_NAMES.get(key, key): value for key, value in values.items() if not key.startswith(BACKING)}
    below = {key.removeprefix(BACKING): value for key, value in values.items() if key.startswith(BACKING)}
    for key, allowed in TAKEN.items():
        if own.pop(key, allowed[0]) not in allowed:
            raise ConfigError(f"{prefix}{key}: allowed is {' or '.join(allowed)}", key="--image-opts")
    for key in own:
        if key not in IMAGE_KEYS:
            known = ", ".join((*IMAGE_KEYS, f"{BACKING}KEY"))
            raise ConfigError(f"{prefix}{key} is not known here; there are: {known}", key="--image-opts")
    if prefix and "file.filename" in own:
        raise ConfigError(f"{prefix}file.filename: it is what the image names, and nothing else", key="--image-opts")
    driver = own.get("driver")
    backing = _node(below, prefix + BACKING) if below else None
    format = "raw" if driver in PROTOCOLS else driver
    return Node(own.get("file.filename"), format, own.get("encrypt.key-secret"), backing)
