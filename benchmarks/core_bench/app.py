"""The process that is dumped: it holds memory and says every millisecond that it is alive.

``app.py BEATS RANDOM ZERO``: BEATS is a file shared with the benchmark, the others are bytes. Zero pages are written to,
so that they exist; they lie between random ones, a MiB each in turn.
"""

from __future__ import annotations

import mmap
import os
import sys
import time

STEP = 1 << 20
SLOTS = 1 << 17
"""Beats in the file before the oldest is overwritten: 131 s."""


def hold(random: int, zero: int) -> mmap.mmap:
    """Return memory of that many random and zero bytes."""
    memory = mmap.mmap(-1, random + zero, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    nothing = bytes(STEP)
    at = 0
    with open("/dev/urandom", "rb", buffering=0) as source:
        while random or zero:
            if random:
                length = min(STEP, random)
                source.readinto(view[at : at + length])
                random -= length
                at += length
            if zero:
                length = min(STEP, zero)
                view[at : at + length] = nothing[:length]
                zero -= length
                at += length
    return memory


def main() -> None:
    """Fill the memory, then beat for ever; the first word is the number of beats."""
    memory = hold(int(sys.argv[2]), int(sys.argv[3]))
    fd = os.open(sys.argv[1], os.O_RDWR)
    words = memoryview(mmap.mmap(fd, 8 * (SLOTS + 1))).cast("Q")
    os.close(fd)
    while memory:
        words[1 + words[0] % SLOTS] = time.time_ns()
        words[0] += 1
        time.sleep(0.001)


if __name__ == "__main__":
    main()
