"""What a failed restore left: processes are killed, file changes undone, before anything starts cold."""

from __future__ import annotations

import os
import time

from chrek.entrypoint.supervise import WALL
from chrek.errors import ChrekError, Reason, RestoreFailed
from chrek.system.ids import HostPid

_SIGKILL = 9
_LIMIT = 10.0
"""Seconds until the killed are given up: what sleeps uninterruptibly (a hung NFS server) does not die."""


def kill_all() -> list[int]:
    """Kill every other process of this PID namespace, or every descendant when not its PID 1.

    Return the ids of those that would not die. Stopped and traced processes die of SIGKILL like all
    others. Repeated until none is left: one that was being forked is missed by the first round.
    """
    deadline = time.monotonic() + _LIMIT
    while True:
        _reap()
        alive = [pid for pid in (_others() if os.getpid() == 1 else _descendants()) if _lives(pid)]
        if not alive or time.monotonic() > deadline:
            return alive
        for pid in alive:
            try:
                os.kill(pid, _SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.002)  # those that are no children of ours end without an event


def undo_files() -> None:
    """Undo what an interrupted restore changed in the root file system and in the container's own volumes.

    Done in a process of its own, which alone pays for the modules. Raise `RestoreFailed` with
    ``UNDO_IMPOSSIBLE``: then a cold start would run on the checkpoint's files.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(_undo(writing))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = os.fsdecode(pipe.read())
    if os.waitpid(pid, 0)[1] != 0:
        raise RestoreFailed(
            Reason.UNDO_IMPOSSIBLE,
            f"The files that the restore changed could not be undone: {message or 'no reason was given'}",
        )


def _undo(report: int) -> int:
    try:
        # Only in this process.
        from chrek.engine.container import Container  # noqa: PLC0415
        from chrek.rootfs.journal import Journal  # noqa: PLC0415

        for place in ("/", *(path for path, _ in Container(HostPid(os.getppid())).volumes)):
            directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            journal = Journal.find(directory)
            if journal is not None:
                journal.undo()
    except (ChrekError, OSError) as error:
        os.write(report, os.fsencode(str(error))[:4000])
        return 1
    except BaseException as error:  # noqa: BLE001 - this process must not return into the init's code
        os.write(report, os.fsencode(repr(error))[:4000])
        return 1
    return 0


def _reap() -> None:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG | WALL)[0] == 0:
                return
        except ChildProcessError:
            return


def _others() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for pid in _others():
        fields = _stat(pid)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(pid)
    found: list[int] = []
    queue = [os.getpid()]
    while queue:
        queue += (more := children.get(queue.pop(), []))
        found += more
    return found


def _lives(pid: int) -> bool:
    fields = _stat(pid)
    return fields is not None and fields[0] not in (b"Z", b"X")


def _stat(pid: int) -> list[bytes] | None:
    """Return the fields of a process's stat file after its name: state, parent and so on."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.readall().rpartition(b")")[2].split()
    except OSError:
        return None
