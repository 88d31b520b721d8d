"""Every test here runs on each backend that can be had."""

from tests.serving import backend, tcp

__all__ = ["backend", "tcp"]
