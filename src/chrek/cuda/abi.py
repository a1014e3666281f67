"""The part of NVIDIA's driver interface (``cuda.h``) that checkpointing needs, as ctypes sees it.

Every layout and number here is taken from ``cuda.h`` of CUDA 13; a test in ``tests/gpu`` compiles a
small C program against the header where one is installed and compares. The argument structures are
64 bytes with reserved tails that must be zero, so a newer driver reads an older caller's arguments as
"nothing asked for".

Numbers that this file does not know are no error: a driver newer than this program may return new
states and new codes, and the caller must be able to name them and go on.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

UUID_BYTES: Final = 16


class Uuid(ctypes.Structure):
    """``CUuuid``."""

    _fields_: ClassVar = [("bytes", ctypes.c_ubyte * UUID_BYTES)]


class LockArgs(ctypes.Structure):
    """``CUcheckpointLockArgs``: how long to wait for work under way; 0 waits for ever."""

    _fields_: ClassVar = [
        ("timeout_ms", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    ]


class CheckpointArgs(ctypes.Structure):
    """``CUcheckpointCheckpointArgs``; all reserved (CUDA 13.2 and later: a custom storage pointer first)."""

    _fields_: ClassVar = [("reserved", ctypes.c_uint64 * 8)]


class GpuPair(ctypes.Structure):
    """``CUcheckpointGpuPair``: the GPU at the checkpoint, the GPU to restore on."""

    _fields_: ClassVar = [("old", Uuid), ("new", Uuid)]


class RestoreArgs(ctypes.Structure):
    """``CUcheckpointRestoreArgs``; the pairs are read by drivers of CUDA 13 (580) and later.

    CUDA 13.0 declares 64 + 8 bytes, later headers 64: the larger size serves both.
    """

    _fields_: ClassVar = [
        ("pairs", ctypes.POINTER(GpuPair)),
        ("pair_count", ctypes.c_uint),
        ("reserved", ctypes.c_char * 52),
        ("reserved1", ctypes.c_uint64),
    ]


class UnlockArgs(ctypes.Structure):
    """``CUcheckpointUnlockArgs``; all reserved."""

    _fields_: ClassVar = [("reserved", ctypes.c_uint64 * 8)]


class ProcessState(IntEnum):
    """``CUprocessState``: what the driver says of a process."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5


class Code(IntEnum):
    """The ``CUresult`` values that the checkpoint calls are known to give."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    DEINITIALIZED = 4
    STUB_LIBRARY = 34
    DEVICE_UNAVAILABLE = 46
    NO_DEVICE = 100
    INVALID_DEVICE = 101
    INVALID_CONTEXT = 201
    OPERATING_SYSTEM = 304
    INVALID_HANDLE = 400
    ILLEGAL_STATE = 401
    NOT_READY = 600
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801
    SYSTEM_NOT_READY = 802
    SYSTEM_DRIVER_MISMATCH = 803
    UNKNOWN = 999


def code_name(value: int) -> str:
    """Name of a ``CUresult`` for a person, also of one that this program does not know."""
    try:
        return f"{Code(value).name} ({value})"
    except ValueError:
        return f"driver error {value}"


def state_name(value: int) -> str:
    """Name of a ``CUprocessState`` for a person, also of one that this program does not know."""
    try:
        return ProcessState(value).name.lower()
    except ValueError:
        return f"unknown state {value}"


@dataclass(frozen=True)
class Needs:
    """A driver call and the first driver branch that has it."""

    symbol: str
    driver: str


# The CUDA driver API reference gives CUDA 12.8 (driver 570) for these calls, 13.0 (580) for the GPU pairs.
CALLS: Final = (
    Needs("cuCheckpointProcessGetState", "570"),
    Needs("cuCheckpointProcessLock", "570"),
    Needs("cuCheckpointProcessCheckpoint", "570"),
    Needs("cuCheckpointProcessRestore", "570"),
    Needs("cuCheckpointProcessUnlock", "570"),
    Needs("cuCheckpointProcessGetRestoreThreadId", "570"),
)

PAIRS_NEED_CUDA: Final = 13000
"""``cuDriverGetVersion`` of the first driver that reads `RestoreArgs.pairs`."""

PAIRS_NEED_DRIVER: Final = "580"
