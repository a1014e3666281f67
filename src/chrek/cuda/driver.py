"""The checkpoint calls of ``libcuda.so.1``, each a method that returns the driver's code.

Nothing is spawned: the calls act on another process by its id, as the caller's PID namespace shows
it, and need the rights to trace that process. ``cuInit`` is called once, early and on a thread of its
own, because it takes a fraction of a second and because a restore needs it (or persistence mode)
before it.

A method never raises for a code that the driver returned: some codes are answers (a process without
CUDA is "not initialised"), and what to do about the others is for `chrek.cuda.sequence` to say. It
raises only if the library or one of its calls is not there.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from chrek.cuda import abi
from chrek.errors import Reason, Refused
from chrek.system.ids import HostPid

LIBRARY: Final = "libcuda.so.1"


@dataclass(frozen=True, order=True)
class GpuUuid:
    """A GPU's UUID; `str` gives the form of ``nvidia-smi -L``."""

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> GpuUuid:
        """From ``GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx``; `ValueError` for anything else."""
        raw = bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))
        if len(raw) != abi.UUID_BYTES or not text.startswith("GPU-"):
            message = f"{text!r} is not the UUID of a GPU"
            raise ValueError(message)
        return cls(raw)

    def __str__(self) -> str:
        h = self.raw.hex()
        return f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


class Driver:
    """The loaded driver library.

    Raises `Refused` with `GPU_DRIVER_MISSING` if it cannot be loaded.
    """

    def __init__(self, path: str = LIBRARY) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            message = f"Loading {path} failed: {error}."
            raise Refused(Reason.GPU_DRIVER_MISSING, message) from error
        self._init_code: int | None = None
        self._init = threading.Thread(target=self._initialise, name="chrek-cuinit", daemon=True)
        self._init.start()

    def _initialise(self) -> None:
        self._init_code = int(self._library.cuInit(0))

    def require(self, *, gpu_map: Mapping[GpuUuid, GpuUuid] | None = None) -> None:
        """Raise `Refused` with `GPU_DRIVER_TOO_OLD` unless every checkpoint call is there.

        With a `gpu_map` that is not empty the driver has to take one, too.
        """
        for call in abi.CALLS:
            self._function(call.symbol)
        if gpu_map and not self.takes_map():
            message = f"Restoring on other GPUs needs a driver of CUDA 13; this is CUDA {self.cuda_version_text()}."
            cure = f"Install NVIDIA driver {abi.PAIRS_NEED_DRIVER} or newer, or restore on the checkpoint's own GPUs."
            raise Refused(Reason.GPU_DRIVER_TOO_OLD, message, cure=cure)

    def ready(self, timeout: float) -> int | None:
        """Wait for ``cuInit``; its code, or None if it has not come back after `timeout` seconds."""
        self._init.join(timeout)
        return self._init_code

    def _function(self, symbol: str) -> ctypes._NamedFuncPointer:
        try:
            return getattr(self._library, symbol)  # type: ignore[no-any-return]
        except AttributeError as error:
            needed = next((call.driver for call in abi.CALLS if call.symbol == symbol), "a newer one")
            message = f"The driver {self.path} (CUDA {self.cuda_version_text()}) has no {symbol}."
            cure = f"Install NVIDIA driver {needed} or newer on the node."
            raise Refused(Reason.GPU_DRIVER_TOO_OLD, message, cure=cure) from error

    # --- about the driver -----------------------------------------------------------------------------
    def cuda_version(self) -> int:
        """``cuDriverGetVersion``: 1000 times major plus 10 times minor; 0 if the driver does not say."""
        value = ctypes.c_int(0)
        try:
            self._library.cuDriverGetVersion(ctypes.byref(value))
        except AttributeError:
            return 0
        return value.value

    def cuda_version_text(self) -> str:
        """The CUDA version of the driver as people write it, for example ``13.0``."""
        value = self.cuda_version()
        return f"{value // 1000}.{value % 1000 // 10}"

    def takes_map(self) -> bool:
        """Whether this driver can restore on another GPU than the checkpoint's."""
        return self.cuda_version() >= abi.PAIRS_NEED_CUDA

    def error_text(self, code: int) -> str:
        """A code's name; the driver's own where this program does not know it."""
        if code in set(abi.Code):
            return abi.code_name(code)
        text = ctypes.c_char_p()
        try:
            self._library.cuGetErrorName(code, ctypes.byref(text))
        except AttributeError:
            return abi.code_name(code)
        return f"{text.value.decode(errors='replace')} ({code})" if text.value else abi.code_name(code)

    # --- the calls ------------------------------------------------------------------------------------
    def state(self, pid: HostPid) -> tuple[int, int]:
        """``cuCheckpointProcessGetState``: code and state (meaningful only with code 0)."""
        value = ctypes.c_int(-1)
        code = self._function("cuCheckpointProcessGetState")(ctypes.c_int(pid), ctypes.byref(value))
        return int(code), value.value

    def lock(self, pid: HostPid, *, timeout_ms: int) -> int:
        """``cuCheckpointProcessLock``; gives `NOT_READY` after `timeout_ms`, the process then runs on."""
        args = abi.LockArgs(timeout_ms=timeout_ms)
        return int(self._function("cuCheckpointProcessLock")(ctypes.c_int(pid), ctypes.byref(args)))

    def checkpoint(self, pid: HostPid) -> int:
        """``cuCheckpointProcessCheckpoint``: GPU memory goes into the process, GPUs are let go."""
        args = abi.CheckpointArgs()
        return int(self._function("cuCheckpointProcessCheckpoint")(ctypes.c_int(pid), ctypes.byref(args)))

    def restore(self, pid: HostPid, gpu_map: Mapping[GpuUuid, GpuUuid] | None = None) -> int:
        """``cuCheckpointProcessRestore``, on other GPUs if a map of **every** old GPU is given."""
        args = abi.RestoreArgs()
        pairs = [_pair(old, new) for old, new in (gpu_map or {}).items()]
        array = (abi.GpuPair * len(pairs))(*pairs)
        if pairs:
            args.pairs = ctypes.cast(array, ctypes.POINTER(abi.GpuPair))
            args.pair_count = len(pairs)
        return int(self._function("cuCheckpointProcessRestore")(ctypes.c_int(pid), ctypes.byref(args)))

    def unlock(self, pid: HostPid) -> int:
        """``cuCheckpointProcessUnlock``: the process may use its GPUs again."""
        args = abi.UnlockArgs()
        return int(self._function("cuCheckpointProcessUnlock")(ctypes.c_int(pid), ctypes.byref(args)))

    def restore_thread(self, pid: HostPid) -> tuple[int, int]:
        """``cuCheckpointProcessGetRestoreThreadId``: code and the thread that the driver works in."""
        value = ctypes.c_int(-1)
        symbol = "cuCheckpointProcessGetRestoreThreadId"
        return int(self._function(symbol)(ctypes.c_int(pid), ctypes.byref(value))), value.value


def _pair(old: GpuUuid, new: GpuUuid) -> abi.GpuPair:
    return abi.GpuPair(abi.Uuid.from_buffer_copy(old.raw), abi.Uuid.from_buffer_copy(new.raw))
