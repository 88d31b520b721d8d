"""Run a command as a container does whose seccomp profile forbids io_uring: ``forbid_io_uring.py COMMAND...``

io_uring_setup(2), io_uring_enter(2) and io_uring_register(2) fail with EPERM; all else is allowed.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2

# linux/bpf_common.h and linux/seccomp.h. A filter is an array of (code, jump if true, jump if false, operand).
LOAD_WORD = 0x20
JUMP_EQUAL = 0x15
RETURN = 0x06
ALLOW = 0x7FFF0000
FAIL_EPERM = 0x00050000 | 1

#: The same numbers on every architecture.
IO_URING_CALLS = (425, 426, 427)


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def forbid() -> None:
    """For this process and what it becomes, for good. Raises OSError."""
    # The system call's number is the first word of struct seccomp_data.
    steps = [(LOAD_WORD, 0, 0, 0)]
    for position, call in enumerate(IO_URING_CALLS):
        steps.append((JUMP_EQUAL, len(IO_URING_CALLS) - position, 0, call))
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL_EPERM)]
    code = b"".join(struct.pack("<HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(steps), code)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])
