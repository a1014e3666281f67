"""A seccomp filter that hides from an application what CRIU cannot dump: io_uring and MPTCP.

CRIU cannot dump an io_uring instance (``anon_inode:[io_uring]``), and torch's TCPStore and libuv
create one whenever the kernel offers it; both fall back to epoll when the kernel has none. Nor can it dump an MPTCP
socket, which Go's `net` has made for every listener since Go 1.24; told that the kernel has no such protocol it
takes TCP. So the application is shown a kernel without either. CRIU dumps and restores the filter with the process.

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

IPPROTO_MPTCP = 262
SOCKET = {"x86_64": 41, "aarch64": 198}
"""socket(2), where its arguments can be seen; 32-bit programs also reach it through socketcall(2), whose cannot."""

IO_URING_FIRST, IO_URING_LAST = 425, 427
"""io_uring_setup, _enter, _register: the same numbers on every architecture (unified since 5.1)."""
X32_BIT = 0x40000000

AUDIT_ARCHES = {"x86_64": 0xC000003E, "i386": 0x40000003, "aarch64": 0xC00000B7, "arm": 0x40000028}
"""AUDIT_ARCH_* of linux/audit.h: both machines and the 32-bit programs they can run."""

RET_ALLOW = 0x7FFF0000
RET_ENOSYS = 0x00050000 | errno.ENOSYS
RET_EPROTONOSUPPORT = 0x00050000 | errno.EPROTONOSUPPORT

# BPF: load word, jump if equal / greater or equal / greater, and, return (linux/bpf_common.h).
_LD, _JEQ, _JGE, _JGT, _AND, _RET = 0x20, 0x15, 0x35, 0x25, 0x54, 0x06
_DATA_NR, _DATA_ARCH, _DATA_PROTOCOL = 0, 4, 16 + 2 * 8
"""Offsets in struct seccomp_data (linux/seccomp.h); the last is the lower half of the third argument."""


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
    mptcp = [line for name, number in SOCKET.items() for line in _mptcp(AUDIT_ARCHES[name], number)]
    tail = (
        (_LD, 0, 0, _DATA_NR),
        (_AND, 0, 0, 0xFFFFFFFF & ~X32_BIT),
        (_JGE, 0, 2, IO_URING_FIRST),
        (_JGT, 1, 0, IO_URING_LAST),
        (_RET, 0, 0, RET_ENOSYS),
        *mptcp,
        (_RET, 0, 0, RET_ALLOW),
    )
    return (
        (_LD, 0, 0, _DATA_ARCH),
        *((_JEQ, len(arches) - 1 - i, 0, arch) for i, arch in enumerate(arches[:-1])),
        (_JEQ, 0, len(tail) - 1, arches[-1]),
        *tail,
    )


def _mptcp(arch: int, socket: int) -> tuple[tuple[int, int, int, int], ...]:
    """Return what answers socket(2) for MPTCP on *arch* and lets everything else go on behind it."""
    return (
        (_LD, 0, 0, _DATA_ARCH),
        (_JEQ, 0, 6, arch),
        (_LD, 0, 0, _DATA_NR),
        (_AND, 0, 0, 0xFFFFFFFF & ~X32_BIT),
        (_JEQ, 0, 3, socket),
        (_LD, 0, 0, _DATA_PROTOCOL),
        (_JEQ, 0, 1, IPPROTO_MPTCP),
        (_RET, 0, 0, RET_EPROTONOSUPPORT),
    )


def changes_nothing_else(effective_capabilities: int) -> bool:
    """Return whether a filter can be installed here without setting no_new_privs.

    `effective_capabilities` is the CapEff mask of this process.
    """
    return bool(effective_capabilities >> CAP_SYS_ADMIN & 1) or prctl(PR_GET_NO_NEW_PRIVS) == 1


def hide_what_criu_cannot_dump(*, set_no_new_privs: bool = False) -> None:
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
