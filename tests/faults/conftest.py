from tests.serving import backend, memory, tcp

__all__ = ["backend", "memory", "tcp"]
