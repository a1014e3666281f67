"""What the process says of time, from outside: it writes the wall clock into shared memory every millisecond.

The wall clock, because a restored process has a time namespace of its own for every other one.
"""

from __future__ import annotations

import itertools
import mmap
import os
import time
from pathlib import Path
from typing import Self

from core_bench.app import SLOTS

NANO = 1e-9


class Beats:
    """The file the process writes its beats into."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(fd, 8 * (SLOTS + 1))
        self._map = mmap.mmap(fd, 8 * (SLOTS + 1))
        os.close(fd)
        self._words = memoryview(self._map).cast("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._words.release()
        self._map.close()
        self.path.unlink()

    def longest_pause(self, since: int, until: int) -> float:
        """Return the longest time without a beat, in seconds, between two values of `time.time_ns`."""
        times = sorted(t for t in self._words[1:].tolist() if t)
        before = max((t for t in times if t <= since), default=since)
        inside = [before, *(t for t in times if since < t <= until)]
        return max((b - a for a, b in itertools.pairwise(inside)), default=0) * NANO

    def first_after(self, since: int, timeout: float) -> float:
        """Wait for a beat after *since* (`time.time_ns`); return how many seconds later the first one was.

        Raises:
            TimeoutError: there was none.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            newest = self._words[1 + (self._words[0] - 1) % SLOTS] if self._words[0] else 0
            if newest > since:
                # Only the beats' own clock counts; this loop may be late.
                return (min(t for t in self._words[1:].tolist() if t > since) - since) * NANO
            time.sleep(0.001)
        raise TimeoutError(f"no sign of life within {timeout:g} s")
