"""Getting a checkpoint's files to stable storage without waiting for one after the other.

Measured on 2 cores, ext4 on a virtual disk, 300 files of 3 KB: ``fdatasync`` one by one 0.41 s, from 4 threads
0.053 s (the journal commits many at once), ``syncfs`` 0.010 s; 4 files of 256 MB: 0.49, 0.38 and 0.32 s.
``syncfs`` is not used for all that: it waits for what everybody else wrote to that file system too,
and on FUSE it does not reach the server behind it. What counts at tens of gigabytes is to start
writing early: 2 GB from 4 threads took 1.1 to 1.9 s until durable with `start_writeback` every 32 MB, and 2.4 to
3.0 s without (interleaved runs).
"""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from chrek.artifact import tree
from chrek.store.layout import sync_directory

if TYPE_CHECKING:
    from collections.abc import Iterable

WORKERS: Final = 8
"""Threads that flush: they wait for the disk, not for a core."""

_SYNC_FILE_RANGE_WRITE: Final = 2
_FILE_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Start writing a range of a file to disk and do not wait; only a hint, so errors are not reported.

    A writer of bulk data calls it every few tens of megabytes; the flush at the end then has little left
    to do. See sync_file_range(2).
    """
    _sync_file_range()(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def flush_files(at: int, paths: Iterable[str]) -> None:
    """Set mode 0600 on regular files below the directory *at* and flush them.

    Raises:
        OSError: one could not be flushed: what was written earlier may be lost.
    """

    def flush(path: str) -> None:
        with tree.opened_file(at, path) as fd:
            os.fchmod(fd, _FILE_MODE)
            os.fdatasync(fd)

    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(flush, paths):
            pass


def flush_directories(at: int, paths: Iterable[str]) -> None:
    """Set mode 0700 on directories below *at*, flush them, and then *at* itself.

    Raises:
        OSError: one could not be flushed.
    """
    for path in sorted(paths, reverse=True):
        fd = tree.open_directory(at, path)
        try:
            os.fchmod(fd, _DIRECTORY_MODE)
            sync_directory(fd)
        finally:
            os.close(fd)
    os.fchmod(at, _DIRECTORY_MODE)
    sync_directory(at)


@functools.cache
def _sync_file_range() -> Any:  # noqa: ANN401 - a foreign function
    function = ctypes.CDLL(None).sync_file_range
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function
