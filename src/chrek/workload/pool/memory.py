"""GPU memory whose address outlives its contents.

CUDA's virtual memory calls split an allocation in two: a reserved range of addresses, and physical
memory mapped into it. Dropping only the second leaves every pointer valid (a tensor's, a CUDA graph's,
a compiled kernel's argument) while the bytes are away; mapping fresh memory at the same addresses and
copying the bytes back makes all of them work again.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from chrek.workload.pool.cuda import ON_DEVICE, PINNED, READ_WRITE, Access, Cuda, Location, Properties
from chrek.workload.pool.errors import CudaError


@dataclass
class Segment:
    """A reserved range; `handle` is the physical memory mapped into it, 0 if there is none."""

    device: int
    address: int
    size: int
    handle: int = 0

    @property
    def resident(self) -> bool:
        """Whether physical memory is mapped."""
        return self.handle != 0


def properties(device: int) -> Properties:
    """What ``cuMemCreate`` has to make: memory of one device."""
    return Properties(type=PINNED, location=Location(ON_DEVICE, device))


def granularity(cuda: Cuda, device: int) -> int:
    """Smallest unit of physical memory in bytes (2 MiB on every GPU known)."""
    value = ctypes.c_size_t()
    cuda.call("cuMemGetAllocationGranularity", ctypes.byref(value), ctypes.byref(properties(device)), 0)
    return value.value


def reserve(cuda: Cuda, device: int, size: int) -> Segment:
    """A range of at least `size` bytes (at least one unit) with physical memory in it.

    Raises `CudaError`; nothing is left behind then.
    """
    unit = granularity(cuda, device)
    rounded = max(1, -(-size // unit)) * unit
    segment = Segment(device, cuda.handle("cuMemAddressReserve", rounded, 0, 0, 0), rounded)
    try:
        fill(cuda, segment)
    except CudaError:
        cuda.call("cuMemAddressFree", segment.address, segment.size)
        raise
    return segment


def fill(cuda: Cuda, segment: Segment) -> None:
    """Map new physical memory (of undefined contents) into the range.

    Raises `CudaError`; the range is empty then, as before.
    """
    handle = cuda.handle("cuMemCreate", segment.size, ctypes.byref(properties(segment.device)), 0)
    try:
        cuda.call("cuMemMap", segment.address, segment.size, 0, handle, 0)
    except CudaError:
        cuda.call("cuMemRelease", handle)
        raise
    access = Access(Location(ON_DEVICE, segment.device), READ_WRITE)
    try:
        cuda.call("cuMemSetAccess", segment.address, segment.size, ctypes.byref(access), 1)
    except CudaError:
        cuda.call("cuMemUnmap", segment.address, segment.size)
        cuda.call("cuMemRelease", handle)
        raise
    segment.handle = handle


def drop(cuda: Cuda, segment: Segment) -> None:
    """Give the physical memory back; the addresses stay reserved. No work may be using it."""
    if segment.resident:
        cuda.call("cuMemUnmap", segment.address, segment.size)
        handle, segment.handle = segment.handle, 0
        cuda.call("cuMemRelease", handle)


def release(cuda: Cuda, segment: Segment) -> None:
    """Give back physical memory, if any, and the addresses."""
    drop(cuda, segment)
    cuda.call("cuMemAddressFree", segment.address, segment.size)
