"""Memory of real processes goes into shards and comes back the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chrek.memory import (
    Captured,
    Folders,
    Limits,
    Range,
    Verify,
    capture,
    digest,
    fill,
    prefetch,
    read_index,
    verify,
    write_index,
)
from chrek.system.ids import HostPid, NsPid
from system.memory_child import BASE, EXEC, NONE, PAGE, READ, RW, Child

APP = NsPid(7)
MB = 1 << 20
SMALL = 64 << 10


@pytest.fixture
def source() -> Iterator[Child]:
    """Run the process that is captured."""
    with Child() as child:
        yield child


@pytest.fixture
def target() -> Iterator[Child]:
    """Run the process that is filled."""
    with Child() as child:
        yield child


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    """Give a descriptor of an empty ``memory/``."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def host(child: Child) -> dict[NsPid, HostPid]:
    """Return the map of process ids in which the application's one process is *child*."""
    return {APP: HostPid(child.pid)}


def move(
    source: Child, target: Child, folder: int, ranges: list[Range], *, workers: int = 3, mode: Verify = Verify.FULL
) -> Captured:
    """Capture, seal, read back and fill."""
    captured = capture(ranges, host_pids=host(source), folder=folder, block_size=SMALL, limits=Limits(workers=workers))
    index = read_index(folder, write_index(folder, captured.index))
    assert index == captured.index
    verify(index, Folders(folder))
    filled = fill(index, Folders(folder), host_pids=host(target), verify=mode, limits=Limits(workers=workers))
    assert filled.written == captured.stored
    return captured


PATTERNS: dict[str, tuple[str, int]] = {
    "dense": ("randomise(BASE, N, 1)", 0),
    "zero": ("put(BASE, bytes(N))", 1000),
    "half zero": ("randomise(BASE, N // 2, 1)", 500),
    "one byte": ("put(BASE + N - 1, b'x')", 999),
    "alternating": ("for page in range(0, N, 2 * PAGE): put(BASE + page, b'x' * PAGE)", 500),
    "first words zero": ("for page in range(0, N, PAGE): put(BASE + page + 1000, b'x')", 0),
    "islands": ("for page in range(0, N, 16 * PAGE): randomise(BASE + page, 3 * PAGE, page)", 812),
}


@pytest.mark.parametrize(("code", "zeros"), PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("workers", [1, 5])
def test_patterns(source: Child, target: Child, folder: int, code: str, zeros: int, workers: int) -> None:
    """Whatever lies where, it comes back, and pages of zeros are not stored."""
    pages = 1000
    for child in (source, target):
        child(f"N = {pages * PAGE}\nanon(BASE, N)")
    source(code if "\n" in code or "for" not in code else f"{code}\nNone")
    captured = move(source, target, folder, [Range(APP, BASE, pages * PAGE)], workers=workers)
    assert target("sha(BASE, N)") == source("sha(BASE, N)")
    assert (captured.scanned, captured.stored + captured.zero) == (pages * PAGE, pages * PAGE)
    assert abs(captured.zero // PAGE - zeros) <= 1


@pytest.mark.parametrize("mode", Verify)
def test_every_verify_mode_fills_the_same(source: Child, target: Child, folder: int, mode: Verify) -> None:
    """Full, sampled and off write the same bytes."""
    for child in (source, target):
        child(f"anon(BASE, {3 * MB})")
    source(f"randomise(BASE, {3 * MB}, 4)")
    move(source, target, folder, [Range(APP, BASE, 3 * MB)], mode=mode)
    assert target(f"sha(BASE, {3 * MB})") == source(f"sha(BASE, {3 * MB})")


@pytest.mark.parametrize("protection", [RW, READ, READ | EXEC, NONE], ids=["rw-", "r--", "r-x", "---"])
def test_protected_memory(source: Child, target: Child, folder: int, protection: int) -> None:
    """Pages that their own process may not read or write are copied like any other, also in mixed ranges."""
    size = 40 * PAGE
    for child in (source, target):
        child(f"anon(BASE, {size})")
    source(f"randomise(BASE, {size}, 2)")
    expected = source(f"sha(BASE, {size})")
    for child in (source, target):
        child(f"protect(BASE + 5 * PAGE, 3 * PAGE, {protection})\nprotect(BASE + 20 * PAGE, 20 * PAGE, {protection})")
    move(source, target, folder, [Range(APP, BASE, size)], workers=2)
    assert target(f"protect(BASE, {size}, RW)\nsha(BASE, {size})") == expected


@pytest.mark.parametrize(
    "prepare", ["check(libc.mlock(BASE, N))", "check(libc.madvise(BASE, N, 14))"], ids=["locked", "hugepage"]
)
def test_locked_and_huge_pages(source: Child, target: Child, folder: int, prepare: str) -> None:
    """Locked memory and memory advised to be huge come back the same."""
    for child in (source, target):
        child(f"N = {6 * MB}\nanon(BASE, N)\n{prepare}")
    source("randomise(BASE, N, 3)")
    move(source, target, folder, [Range(APP, BASE, 6 * MB)])
    assert target("sha(BASE, N)") == source("sha(BASE, N)")


def test_zero_pages_of_a_mapped_file_are_written(source: Child, target: Child, folder: int, tmp_path: Path) -> None:
    """A page that the application zeroed in its private copy of a file does not come back as the file's."""
    file = tmp_path / "library"
    file.write_bytes(b"code" * 4096)
    for child in (source, target):
        child(f"fd = os.open({str(file)!r}, os.O_RDONLY)\nanon(BASE, 4 * PAGE, fd=fd)")
    source("put(BASE + PAGE, bytes(PAGE))")
    move(source, target, folder, [Range(APP, BASE + PAGE, PAGE, anonymous=False)])
    assert target("sha(BASE, 4 * PAGE)") == source("sha(BASE, 4 * PAGE)")


def test_twenty_thousand_small_mappings(source: Child, target: Child, folder: int) -> None:
    """Many small mappings with holes between them move in few calls and give a small index."""
    count = 20_000
    for child in (source, target):
        child(
            f"anon(BASE, {2 * count} * PAGE)\nfor n in range({count}): protect(BASE + (2 * n + 1) * PAGE, PAGE, NONE)"
        )
    source(f"for n in range({count}): put(BASE + 2 * n * PAGE, (n + 1).to_bytes(4, 'little') * 1024)")
    captured = move(source, target, folder, [Range(APP, BASE + 2 * n * PAGE, PAGE) for n in range(count)])
    code = f"hashlib.sha256(b''.join(get(BASE + 2 * n * PAGE, PAGE) for n in range({count}))).hexdigest()"
    assert target(code) == source(code)
    assert captured.index.run_count == count
    assert len(captured.index.encode()) < 16 * count + 60 * 2000


def test_a_stopped_process(source: Child, target: Child, folder: int) -> None:
    """A process that stands still is read all the same, and is left standing."""
    for child in (source, target):
        child(f"anon(BASE, {MB})")
    source(f"randomise(BASE, {MB}, 5)")
    expected = source(f"sha(BASE, {MB})")
    for child in (source, target):
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    move(source, target, folder, [Range(APP, BASE, MB)])
    os.kill(target.pid, signal.SIGCONT)
    assert target(f"sha(BASE, {MB})") == expected


def test_two_processes_in_one_index(source: Child, target: Child, folder: int) -> None:
    """Processes with memory at the same addresses are kept apart."""
    with Child() as second, Child() as second_target:
        for number, child in enumerate((source, second, target, second_target)):
            child(f"anon(BASE, {MB})\nrandomise(BASE, {MB}, {number})")
        pids = (NsPid(9), NsPid(3))
        captured = capture(
            [Range(pid, BASE + half, MB // 2) for half in (MB // 2, 0) for pid in pids],
            host_pids=dict(zip(pids, (HostPid(source.pid), HostPid(second.pid)), strict=True)),
            folder=folder,
            block_size=SMALL,
        )
        restored = dict(zip(pids, (HostPid(target.pid), HostPid(second_target.pid)), strict=True))
        fill(captured.index, Folders(folder), host_pids=restored)
        assert target(f"sha(BASE, {MB})") == source(f"sha(BASE, {MB})")
        assert second_target(f"sha(BASE, {MB})") == second(f"sha(BASE, {MB})")


def test_nothing_to_capture(source: Child, folder: int) -> None:
    """No ranges give an index without files, which fills nothing."""
    captured = capture([], host_pids={}, folder=folder)
    index = read_index(folder, write_index(folder, captured.index))
    assert (index.files, index.size, os.listdir(folder)) == ((), 0, ["index"])
    assert fill(index, Folders(folder), host_pids=host(source)).written == 0


def test_digests_after_the_thaw_are_the_same(source: Child, folder: int, tmp_path: Path) -> None:
    """Leaving the digests for later gives the index that computing them during the copy gives."""
    source(f"anon(BASE, {MB})\nrandomise(BASE, {MB // 3}, 6)")
    indexes = []
    for name, during in (("a", True), ("b", False)):
        (tmp_path / name).mkdir()
        fd = os.open(name, os.O_RDONLY, dir_fd=folder)
        captured = capture(
            [Range(APP, BASE, MB)],
            host_pids=host(source),
            folder=fd,
            block_size=SMALL,
            digest=during,
            limits=Limits(workers=1),
        )
        assert not (during and captured.undigested)
        indexes.append(digest(captured.index, Folders(fd), only=captured.undigested))
        os.close(fd)
    assert indexes[0] == indexes[1]


def test_only_the_digests_that_are_missing_are_computed(source: Child, folder: int) -> None:
    """Blocks that were digested during the copy keep their digests; the others get theirs from the files."""
    source(f"anon(BASE, {MB})\nrandomise(BASE, {MB // 2}, 6)")
    whole = capture([Range(APP, BASE, MB)], host_pids=host(source), folder=folder, block_size=SMALL).index
    size, count = whole.algorithm.size, len(whole.ends)
    assert count > 3
    missing = frozenset(range(0, count, 3))
    kept = [bytes(size) if block.number in missing else whole.digest(block) for block in whole.blocks()]
    assert digest(replace(whole, digests=b"".join(kept)), Folders(folder), only=missing) == whole
    wrong = replace(whole, digests=bytes(size * count))
    assert digest(wrong, Folders(folder), only=frozenset()) == wrong


def test_only_the_ranges_are_touched(source: Child, target: Child, folder: int) -> None:
    """What was left out of the ranges keeps what the target had there."""
    for child, seed in ((source, 1), (target, 2)):
        child(f"anon(BASE, 10 * PAGE)\nrandomise(BASE, 10 * PAGE, {seed})")
    around = [Range(APP, BASE, 3 * PAGE), Range(APP, BASE + 5 * PAGE, 5 * PAGE)]
    before = target("sha(BASE + 3 * PAGE, 2 * PAGE)")
    move(source, target, folder, around)
    assert target("sha(BASE + 3 * PAGE, 2 * PAGE)") == before
    assert target("sha(BASE, 3 * PAGE)") == source("sha(BASE, 3 * PAGE)")
    assert target("sha(BASE + 5 * PAGE, 5 * PAGE)") == source("sha(BASE + 5 * PAGE, 5 * PAGE)")


def test_progress_ends_at_all_bytes(source: Child, folder: int) -> None:
    """Progress of a capture counts the memory looked at, of a fill the memory written."""
    source(f"anon(BASE, {MB})\nrandomise(BASE, {MB // 2}, 1)")
    seen: list[int] = []
    captured = capture(
        [Range(APP, BASE, MB)], host_pids=host(source), folder=folder, limits=Limits(progress=seen.append)
    )
    assert seen[-1] == MB
    fill(captured.index, Folders(folder), host_pids=host(source), limits=Limits(progress=seen.append))
    assert seen[-1] == MB // 2


MEASURED = """
import os, sys
from chrek.memory import *
pid, size, folder = int(sys.argv[1]), int(sys.argv[2]), os.open(sys.argv[3], os.O_RDONLY)
limits = Limits(workers=16)
captured = capture([Range(7, {base}, size)], host_pids={{7: pid}}, folder=folder, limits=limits)
fill(captured.index, Folders(folder), host_pids={{7: pid}}, limits=limits)
print(captured.stored, *[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


def test_own_memory_does_not_grow_with_size(source: Child, tmp_path: Path) -> None:
    """Sixteen threads that move 400 MB hold less than 150 MB themselves."""
    size = 400 * MB
    source(f"anon(BASE, {size})\nfor n in range(0, {size}, 32 * PAGE): put(BASE + n, os.urandom(31 * PAGE))")
    program = [sys.executable, "-c", MEASURED.format(base=BASE), str(source.pid), str(size), str(tmp_path)]
    stored, peak = subprocess.run(program, check=True, capture_output=True, text=True).stdout.split()
    assert int(stored) == size // 32 * 31
    assert int(peak) < 150 * 1024


def test_prefetch_brings_shards_into_the_page_cache(
    source: Child, folder: int, tmp_path: Path, resident: Callable[[Path], float]
) -> None:
    """After a prefetch the shards are in memory, and stopping one early is harmless."""
    source(f"anon(BASE, {8 * MB})\nrandomise(BASE, {8 * MB}, 1)")
    captured = capture([Range(APP, BASE, 8 * MB)], host_pids=host(source), folder=folder, limits=Limits(workers=1))
    shard = tmp_path / captured.index.files[0].name
    with shard.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(shard) > 0.1:
        pytest.skip("this file system keeps its pages (tmpfs)")
    with prefetch(captured.index, Folders(folder)):
        pass
    with prefetch(captured.index, Folders(folder)) as ahead:
        ahead.wait()
        deadline = time.monotonic() + 30
        while resident(shard) < 0.99:  # the kernel has no event for it
            assert time.monotonic() < deadline
    ahead.stop()


@pytest.fixture
def resident() -> Callable[[Path], float]:
    """Give a function that returns which part of a file is in the page cache (mincore(2))."""

    def look(path: Path) -> float:
        code = (
            "import ctypes, mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1, flags=1)\n"
            "n = len(m) // 4096; v = (ctypes.c_ubyte * n)(); libc = ctypes.CDLL(None)\n"
            "libc.mmap.restype = ctypes.c_void_p\n"
            "a = libc.mmap(None, ctypes.c_size_t(len(m)), 1, 1, f.fileno(), ctypes.c_long(0))\n"
            "assert libc.mincore(ctypes.c_void_p(a), ctypes.c_size_t(len(m)), v) == 0\n"
            "print(sum(b & 1 for b in v) / n)"
        )
        run = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
        return float(run.stdout)

    return look
