"""The seccomp filters that another process runs under, as programs.

The kernel shows their number in ``/proc/PID/status`` and their programs through
``PTRACE_SECCOMP_GET_FILTER`` alone (ptrace(2)): to a tracer with CAP_SYS_ADMIN that has no filter itself, on a
kernel with CONFIG_CHECKPOINT_RESTORE, which CRIU needs as well. The process is stopped for it, well under a
millisecond *(measured on a 2-core machine)*; it sees nothing of that, and goes on also if the tracer dies.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time

from chrek.system.syscalls import LIBC

INSTRUCTION = 8
"""Bytes of a ``struct sock_filter``."""

_DETACH, _SEIZE, _INTERRUPT, _GET_FILTER = 17, 0x4206, 0x4207, 0x420C
_EVENT_STOP = 128
_WALL = 0x40000000
_PATIENCE = 5.0
"""Seconds for the process to stop: it does at once unless it sleeps uninterruptibly."""


def seccomp_filters(pid: int) -> list[bytes]:
    """Return the filter programs of *pid*'s main thread, the one installed first being the first.

    Raises:
        OSError: the kernel does not show them to us, or the process is gone, traced already, or does not stop.
    """
    _ptrace(_SEIZE, pid, 0, None)
    signal = 0
    try:
        _ptrace(_INTERRUPT, pid, 0, None)
        signal = _stopped(pid)
        return _programs(pid)
    finally:
        # Fails where the process did not stop or is gone; then the kernel detaches when this thread ends.
        LIBC.ptrace(ctypes.c_long(_DETACH), ctypes.c_long(pid), ctypes.c_void_p(0), ctypes.c_void_p(signal))


def _programs(pid: int) -> list[bytes]:
    found: list[bytes] = []
    while True:
        try:
            instructions = _ptrace(_GET_FILTER, pid, len(found), None)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return found
            raise
        buffer = ctypes.create_string_buffer(instructions * INSTRUCTION)
        _ptrace(_GET_FILTER, pid, len(found), buffer)
        found.append(buffer.raw)


def _stopped(pid: int) -> int:
    """Wait until the process has stopped; return the signal that is to be delivered when it goes on."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        waited, status = os.waitpid(pid, _WALL | os.WNOHANG)
        if waited and not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
        if waited:
            return 0 if status >> 16 == _EVENT_STOP else os.WSTOPSIG(status)
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"process {pid} does not stop")
        time.sleep(0.0005)  # the kernel's word is a SIGCHLD, which belongs to the whole program


def _ptrace(request: int, pid: int, address: int, data: ctypes.Array[ctypes.c_char] | None) -> int:
    result = LIBC.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), data)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
    return int(result)
