"""A seccomp filter that answers ENOSYS to io_uring, and nothing else.

CRIU cannot dump an io_uring instance (``anon_inode:[io_uring]``), and torch's TCPStore and libuv
create one whenever the kernel offers it; both fall back to epoll when the kernel has none. So the
application is shown a kernel without io_uring. CRIU dumps and restores the filter with the process.

The filter belongs on the application alone, between fork and exec: CRIU refuses to run under a
filter of its own, and what runs under one while it restores stacks a second one on the tree.

Installing a filter needs no_new_privs or CAP_SYS_ADMIN (seccomp(2)). ``SPEC_ALLOW`` keeps kernels
before 5.16 from also turning speculative store bypass off, which would slow the application.
"""

from __future__ import annotations

import ctypes
import errno

from chrek.system.syscalls import prctl, syscall

PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1 << 2
CAP_SYS_ADMIN = 21

IO_URING_FIRST, IO_URING_LAST = 425, 427
"""io_uring_setup, _enter, _register: the same numbers on every architecture (unified since 5.1)."""
X32_BIT = 0x40000000

AUDIT_ARCHES = {"x86_64": 0xC000003E, "i386": 0x40000003, "aarch64": 0xC00000B7, "arm": 0x40000028}
"""AUDIT_ARCH_* of linux/audit.h: both machines and the 32-bit programs they can run."""

RET_ALLOW = 0x7FFF0000
RET_ENOSYS = 0x00050000 | errno.ENOSYS

# BPF: load word, jump if equal / greater or equal / greater, and, return (linux/bpf_common.h).
_LD, _JEQ, _JGE, _JGT, _AND, _RET = 0x20, 0x15, 0x35, 0x25, 0x54, 0x06
_DATA_NR, _DATA_ARCH = 0, 4


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def program() -> tuple[tuple[int, int, int, int], ...]:
    """Return the filter as BPF instructions (code, jump if true, jump if false, operand).

    On x86-64 the x32 variants carry a bit on top of the number; it is masked away. Calls of an
    architecture that is not known here are allowed: their numbers mean other things.
    """
    arches = tuple(AUDIT_ARCHES.values())
    to_allow = 5  # instructions from the load of the number to the one that allows
    return (
        (_LD, 0, 0, _DATA_ARCH),
        *((_JEQ, len(arches) - 1 - i, 0, arch) for i, arch in enumerate(arches[:-1])),
        (_JEQ, 0, to_allow, arches[-1]),
        (_LD, 0, 0, _DATA_NR),
        (_AND, 0, 0, 0xFFFFFFFF & ~X32_BIT),
        (_JGE, 0, 2, IO_URING_FIRST),
        (_JGT, 1, 0, IO_URING_LAST),
        (_RET, 0, 0, RET_ENOSYS),
        (_RET, 0, 0, RET_ALLOW),
    )


def changes_nothing_else(effective_capabilities: int) -> bool:
    """Return whether a filter can be installed here without setting no_new_privs.

    `effective_capabilities` is the CapEff mask of this process.
    """
    return bool(effective_capabilities >> CAP_SYS_ADMIN & 1) or prctl(PR_GET_NO_NEW_PRIVS) == 1


def block_io_uring(*, set_no_new_privs: bool = False) -> None:
    """Install the filter on the calling thread and what it starts; raise `OSError` if not allowed.

    `set_no_new_privs` first gives up set-user-ID programs and file capabilities for good, which lets
    a process without privilege install a filter.
    """
    if set_no_new_privs:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    instructions = program()
    array = (_Instruction * len(instructions))(*(_Instruction(*item) for item in instructions))
    filter_program = _Program(len(instructions), array)
    syscall("seccomp", SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, filter_program)
