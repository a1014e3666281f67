"""What an init does while the application runs: forward, reap, end as it ended."""

from __future__ import annotations

import os
import select

from chrek.entrypoint.signals import SIGCHLD, Signal, forward, read_signals

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Iterable

WALL = 0x40000000
"""_WALL of wait(2): also children that announce themselves by another signal than SIGCHLD."""


def supervise(application: int, signals: int, early: Iterable[Signal] = ()) -> int:
    """Run until the application has ended; return its wait status.

    `early` are signals that arrived before there was an application. SIGTSTP, SIGTTIN and SIGTTOU are
    forwarded like all others: the application's group is orphaned (its parent is in another session),
    so without a handler the kernel ignores them there, just as it does for PID 1 itself.
    """
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    pending: Iterable[Signal] = early
    while True:
        for signal in pending:
            if not (signal.number == SIGCHLD and signal.of_kernel):
                forward(signal, application)
        # Always, not only after a SIGCHLD: several coalesce into one, or into a forwarded one.
        status = reap(application)
        if status is not None:
            return status
        poll.poll()
        pending = read_signals(signals)


def reap(application: int) -> int | None:
    """Collect every process that has ended; return the application's wait status if it is among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | WALL)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == application:
            return status


def exit_code(status: int) -> int:
    """Return the exit code for a wait status: the application's own, or 128 plus its signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
