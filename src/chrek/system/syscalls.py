"""The C library through `ctypes`, and the numbers of the few system calls it has no function for.

One handle for the whole program; every wrapper here raises `OSError` with the call's own errno.
"""

from __future__ import annotations

import ctypes
import os
import sys

LIBC = ctypes.CDLL(None, use_errno=True)

_UNIFIED = {"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "pidfd_getfd": 438}
_NUMBERS = {
    "x86_64": {"rt_sigprocmask": 14, "rt_sigqueueinfo": 129, "signalfd4": 289, "seccomp": 317, **_UNIFIED},
    "aarch64": {"rt_sigprocmask": 135, "rt_sigqueueinfo": 138, "signalfd4": 74, "seccomp": 277, **_UNIFIED},
}
"""Source: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux."""

_BUFFER = ctypes.c_char_p


def check(result: int, what: str) -> int:
    """Return the result of a C call, or raise `OSError` with its errno when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | ctypes.Structure | None) -> int:
    """Make a system call by name; integers are passed as longs, buffers and structures by address."""
    numbers = _NUMBERS.get(os.uname().machine)
    if numbers is None:
        raise OSError(38, f"{name}: not known on {os.uname().machine}")
    return check(LIBC.syscall(ctypes.c_long(numbers[name]), *map(_argument, arguments)), name)


def prctl(option: int, *arguments: int) -> int:
    """Set or get a process attribute: an option and up to four integers."""
    longs = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return check(LIBC.prctl(ctypes.c_int(option), *longs), f"prctl {option}")


def _argument(value: object) -> object:
    if isinstance(value, int):
        return ctypes.c_long(value)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return value


assert sys.byteorder == "little", "ChReK runs on x86-64 and aarch64"
