"""Something that happens at the n-th change a process makes to the file system.

The functions of `os` that change something are wrapped; a test runs this in a child process that it is ready to lose.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_CHANGES = ("mkdir", "rmdir", "rename", "unlink", "symlink", "write", "pwrite", "ftruncate", "fsync", "fdatasync",
            "fchmod", "open")  # fmt: skip


def interrupt_at(at: int, action: Callable[[], object], *, after: bool = False) -> None:
    """Let *action* run before (or just after) the *at*-th change from now on; for the rest of this process's life."""
    counter = _Counter()
    for name in _CHANGES:
        setattr(os, name, counter.wrap(name, getattr(os, name), at, action, after=after))


def count_changes(operation: Callable[[], object]) -> int:
    """Return how many changes *operation* makes when nothing interrupts it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            counter = _Counter()
            for name in _CHANGES:
                setattr(os, name, counter.wrap(name, getattr(os, name), 0, int))
            operation()
            os.write(writing, b"%d" % counter.count)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    count = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    return count


class _Counter:
    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def wrap(
        self, name: str, function: Callable[..., Any], at: int, action: Callable[[], object], *, after: bool = False
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:  # noqa: ANN401 - any function of os
            if name == "open" and not args[1] & os.O_CREAT:
                return function(*args, **options)
            with self._lock:  # flushing has threads
                self.count += 1
                own = self.count
            if own == at and not after:
                action()
            try:
                return function(*args, **options)
            finally:
                if own == at and after:
                    action()

        return wrapped
