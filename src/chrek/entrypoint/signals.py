"""Every signal as a readable event.

All signals are blocked in the init for good, from its first line on, and read from a signalfd. So no
handler of Python's runs, none is lost while the application is being started, and the kernel queues
even those that PID 1 would otherwise never see: blocked signals are kept whatever their disposition
(`sig_ignored()` in kernel/signal.c), also the ones it ignores for a PID 1 without a handler.

The raw system calls are used because the C library hides signals 32 and 33 (its own threads' use),
which a musl program of the same container may well be sent.
"""

from __future__ import annotations

import ctypes
import os

from chrek.system.record import record
from chrek.system.syscalls import syscall

SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGTERM, SIGCHLD, SIGCONT, SIGXFSZ = 1, 2, 3, 13, 15, 17, 18, 25
"""The numbers on x86-64 and aarch64. Python's `signal` builds enums of them all: 3 ms at every start."""

ENDING = frozenset((SIGHUP, SIGINT, SIGQUIT, SIGTERM))
"""What ends a container that has no application yet."""

EVERY = 2**64 - 1
_SET_SIZE = 8
_SIG_BLOCK, _SIG_SETMASK = 0, 2
_SFD_NONBLOCK, _SFD_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_INFO_SIZE = 128
_SI_QUEUE = -1


@record
class Signal:
    """One received signal: its number, si_code, and the sender where there is one."""

    number: int
    code: int
    sender: int
    uid: int
    value: int

    @property
    def of_kernel(self) -> bool:
        """Whether the kernel made it up itself: a child changed, a terminal hung up."""
        return self.code > 0


def bit(number: int) -> int:
    """Return the mask with one signal."""
    return 1 << (number - 1)


def block_all() -> int:
    """Block every signal and return the mask as it was."""
    old = ctypes.create_string_buffer(_SET_SIZE)
    syscall("rt_sigprocmask", _SIG_BLOCK, _set(EVERY), old, _SET_SIZE)
    return int.from_bytes(old.raw, "little")


def set_mask(mask: int) -> None:
    """Make `mask` the blocked signals of this thread."""
    syscall("rt_sigprocmask", _SIG_SETMASK, _set(mask), None, _SET_SIZE)


def open_signals() -> int:
    """Return a descriptor that delivers every blocked signal of this process."""
    return syscall("signalfd4", -1, _set(EVERY), _SET_SIZE, _SFD_NONBLOCK | _SFD_CLOEXEC)


def read_signals(descriptor: int) -> list[Signal]:
    """Return the signals that are pending now, possibly none.

    Those that this process caused itself are left out: SIGPIPE from a log that nobody reads any more
    (blocked, it is kept although it is ignored), SIGHUP and SIGCONT from giving a terminal up.
    """
    own = os.getpid()
    found: list[Signal] = []
    while True:
        try:
            block = os.read(descriptor, _INFO_SIZE * 64)
        except BlockingIOError:
            return found
        signals = (_parse(block[start : start + _INFO_SIZE]) for start in range(0, len(block), _INFO_SIZE))
        found.extend(signal for signal in signals if signal.of_kernel or signal.sender != own)


def forward(signal: Signal, pid: int) -> None:
    """Send a signal on, with the value that sigqueue(3) gave it; a process that has ended is no error."""
    try:
        if signal.code == _SI_QUEUE:
            syscall("rt_sigqueueinfo", pid, signal.number, _siginfo(signal))
        else:
            os.kill(pid, signal.number)
    except ProcessLookupError:
        return


def _set(mask: int) -> bytes:
    return mask.to_bytes(_SET_SIZE, "little")


def _parse(info: bytes) -> Signal:
    """Decode struct signalfd_siginfo (signalfd(2))."""

    def field(offset: int, size: int = 4, *, signed: bool = False) -> int:
        return int.from_bytes(info[offset : offset + size], "little", signed=signed)

    return Signal(number=field(0), code=field(8, signed=True), sender=field(12), uid=field(16), value=field(48, 8))


def _siginfo(signal: Signal) -> bytes:
    """Encode the kernel's 64-bit siginfo_t of a queued signal (128 bytes, union at 16)."""
    words = (
        signal.number.to_bytes(4, "little")
        + bytes(4)
        + signal.code.to_bytes(4, "little", signed=True)
        + bytes(4)
        + signal.sender.to_bytes(4, "little")
        + signal.uid.to_bytes(4, "little")
        + signal.value.to_bytes(8, "little")
    )
    return words.ljust(_INFO_SIZE, b"\0")
