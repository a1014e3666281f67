"""Reaching files by directory descriptors, so that no name a workload planted leads anywhere else.

Every path here is relative to an open directory and is resolved by ``openat2`` (Linux 5.6) with the
kernel's own promise that it stays beneath that directory and passes no symbolic link. Checking a path
first and using it afterwards would leave a moment in which a process of the container swaps a
directory for a link; the promise is kept inside one system call, so there is no such moment.

Python has no ``openat2``, nor the extended-attribute calls that take a directory descriptor and a
name; the latter are reached through ``/proc/self/fd/N/name``, which is the same thing.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

from chrek.errors import Reason, Refused

_SYS_OPENAT2: Final = 437  # one number on every architecture (asm-generic/unistd.h)

NO_XDEV: Final = 0x01
NO_MAGICLINKS: Final = 0x02
NO_SYMLINKS: Final = 0x04
_BENEATH: Final = 0x08
IN_ROOT: Final = 0x10

BENEATH: Final = _BENEATH | NO_SYMLINKS | NO_MAGICLINKS
"""Stay under the directory and pass no symbolic link at all, not even one that stays inside."""

READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOATIME
"""Read a file: a FIFO planted in its place does not block us, and its access time stays."""

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

_CHUNK: Final = 4000  # one call takes paths shorter than PATH_MAX (4096); longer ones go step by step

GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE)
"""What an open says when the entry vanished, or is of another type than it was a moment ago."""


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)


@lru_cache(maxsize=64)
def _how(flags: int, mode: int, resolve: int) -> _OpenHow:
    return _OpenHow(flags | os.O_CLOEXEC, mode, resolve)


def openat2(dir_fd: int, path: bytes, flags: int, *, resolve: int, mode: int = 0) -> int:
    """Open *path* under *dir_fd* (man 2 openat2) and return the descriptor, close-on-exec.

    Raises `OSError`: EXDEV when NO_XDEV met a mount point or BENEATH an escape, ELOOP at a symbolic link.
    """
    how = _how(flags, mode, resolve)
    while True:
        fd: int = _syscall(_SYS_OPENAT2, dir_fd, path, ctypes.addressof(how), ctypes.sizeof(how))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number == errno.ENOSYS:
            raise Refused(Reason.KERNEL_TOO_OLD, "The kernel lacks openat2, which came with Linux 5.6.")
        if number not in (errno.EINTR, errno.EAGAIN):  # EAGAIN: a rename raced with the resolution
            raise OSError(number, os.strerror(number), path)


def open_beneath(root: int, path: bytes, flags: int = DIRECTORY, *, resolve: int = BENEATH | NO_XDEV) -> int:
    """Open *path* (no leading slash; empty is *root* itself) of any length beneath *root*."""
    if len(path) < _CHUNK:
        return openat2(root, path or b".", flags, resolve=resolve)
    at = os.dup(root)
    try:
        while len(path) >= _CHUNK:
            cut = path.rindex(b"/", 0, _CHUNK)
            step = openat2(at, path[:cut], os.O_PATH | os.O_DIRECTORY, resolve=resolve)
            os.close(at)
            at, path = step, path[cut + 1 :]
        return openat2(at, path, flags, resolve=resolve)
    finally:
        os.close(at)


@contextmanager
def opened(root: int, path: bytes, flags: int = DIRECTORY, *, resolve: int = BENEATH | NO_XDEV) -> Iterator[int]:
    """`open_beneath`, closed at the end of the block."""
    fd = open_beneath(root, path, flags, resolve=resolve)
    try:
        yield fd
    finally:
        os.close(fd)


def open_in_root(root: int, path: bytes) -> int:
    """Open a container's directory as the container itself would, its links included, its root never left."""
    return openat2(root, path, os.O_RDONLY | os.O_DIRECTORY, resolve=IN_ROOT | NO_MAGICLINKS)


def split(path: bytes) -> tuple[bytes, bytes]:
    """Split ``a/b/c`` into ``a/b`` and ``c``; the parent of a top entry is empty."""
    parent, _, name = path.rpartition(b"/")
    return parent, name


def join(parent: bytes, name: bytes) -> bytes:
    """Put a name under a parent directory's path."""
    return parent + b"/" + name if parent else name


def shown(path: bytes) -> str:
    """Give a path as people read it in messages and reports: from the root, odd bytes escaped."""
    return "/" + path.decode("utf-8", "backslashreplace")


def magic(dir_fd: int, name: bytes = b"") -> bytes:
    """Give the path by which calls without a directory argument reach an entry (last link not followed)."""
    return b"/proc/self/fd/%d/%s" % (dir_fd, name) if name else b"/proc/self/fd/%d" % dir_fd


def lstat(dir_fd: int, name: bytes) -> os.stat_result | None:
    """Stat an entry itself, never what it links to; None when there is none."""
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def is_mount_point(dir_fd: int, name: bytes) -> bool:
    """Tell whether another mount begins at this entry."""
    try:
        os.close(openat2(dir_fd, name, os.O_PATH | os.O_NOFOLLOW, resolve=NO_XDEV | NO_MAGICLINKS))
    except OSError as error:
        return error.errno == errno.EXDEV
    return False


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
