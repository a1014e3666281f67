"""Writing an archive while it is hashed: one thread reads files, one hashes, one writes.

All three release the interpreter's lock while they work, so a pass costs what the slowest costs. The
threads are started by the first full buffer only: for a container that changed a few kilobytes they
would cost more than the work.

Numbers that chose the sizes (2-core Xeon VM, ext4 and tmpfs, 2 GB of page-cached 64 MB files): buffers
of 256 KiB to 4 MiB do not differ, SHA-256 alone runs at 1.5 to 2 GB/s and is the limit. The queue holds
at most `_DEPTH` buffers, which bounds memory to about 10 MB however large the files are.
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

from chrek.errors import CaptureFailed, Reason
from chrek.rootfs.fd import write_all

BUFFER: Final = 1 << 20
_DEPTH: Final = 4


def write_failed(name: str, error: OSError) -> CaptureFailed:
    """Give the error for a write that failed: NO_SPACE or WRITE_FAILED, with the file's name."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = Reason.NO_SPACE if full else Reason.WRITE_FAILED
    return CaptureFailed(reason, f"Writing {name} failed: {os.strerror(error.errno or 0)}.")


class _Stage:
    """A thread that does one thing with every buffer, in order; its first error is kept."""

    def __init__(self, action: Callable[[bytes], object]) -> None:
        self._action = action
        self._queue: queue.Queue[bytes | None] = queue.Queue(_DEPTH)
        self.error: BaseException | None = None
        self.joined = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            if self.error is None:
                try:
                    self._action(data)
                except BaseException as error:  # noqa: BLE001 - raised again where the archive is written
                    self.error = error

    def put(self, data: bytes) -> None:
        self._queue.put(data)

    def join(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self.joined = True


class ArchiveWriter:
    """A file that is hashed as it is written.

    Use it as a context manager: leaving it by an exception stops its threads. `finish` gives the result.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._hash = hashlib.sha256()
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._stages: tuple[_Stage, ...] = ()
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
        if self._pending_size >= BUFFER:
            self._flush()

    def finish(self) -> tuple[int, str]:
        """Write what is left and return the size in bytes and the SHA-256 in hexadecimal."""
        if self._stages:
            self._flush()
            self._stop()
            self._check()
        else:
            data = b"".join(self._pending)
            self._hash.update(data)
            try:
                write_all(self._fd, data)
            except OSError as error:
                raise write_failed(self._name, error) from error
        return self.size, self._hash.hexdigest()

    def _flush(self) -> None:
        if not self._stages:
            self._stages = (_Stage(self._hash.update), _Stage(lambda data: write_all(self._fd, data)))
        data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        self._pending, self._pending_size = [], 0
        for stage in self._stages:
            stage.put(data)
        self._check()

    def _check(self) -> None:
        for stage in self._stages:
            if isinstance(stage.error, OSError):
                raise write_failed(self._name, stage.error) from stage.error
            if stage.error is not None:
                raise stage.error

    def _stop(self) -> None:
        for stage in self._stages:
            if not stage.joined:
                stage.join()
