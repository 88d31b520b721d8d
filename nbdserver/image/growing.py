"""Making a disk longer without showing what was hidden behind its end."""

from __future__ import annotations

from nbdserver.layer import Layer


def grow(layer: Layer, size: int) -> None:
    """Make an open image at least ``size`` bytes long; what is new reads as zeroes. Raises RequestError, OSError."""
    if layer.size < size:
        layer.resize(size)
