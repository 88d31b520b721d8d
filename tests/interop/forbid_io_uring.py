"""Run a command as a container does whose seccomp profile forbids io_uring: ``forbid_io_uring.py COMMAND...``

io_uring_setup(2), io_uring_enter(2) and io_uring_register(2) fail with EPERM; all else is allowed.

With ``--clone`` before the command only cloning registered buffers fails, with EINVAL, as before Linux 6.12; with
``--buffers`` registering buffers fails altogether.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence

PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2

# linux/bpf_common.h and linux/seccomp.h. A filter is an array of (code, jump if true, jump if false, operand).
LOAD_WORD = 0x20
JUMP_EQUAL = 0x15
RETURN = 0x06
ALLOW = 0x7FFF0000
FAIL = 0x00050000  # and the errno
#: Of struct seccomp_data: the system call's number, and the lower half of its second argument.
CALL, SECOND_ARGUMENT = 0, 24 if sys.byteorder == "little" else 28

#: The same numbers on every architecture.
IO_URING_CALLS = (425, 426, 427)
IO_URING_REGISTER = 427
#: Operations of io_uring_register(2).
BUFFERS, BUFFERS2, CLONE_BUFFERS = 0, 15, 30

Step = tuple[int, int, int, int]


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def fail(numbers: Sequence[int], error: int) -> list[Step]:
    """Fail with ``error`` if what has been loaded is one of ``numbers``; else allow."""
    steps = [(JUMP_EQUAL, len(numbers) - position, 0, number) for position, number in enumerate(numbers)]
    return [*steps, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL | error)]


def forbid_calls() -> list[Step]:
    return [(LOAD_WORD, 0, 0, CALL), *fail(IO_URING_CALLS, errno.EPERM)]


def forbid_registering(operations: Sequence[int]) -> list[Step]:
    """Let io_uring_register(2) fail for these operations."""
    other_calls = [(LOAD_WORD, 0, 0, CALL), (JUMP_EQUAL, 1, 0, IO_URING_REGISTER), (RETURN, 0, 0, ALLOW)]
    return [*other_calls, (LOAD_WORD, 0, 0, SECOND_ARGUMENT), *fail(operations, errno.EINVAL)]


def install(steps: Sequence[Step]) -> None:
    """For this process and what it becomes, for good. Raises OSError."""
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(steps), code)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "prctl")


def main(arguments: list[str]) -> None:
    steps = forbid_calls()
    if arguments[0] == "--clone":
        steps, arguments = forbid_registering([CLONE_BUFFERS]), arguments[1:]
    elif arguments[0] == "--buffers":
        steps, arguments = forbid_registering([BUFFERS, BUFFERS2, CLONE_BUFFERS]), arguments[1:]
    install(steps)
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
