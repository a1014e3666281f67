"""Standard streams: the runtime's ends of a container, which the application inherited from PID 1.

They are the one thing a process tree shares with the outside. At capture CRIU is told that they are
external; at restore each is replaced by the new container's own, or output would go nowhere and the
application would die of SIGPIPE.
"""

from __future__ import annotations

import ctypes
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chrek.errors import Reason, Refused
from chrek.system import procfs
from chrek.system.syscalls import LIBC, check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chrek.artifact import Stream
    from chrek.engine.container import Container
    from chrek.system.ids import HostPid
    from chrek.system.procfs import Descriptor

_SYS_PIDFD_GETFD = 438


@dataclass(frozen=True)
class External:
    """A standard stream as CRIU names it: ``pipe:[I]``, ``file[M:I]`` or ``tty[R:D]``.

    Attributes:
        number: 0, 1 or 2, of PID 1.
        key: CRIU's name for it.
        declared: whether the dump must be told (``--external``); pipes need not.
    """

    number: int
    key: str
    declared: bool


def external(container: Container) -> list[External]:
    """Return PID 1's standard streams that come from outside the container.

    A stream opened inside it, such as its own ``/dev/null``, is a file like any other.
    """
    known = {mount.id for mount in container.mounts}
    found = []
    for descriptor in procfs.descriptors(container.pid1):
        if descriptor.number <= 2:
            key = _key(container.pid1, descriptor, known)
            if key is not None:
                found.append(External(descriptor.number, key, declared=not key.startswith("pipe:")))
    return found


def _key(pid: HostPid, descriptor: Descriptor, known: set[int]) -> str | None:
    try:
        info = os.stat(f"/proc/{pid}/fd/{descriptor.number}")
    except procfs.GONE:
        return None
    if descriptor.target.startswith("pipe:"):
        return descriptor.target
    if stat.S_ISCHR(info.st_mode) and os.major(info.st_rdev) in range(136, 144):
        return f"tty[{info.st_rdev:x}:{info.st_dev:x}]"
    if descriptor.target.startswith("/") and descriptor.mount not in known:
        return f"file[{descriptor.mount:x}:{info.st_ino:x}]"
    return None


def take(container: Container, recorded: Mapping[str, Stream]) -> dict[str, int]:
    """Return, for CRIU's name of each recorded stream, a descriptor of this container's own stream of that number.

    The caller closes the descriptors.

    Raises:
        Refused: ``CLAIM_LOST``, when PID 1 is gone.
    """
    taken: dict[str, int] = {}
    pidfd = os.pidfd_open(container.pid1)
    try:
        for number, stream in sorted(recorded.items()):
            if stream.key is not None and stream.key not in taken:
                taken[stream.key] = _get(pidfd, int(number))
    except OSError as error:
        for fd in taken.values():
            os.close(fd)
        raise Refused(Reason.CLAIM_LOST, f"Standard streams of process {container.pid1}: {error.strerror}.") from error
    finally:
        os.close(pidfd)
    return taken


def _get(pidfd: int, number: int) -> int:
    """Duplicate another process's descriptor (pidfd_getfd(2)): unlike opening it anew, works for sockets too."""
    long = ctypes.c_long
    return check(LIBC.syscall(long(_SYS_PIDFD_GETFD), long(pidfd), long(number), long(0)), "pidfd_getfd")
