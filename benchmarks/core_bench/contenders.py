"""The two programs, each as one command whose whole time counts.

Stock CRIU is the bundle's own program with its usual options and its usual cache of kernel features in ``/run``
(a memory file system, as on any machine with systemd); it writes its images and does not wait for the disk.
ChReK's command is a fresh Python process that makes one call of the engine; what it publishes is on the disk.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_bench.beats import Beats
from core_bench.place import NAMESPACES, Place, ready_memory, remove, settle

KDAT = b"/run/criu.kdat"
WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Stock:
    """Stock CRIU, out of the bundle."""

    bundle: Path
    scratch: Path
    images: Path
    size: int = 0

    def __post_init__(self) -> None:
        # The bundle's copy is kept from the cache in /run; stock CRIU uses it.
        facts = json.loads((self.bundle / "bundle.json").read_text())
        self.version = str(facts["criu"])
        program = (self.bundle / "criu").read_bytes()
        self._program = self.scratch / "criu"
        self._program.write_bytes(program.replace(_constant(program), KDAT))
        self._program.chmod(0o755)

    def capture(self, place: Place, beats: Beats) -> dict[str, float]:
        """Dump the process and leave it running."""
        remove(self.images)
        settle(self.scratch)
        ready_memory(self.size, self.scratch)
        self.images.mkdir()
        since, used = time.time_ns(), _processor_time()
        arguments = ["dump", "-t", str(place.application()), "-D", str(self.images), "--leave-running", "-o", "dump.log"]
        self._run(place, arguments, "dump.log")
        until, used_until = time.time_ns(), _processor_time()
        began = time.monotonic()
        _flush(self.images)
        return {
            "seconds": (until - since) / 1e9,
            "processor": used_until - used,
            "frozen": beats.longest_pause(since, until),
            "flush": time.monotonic() - began,
        }

    def restore(self, place: Place, beats: Beats) -> dict[str, float]:
        """Restore the process; time until it lives."""
        ready_memory(self.size, self.scratch)
        since = time.time_ns()
        self._run(place, ["restore", "-d", "-D", str(self.images), "-o", "restore.log"], "restore.log")
        return {"seconds": beats.first_after(since, 30)}

    def _run(self, place: Place, arguments: list[str], log: str) -> None:
        loader = [str(self.bundle / "ld.so"), "--library-path", str(self.bundle / "lib"), str(self._program)]
        command = ["nsenter", "-t", str(place.pid1), *NAMESPACES, *loader, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            said = (self.images / log).read_text(errors="replace").splitlines()[-5:]
            raise RuntimeError(f"stock CRIU: {result.stderr} {said}")


@dataclass
class ChReK:
    """ChReK's engine in a process of its own."""

    store: Path
    size: int = 0

    def capture(self, place: Place, beats: Beats, *, mode: str, count_pipes: bool = False) -> dict[str, Any]:
        """Capture the process and leave it running."""
        remove(self.store / mode)
        settle(self.store)
        ready_memory(self.size, self.store)
        since, used = time.time_ns(), _processor_time()
        result = self._run(mode, what="capture", pid1=place.pid1, mode=mode, count_pipes=count_pipes)
        until = time.time_ns()
        result["processor"] = _processor_time() - used
        return {**result, "seconds": (until - since) / 1e9, "outside": beats.longest_pause(since, until)}

    def restore(self, place: Place, beats: Beats, *, mode: str, verify: str) -> dict[str, Any]:
        """Restore the process; time until it lives."""
        ready_memory(self.size, self.store)
        since, used = time.time_ns(), _processor_time()
        result = self._run(mode, what="restore", pid1=place.pid1, verify=verify)
        result["processor"] = _processor_time() - used
        alive = beats.first_after(since, 30)
        return {**result, "seconds": alive, "from_engine": alive - (result["began"] - since) / 1e9}

    def _run(self, name: str, **task: object) -> dict[str, Any]:
        text = json.dumps({**task, "id": name, "store": str(self.store / name)})
        command = [sys.executable, "-I", str(WORKER), text]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        if result.returncode:
            raise RuntimeError(f"ChReK: {result.stderr[-3000:]}")
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer


def _processor_time() -> float:
    """Return the processor time of all commands so far, in seconds; the dumped process's own part is not in it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _flush(directory: Path) -> None:
    def one(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.close(fd)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, directory.iterdir()))


def _constant(program: bytes) -> bytes:
    """Return the bytes that stand in the bundle's program where CRIU's own path of its cache stood."""
    for known in (b"/sys/criu.kdat", b"/proc/.no.kdat", b"criu.kdat\0\0\0\0\0", KDAT):
        if program.count(b"\0" + known + b"\0") == 1:
            return known
    raise RuntimeError("the bundle's CRIU has no path of a feature cache")
