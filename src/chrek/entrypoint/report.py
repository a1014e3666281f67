"""What the init tells people: lines on stderr, the container's termination message."""

from __future__ import annotations

import os
import stat
import time

TERMINATION_LOG = "/dev/termination-log"
"""Where Kubernetes reads why a container ended (terminationMessagePath's default), 4096 bytes."""
TERMINATION_MAX = 4096


class Report:
    """Writes to the descriptor that the runtime gave as standard error, if it gave one."""

    def __init__(self, *, enabled: bool, debug: bool = False) -> None:
        self._enabled = enabled
        self._debug = debug

    def line(self, text: str) -> None:
        """Write one line; a closed or full log is no reason to stop."""
        if not self._enabled:
            return
        try:
            os.write(2, os.fsencode("chrek: " + text.replace("\n", " ") + "\n"))
        except OSError:
            return

    def debug(self, text: str) -> None:
        """Write one line if DEBUG asks for it."""
        if self._debug:
            self.line(text)

    def started(self, how: str, reason: str, seconds: float) -> None:
        """Write the stable line on how the application came to be."""
        self.line(f"start={how} reason={reason} seconds={seconds:.3f}")

    def ending(self, text: str) -> None:
        """Write why the container ends or starts cold: the log and the termination message."""
        self.line(text)
        termination_message(text)


def termination_message(text: str, path: str = TERMINATION_LOG) -> None:
    """Leave the termination message, where the runtime made a regular file for it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.truncate(descriptor, 0)
            os.write(descriptor, os.fsencode(text)[:TERMINATION_MAX])
    except OSError:
        return
    finally:
        os.close(descriptor)


def age() -> float:
    """Return how long this process has been running, in seconds (to 10 ms: a clock tick)."""
    try:
        with open("/proc/self/stat", "rb", buffering=0) as file:
            start = int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    # Both seen from this process's time namespace, so its offset cancels out.
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK"))
