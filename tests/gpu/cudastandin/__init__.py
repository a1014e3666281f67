"""Building and steering the stand-in of NVIDIA's driver (`standin.c`).

The library is loaded through the same ctypes path as the real one. Its state lies in a shared file,
so a test sees what became of each process and says which call shall fail, hang, or be missing.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

SOURCE = Path(__file__).with_name("standin.c")
NAME = 48
GIB = 1 << 30


class _Process(ctypes.Structure):
    _fields_: ClassVar = [
        ("pid", ctypes.c_int32),
        ("state", ctypes.c_int32),
        ("tracked", ctypes.c_int32),
        ("mib", ctypes.c_int32),
        ("calls", ctypes.c_int32 * 8),
        ("map_pairs", ctypes.c_int32),
        ("timeout_ms", ctypes.c_int32),
    ]


class _Rule(ctypes.Structure):
    _fields_: ClassVar = [
        ("call", ctypes.c_char * NAME),
        ("pid", ctypes.c_int32),
        ("skip", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("hang_ms", ctypes.c_int32),
        ("times", ctypes.c_int32),
        ("hits", ctypes.c_int32),
    ]


class _Gpu(ctypes.Structure):
    _fields_: ClassVar = [
        ("uuid", ctypes.c_ubyte * 16),
        ("name", ctypes.c_char * NAME),
        ("total", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("minor", ctypes.c_int32),
        ("mig", ctypes.c_int32),
    ]


class _Shared(ctypes.Structure):
    _fields_: ClassVar = [
        ("version", ctypes.c_int32),
        ("gpus", ctypes.c_int32),
        ("release", ctypes.c_int32),
        ("live", ctypes.c_int32),
        ("process", _Process * 64),
        ("rule", _Rule * 32),
        ("gpu", _Gpu * 8),
    ]


def compiler() -> str | None:
    """The C compiler of this machine, or None."""
    return shutil.which("cc") or shutil.which("gcc")


def build(directory: Path, *, old: bool = False) -> Path:
    """Compile the stand-in into `directory`; `old` leaves out a call, as an old driver does."""
    library = directory / ("libcuda-old.so" if old else "libcuda-standin.so")
    command = [compiler() or "cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-lpthread"]
    subprocess.run(command + ["-DOLD_DRIVER"] * old, check=True)
    return library


@functools.cache
def _built() -> bytes:
    """The library's bytes, compiled once in this process."""
    with tempfile.TemporaryDirectory() as place:
        return build(Path(place)).read_bytes()


@contextmanager
def machine(directory: Path, *, gpus: int = 1) -> Iterator[StandIn]:
    """A machine of its own below `directory`: a copy of the library, which keeps its state for as long as it is loaded."""
    library = directory / "libcuda-standin.so"
    library.write_bytes(_built())
    made = StandIn(directory, library, gpus=gpus)
    try:
        yield made
    finally:
        made.release()


class StandIn:
    """One machine's driver: processes, GPUs, and what shall go wrong."""

    def __init__(self, directory: Path, library: Path, *, gpus: int = 1) -> None:
        self.library = library
        self.path = directory / "standin.state"
        self.path.write_bytes(bytes(ctypes.sizeof(_Shared)))
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.shared = _Shared.from_buffer(self._map)
        self.shared.version = 13000
        self.shared.gpus = gpus
        for index in range(gpus):
            self.set_gpu(index)
        os.environ["CHREK_STANDIN"] = str(self.path)

    def set_gpu(self, index: int, *, name: str = "NVIDIA H100 80GB HBM3", mig: int = 0) -> None:
        """Describe a GPU; its UUID is made from its index."""
        gpu = self.shared.gpu[index]
        gpu.uuid[:] = [index + 1] * 16
        gpu.name = name.encode()
        gpu.total = gpu.free = 80 * GIB
        gpu.minor, gpu.mig = index, mig

    def add(self, pid: int, *, state: int = 0, mib: int = 0) -> None:
        """Let a process count as one with an initialised driver."""
        slot = next(p for p in self.shared.process if not p.tracked)
        slot.pid, slot.state, slot.mib, slot.tracked = pid, state, mib, 1

    def process(self, pid: int) -> _Process:
        """What the driver knows of a process."""
        found: _Process = next(p for p in self.shared.process if p.tracked and p.pid == pid)
        return found

    def state(self, pid: int) -> int:
        """The state of a process, as a number."""
        return int(self.process(pid).state)

    def fail(self, call: str, code: int, *, pid: int = 0, skip: int = 0, times: int = 0, hang_ms: int = 0) -> None:
        """Let a call give `code` (-1: succeed), after `skip` good calls, `times` times (0: from then on)."""
        rule = next(r for r in self.shared.rule if not r.call)
        rule.call, rule.pid, rule.skip = call.encode(), pid, skip
        rule.code, rule.hang_ms, rule.times = code, hang_ms, times

    def forgive(self) -> None:
        """Drop every rule, and let hanging calls go on."""
        self.release()
        for rule in self.shared.rule:
            rule.call = b""
            rule.hits = 0

    def release(self) -> None:
        """Let hanging calls go on."""
        self.shared.release = 1

    @property
    def live(self) -> int:
        """Physical allocations of GPU memory that are not released."""
        return int(self.shared.live)
