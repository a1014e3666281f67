"""What /proc says about a process that uses GPUs, as values and as text.

The detectors in `chrek.cuda.detect` look at nothing else, so a recording of a real process is as good
as the process: ``tests/gpu/evidence`` holds recordings of each case, made on a GPU machine with
``python -m chrek.cuda.evidence PID...``, and the detectors are tested on them.

A recording is shortened: of mapped ordinary files the names, of the environment the variables that
steer CUDA and NCCL, of descriptors those that are devices or shared memory.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from chrek.system.ids import HostPid

VARIABLES = ("CUDA_VISIBLE", "CUDA_MPS", "NCCL_", "NVIDIA_VISIBLE", "TORCH_SYMM", "NVSHMEM_")
KCMP = {"x86_64": 312, "aarch64": 272}
"""Number of kcmp(2), for which the C library has no function."""
KCMP_FILE = 0
_libc = ctypes.CDLL(None, use_errno=True)
LIBCUDA = re.compile(r"/libcuda\.so(\.\d+)*$")
KEPT = re.compile(r"/dev/|/memfd:|\(deleted\)|libcuda\.|libnccl\.|libnvidia-ml\.|io_uring")


@dataclass(frozen=True)
class MapLine:
    """One line of /proc/PID/maps that has a name."""

    start: int
    end: int
    permissions: str
    path: str


@dataclass(frozen=True)
class Evidence:
    """One process. `descriptors` maps numbers to their targets, `threads` are names of threads."""

    pid: HostPid
    parent: HostPid
    maps: tuple[MapLine, ...] = ()
    descriptors: Mapping[int, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: tuple[str, ...] = ()
    inherited: tuple[int, ...] = ()
    """Descriptors of GPU devices that are the same open files as the parent's: inherited by fork."""
    driver_state: str = "unknown"
    """What the driver said of the process: a state's name, ``none`` without CUDA, or ``unknown``."""

    def text(self) -> str:
        """The recording of this process."""
        lines = [f"process {self.pid} parent {self.parent} driver {self.driver_state}"]
        lines += [f"map {m.start:x}-{m.end:x} {m.permissions} {m.path}" for m in self.maps]
        lines += [f"fd {number} {target}" for number, target in sorted(self.descriptors.items())]
        lines += [f"inherited {number}" for number in self.inherited]
        lines += [f"env {name}={value}" for name, value in sorted(self.environment.items())]
        lines += [f"thread {name}" for name in self.threads]
        return "\n".join(lines) + "\n"


def parse(text: str) -> tuple[Evidence, ...]:
    """Processes of a recording; lines that start with # are for people. `ValueError` if it is none."""
    found: list[dict[str, list[str]]] = []
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if not line or kind.startswith("#"):
            continue
        if kind == "process":
            found.append({"process": [rest], "map": [], "fd": [], "inherited": [], "env": [], "thread": []})
        else:
            found[-1][kind].append(rest)
    return tuple(_parse_one(one) for one in found)


def _parse_one(one: dict[str, list[str]]) -> Evidence:
    pid, _, parent, _, state = one["process"][0].split()
    return Evidence(
        HostPid(int(pid)),
        HostPid(int(parent)),
        tuple(_parse_map(line) for line in one["map"]),
        {int(number): target for number, target in (line.split(" ", 1) for line in one["fd"])},
        dict(line.split("=", 1) for line in one["env"]),
        tuple(one["thread"]),
        tuple(int(number) for number in one["inherited"]),
        state,
    )


def _parse_map(line: str) -> MapLine:
    span, permissions, path = line.split(" ", 2)
    start, end = span.split("-")
    return MapLine(int(start, 16), int(end, 16), permissions, path)


def read(pid: HostPid, *, driver_state: str = "unknown") -> Evidence:
    """The process as it is now; raises `OSError` if it ended or may not be looked at."""
    base = f"/proc/{pid}"
    with open(f"{base}/stat", "rb") as file:
        parent = int(file.read().rpartition(b")")[2].split()[1])
    descriptors = {number: target for number, target in _read_descriptors(base) if KEPT.search(target)}
    return Evidence(
        pid,
        HostPid(parent),
        tuple(_shorten(_read_maps(base))),
        descriptors,
        dict(_read_environment(base)),
        tuple(sorted(_read_threads(base))),
        tuple(_read_inherited(pid, parent, descriptors)),
        driver_state,
    )


def is_gpu_device(target: str) -> bool:
    """Whether a descriptor's target is one of the driver's devices."""
    return target.startswith("/dev/nvidia")


def uses_driver(pid: HostPid) -> bool:
    """Whether a process has the driver's library mapped or one of its devices open; False if it ended.

    The library counts too: a process that the driver has checkpointed holds no device.
    """
    base = f"/proc/{pid}"
    try:
        mapped = any(LIBCUDA.search(one.path) for one in _read_maps(base))
        return mapped or any(is_gpu_device(target) for _, target in _read_descriptors(base))
    except (FileNotFoundError, ProcessLookupError):
        return False


def remaining_devices(pids: Iterable[HostPid]) -> dict[HostPid, tuple[str, ...]]:
    """GPU devices that processes still hold after the driver's checkpoint: CRIU cannot dump those."""
    held = {}
    for pid in pids:
        targets = {target for _, target in _read_descriptors(f"/proc/{pid}") if is_gpu_device(target)}
        if targets:
            held[pid] = tuple(sorted(targets))
    return held


def _read_inherited(pid: int, parent: int, descriptors: Mapping[int, str]) -> Iterator[int]:
    """Fork keeps numbers, so only the same number can be the same open file (kcmp(2), Linux 3.5)."""
    for number, target in sorted(descriptors.items()):
        if is_gpu_device(target) and same_file(pid, number, parent, number):
            yield number


def same_file(pid: int, number: int, other: int, other_number: int) -> bool:
    """Whether two descriptors are one open file; False also where that may not be asked."""
    call = KCMP.get(os.uname().machine)
    return call is not None and _libc.syscall(call, pid, other, KCMP_FILE, number, other_number) == 0


def _read_maps(base: str) -> Iterator[MapLine]:
    with open(f"{base}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            span, permissions, *_, path = [*line.rstrip("\n").split(None, 5), ""][:6]
            if path and path[0] == "/":
                start, end = span.split("-")
                yield MapLine(int(start, 16), int(end, 16), permissions, path)


def _shorten(maps: Iterable[MapLine]) -> Iterator[MapLine]:
    """Every mapping of a device or of shared memory; of other files the first one, if it is telling."""
    seen: set[str] = set()
    for one in maps:
        special = one.path.startswith(("/dev/", "/memfd:", "/SYSV")) or one.path.endswith("(deleted)")
        if special or (one.path not in seen and KEPT.search(one.path)):
            seen.add(one.path)
            yield one


def _read_descriptors(base: str) -> Iterator[tuple[int, str]]:
    for name in os.listdir(f"{base}/fd"):
        try:
            yield int(name), os.readlink(f"{base}/fd/{name}")
        except FileNotFoundError:
            continue


def _read_environment(base: str) -> Iterator[tuple[str, str]]:
    with open(f"{base}/environ", encoding="utf-8", errors="surrogateescape") as file:
        for entry in file.read().split("\0"):
            name, sign, value = entry.partition("=")
            if sign and name.startswith(VARIABLES) and name != "NCCL_VERSION" and "\n" not in value:
                yield name, value


def _read_threads(base: str) -> Iterator[str]:
    for task in os.listdir(f"{base}/task"):
        try:
            with open(f"{base}/task/{task}/comm") as file:
                yield file.read().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue


def main(arguments: list[str], *, write: Callable[[str], object] = sys.stdout.write) -> None:
    """Record the processes named on the command line."""
    for argument in arguments:
        write(read(HostPid(int(argument))).text())


if __name__ == "__main__":
    main(sys.argv[1:])
