"""Where it happens: a PID 1 in namespaces of its own, on this machine's own root; no container runtime is needed.

The benchmark itself runs in a private mount namespace, so that nothing it mounts outlives it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SOURCES = Path(__file__).resolve().parents[2] / "src"
INIT = [sys.executable, "-I", "-S", str(SOURCES / "chrek/entrypoint")]
NAMESPACES = ("--pid", "--mount", "--ipc", "--uts")
SOURCE_PID, TARGET_PID = 1000, 30000
"""Ids begin here in the namespace of the dumped process, and in one it is restored in: CRIU there takes none it needs."""

_PREPARE = 'echo {} > /proc/sys/kernel/ns_last_pid; exec "$@" </dev/null >/dev/null 2>&1'
_PRIVATE = "CHREK_BENCH_PRIVATE"


def enter_private_mounts() -> None:
    """Start this program anew in a mount namespace of its own."""
    if _PRIVATE not in os.environ:
        os.environ[_PRIVATE] = "1"
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
        os.execvp(command[0], command)


def mount_tmpfs(directory: Path) -> None:
    """Mount a fresh memory file system."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "bench", str(directory)], check=True)


def kind_of(directory: Path) -> str:
    """Return the type of the file system, for the report."""
    found = subprocess.run(["stat", "-f", "-c", "%T", str(directory)], capture_output=True, text=True, check=True)
    return found.stdout.strip().replace("ext2/ext3", "ext4")


@dataclass
class Place:
    """PID 1 and what hangs under it; gone with the block."""

    command: list[str]
    environment: dict[str, str]
    first_pid: int

    def __enter__(self) -> Self:
        start = ["sh", "-c", _PREPARE.format(self.first_pid), "sh", *self.command]
        self._outer = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", *start],
            env={"PATH": os.environ["PATH"], **self.environment},
            stdin=subprocess.DEVNULL,
        )
        self.pid1 = self._child(self._outer.pid)
        return self

    def __exit__(self, *exception: object) -> None:
        self._outer.send_signal(signal.SIGKILL)
        self._outer.wait()
        deadline = time.monotonic() + 60
        # Freeing gigabytes takes its time, which is not the next contender's.
        while Path(f"/proc/{self.pid1}").exists() and time.monotonic() < deadline:
            time.sleep(0.005)

    def application(self) -> int:
        """Return the id of PID 1's child as the namespace numbers it."""
        child = self._child(self.pid1)
        for line in Path(f"/proc/{child}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
        raise LookupError(child)

    def _child(self, pid: int) -> int:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._outer.poll() is None:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.002)
        raise LookupError(f"process {pid} has no child")


def ready_memory(size: int, directory: Path) -> None:
    """Use and free some memory, both kinds, so that the next contender finds it ready.

    A virtual machine's host takes back what has been free for two seconds (free page reporting of virtio_balloon),
    and who uses it next pays for that: up to 2 s of processor time a GB here.
    """
    file = directory / "ready"
    piece = bytes(256 << 10)
    with file.open("wb", buffering=0) as target:
        for _ in range(0, size, len(piece)):
            target.write(piece)
    file.unlink()
    program = f"import mmap; mmap.mmap(-1, {size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
    subprocess.run([sys.executable, "-c", program], check=True)


def settle(directory: Path) -> None:
    """Wait until the file system has nothing to write: what one contender left is not the next one's burden."""
    subprocess.run(["sync", "-f", str(directory)], check=True)


def remove(directory: Path) -> None:
    """Remove a directory that need not be there."""
    shutil.rmtree(directory, ignore_errors=True)
