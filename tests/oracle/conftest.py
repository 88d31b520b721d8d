from tests.serving import backend, tcp

__all__ = ["backend", "tcp"]
