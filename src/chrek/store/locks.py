"""One writer for an id: an exclusive ``flock`` that ends with the process that holds it.

A lock file with a process id in it would have to be judged stale by somebody, wrongly on another node or
after the id was reused; the kernel (or the NFS server) releases this one when its holder dies, however it
dies. The descriptor is close-on-exec: programs started meanwhile do not keep the lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final

from chrek.errors import Reason, Refused
from chrek.store import layout

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class IdLock:
    """The exclusive right to write or delete one id, held until `release`."""

    def __init__(self, fd: int, directory: int, checkpoint_id: str) -> None:
        self._fd = fd
        self._directory = directory
        self.checkpoint_id = checkpoint_id

    @classmethod
    def acquire(cls, store: layout.Store, checkpoint_id: str) -> Self:
        """Take the lock without waiting.

        Raises:
            Refused: ``CAPTURE_IN_PROGRESS`` when another live process has it, ``NOT_SUPPORTED_HERE`` when the
                file system has no locks.
            OSError: the lock file cannot be made.
        """
        directory = store.private(layout.LOCKS, create=True)
        try:
            while True:
                fd = os.open(checkpoint_id, _FLAGS, 0o600, dir_fd=directory)
                try:
                    _lock(fd, checkpoint_id, store.path)
                    if _is_named(fd, checkpoint_id, directory):
                        return cls(fd, directory, checkpoint_id)
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)  # its holder removed the file between our open and our lock: take the new one
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


def _lock(fd: int, checkpoint_id: str, store: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            raise Refused(
                Reason.CAPTURE_IN_PROGRESS, f"Another process is writing or deleting checkpoint {checkpoint_id!r}."
            ) from error
        raise Refused(
            Reason.NOT_SUPPORTED_HERE,
            f"The file system of the store {store!r} refuses file locks: {error.strerror}.",
            cure="Use a file system with flock, or mount it with locking.",
        ) from error


def _is_named(fd: int, name: str, directory: int) -> bool:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    own = os.fstat(fd)
    if not stat.S_ISREG(own.st_mode):
        raise OSError(errno.EINVAL, f"the lock {name!r} is not a regular file")
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)
