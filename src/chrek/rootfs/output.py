"""Writing an archive while it is hashed: one thread reads files, others hash, one writes.

All release the interpreter's lock while they work, so a pass costs what the slowest costs. The threads
are started by the first full buffer only: for a container that changed a few kilobytes they would cost
more than the work.

One SHA-256 over the whole is the limit of a pass: 0.8 GB/s here (2-core Xeon VM, tmpfs and ext4), with
reading and writing at 1.5 GB/s and more. So a caller may ask for a digest of each block instead (the bulk
form of the manifest), which several threads compute. Buffers wait in queues of bounded length: memory stays
below 10 MB for one digest and 50 MB for blocks, however large the files are.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from chrek.artifact.digest import BLOCK_SIZE, BlocksBuilder, FileEntry
from chrek.errors import CaptureFailed, Reason
from chrek.rootfs.fd import write_all

BUFFER: Final = 1 << 20
_HASHERS: Final = min(4, os.cpu_count() or 1)


def write_failed(name: str, error: OSError) -> CaptureFailed:
    """Give the error for a write that failed: NO_SPACE or WRITE_FAILED, with the file's name."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = Reason.NO_SPACE if full else Reason.WRITE_FAILED
    return CaptureFailed(reason, f"Writing {name} failed: {os.strerror(error.errno or 0)}.")


class _Stage:
    """A thread that does one thing with every buffer given to it, in order; its first error is kept."""

    def __init__(self, action: Callable[[int, bytes], object], *, depth: int) -> None:
        self._action = action
        self._queue: queue.Queue[tuple[int, bytes] | None] = queue.Queue(depth)
        self.error: BaseException | None = None
        self.joined = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is None:
                try:
                    self._action(*item)
                except BaseException as error:  # noqa: BLE001 - raised again where the archive is written
                    self.error = error

    def put(self, index: int, data: bytes) -> None:
        self._queue.put((index, data))

    def join(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self.joined = True


class ArchiveWriter:
    """A file that is hashed as it is written, as a whole or (*blocks*) in blocks of 4 MiB.

    Use it as a context manager: leaving it by an exception stops its threads. `finish` gives the result.
    """

    def __init__(self, fd: int, name: str, *, blocks: bool = False) -> None:
        self._fd = fd
        self._name = name
        self._blocks = BlocksBuilder(block_size=BLOCK_SIZE) if blocks else None
        self._limit = BLOCK_SIZE if blocks else BUFFER
        self._hash = hashlib.sha256()
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._index = 0
        self._writer: _Stage | None = None
        self._hashers: list[_Stage] = []
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def put(self, data: bytes) -> None:
        """Append *data*; raises `CaptureFailed` when an earlier write failed."""
        self.size += len(data)
        self._pending.append(data)
        self._pending_size += len(data)
        while self._pending_size >= self._limit:
            self._flush()

    def finish(self) -> FileEntry:
        """Write what is left and return size and digest, in blocks if there is more than one of them."""
        if self._writer is None:
            return self._finish_small()
        if self._pending_size:
            self._flush()
        self._stop()
        self._check()
        if self._blocks is not None:
            return FileEntry.of_blocks(self._blocks.finish())
        return FileEntry(size=self.size, sha256=self._hash.hexdigest())

    def _finish_small(self) -> FileEntry:
        data = b"".join(self._pending)
        try:
            write_all(self._fd, data)
        except OSError as error:
            raise write_failed(self._name, error) from error
        return FileEntry.of_bytes(data)

    def _flush(self) -> None:
        if self._writer is None:
            self._start()
        data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        if self._blocks is not None and len(data) > self._limit:  # blocks are of exactly one size
            data, rest = data[: self._limit], data[self._limit :]
            self._pending, self._pending_size = [rest], len(rest)
        else:
            self._pending, self._pending_size = [], 0
        assert self._writer is not None
        self._hashers[self._index % len(self._hashers)].put(self._index, data)
        self._writer.put(self._index, data)
        self._index += 1
        self._check()

    def _start(self) -> None:
        self._writer = _Stage(lambda _, data: write_all(self._fd, data), depth=2)
        if self._blocks is None:
            self._hashers = [_Stage(lambda _, data: self._hash.update(data), depth=2)]
        else:
            self._hashers = [_Stage(self._blocks.add, depth=1) for _ in range(_HASHERS)]

    def _stages(self) -> list[_Stage]:
        return self._hashers if self._writer is None else [self._writer, *self._hashers]

    def _check(self) -> None:
        for stage in self._stages():
            if isinstance(stage.error, OSError):
                raise write_failed(self._name, stage.error) from stage.error
            if stage.error is not None:
                raise stage.error

    def _stop(self) -> None:
        for stage in self._stages():
            if not stage.joined:
                stage.join()
