"""How long restored starts lived: after three short ones in a row the next start is cold.

For a restore from outside the agent counts, in the pod's annotation. A container that restores itself has nobody to
ask, and little that outlasts it: its root file system is new with every start, the store is read-only. Its
/dev/shm lasts as long as the pod; containerd and CRI-O give all starts of all containers of a pod the same one. So the
count lies there.

A restored start counts as short from the beginning, and a minute later as long: an init that is killed, too, leaves the
truth behind. The count names the file system it was written to, so that one which came out of a checkpoint, with the
rest of its /dev/shm, says nothing here; and a file of another user says nothing. Where there is no /dev/shm nothing is
counted, and every start is restored.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import stat
import time

PLACE = "/dev/shm/.chrek-short-lives"
SHORT = 60.0
LIMIT = 3
_SIZE_MAX = 100


class Lives:
    """The count of this container's pod."""

    def __init__(self, *, place: str = PLACE, short: float = SHORT) -> None:
        self._place = place
        self._short = short
        self.count = _read(place)

    @property
    def given_up(self) -> bool:
        """Whether it is time to start cold."""
        return self.count >= LIMIT

    def begin(self, *, restored: bool) -> None:
        """Count a start, and forget all of them if it lives long enough."""
        if restored:
            _write(self._place, self.count + 1)
        _thread.start_new_thread(self._forget_later, ())

    def give_up(self) -> None:
        """Have the next start be cold: the application has found damage in what was restored."""
        _write(self._place, LIMIT)

    def _forget_later(self) -> None:
        time.sleep(self._short)
        with contextlib.suppress(OSError):
            os.unlink(self._place)


def _read(place: str) -> int:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return 0
        device, count = os.read(descriptor, _SIZE_MAX).split()
        return int(count) if int(device) == status.st_dev else 0
    except (OSError, ValueError):
        return 0
    finally:
        os.close(descriptor)


def _write(place: str, count: int) -> None:
    """Write the count; without a place for it nothing is counted."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # Anew, whatever lies there: a restore may have put a file of the checkpoint's there.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)
        descriptor = os.open(place, flags, 0o600)
    except OSError:
        return
    try:
        os.write(descriptor, b"%d %d\n" % (os.fstat(descriptor).st_dev, count))
    except OSError:
        return
    finally:
        os.close(descriptor)
