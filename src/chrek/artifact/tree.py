"""Directories reached by descriptor only, so that no name in them can lead anywhere else.

A checkpoint may have been tampered with by whoever can write to the store: a symbolic link in place
of a file, a FIFO that would make an open wait for ever, a device. Every path is therefore walked one
component at a time with ``O_NOFOLLOW``, looked at before it is opened, and looked at again afterwards.
``openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`` does the same in one call, but it is refused by
the seccomp filters of older container runtimes, so that this walk would be needed beside it anyway; paths here
have at most a few components and none is ``..``.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

MAX_ENTRIES: Final = 250_000
MAX_DEPTH: Final = 20


class NotPlainError(OSError):
    """Something stands where a regular file or a directory should be."""


@dataclass(frozen=True)
class Entry:
    """One thing below a directory; *path* is relative to it."""

    path: str
    status: os.stat_result

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return file_kind(self.status.st_mode)


def file_kind(mode: int) -> str:
    """Return the type of a file in words."""
    return _KINDS.get(stat.S_IFMT(mode), "thing of unknown type")


_KINDS: Final = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def open_directory(at: int, path: str) -> int:
    """Open a directory below the directory *at*, or (``.``) itself anew; no component may be a symbolic link.

    Raises:
        OSError: with the errno of the component that failed (``ELOOP`` or ``ENOTDIR`` for a link).
    """
    current = os.open(".", _DIRECTORY, dir_fd=at)
    for component in path.split("/") if path != "." else ():
        try:
            below = os.open(_plain(component), _DIRECTORY, dir_fd=current)
        finally:
            os.close(current)
        current = below
    return current


def open_file(at: int, path: str) -> int:
    """Open a regular file below the directory *at* for reading; never blocks, never follows a link.

    Raises:
        NotPlainError: it is something else than a regular file.
        OSError: it cannot be opened.
    """
    parent, _, name = path.rpartition("/")
    directory = open_directory(at, parent) if parent else os.dup(at)
    try:
        # Opening a device can have effects of its own, so the name is looked at first.
        _require_regular(os.stat(_plain(name), dir_fd=directory, follow_symlinks=False), path)
        fd = os.open(name, _FILE, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        _require_regular(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def opened_file(at: int, path: str) -> Iterator[int]:
    """`open_file` as a context manager."""
    fd = open_file(at, path)
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(at: int, path: str, *, limit: int) -> bytes:
    """Read a regular file of at most *limit* bytes.

    Raises:
        ValueError: it is longer.
        OSError: as `open_file`.
    """
    with opened_file(at, path) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ValueError(f"{path} has {size} bytes, more than {limit}")
        chunks = []
        left = limit + 1
        while left > 0 and (chunk := os.read(fd, min(left, 1 << 20))):
            chunks.append(chunk)
            left -= len(chunk)
    if left <= 0:
        raise ValueError(f"{path} has more than {limit} bytes")
    return b"".join(chunks)


def scan(at: int) -> Iterator[Entry]:
    """Yield everything below the directory *at*, parents before children, following no link.

    Raises:
        ValueError: there are more than `MAX_ENTRIES` entries, or more than `MAX_DEPTH` levels.
        OSError: a directory cannot be read.
    """
    pending = [""]
    count = 0
    while pending:
        parent = pending.pop()
        directory = open_directory(at, parent) if parent else os.dup(at)
        try:
            names = sorted(entry.name for entry in _scandir(directory))
            for name in names:
                count += 1
                if count > MAX_ENTRIES:
                    raise ValueError(f"there are more than {MAX_ENTRIES} files")
                found = Entry(f"{parent}/{name}" if parent else name, _status(directory, name))
                yield found
                if found.is_directory:
                    if found.path.count("/") >= MAX_DEPTH:
                        raise ValueError(f"directories are nested more than {MAX_DEPTH} deep")
                    pending.append(found.path)
        finally:
            os.close(directory)


def _scandir(directory: int) -> Iterator[os.DirEntry[str]]:
    # A duplicate shares its position with its original, which another scan may have moved to the end.
    own = os.open(".", _DIRECTORY, dir_fd=directory)
    try:
        with os.scandir(own) as entries:
            yield from entries
    finally:
        os.close(own)


def _status(directory: int, name: str) -> os.stat_result:
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def _plain(component: str) -> str:
    if component in {"", ".", ".."} or "/" in component or "\0" in component:
        raise ValueError(f"{component[:80]!r} is not the name of a file")
    return component


def _require_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotPlainError(f"{path} is a {file_kind(status.st_mode)}, not a regular file")
