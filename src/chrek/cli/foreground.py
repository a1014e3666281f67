"""What stands outside while an application runs in the foreground: streams, signals, the exit status.

The application gets pipes of its own as standard streams, as under a container runtime, and this process copies
between them and ours. Handing ours through would tie a checkpoint to their kind: CRIU gives a restored process
a terminal only for a terminal and a file only for a file (at the old position: a new log would begin with a
hole), while a pipe fits whatever the next start is connected to.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chrek.cli import isolation
from chrek.errors import Reason, Refused

if TYPE_CHECKING:
    from types import FrameType

_FORWARDED = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH),
    *(signal.SIGALRM, signal.SIGCONT),
)
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Started:
    """A started application: PID 1 of its namespaces, and the threads that copy its output."""

    pid1: int
    output: tuple[threading.Thread, ...]


def start(command: Sequence[str], environment: Mapping[str, str], beside: Callable[[int], None]) -> Started:
    """Start ChReK's init for a command; *beside* is called with its process id and may fork.

    Raises:
        Refused: ``NOT_SUPPORTED_HERE``.
    """
    # Left blocked until there is somebody to forward to: an early ^C must not be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    _open_streams()
    pipes = [os.pipe() for _ in range(3)]
    theirs = (pipes[0][0], pipes[1][1], pipes[2][1])
    try:
        pid1 = isolation.start(command, environment, theirs)
    except OSError as error:
        raise Refused(Reason.NOT_SUPPORTED_HERE, f"The application's namespaces cannot be made: {error}.") from error
    for fd in theirs:
        os.close(fd)
    beside(pid1)  # before there are threads
    _forward_to(pid1)
    _copying(0, pipes[0][1])
    return Started(pid1, (_copying(pipes[1][0], 1), _copying(pipes[2][0], 2)))


def wait(started: Started) -> int:
    """Wait until the application has ended and all its output is written; return its exit code."""
    # Everything it had is gone with PID 1: the copies end when the pipes are empty.
    status = os.waitpid(started.pid1, 0)[1]
    for thread in started.output:
        thread.join()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _forward_to(pid1: int) -> None:
    def forward(number: int, _: FrameType | None) -> None:
        try:
            os.kill(pid1, number)
        except ProcessLookupError:
            return

    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, forward)
    # In the background of a shell, reading the terminal would stop this process and with it the application's output.
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)


def _open_streams() -> None:
    """Give this process the standard streams it lacks: a pipe must not get their numbers."""
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _copying(source: int, target: int) -> threading.Thread:
    thread = threading.Thread(target=_copy, args=(source, target), name=f"copy {source} to {target}", daemon=True)
    thread.start()
    return thread


def _copy(source: int, target: int) -> None:
    """Copy to the end, or until nobody reads any more; then the application's end of the pipe breaks too."""
    # The threads of a process share its signals; the main thread alone acts on them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        while data := os.read(source, _CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
    except OSError:
        pass
    for fd in (source, target):
        if fd > 2:
            os.close(fd)
