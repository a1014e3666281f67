"""Whether the store can take what is about to be written; asked before anything is touched."""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

from chrek.errors import CaptureFailed, ChrekError, Reason, Refused

MARGIN: Final = 64 << 20
"""Bytes wanted above the computed need: manifest, logs, CRIU's small images, the file system's own."""

_NO_SPACE_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def free_bytes(fd: int) -> int:
    """Return the bytes that this process could still write to the file system of *fd*.

    A quota that the file system does not report, as some network file systems do, cannot be seen.
    """
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize


def require_space(fd: int, need: int, *, largest_file: int = 0, files: int = 0) -> None:
    """Check that *need* bytes in *files* files fit, of which one has *largest_file* bytes.

    Raises:
        Refused: ``NO_SPACE``, with the numbers.
    """
    free = free_bytes(fd)
    if free < need + MARGIN:
        lack = need + MARGIN - free
        raise Refused(
            Reason.NO_SPACE,
            f"The checkpoint needs {need} bytes and {MARGIN} of reserve; the store has {free} free, {lack} too few.",
        )
    status = os.fstatvfs(fd)
    if status.f_files > 0 and status.f_favail < files:
        raise Refused(
            Reason.NO_SPACE, f"The checkpoint needs {files} files; the store has inodes for {status.f_favail}."
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit not in {resource.RLIM_INFINITY, -1} and limit < largest_file:
        raise Refused(
            Reason.NO_SPACE,
            f"The largest file needs {largest_file} bytes; this process may write files of at most {limit}.",
            cure="Raise the limit on file size (ulimit -f).",
        )


def write_failed(error: OSError, what: str) -> CaptureFailed:
    """Return the error to raise when writing *what* for a capture failed with *error*."""
    return CaptureFailed(_reason(error), f"Writing {what} failed: {error}. Nothing was published.")


def change_failed(error: OSError, what: str) -> ChrekError:
    """Return the error to raise when another change to a store, *what*, failed with *error*."""
    return ChrekError(
        _reason(error), f"{what} failed: {error}.", cure="Look whether the store is mounted read-only, or is full."
    )


def _reason(error: OSError) -> Reason:
    return Reason.NO_SPACE if error.errno in _NO_SPACE_ERRORS else Reason.WRITE_FAILED
