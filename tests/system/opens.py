"""Who opens which file of a container's root: fanotify(7) on its file system.

A tracer would do too, but CRIU is one itself and does not start under another.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_libc = ctypes.CDLL(None, use_errno=True)

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FAN_OPEN, _FAN_OPEN_EXEC, _FAN_ONDIR = 0x20, 0x1000, 0x40000000
_EVENT = struct.Struct("<IBBHQii")


class Opens:
    """Records (process, command line, path) of every open below a directory's file system meanwhile."""

    def __init__(self, root: Path) -> None:
        self.seen: list[tuple[int, tuple[str, ...], str]] = []
        flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE
        self._fd = _libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE)
        mask = ctypes.c_uint64(_FAN_OPEN | _FAN_OPEN_EXEC)
        marked = _libc.fanotify_mark(
            self._fd, _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM, mask, -100, os.fsencode(str(root))
        )
        if self._fd < 0 or marked < 0:
            raise OSError(ctypes.get_errno(), f"fanotify on {root}: {os.strerror(ctypes.get_errno())}")
        self._stop, self._told = os.pipe()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._told)
        self._thread.join()
        os.close(self._stop)
        os.close(self._fd)

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._stop], [], [])
            if self._fd in ready:
                self._take(os.read(self._fd, 1 << 16))
            elif self._stop in ready:
                return

    def _take(self, data: bytes) -> None:
        while data:
            length, _, _, _, _, fd, pid = _EVENT.unpack_from(data)
            if fd >= 0:
                path = os.readlink(f"/proc/self/fd/{fd}")
                os.close(fd)
                try:
                    command = tuple(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0"))
                except OSError:
                    command = ("?",)
                if pid != os.getpid():
                    self.seen.append((pid, command, path))
            data = data[length:]
