#!/usr/bin/env python3
"""How fast memory is captured and filled, without CRIU: medians, and seconds of processor time a GB.

    sudo .venv/bin/python benchmarks/memory/mover.py --size 1 --folder /dev/shm --folder /var/tmp

Each repetition runs every case once, so that a machine that is busy for a while is busy for all of them. The
processor time (user and system, all threads of this program) is what to compare on a machine that others use
too: the kernel does nearly all the work of both directions in our threads.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import os
import platform
import resource
import shutil
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from chrek.memory import Folders, Index, Limits, Range, Verify, capture, default_workers, digest, fill
from chrek.system.ids import HostPid, NsPid

APP = NsPid(7)
BASE = 0x2000_0000_0000
MB = 1 << 20
GB = 10**9

PATTERNS = ("dense", "half", "alternating")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    folder: str
    pattern: str
    workers: int
    block: int
    action: str


@dataclass
class Sample:
    """Wall and processor seconds of one run over *size* bytes."""

    size: int
    wall: float
    cpu: float


@contextmanager
def process(size: int, pattern: str | None, *, huge: bool) -> Iterator[HostPid]:
    """Fork a process with *size* bytes at `BASE`, filled or untouched, that waits to be killed."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _prepare(size, pattern, huge=huge)
            os.write(done, b"x")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    try:
        if os.read(ready, 1) != b"x":
            raise SystemExit("the process to measure with did not start")
        yield HostPid(pid)
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _prepare(size: int, pattern: str | None, *, huge: bool) -> None:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
    if libc.mmap(BASE, size, 3, flags, -1, 0) != BASE:
        raise SystemExit("no room for the mapping")
    if huge:
        libc.madvise(BASE, size, mmap.MADV_HUGEPAGE)
    if pattern is None:
        return
    noise = os.urandom(MB)
    if pattern == "alternating":
        noise = b"".join(noise[at : at + 4096] + bytes(4096) for at in range(0, MB, 8192))
    for at in range(0, size, MB):
        # Half of it is zero: 64 MB with data, 64 MB without.
        if pattern != "half" or (at >> 26) % 2 == 0:
            ctypes.memmove(BASE + at, noise, MB)
        else:
            ctypes.memset(BASE + at, 0, MB)


def measured(size: int, action: Callable[[], None]) -> Sample:
    """Run *action* and measure it."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    action()
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    return Sample(size, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def run_case(options: argparse.Namespace, case: Case, source: HostPid, results: dict[Case, list[Sample]]) -> None:
    """Capture once with and once without digests, then fill in each mode."""
    size = options.bytes
    limits = Limits(workers=case.workers)

    def measure(action: str, amount: int, body: Callable[[], None]) -> None:
        sample = measured(amount, body)
        results[Case(case.folder, case.pattern, case.workers, case.block, action)].append(sample)

    path = tempfile.mkdtemp(prefix="chrek-bench-", dir=case.folder)
    try:
        made: list[Index] = []
        for name, during in (("digests later", False), ("digests", True)):
            os.mkdir(f"{path}/{name}")
            fd = os.open(f"{path}/{name}", os.O_RDONLY)

            def take(fd: int = fd, during: bool = during) -> None:  # noqa: FBT001
                made.append(
                    capture(
                        [Range(APP, BASE, size)],
                        host_pids={APP: source},
                        folder=fd,
                        digest=during,
                        block_size=case.block,
                        limits=limits,
                    ).index
                )

            measure(f"capture, {name}", size, take)
            if not during:

                def after(fd: int = fd) -> None:
                    digest(made[-1], Folders(fd), limits=limits)

                measure("digest after", made[-1].size, after)
                shutil.rmtree(f"{path}/{name}")
                os.close(fd)
        for mode in Verify:
            with process(size, None, huge=options.huge) as target:

                def put(fd: int = fd, mode: Verify = mode, target: HostPid = target) -> None:
                    fill(made[-1], Folders(fd), host_pids={APP: target}, verify=mode, limits=limits)

                measure(f"fill, verify {mode.value}", size, put)
        os.close(fd)
    finally:
        shutil.rmtree(path)


def machine(options: argparse.Namespace) -> str:
    """Describe what was measured on."""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} x {model}, Linux {platform.release()}, Python {platform.python_version()}, "
        f"load {load:.1f}; {options.bytes / GB:.2f} GB{', huge pages' if options.huge else ''}, "
        f"median of {options.repetitions}"
    )


def table(results: dict[Case, list[Sample]]) -> None:
    """Print the medians."""
    print(f"{'folder':<14} {'memory':<12} {'threads':>7} {'block':>8}  {'what':<24} {'GB/s':>6} {'cpu s/GB':>9}")
    for case, samples in results.items():
        rate = statistics.median(sample.size / GB / sample.wall for sample in samples)
        cost = statistics.median(sample.cpu / (sample.size / GB) for sample in samples)
        block = f"{case.block >> 10} KiB"
        head = f"{case.folder:<14} {case.pattern:<12} {case.workers:>7} {block:>8}  {case.action:<24}"
        print(f"{head} {rate:6.2f} {cost:9.3f}")


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="GiB of memory (default 1)")
    parser.add_argument("--folder", action="append", help="where to put shards (default /dev/shm)")
    parser.add_argument("--pattern", action="append", choices=PATTERNS, help="default: dense and half")
    parser.add_argument("--workers", action="append", type=int, help="default: one thread a processor")
    parser.add_argument("--block", action="append", type=int, help="KiB in a block (default 2048)")
    parser.add_argument("--huge", action="store_true", help="advise the processes' memory to be huge pages")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    options.bytes = int(options.size * 1024) * MB
    results: dict[Case, list[Sample]] = defaultdict(list)
    cases = itertools.product(
        options.pattern or ["dense", "half"],
        options.folder or ["/dev/shm"],
        options.workers or [default_workers()],
        options.block or [2048],
    )
    ordered = list(cases)
    for _ in range(options.repetitions):
        for pattern, group in itertools.groupby(ordered, key=lambda case: case[0]):
            with process(options.bytes, pattern, huge=options.huge) as source:
                for _, folder, workers, block in group:
                    run_case(options, Case(folder, pattern, workers, block << 10, ""), source, results)
    print(machine(options))
    table(results)


if __name__ == "__main__":
    main()
