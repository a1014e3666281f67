"""POSIX message queues are found wherever, and whether or not, their file system is mounted."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest

from chrek.system.queues import posix_queues
from chrek.system.syscalls import LIBC, check

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make an IPC namespace")

_CLONE_NEWIPC = 0x08000000


def test_queues_of_this_namespace_only() -> None:
    """A namespace has the queues that were made in it, as long as nobody unlinks them, and not those of another."""
    seen: list[list[str]] = []
    realtime = ctypes.CDLL("librt.so.1", use_errno=True)

    def look() -> None:
        for _ in range(2):
            check(LIBC.unshare(_CLONE_NEWIPC), "unshare")
            seen.append(posix_queues())
            queue = check(realtime.mq_open(b"/orders", os.O_CREAT | os.O_RDWR, 0o600, None), "mq_open")
            realtime.mq_close(queue)
            seen.append(posix_queues())
        check(realtime.mq_unlink(b"/orders"), "mq_unlink")
        seen.append(posix_queues())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [[], ["orders"], [], ["orders"], []]
