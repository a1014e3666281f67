"""A controlling terminal, handed on from the init to the application's session.

A terminal belongs to one session, and the application gets a session of its own, so the init (the
session's leader when the runtime gave it a terminal) lets go of it first and the application takes
it. Letting go sends SIGHUP and SIGCONT to the terminal's foreground group, which is the init's own;
`read_signals` leaves out what the init caused itself. Taking it makes the taker's group the foreground group
(`__proc_set_tty()` in drivers/tty/tty_jobctrl.c).

On a plain machine the init usually is not the leader: the shell keeps its terminal, and the
application has none.
"""

from __future__ import annotations

import fcntl
import os

TIOCSCTTY, TIOCNOTTY = 0x540E, 0x5422
"""asm-generic/ioctls.h, the same on x86-64 and aarch64."""


def controlling_terminal() -> int | None:
    """Return a standard descriptor on this session's terminal, if this process leads the session."""
    if os.getsid(0) != os.getpid():
        return None
    for descriptor in (0, 1, 2):
        try:
            os.tcgetpgrp(descriptor)
        except OSError:
            continue
        return descriptor
    return None


def let_go(terminal: int) -> None:
    """Give the terminal up."""
    fcntl.ioctl(terminal, TIOCNOTTY)


def take(terminal: int) -> None:
    """Make the terminal the controlling one of this new session, with this group in its foreground."""
    fcntl.ioctl(terminal, TIOCSCTTY, 0)
