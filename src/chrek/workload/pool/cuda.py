"""The driver calls of a pool: virtual memory, copies, pinned memory, one kernel.

A second binding beside `chrek.cuda` on purpose: this one runs inside the application, on Python 3.9,
and imports nothing of the rest of ChReK. The library is the one that the application has already
loaded, so a pool works in the application's own (primary) contexts.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any, Final

from chrek.workload.pool.errors import CudaError

LIBRARY: Final = "libcuda.so.1"
PINNED: Final = 1
"""``CU_MEM_ALLOCATION_TYPE_PINNED``: the only kind of memory that ``cuMemCreate`` gives."""
ON_DEVICE: Final = 1
"""``CU_MEM_LOCATION_TYPE_DEVICE``."""
READ_WRITE: Final = 3
"""``CU_MEM_ACCESS_FLAGS_PROT_READWRITE``."""
NON_BLOCKING: Final = 1
"""``CU_STREAM_NON_BLOCKING``: not ordered with the application's default stream."""
NO_TIMING: Final = 2
"""``CU_EVENT_DISABLE_TIMING``."""
NOT_READY: Final = 600
"""``CUDA_ERROR_NOT_READY``: an event that has not happened yet."""
PORTABLE: Final = 1
"""``CU_MEMHOSTREGISTER_PORTABLE``: pinned for every context, so one ring serves several GPUs."""


class Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = [("type", c_int), ("id", c_int)]


class Properties(ctypes.Structure):
    """``CUmemAllocationProp``, its tail (compression, usage, reserved) as eight zero bytes."""

    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", c_ubyte * 8),
    ]


class Access(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = [("location", Location), ("flags", c_int)]


SIGNATURES: Final[dict[str, list[Any]]] = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuDeviceGetUuid_v2": [c_void_p, c_int],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxSynchronize": [],
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(Properties), c_int],
    "cuMemAddressReserve": [POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64],
    "cuMemAddressFree": [c_uint64, c_size_t],
    "cuMemCreate": [POINTER(c_uint64), c_size_t, POINTER(Properties), c_uint64],
    "cuMemRelease": [c_uint64],
    "cuMemMap": [c_uint64, c_size_t, c_size_t, c_uint64, c_uint64],
    "cuMemUnmap": [c_uint64, c_size_t],
    "cuMemSetAccess": [c_uint64, c_size_t, POINTER(Access), c_size_t],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_uint64, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_uint64, c_size_t, c_void_p],
    "cuMemsetD8Async": [c_uint64, c_ubyte, c_size_t, c_void_p],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventDestroy_v2": [c_void_p],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuModuleLoadData": [POINTER(c_void_p), c_char_p],
    "cuModuleUnload": [c_void_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuLaunchKernel": [c_void_p] + [c_uint] * 7 + [c_void_p, POINTER(c_void_p), c_void_p],
}


QUICK: Final = frozenset({"cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuEventQuery"})
"""Calls that only queue something, in a few microseconds: they keep Python's lock.

Letting go of the lock and getting it back among 16 threads takes longer than the call: with it, a piece
cost 97 us of everybody's time and copies of 1 MiB ran at 11 GB/s (H100, 32 cores, Python 3.12).
"""


class Cuda:
    """The loaded driver; `call` raises `CudaError` for every code but success."""

    def __init__(self, path: str = LIBRARY) -> None:
        library, quick = ctypes.CDLL(path), ctypes.PyDLL(path)
        self._functions: dict[str, Any] = {}
        for name, arguments in SIGNATURES.items():
            function = getattr(quick if name in QUICK else library, name)
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        """Call a driver function; raises `CudaError` with its name and the driver's code."""
        code = self._functions[name](*arguments)
        if code:
            raise CudaError(name, code, self._name(code))

    def happened(self, event: int) -> bool:
        """Whether all work before an event is done; raises `CudaError`."""
        code = self._functions["cuEventQuery"](event)
        if code not in (0, NOT_READY):
            raise CudaError("cuEventQuery", code, self._name(code))
        return bool(code == 0)

    def _name(self, code: int) -> str:
        text = c_char_p()
        self._functions["cuGetErrorName"](code, ctypes.byref(text))
        return text.value.decode(errors="replace") if text.value else "unknown error"

    def handle(self, name: str, *arguments: object) -> int:
        """Call a function whose first argument receives a 64-bit handle or address; return that."""
        value = c_uint64() if self._functions[name].argtypes[0] is POINTER(c_uint64) else c_void_p()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value or 0


class Primary:
    """A device's primary context, made current in this thread for a ``with`` block."""

    def __init__(self, cuda: Cuda, device: int) -> None:
        self._cuda = cuda
        self._device = device
        self._before = 0

    def __enter__(self) -> Primary:  # noqa: PYI034 - Self is newer than Python 3.9
        self._before = self._cuda.handle("cuCtxGetCurrent")
        context = self._cuda.handle("cuDevicePrimaryCtxRetain", self._device)
        self._cuda.call("cuCtxSetCurrent", context)
        return self

    def __exit__(self, *_: object) -> None:
        self._cuda.call("cuCtxSetCurrent", self._before)
        self._cuda.call("cuDevicePrimaryCtxRelease_v2", self._device)
