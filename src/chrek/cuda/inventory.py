"""The GPUs of this machine, and what processes have on them, from NVML (``libnvidia-ml.so.1``).

NVML answers without a context on the GPU and without the driver's compute library. It is asked for
each capture and restore anew: GPUs come and go with hot-plug and MIG.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar, Final

from chrek.cuda.driver import GpuUuid
from chrek.cuda.gpumap import Gpu
from chrek.errors import CaptureFailed, Reason, Refused
from chrek.system.ids import HostPid

LIBRARY: Final = "libnvidia-ml.so.1"
TEXT: Final = 96
MOST_PROCESSES: Final = 1024
UNKNOWN_BYTES: Final = (1 << 64) - 1
"""NVML's word for "not known", for example inside some virtual machines."""
NOT_SUPPORTED: Final = 3
P2P_READ: Final = 0
P2P_OK: Final = 0
GIB: Final = 1 << 30


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_: ClassVar = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Process(ctypes.Structure):
    """``nvmlProcessInfo_t``."""

    _fields_: ClassVar = [
        ("pid", ctypes.c_uint),
        ("bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Use:
    """Memory that a process has on a GPU; `bytes` is None where NVML does not know it."""

    pid: HostPid
    gpu: GpuUuid
    bytes: int | None


@dataclass(frozen=True)
class Inventory:
    """GPUs in NVML's order, uses of them, the driver's version.

    `mig` are the device minors of GPUs that are cut up by MIG, `peers` the ordered pairs of minors of
    which the first can reach the second's memory.
    """

    driver: str
    gpus: tuple[Gpu, ...]
    uses: tuple[Use, ...]
    mig: frozenset[int]
    peers: frozenset[tuple[int, int]]

    def of(self, pids: Iterable[HostPid]) -> tuple[Use, ...]:
        """What the given processes have on GPUs."""
        wanted = set(pids)
        return tuple(use for use in self.uses if use.pid in wanted)

    def gpus_of(self, minors: Iterable[int], pids: Iterable[HostPid]) -> tuple[Gpu, ...]:
        """The GPUs that processes with these device nodes open have to be given again, with what they use.

        The driver opens every GPU that it can see, so the open device nodes are the ones that a map has
        to name.
        """
        wanted = set(minors)
        used: dict[GpuUuid, int] = {}
        for use in self.of(pids):
            used[use.gpu] = used.get(use.gpu, 0) + (use.bytes or 0)
        return tuple(
            Gpu(gpu.uuid, gpu.model, gpu.memory, gpu.minor, used.get(gpu.uuid, 0), gpu.free)
            for gpu in self.gpus
            if gpu.minor in wanted
        )


class Nvml:
    """The loaded library. Raises `Refused` with `GPU_DRIVER_MISSING` if it cannot be loaded."""

    def __init__(self, path: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise Refused(Reason.GPU_DRIVER_MISSING, f"Loading {path} failed: {error}.") from error
        self._call("nvmlInit_v2")

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise CaptureFailed(Reason.GPU_CALL_FAILED, f"{name} gave NVML error {code}.")

    def read(self) -> Inventory:
        """Everything as it is now; raises `CaptureFailed` if NVML does not answer."""
        version = ctypes.create_string_buffer(TEXT)
        self._call("nvmlSystemGetDriverVersion", version, TEXT)
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        gpus, uses, mig, handles = [], [], set(), {}
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self._call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
            gpu = self._gpu(handle)
            gpus.append(gpu)
            uses += list(self._uses(handle, gpu.uuid))
            handles[gpu.minor] = handle
            if self._is_cut(handle):
                mig.add(gpu.minor)
        peers = {(a, b) for a, b in permutations(handles, 2) if self._reaches(handles[a], handles[b])}
        return Inventory(version.value.decode(), tuple(gpus), tuple(uses), frozenset(mig), frozenset(peers))

    def _reaches(self, one: ctypes.c_void_p, other: ctypes.c_void_p) -> bool:
        status = ctypes.c_uint()
        code = self._library.nvmlDeviceGetP2PStatus(one, other, P2P_READ, ctypes.byref(status))
        return bool(code) or status.value == P2P_OK  # not known counts as possible

    def _text(self, name: str, handle: ctypes.c_void_p) -> str:
        text = ctypes.create_string_buffer(TEXT)
        self._call(name, handle, text, TEXT)
        return text.value.decode()

    def _gpu(self, handle: ctypes.c_void_p) -> Gpu:
        minor, memory = ctypes.c_uint(), _Memory()
        self._call("nvmlDeviceGetMinorNumber", handle, ctypes.byref(minor))
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return Gpu(
            GpuUuid.parse(self._text("nvmlDeviceGetUUID", handle)),
            self._text("nvmlDeviceGetName", handle),
            memory.total,
            minor.value,
            free=memory.free,
        )

    def _uses(self, handle: ctypes.c_void_p, gpu: GpuUuid) -> Iterator[Use]:
        count, found = ctypes.c_uint(MOST_PROCESSES), (_Process * MOST_PROCESSES)()
        with contextlib.suppress(CaptureFailed):  # not every virtual machine tells
            self._call("nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(count), found)
            for process in found[: count.value]:
                known = None if process.bytes == UNKNOWN_BYTES else process.bytes
                yield Use(HostPid(process.pid), gpu, known)

    def _is_cut(self, handle: ctypes.c_void_p) -> bool:
        now, pending = ctypes.c_uint(), ctypes.c_uint()
        code = self._library.nvmlDeviceGetMigMode(handle, ctypes.byref(now), ctypes.byref(pending))
        return code != NOT_SUPPORTED and now.value == 1


def require_memory(uses: Iterable[Use], *, limit: int | None, current: int) -> int:
    """Bytes that the driver will move into the container's memory; raise `Refused` if they do not fit.

    A checkpoint of the driver copies GPU memory into the process that owns it, and above its limit the
    kernel ends the container. `limit` and `current` are the cgroup's, in bytes; `limit` None is none.
    NVML counts the context too, so this errs on the safe side (by about 0.5 GB a context).
    """
    needed = sum(use.bytes or 0 for use in uses)
    if limit is not None and current + needed > limit:
        message = (
            f"The container uses {current / GIB:.1f} GiB of its limit of {limit / GIB:.1f} GiB, and "
            f"{needed / GIB:.1f} GiB of GPU memory have to fit beside it during a checkpoint."
        )
        wanted = -(-(current + needed) // GIB)
        cure = f"Set the container's memory limit to {wanted}Gi or more, or keep the weights in a TensorPool."
        raise Refused(Reason.MEMORY_LIMIT, message, cure=cure)
    return needed
