"""The small container that `chrek run` makes on a plain machine: PID 1 is ChReK's init.

New are the namespaces that a restore needs for itself, and nothing else:

``pid``     the application must get the process ids back that it had; only an empty namespace has them free
``mnt``     a /proc that shows this PID namespace, and a /dev/shm of its own: shared memory and named semaphores
            then belong to the application alone, so that a checkpoint can carry them
``ipc``     System V objects of strangers would otherwise refuse every capture

Files, network and host name stay the machine's: the application is meant to run as if it had been started
without ChReK. Mounts made on the machine later still arrive (propagation is slave, not private).

PID 1 dies with its parent, however that dies: an application without the program that answers for it would
keep ports and memory that the next start needs.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from chrek.engine.container import OWN_VOLUME
from chrek.system.syscalls import LIBC, check, prctl

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x08000000, 0x20000000
"""sched.h"""

SHARED_MEMORY = "/dev/shm"

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 0x2, 0x4, 0x8, 0x4000, 0x80000
_PR_SET_PDEATHSIG = 1
_FAILED = 125


def init_command(command: Sequence[str]) -> list[str]:
    """Return the command line of ChReK's init for an application's command."""
    program = Path(__file__).resolve().parents[1] / "entrypoint/__main__.py"
    return [sys.executable, "-I", "-S", str(program), "--", *command]


def start(command: Sequence[str], environment: Mapping[str, str], streams: tuple[int, int, int]) -> int:
    """Start ChReK's init as PID 1 of new namespaces and return its process id, as the caller numbers it.

    It gets *streams* as its standard streams and an empty signal mask.

    Raises:
        OSError: the kernel refuses a new PID namespace.
    """
    home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    alive, ours = os.pipe()
    check(LIBC.unshare(CLONE_NEWPID), "unshare(CLONE_NEWPID)")
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _become_init(alive, init_command(command), dict(environment), streams)
    os.close(alive)
    # Until this, every child would be born into the new namespace, and no thread could be made (clone(2), EINVAL).
    check(LIBC.setns(home, CLONE_NEWPID), "setns")
    os.close(home)
    # `ours` stays open for as long as this process lives: that is how the child knows.
    return pid


def _become_init(alive: int, command: list[str], environment: dict[str, str], streams: tuple[int, int, int]) -> None:
    """Make the other namespaces and mounts, then become the init; never returns."""
    step = "starting"
    try:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([alive], [], [], 0)[0]:  # the end of the pipe: the parent died before the line above
            os._exit(_FAILED)
        step = "making a mount and an IPC namespace"
        check(LIBC.unshare(CLONE_NEWNS | CLONE_NEWIPC), "unshare(CLONE_NEWNS | CLONE_NEWIPC)")
        step = "making the mounts its own"
        _mount(None, "/", None, _MS_REC | _MS_SLAVE)
        step = "mounting /proc"
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        step = f"mounting {SHARED_MEMORY}"
        _mount(OWN_VOLUME, SHARED_MEMORY, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777")
        step = "connecting its streams"
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
        step = f"running {command[0]}"
        # What else the caller's shell has open belongs to the outside, and no checkpoint could carry it.
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        # A session of its own: the terminal's signals come once, through the program outside.
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(command[0], command, environment)
    except BaseException as error:  # noqa: BLE001 - nothing may return into the caller's code in this process
        os.write(2, f"chrek: the application's namespaces: {step}: {error}\n".encode())
    os._exit(_FAILED)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    check(LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mount on {target}")
