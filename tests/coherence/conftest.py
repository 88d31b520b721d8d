"""Every test here runs on each backend that can be had."""

from tests.serving import backend

__all__ = ["backend"]
