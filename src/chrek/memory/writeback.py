"""Sending shards to the disk while they are still being written.

The kernel starts writing late (10 % of memory dirty) and then slows the writers down, which would lengthen the
time in which the application stands still; and what it has not written is waited for before the checkpoint is
published. So each block is handed to the disk at once. ``sync_file_range`` (man 2) waits when the disk's queue
is full: that must not hold up the copy, so one thread of its own does it, and what it has not come to when the
copy ends is left to the kernel.

Medians of eight interleaved runs of 1 GB to ext4 (2-core EPYC, busy with other work): copy 0.61 s and flush 0.00 s
with it, copy 0.53 s and flush 0.32 s without.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from types import TracebackType
from typing import Final, Self

SYNC_FILE_RANGE_WRITE: Final = 2

_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class Writeback:
    """Starts the writing of pieces of files; ends with its block, before their descriptors are closed."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="chrek-writeback")

    def start(self, fd: int, offset: int, length: int) -> None:
        """Have a piece that was written into the page cache written to disk, soon."""
        self._pieces.put((fd, offset, length))

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None and not self._ended.is_set():
            # Only a hint: an error of the disk shows at the flush before publishing.
            _sync_file_range(*piece, SYNC_FILE_RANGE_WRITE)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._pieces.put(None)
        self._thread.join()
