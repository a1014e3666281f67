"""What one thread of a transfer needs on the GPU: a stream and a small pinned buffer.

The pinned buffer is ordinary private memory that is registered with the driver, and not memory from
``cuMemHostAlloc``: that is shared memory, which CRIU moves on one thread, and takes three times as long to
make (256 MiB: 0.16 s, in huge pages 0.05 s; H100, driver 580). It is made when it is first used and
gone when the transfer ends, so a checkpoint never holds it.

The buffer is small on purpose: with pieces of 4 MiB what was read is probably still in the processor's
cache when it crosses the link (16 threads: 26 GB/s, with pieces of 16 MiB 22; 8 threads: 29 and 17), and
smaller pieces cost more of Python than they gain.

Rejected: pinning the pages of the files themselves, so that the processor copies nothing. The driver
pins on one thread at a time, 1 GiB in 0.046 s, which ends at 17 GB/s (with 4 KiB pages 9), and slows
the other threads' copies down; see docs/performance.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import TYPE_CHECKING

from chrek.workload.pool.cuda import NO_TIMING, NON_BLOCKING, PORTABLE

if TYPE_CHECKING:
    from chrek.workload.pool.cuda import Cuda
    from chrek.workload.pool.layout import Piece


class Lane:
    """One thread's stream and pinned buffer of some slots, to be used in the device's context."""

    def __init__(self, cuda: Cuda, slots: int, chunk: int) -> None:
        self.slots = slots
        self.chunk = chunk
        self._cuda = cuda
        self.stream = cuda.handle("cuStreamCreate", NON_BLOCKING)
        self._events: list[int] = []
        self._memory: mmap.mmap | None = None
        self._views: list[memoryview] = []
        self.address = 0
        self._turn = 0

    def _make(self) -> None:
        memory = mmap.mmap(-1, self.slots * self.chunk, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # no huge pages on this kernel
            memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        del first  # or the mapping could not be closed
        self._cuda.call("cuMemHostRegister_v2", address, self.slots * self.chunk, PORTABLE)
        self._memory, self.address = memory, address
        whole = memoryview(memory)
        self._views = [whole[slot * self.chunk : (slot + 1) * self.chunk] for slot in range(self.slots)]
        self._events = [self._cuda.handle("cuEventCreate", NO_TIMING) for _ in range(self.slots)]

    def next(self) -> int:
        """The slot whose turn it is; its last copy may still be under way."""
        if self._memory is None:
            self._make()
        self._turn = (self._turn + 1) % self.slots
        return self._turn

    def view(self, slot: int, size: int) -> memoryview:
        """The first `size` bytes of a slot."""
        return self._views[slot] if size == self.chunk else self._views[slot][:size]

    def out(self, slot: int, piece: Piece) -> None:
        """Start a copy from the GPU into a slot."""
        where = self.address + slot * self.chunk
        self._cuda.call("cuMemcpyDtoHAsync_v2", where, piece.address, piece.size, self.stream)
        self._cuda.call("cuEventRecord", self._events[slot], self.stream)

    def into(self, slot: int, piece: Piece) -> None:
        """Start a copy from a slot to the GPU."""
        where = self.address + slot * self.chunk
        self._cuda.call("cuMemcpyHtoDAsync_v2", piece.address, where, piece.size, self.stream)
        self._cuda.call("cuEventRecord", self._events[slot], self.stream)

    def wait(self, slot: int) -> None:
        """Wait for the last copy of a slot, if there was one."""
        if not self._cuda.happened(self._events[slot]):
            self._cuda.call("cuEventSynchronize", self._events[slot])

    def close(self) -> None:
        """Wait for what is under way and give everything back."""
        self._cuda.call("cuStreamSynchronize", self.stream)
        for event in self._events:
            self._cuda.call("cuEventDestroy_v2", event)
        self._cuda.call("cuStreamDestroy_v2", self.stream)
        if self._memory is not None:
            for view in self._views:
                view.release()
            self._cuda.call("cuMemHostUnregister", self.address)
            with contextlib.suppress(BufferError):  # the traceback of a failed write still holds a view
                self._memory.close()
