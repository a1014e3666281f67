"""One writer for an id: an exclusive ``flock`` that ends with the process that holds it.

A lock file with a process id in it would have to be judged stale by somebody, wrongly on another node or
after the id was reused; the kernel (or the NFS server) releases this one when its holder dies, however it
dies. The descriptor is close-on-exec: programs started meanwhile do not keep the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from enum import Enum
from typing import TYPE_CHECKING, Final

from chrek.artifact import tree
from chrek.errors import Reason, Refused
from chrek.store import layout

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# A holder writes what it does into the file just after it got the lock: a text seen at once may be its predecessor's.
_SETTLE_SECONDS: Final = 0.2
# Cleaning up removes at most one checkpoint's files.
_CLEANUP_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.02  # flock has no deadline of its own


class Purpose(Enum):
    """What a lock is held for; a capture waits for a cleanup, but not for another capture."""

    CAPTURE = "capture"
    CLEANUP = "cleanup"


class IdLock:
    """The exclusive right to write or delete one id, held until `release`."""

    def __init__(self, fd: int, directory: int, checkpoint_id: str) -> None:
        self._fd = fd
        self._directory = directory
        self.checkpoint_id = checkpoint_id

    @classmethod
    def acquire(cls, store: layout.Store, checkpoint_id: str, purpose: Purpose) -> Self:
        """Take the lock; waits only while a cleanup has it, and not for one cleanup after another.

        Raises:
            Refused: ``CAPTURE_IN_PROGRESS`` when another live process has it, ``NOT_SUPPORTED_HERE`` when the
                file system has no locks.
            OSError: the lock file cannot be made.
        """
        directory = store.private(layout.LOCKS, create=True)
        begin = time.monotonic()
        try:
            while True:
                fd = os.open(checkpoint_id, _FLAGS, 0o600, dir_fd=directory)
                try:
                    if not _try_lock(fd, store.path):
                        _wait_or_refuse(fd, checkpoint_id, time.monotonic() - begin)
                    elif _is_named(fd, checkpoint_id, directory):
                        _sign(fd, purpose)
                        return cls(fd, directory, checkpoint_id)
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)  # busy, or its holder removed the file between our open and our lock
        except BaseException:
            os.close(directory)
            raise

    def remove(self) -> None:
        """Remove the lock file; only its holder may, so nobody else can hold a lock on it afterwards."""
        os.unlink(self.checkpoint_id, dir_fd=self._directory)

    def release(self) -> None:
        """Let go; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            os.close(self._directory)
            self._fd = self._directory = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(store: layout.Store, checkpoint_id: str) -> bool:
    """Whether a live process has the lock of an id at this moment; writes nothing."""
    path = f"{layout.LOCKS}/{checkpoint_id}"
    try:
        fd = tree.open_file(store.fd, path)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _BUSY
    finally:
        os.close(fd)
    return False


_BUSY: Final = frozenset({errno.EWOULDBLOCK, errno.EACCES})


def _try_lock(fd: int, store: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise Refused(
            Reason.NOT_SUPPORTED_HERE,
            f"The file system of the store {store!r} refuses file locks: {error.strerror}.",
            cure="Use a file system with flock, or mount it with locking.",
        ) from error
    return True


def _wait_or_refuse(fd: int, checkpoint_id: str, waited: float) -> None:
    holder = os.pread(fd, 512, 0).decode("utf-8", "replace").strip()
    patience = _CLEANUP_SECONDS if holder.startswith(Purpose.CLEANUP.value) else _SETTLE_SECONDS
    if waited > patience:
        raise Refused(
            Reason.CAPTURE_IN_PROGRESS,
            f"Another process is at work on checkpoint {checkpoint_id!r} ({holder or 'unknown'}).",
        )
    time.sleep(_POLL_SECONDS)


def _sign(fd: int, purpose: Purpose) -> None:
    """Say in the file who has the lock, for people and for `_wait_or_refuse`; a full disk is no reason to fail."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{purpose.value} by process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)


def _is_named(fd: int, name: str, directory: int) -> bool:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    own = os.fstat(fd)
    if not stat.S_ISREG(own.st_mode):
        raise OSError(errno.EINVAL, f"the lock {name!r} is not a regular file")
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)
