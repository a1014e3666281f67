"""Digests of blocks of GPU memory, computed where the memory is.

Hashing 60 GB on the processor takes seconds of all its cores (SHA-256: 1.2 GB/s on one, 8 to 14 GB/s on
16) and would be the slowest part of a restore. The GPU reads its own memory at 2.3 TB/s, so there a
digest costs half a millisecond a gigabyte, and it covers the whole way: file, page cache, pinned
buffer, link, GPU memory.

It is 128 bits, made to notice damage and to tell blocks apart, not to withstand someone who wants two
blocks to have the same digest; whoever can write to the store can change its digests as well. The
definition, in words of 64 bits with wrapping arithmetic and `mix` the finaliser of MurmurHash3, is in
`reference`, which the tests compare with the kernel.

Where the kernel cannot be loaded (no PTX compiler in the container) SHA-256 on the processor takes its
place, block by block beside the copies; `KIND` names both in the index.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Final

from chrek.workload.pool.cuda import Primary
from chrek.workload.pool.errors import CudaError
from chrek.workload.pool.kernel import PTX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chrek.workload.pool.cuda import Cuda

LANES: Final = "lanes128"
SHA256: Final = "sha256"
WORD: Final = 8
STEP: Final = 16
"""The kernel reads 16 bytes at a time; blocks are multiples of that, at addresses that are, too."""
MASK: Final = (1 << 64) - 1
GOLDEN: Final = 0x9E3779B97F4A7C15
PARTS: Final = 16
"""Parts a block is cut into: with 8 MiB blocks and 256 threads each, 16 parts keep 132 processors busy."""
MOST_BLOCKS: Final = 32768
"""Blocks a launch; a grid's second dimension ends at 65535."""


def _mix(word: int) -> int:
    word ^= word >> 33
    word = word * 0xFF51AFD7ED558CCD & MASK
    word ^= word >> 33
    word = word * 0xC4CEB9FE1A85EC53 & MASK
    return word ^ word >> 33


def reference(data: bytes) -> bytes:
    """The digest of a block in plain Python, about 1 MB/s: the definition, not for use."""
    first = second = 0
    for index, (word,) in enumerate(struct.iter_unpack("<Q", data)):
        key = (index + 1) * GOLDEN & MASK
        first += _mix(word + key & MASK)
        second += _mix(word ^ key ^ MASK)
    return struct.pack(">QQ", first & MASK, second & MASK)


class Digester:
    """The kernel, loaded into the primary context of one device.

    Raises `CudaError` if the driver cannot load it.
    """

    def __init__(self, cuda: Cuda, device: int) -> None:
        self._cuda = cuda
        self._device = device
        with Primary(cuda, device):
            self._module = cuda.handle("cuModuleLoadData", PTX)
            self._function = cuda.handle("cuModuleGetFunction", self._module, b"chrek_digest")

    def digests(self, blocks: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Digests of blocks given as (address, bytes); None for a block of zeros.

        All work that writes to the blocks must be finished. Raises `CudaError`.
        """
        found: list[bytes | None] = []
        with Primary(self._cuda, self._device):
            for start in range(0, len(blocks), MOST_BLOCKS):
                found += self._launch(blocks[start : start + MOST_BLOCKS])
        return found

    def _launch(self, blocks: Sequence[tuple[int, int]]) -> list[bytes | None]:
        table = (ctypes.c_uint64 * (2 * len(blocks)))(*[number for block in blocks for number in block])
        sums = (ctypes.c_uint64 * (3 * len(blocks)))()
        call, handle = self._cuda.call, self._cuda.handle
        stream = handle("cuStreamCreate", 1)
        scratch = handle("cuMemAlloc_v2", ctypes.sizeof(table) + ctypes.sizeof(sums))
        try:
            out = scratch + ctypes.sizeof(table)
            call("cuMemcpyHtoDAsync_v2", scratch, ctypes.addressof(table), ctypes.sizeof(table), stream)
            call("cuMemsetD8Async", out, 0, ctypes.sizeof(sums), stream)
            values = (ctypes.c_uint64(scratch), ctypes.c_uint64(out))
            arguments = (ctypes.c_void_p * 2)(*[ctypes.addressof(value) for value in values])
            call("cuLaunchKernel", self._function, PARTS, len(blocks), 1, 256, 1, 1, 0, stream, arguments, None)
            call("cuMemcpyDtoHAsync_v2", ctypes.addressof(sums), out, ctypes.sizeof(sums), stream)
            call("cuStreamSynchronize", stream)
        finally:
            call("cuMemFree_v2", scratch)
            call("cuStreamDestroy_v2", stream)
        triples = zip(sums[0::3], sums[1::3], sums[2::3])
        return [struct.pack(">QQ", first, second) if any_bit else None for first, second, any_bit in triples]

    def close(self) -> None:
        """Unload the kernel."""
        with Primary(self._cuda, self._device):
            self._cuda.call("cuModuleUnload", self._module)


def digester(cuda: Cuda, device: int) -> Digester | None:
    """The kernel on `device`, or None where the driver cannot load it."""
    try:
        return Digester(cuda, device)
    except CudaError:
        return None
