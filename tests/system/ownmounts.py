"""Mounts that nobody else gets a copy of.

Every mount namespace that is made while something is mounted, by a container's start or by `chrek run`, is a copy with
that mount in it, and keeps the file system mounted after our own umount(8): mounted again, it is still the old one.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from chrek.system.syscalls import LIBC, check

_CLONE_NEWNS, _MS_REC_PRIVATE = 0x20000, 0x44000


def in_own_mounts(body: Callable[[], None]) -> None:
    """Run a test's body in a child process with a mount namespace of its own; what it raises is printed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check(LIBC.unshare(_CLONE_NEWNS), "unshare")
            check(LIBC.mount(None, b"/", None, _MS_REC_PRIVATE, None), "mount")
            body()
            status = 0
        except BaseException:  # noqa: BLE001 - nothing may return into pytest's code in this process
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "see the child's standard error"
