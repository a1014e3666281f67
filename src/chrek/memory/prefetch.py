"""Starting to read page files before they are needed.

A restore spends its first tenths of a second in manifests, file changes and CRIU; storage can work meanwhile.
The kernel is only asked to read ahead (posix_fadvise(2), WILLNEED), so nothing is copied and no memory of this
program grows. The page cache is charged to the control group of the thread that asks: call this from a
process of the target's group, or of one without a limit, or a limit makes the pages evict each other.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from chrek.memory.index import Index
from chrek.memory.shard import Folders, PageReader, page_files

THREADS: Final = 4
"""Network storage answers several requests at once; a local disk is busy with one."""


class Prefetch:
    """Reads the page files of an index ahead, in the order of a fill, until done or stopped."""

    def __init__(self, index: Index, folders: Folders) -> None:
        """Open the files and start.

        Raises:
            Refused: ``CORRUPT``; a file is missing or has another size.
        """
        self._cancel = threading.Event()
        self._files = ExitStack()
        self._blocks = index.blocks()
        self._lock = threading.Lock()
        reader = self._files.enter_context(page_files(index, folders))
        self._threads = [
            threading.Thread(target=self._work, args=(reader,), name=f"chrek-prefetch-{number}", daemon=True)
            for number in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Return when the kernel was asked for everything."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """End early, and close the files; harmless when called again."""
        self._cancel.set()
        self.wait()
        self._files.close()

    def _work(self, reader: PageReader) -> None:
        while not self._cancel.is_set():
            with self._lock:
                block = next(self._blocks, None)
            if block is None:
                return
            reader.advise(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def prefetch(index: Index, folders: Folders) -> Prefetch:
    """Start reading all page files of *index* into the page cache; the result stops it.

    Raises:
        Refused: ``CORRUPT``; a file is missing or has another size.
    """
    return Prefetch(index, folders)
