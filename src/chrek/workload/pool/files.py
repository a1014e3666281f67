"""Files of blobs: written under another name first, read cached or around the cache, linked if known.

A blob whose first page is in the page cache is read through it; one that is not is read with direct
I/O, which on fast disks is quicker and leaves the container's memory alone. ``preadv2`` with
``RWF_NOWAIT`` answers the question without reading (Linux 4.14; file systems that cannot say count as
cached).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chrek.workload.pool.errors import PoolCorrupt, PoolError
from chrek.workload.pool.layout import BLOBS, Blob, Index

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

AUTO: Final = "auto"
ON: Final = "on"
OFF: Final = "off"
DIRECT: Final = getattr(os, "O_DIRECT", 0)
UNIT: Final = 4096
"""Direct I/O moves whole units; a blob that ends within one is read and written through the cache."""


@dataclass
class Output:
    """A blob's file that is being written; it gets its name with the last byte."""

    directory: str
    blob: Blob
    fd: int
    temporary: str
    missing: int
    """Bytes that are still to be written."""

    def write(self, view: memoryview, offset: int) -> None:
        """Write one piece; raises `OSError`."""
        done = os.pwrite(self.fd, view, offset)
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], offset + done)
        self.missing -= len(view)
        if self.missing == 0:
            os.close(self.fd)
            self.fd = -1
            os.rename(self.temporary, os.path.join(self.directory, self.blob.name))

    def abandon(self) -> None:
        """Close and remove an unfinished file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.temporary)


def create(directory: str, blob: Blob, number: int, direct: str) -> Output:
    """Start a blob's file in `directory`; raises `OSError`.

    The directory is this process's own: a file of that name was left by a killed one with the same id.
    """
    temporary = os.path.join(directory, f".writing-{number}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags | (DIRECT if direct == ON and blob.size % UNIT == 0 else 0), 0o600)
    return Output(directory, blob, fd, temporary, blob.size)


def open_blob(path: str, size: int, direct: str) -> int:
    """Open a blob for reading, around the page cache if that is asked for or pays; raises `OSError`."""
    if size % UNIT or direct == OFF or (direct == AUTO and _cached(path)):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _cached(path: str) -> bool:
    """Whether the first page of a file is in the page cache; raises `OSError` if the file is not there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.preadv(fd, [bytearray(mmap.PAGESIZE)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    else:
        return True
    finally:
        os.close(fd)


def read(fd: int, view: memoryview, offset: int, path: str) -> None:
    """Fill `view`; raises `OSError`, or `PoolCorrupt` if the file ends before."""
    done = os.preadv(fd, [view], offset)
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise PoolCorrupt(f"{path} ends at byte {offset + done}; the index says that it goes on")
        done += count


def reuse(directory: str, blobs: Iterable[Blob], known: Sequence[str]) -> list[Blob]:
    """The blobs that have to be written; the others are in `directory` already or could be linked.

    `known` are directories of pools in other checkpoints on the same file system. A file counts by name and
    size; its contents are checked by digest when they are read back.
    """
    missing = []
    written: set[str] = set()
    for blob in blobs:
        name = blob.name
        if name not in written and not _there(directory, blob) and not _link(directory, blob, known):
            missing.append(blob)
        written.add(name)
    return missing


def _there(directory: str, blob: Blob) -> bool:
    try:
        return os.stat(os.path.join(directory, blob.name)).st_size == blob.size
    except OSError:
        return False


def _link(directory: str, blob: Blob, known: Sequence[str]) -> bool:
    for other in known:
        blobs = os.path.join(other, BLOBS)
        if _there(blobs, blob):
            with contextlib.suppress(OSError):
                os.link(os.path.join(blobs, blob.name), os.path.join(directory, blob.name))
                return True
    return False


def prune(directory: str, index: Index) -> None:
    """Remove blobs that `index` does not name, and unfinished ones."""
    wanted = {blob.name for blob in index.stored()}
    for entry in os.listdir(directory):
        if entry not in wanted:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, entry))


def locate(index: Index, directories: Iterable[str]) -> str:
    """The first directory that has every blob of `index` in its size.

    Raises `PoolError` that says what each directory lacks.
    """
    if not any(True for _ in index.stored()):
        return ""  # nothing but zeros
    troubles = []
    for directory in dict.fromkeys(directories):
        blobs = os.path.join(directory, BLOBS)
        lacking = [blob for blob in index.stored() if not _there(blobs, blob)]
        if not lacking:
            return directory
        troubles.append(f"{directory} lacks {len(lacking)} of {sum(1 for _ in index.stored())} files")
    raise PoolError(
        f"the contents of pool {index.pool!r} were not found: {'; '.join(troubles) or 'no directory given'}"
    )
