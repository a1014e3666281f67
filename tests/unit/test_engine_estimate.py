"""How much a capture will write: of a real process, and with real limits."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chrek.engine import estimate
from chrek.engine.container import Container
from chrek.engine.preflight import Subject
from chrek.errors import Reason, Refused
from chrek.system.ids import HostPid

MIB = 1 << 20
ME = HostPid(os.getpid())
Start = Callable[[str], HostPid]


@pytest.fixture
def child() -> Iterator[Start]:
    """Return what runs a program to where it waits, and stops it there until the end of the test."""
    processes = []

    def start(code: str) -> HostPid:
        argv = [sys.executable, "-SIc", f"{code}\nprint(flush=True)\ninput()"]
        processes.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stdout = processes[-1].stdout
        assert stdout is not None
        assert stdout.readline() == b"\n"
        # Stopped, so that its memory is the same whenever it is looked at.
        os.kill(processes[-1].pid, signal.SIGSTOP)
        os.waitid(os.P_PID, processes[-1].pid, os.WSTOPPED)
        return HostPid(processes[-1].pid)

    yield start
    for process in processes:
        with process:
            process.kill()


def subject(*pids: HostPid) -> Subject:
    """Return these processes as an application in a container with this machine's own root."""
    return Subject(Container(ME), list(pids), {pid: [] for pid in pids})


def test_private_memory(child: Start) -> None:
    """Memory that a process has written is private and counts in both numbers."""
    before = estimate._memory(child(""))
    own, all_ = estimate._memory(child(f"block = b'x' * {64 * MIB}"))
    assert 60 * MIB < own - before[0] < 70 * MIB
    assert 60 * MIB < all_ - before[1] < 70 * MIB


def test_shared_memory(child: Start) -> None:
    """Shared memory is not private, but a restore needs it."""
    before = estimate._memory(child("import mmap"))
    own, all_ = estimate._memory(child(f"import mmap\nblock = mmap.mmap(-1, {32 * MIB})\nblock[:] = b'x' * {32 * MIB}"))
    assert own - before[0] < 40 * MIB  # the string that filled it may be there still
    assert all_ - before[1] > 30 * MIB


def test_a_process_that_is_gone() -> None:
    """A process that is no more has no memory."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert estimate._memory(pid) == (0, 0)


def test_used_bytes(tmp_path: Path) -> None:
    """Files count with the blocks that they have on disk, at any depth; holes and targets of links do not."""
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("x", "a/b/y"):
        with (tmp_path / name).open("wb") as file:
            file.write(b"x" * MIB)
            os.fsync(file.fileno())
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 100 * MIB)
    (tmp_path / "link").symlink_to("/proc/kcore")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    assert 2 * MIB <= estimate._used(fd) < 3 * MIB
    os.close(fd)


def test_estimate(child: Start, tmp_path: Path) -> None:
    """All private memory and the volumes together are written; a volume that is not there counts nothing."""
    pid = child(f"block = b'x' * {64 * MIB}")
    own, all_ = estimate._memory(pid)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * MIB)
        os.fsync(file.fileno())
    plain = estimate.estimate(subject(pid), [str(tmp_path), "/no/such/volume"], mode="plain")
    assert plain.mode == "plain"
    assert own + MIB <= plain.bytes < own + 3 * MIB
    assert plain.largest_file == own
    assert plain.resident == all_
    twice = estimate.estimate(subject(pid, pid), [], mode="plain", on_gpu=MIB)
    assert (twice.bytes, twice.resident) == (2 * own + MIB, 2 * all_ + MIB)


def test_modes(child: Start) -> None:
    """The lazy way is taken where the limits allow it; where it was asked for and they do not, it is refused."""
    one = subject(child(""))
    possible = estimate.lazy_limit()
    assert possible > 0
    assert estimate.estimate(one, [], mode="auto").mode == "lazy"
    assert estimate.estimate(one, [], mode="lazy").mode == "lazy"
    assert estimate.estimate(one, [], mode="auto", on_gpu=possible).mode == "plain"
    with pytest.raises(Refused, match=f"{possible} bytes at most") as caught:
        estimate.estimate(one, [], mode="lazy", on_gpu=possible)
    assert caught.value.reason is Reason.NOT_SUPPORTED_HERE


def test_a_lazy_dump_is_in_several_files(child: Start) -> None:
    """A lazy dump's memory is spread over shards, a plain one's largest file has all of it."""
    pid = child(f"block = b'x' * {64 * MIB}")
    own, _ = estimate._memory(pid)
    assert estimate.estimate(subject(pid), [], mode="lazy").largest_file == own // 4


def test_lazy_limit_of_an_ordinary_process() -> None:
    """Without CAP_SYS_RESOURCE the hard limit of open files decides: two descriptors for each pipe of 1 MiB."""
    code = """
import os, resource
from chrek.engine import estimate
estimate.lazy_limit()  # what it imports may be root's to read
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 4096))
if estimate._may_raise():
    os.setresuid(65534, 65534, 65534)
assert not estimate._may_raise()
print(estimate.lazy_limit())
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000))
print(estimate.lazy_limit())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str((4096 - 2048) // 2 * MIB), "0"]


def test_lazy_limit_of_this_process() -> None:
    """The limit is no larger than what the kernel allows anybody."""
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = most if estimate._may_raise() or hard == resource.RLIM_INFINITY else hard
    assert estimate.lazy_limit() == max(wanted - 2048, 0) // 2 * MIB
