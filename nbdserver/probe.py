"""Probing: what format an image is in, by its first bytes and nothing else, as QEMU probes.

A guest can write whatever bytes it likes to the start of its disk, and so make a raw image look like any other
format, naming any file as its backing file. Hence a *writable* image is never probed, and an image probed as raw
is served read-only unless the configuration says ``format = "raw"``.
"""

from __future__ import annotations

from typing import Final

from nbdserver import registry
from nbdserver.errors import ConfigError, ImageError
from nbdserver.extent import OpenFile
from nbdserver.request import Vector

#: How much of the image is looked at; QEMU's BLOCK_PROBE_BUF_SIZE.
HEAD_LENGTH: Final = 512

#: (offset, magic, format), formats called as QEMU calls them.
MAGICS: Final = (
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
)


def probe(file: OpenFile) -> str:
    """The format of the image in ``file``: a layer's name; ``raw`` if it is none that has a mark.

    Raises ImageError for a format that has no layer, and if the file cannot be read.
    """
    head = Vector.of(HEAD_LENGTH)
    try:
        file.read(0, head)
    except OSError as error:
        raise ImageError(f"cannot be probed: {error.strerror}", path=file.name) from error
    format = identify(head.tobytes())
    try:
        registry.layer_type(format)
    except ConfigError as error:
        raise ImageError(f"is a {format} image; no layer reads that yet", path=file.name) from error
    return format


def identify(head: bytes) -> str:
    """The format of an image that begins with ``head`` (HEAD_LENGTH bytes), whether or not a layer reads it."""
    for offset, magic, format in MAGICS:
        if head.startswith(magic, offset):
            return format
    return "raw"
