"""POSIX message queues of an IPC namespace: they outlive every descriptor of them, so no process need show one.

A queue is a file of the file system ``mqueue``, of which each IPC namespace has one (mq_overview(7)). Whether a container
mounts it, and what else it puts at ``/dev/mqueue``, says nothing: a mount of our own is made, detached, and looked at.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from chrek.system.syscalls import syscall

_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6


def posix_queues() -> list[str]:
    """Return the names of the message queues in the calling thread's IPC namespace.

    Raises:
        OSError: this program may not look (it takes CAP_SYS_ADMIN).
    """
    try:
        context = syscall("fsopen", b"mqueue", _CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENODEV:  # a kernel without them
            return []
        raise
    try:
        syscall("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mounted = syscall("fsmount", context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mounted)
    finally:
        os.close(mounted)
    try:
        return sorted(os.listdir(top))
    finally:
        os.close(top)
