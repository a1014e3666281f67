"""Taking the files that pools left beside a checkpoint into it (`docs/format-gpu.md`).

The files were written by the application, into a directory that it can still write. So nothing in it
is believed: no link is followed, only regular files with the names of an index and of blobs are taken,
and what else lies there is left. What the application changes later it changes in its own checkpoint;
digests notice.

Blobs are taken by hard link, so nothing large is copied and the source keeps its own until the checkpoint is
published: if the capture fails, only the links in the staging directory are removed. Where the file
system has no hard links they are copied. The index, which the application may still replace, is always copied:
no file of a checkpoint but a blob may have a second name.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from chrek.errors import CaptureFailed, Reason
from chrek.system.ids import NsPid

DIRECTORY: Final = ".handover"
GPU: Final = "gpu"
BLOBS: Final = "blobs"
INDEX: Final = "index.json"
POOL: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\.(\d{1,10})")
BLOB: Final = re.compile(r"[0-9a-f]{64}")
LARGEST_INDEX: Final = 64 << 20
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})
_COPY: Final = 8 << 20


@dataclass(frozen=True)
class Adopted:
    """What was taken: paths below the checkpoint, and bytes."""

    paths: tuple[str, ...] = ()
    bytes: int = 0


def adopt(store: int, identity: str, staging: int, pids: Collection[NsPid]) -> Adopted:
    """Take the pools of the given processes into ``gpu/`` of the directory `staging`.

    `store` and `staging` are directory descriptors, `identity` the checkpoint's id. Raises
    `CaptureFailed` with `WRITE_FAILED` if a pool's files are incomplete or cannot be taken.
    """
    try:
        with _descend(store, DIRECTORY, identity, GPU) as source:
            names = sorted(os.listdir(source))
    except FileNotFoundError:
        return Adopted()
    except OSError as error:
        raise _failed(error) from error
    mine = [name for name in names if (match := POOL.fullmatch(name)) and int(match[1]) in pids]
    paths: list[str] = []
    size = 0
    try:
        for name in mine:
            with _descend(store, DIRECTORY, identity, GPU, name) as pool:
                if not _exists(pool, INDEX):
                    continue  # never saved whole: the process kept its memory
                with _descend(staging, GPU, name, make=True) as target:
                    for path, length in _take(pool, target, f"{GPU}/{name}"):
                        paths.append(path)
                        size += length
    except OSError as error:
        raise _failed(error) from error
    return Adopted(tuple(paths), size)


def _failed(error: OSError) -> CaptureFailed:
    return CaptureFailed(Reason.WRITE_FAILED, f"The pools' files could not be taken: {error}.")


def _exists(at: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def discard(store: int, identity: str) -> None:
    """Remove a checkpoint's handover directory; what cannot be removed is left."""
    with suppress(OSError), _descend(store, DIRECTORY) as directory:
        _remove(directory, identity)
        with suppress(OSError):
            os.rmdir(DIRECTORY, dir_fd=store)


def _take(pool: int, target: int, path: str) -> Iterator[tuple[str, int]]:
    """Take one pool: the blobs that its index names, then the index."""
    wanted = _wanted(pool, path)
    if wanted:
        with _descend(pool, BLOBS) as source, _descend(target, BLOBS, make=True) as destination:
            for name in sorted(wanted):
                yield f"{path}/{BLOBS}/{name}", _take_file(source, destination, name, f"{path}/{BLOBS}")
    yield f"{path}/{INDEX}", _take_file(pool, target, INDEX, path, link=False)


def _wanted(pool: int, path: str) -> set[str]:
    """Names of the blobs that an index names."""
    fd = os.open(INDEX, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=pool)
    with open(fd, "rb") as file:
        data = file.read(LARGEST_INDEX + 1)
    try:
        names = {blob["name"] for blob in json.loads(data[:LARGEST_INDEX])["blobs"]} - {None}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CaptureFailed(Reason.WRITE_FAILED, f"{path}/{INDEX} is no index of a pool: {error!r}.") from error
    if bad := [name for name in names if not isinstance(name, str) or not BLOB.fullmatch(name)]:
        raise CaptureFailed(Reason.WRITE_FAILED, f"{path}/{INDEX} names {bad[0]!r}, which is no blob.")
    return names


def _take_file(source: int, target: int, name: str, path: str, *, link: bool = True) -> int:
    """Link a file, or copy it; its size."""
    if not _exists(source, name):
        raise CaptureFailed(Reason.WRITE_FAILED, f"{path}/{name} is missing: the pool was not saved whole.")
    try:
        if not link:
            raise OSError(errno.EXDEV, "to be copied")
        os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy(source, target, name)
    found = os.stat(name, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        os.unlink(name, dir_fd=target)
        raise CaptureFailed(Reason.WRITE_FAILED, f"{path}/{name} is no regular file.")
    return found.st_size


def _copy(source: int, target: int, name: str) -> None:
    # O_NONBLOCK: a FIFO of that name must not hold the capture up.
    reading = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    writing = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(name, reading, dir_fd=source), "rb", buffering=0) as old:
        if not stat.S_ISREG(os.fstat(old.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no regular file", name)
        with open(os.open(name, writing, 0o600, dir_fd=target), "wb", buffering=0) as new:
            while data := old.read(_COPY):
                new.write(data)


@contextmanager
def _descend(at: int, *names: str, make: bool = False) -> Iterator[int]:
    """The directory below another one, no link followed on the way; with *make*, made where it is not there."""
    fd = os.open(".", _OPEN, dir_fd=at)
    try:
        for name in names:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=fd)
            below = os.open(name, _OPEN, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _remove(at: int, name: str) -> None:
    """Remove a directory and all below it."""
    with _descend(at, name) as directory:
        for entry in os.listdir(directory):
            try:
                os.unlink(entry, dir_fd=directory)
            except IsADirectoryError:
                _remove(directory, entry)
    os.rmdir(name, dir_fd=at)
