"""Run a program inside a container's namespaces, control groups and nothing else of the container.

This file is a program of its own: ``python -I -S enter.py SPEC``, a fresh single-threaded process,
because a threaded process cannot change its mount namespace and forking one is not safe. It imports
everything it needs before it enters, and afterwards opens no file by name: what it runs, and everything
that program needs, are descriptors opened outside.

Steps, in this order: join the control groups (so that the first page of what is started is charged
there), enter the namespaces, keep low PIDs free, and fork (only a child is inside the PID namespace);
the child gives up capabilities and becomes the program. The exit status is the program's.

SPEC is the JSON form of `chrek.system.launch.Spec`. Errors go to stderr as one line; the status is 125.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

FAILED = 125

_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_PR_CAPBSET_DROP = 24

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def join_control_groups(descriptors: list[int]) -> None:
    """Write this process into each open ``cgroup.procs``."""
    for fd in descriptors:
        os.write(fd, b"0")
        os.close(fd)


def enter_namespaces(descriptors: list[int]) -> None:
    """Enter each namespace; the mount namespace comes last, so that /proc stays ours until then."""
    for fd in descriptors:
        _check(_libc.setns(fd, 0), "setns")
        os.close(fd)


def open_proc() -> int:
    """Return a directory descriptor of a fresh /proc of this process's PID namespace.

    The container's own /proc has a read-only ``sys`` and may be anything; a detached mount
    (fsopen(2), Linux 5.2) needs no path at all.
    """
    context = _check(_libc.syscall(_SYS_FSOPEN, b"proc", 1), "fsopen(proc)")
    try:
        _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig(proc)")
        return _check(_libc.syscall(_SYS_FSMOUNT, context, 1, 0), "fsmount(proc)")
    finally:
        os.close(context)


def keep_free(last: int) -> None:
    """Make the PID namespace hand out ids above *last* from now on.

    ``ns_last_pid`` belongs to the PID namespace of who writes it, so a short-lived child does it; the
    child itself still gets a low id, and gives it back.
    """
    child = os.fork()
    if child == 0:
        status = 0
        try:
            proc = open_proc()
            fd = os.open("sys/kernel/ns_last_pid", os.O_RDWR, dir_fd=proc)
            if int(os.read(fd, 32)) < last:
                os.pwrite(fd, b"%d" % last, 0)
        except (OSError, ValueError) as error:
            os.write(2, f"enter: cannot keep PIDs up to {last} free: {error}\n".encode())
            status = 1
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise OSError(0, "ns_last_pid could not be raised")


def become(spec: dict[str, object]) -> None:
    """Give up capabilities and replace this process by the program."""
    os.setsid()
    for capability in spec["drop"]:  # type: ignore[attr-defined]
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    for fd in spec["keep"]:  # type: ignore[attr-defined]
        os.set_inheritable(fd, True)
    if spec["real_ids"]:
        # The effective and the saved ids stay root's, and with them every capability (capabilities(7)).
        os.setresgid(spec["real_ids"][1], -1, -1)  # type: ignore[index]
        os.setresuid(spec["real_ids"][0], -1, -1)  # type: ignore[index]
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.execve(f"/proc/self/fd/{spec['program']}", spec["arguments"], spec["environment"])  # type: ignore[arg-type]


def raise_open_files(wanted: int) -> None:
    """Raise the limit of open files as far as allowed: a lazy dump needs two descriptors for each MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), max(hard, wanted)))
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Do the steps; never returns."""
    step = "reading the specification"
    try:
        spec = json.loads(sys.argv[1])
        step = "joining the control groups"
        join_control_groups(spec["control_groups"])
        raise_open_files(spec["open_files"])
        step = "entering the namespaces"
        enter_namespaces(spec["namespaces"])
        os.chdir("/")
        if spec["keep_free"]:
            step = "keeping PIDs free"
            keep_free(spec["keep_free"])
        step = "starting the program"
        child = os.fork()
        if child == 0:
            become(spec)
        _, status = os.waitpid(child, 0)
    except BaseException as error:  # noqa: BLE001 - a traceback would read source files inside the container
        os.write(2, f"enter: {step}: {error}\n".encode())
        os._exit(FAILED)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


if __name__ == "__main__":
    main()
