"""What /proc says, of real processes: those with odd names, those that end, and this one."""

from __future__ import annotations

import mmap
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from chrek.system import procfs
from chrek.system.ids import HostPid

ME = HostPid(os.getpid())
ODD = "a\r\v\f\x1c\x85\u2028b"
"""Everything but the newline that ends a line in Python's eyes."""


@contextmanager
def child(code: str, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[HostPid]:
    """Run a Python program that says a line when it is ready, and then waits for its input to end."""
    argv: Sequence[str] = [sys.executable, "-SIc", f"{code}\nprint(flush=True)\ninput()", *arguments]
    with subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield HostPid(process.pid)
        process.kill()


@pytest.fixture
def gone() -> HostPid:
    """Return the id of a process that is no more."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return HostPid(pid)


def test_status_of_this_process() -> None:
    """The status has the ids, groups, threads and memory that the system calls have."""
    state = procfs.status(ME)
    assert state is not None
    assert (state.pid, state.parent) == (os.getpid(), os.getppid())
    assert state.uids[:3] == os.getresuid()
    assert state.gids[:3] == os.getresgid()
    assert set(state.groups) == set(os.getgroups())
    assert state.threads == threading.active_count() or state.threads > 1
    assert state.resident > 1 << 20
    assert set(state.capabilities) == {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"}
    assert state.state == "R"


def test_a_name_cannot_make_lines() -> None:
    """A process that puts line ends of all kinds into its name changes no other field."""
    for name in ("x\rTracerPid:\t9", "x\vUid:\t0\t0\t0", "x\x1cSeccomp:\t2", "a) R 1 1"):
        with child(f"open('/proc/self/comm', 'w', newline='').write({name!r})") as pid:
            state = procfs.status(pid)
            assert state is not None
            assert state.name == name[:15]
            assert state.uids[0] == os.getuid()
            assert state.seccomp == 0 or "2" not in name
            text = procfs.read_text(pid, "status") or ""
            assert re.findall(r"^TracerPid:\s*(\d+)", text, re.MULTILINE) == ["0"]
            assert procfs.start_time(pid) is not None
            assert (procfs.stat_fields(pid) or [""])[1] == str(os.getpid())


def test_arguments_and_environment_are_as_they_were_given() -> None:
    """Line ends, and bytes that are no UTF-8, come out as they went in."""
    odd = os.fsdecode(b"\xff") + "\r\n" + ODD
    environment = {"A": odd, "EMPTY": "", "B": "x=y"}
    with child("", odd, environment=environment) as pid:
        assert procfs.command_line(pid)[-1] == odd
        found = procfs.environment(pid)
        assert found is not None
        assert {name: found.get(name) for name in environment} == environment


def test_the_first_of_equal_names_wins() -> None:
    """Of two variables of one name the first counts, as for getenv; entries without = are passed over."""
    code = """
import ctypes
arguments = (ctypes.c_char_p * 3)(b"sleep", b"1000", None)
environment = (ctypes.c_char_p * 5)(b"A=1", b"A=2", b"nothing", b"=C:", None)
ctypes.CDLL(None).execve(b"/bin/sleep", arguments, environment)
"""
    with subprocess.Popen([sys.executable, "-SIc", code]) as process:
        while procfs.command_line(process.pid)[:1] != ("sleep",):
            assert process.poll() is None
        assert procfs.environment(process.pid) == {"A": "1", "": "C:"}
        process.kill()


def test_a_process_that_is_gone(gone: HostPid) -> None:
    """Of a process that is no more everything is None or empty, and nothing raises."""
    nothing = (procfs.status, procfs.ns_pid, procfs.stat_fields, procfs.start_time, procfs.environment)
    assert [ask(gone) for ask in nothing] == [None] * len(nothing)
    assert procfs.command_line(gone) == ()
    assert procfs.lines(gone, "status") == []
    assert [procfs.threads(gone), procfs.children(gone), procfs.mappings(gone), procfs.members("pid", gone)] == [[]] * 4
    assert list(procfs.descriptors(gone)) == []
    assert procfs.namespace(gone, "pid") is None
    assert procfs.tree(gone) == [gone]
    assert procfs.in_namespace([gone]) == {}


def test_a_zombie() -> None:
    """A process that has ended and is not waited for has a status without memory, and no arguments."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    state = procfs.status(pid)
    assert state is not None
    assert (state.state, state.resident) == ("Z", 0)
    assert procfs.command_line(pid) == ()
    os.waitpid(pid, 0)


def test_tree() -> None:
    """A tree has the root first, parents before children, and children of every thread."""
    code = """
import os, subprocess, threading
children = []
thread = threading.Thread(target=lambda: children.append(subprocess.Popen(["sleep", "1000"])))
thread.start()
while not children: pass
inner = "sh -c 'echo; kill -STOP $$' & wait"  # says that it is there, and stays
children.append(subprocess.Popen(["sh", "-c", inner], stdout=subprocess.PIPE))
children[1].stdout.readline()
"""
    with child(code) as root:
        found = procfs.tree(root)
        names = {pid: procfs.command_line(pid)[0] for pid in found}
        assert found[0] == root
        assert sorted(list(names.values())[1:]) == ["sh", "sh", "sleep"]
        parents = {pid: state.parent for pid in found if (state := procfs.status(pid))}
        assert all(found.index(parents[pid]) < found.index(pid) for pid in found[1:])
        for pid in reversed(found[1:]):
            os.kill(pid, signal.SIGKILL)


def test_descriptors(tmp_path: Path) -> None:
    """An open file has its number, name, flags and the mount that it is on."""
    file = tmp_path / ODD
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    (found,) = (each for each in procfs.descriptors(ME) if each.number == fd)
    assert found.target == str(file)
    assert found.flags & (os.O_ACCMODE | os.O_APPEND | os.O_CLOEXEC) == os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    assert found.mount > 0
    os.close(fd)


def test_mappings(tmp_path: Path) -> None:
    """A mapping has its addresses, rights, offset and the whole name of its file."""
    file = tmp_path / ODD
    file.write_bytes(bytes(2 * mmap.PAGESIZE))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), mmap.PAGESIZE, offset=mmap.PAGESIZE):
        (found,) = (each for each in procfs.mappings(ME) if each.path.startswith(str(tmp_path)))
    assert found.path == str(file)
    assert (found.end - found.start, found.offset, found.permissions) == (mmap.PAGESIZE, mmap.PAGESIZE, "rw-s")
    assert found.inode == file.stat().st_ino


def test_mappings_are_all_there() -> None:
    """Every line of the file is a mapping, those without a name too, in the order of their addresses."""
    with child("") as pid:
        os.kill(pid, signal.SIGSTOP)  # waiting for its input it may still ask for memory
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        found = procfs.mappings(pid)
        assert len(found) == len(procfs.lines(pid, "maps"))
        assert found == sorted(found, key=lambda each: each.start)
        assert {"[stack]", ""} <= {each.path for each in found}


def test_namespaces() -> None:
    """A child is in this process's namespaces, and is found as a member of them."""
    with child("") as pid:
        assert procfs.namespace(pid, "pid") == procfs.namespace(ME, "pid")
        assert {pid, ME} <= set(procfs.members("pid", pid))
        number = procfs.ns_pid(pid)
        assert number is not None
        assert procfs.in_namespace([pid]) == {number: pid}


def test_threads_and_start_time() -> None:
    """A process has the threads that it started, itself the first, and began after its parent."""
    with child("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()") as pid:
        threads = procfs.threads(pid)
        assert len(threads) == 2
        assert threads[0] == pid
        mine, its = procfs.start_time(ME), procfs.start_time(pid)
        assert mine is not None
        assert its is not None
        assert mine <= its
