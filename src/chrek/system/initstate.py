"""How others learn what a container's init is doing: the reading half of `chrek.system.initpublish`.

Everything found through another process's ``/proc/PID/fd`` is that process's to choose, and it may be
hostile: the name on the link is looked at, then the object behind it is held by an ``O_PATH``
descriptor (which opens nothing: no FIFO blocks, no device driver runs) and must be a memfd, known by
its device, before it is opened at all; then its seals, its size and every value are checked. What
fails any of this is not an init: `Refused` with ``APP_NOT_FOUND``.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat

from chrek.errors import Reason, Refused
from chrek.system import procfs
from chrek.system.ids import HostPid, NsPid
from chrek.system.initpublish import MODES, NAME, SEALS, SIZE_MAX, VERSION, InitState, Process

__all__ = ["InitState", "Process", "application", "find_inits", "open_foreign", "read_state"]

_LINK = f"/memfd:{NAME} (deleted)"
_FDS_MAX = 4096
"""An init holds a handful; a process with more than this many is not searched."""
_PID_MAX = 2**22
"""The kernel's PID_MAX_LIMIT."""
_TICK_TOLERANCE = 1
"""Two start times are each rounded down to a tick after an offset is added."""


def read_state(pid1: HostPid) -> InitState:
    """Return what the init `pid1` has published; raise `Refused` if it is no init of ours."""
    for descriptor in _links(pid1):
        data = _sealed(pid1, descriptor)
        if data is None:
            continue
        state = _decode(data)
        status = procfs.status(pid1)
        # A child between fork and exec still has its parent's descriptor.
        if state is not None and status is not None and status.ns_pid == state.init.pid:
            return state
    raise Refused(Reason.APP_NOT_FOUND, f"Process {pid1} is not ChReK's init.")


def find_inits() -> tuple[HostPid, ...]:
    """Return every init in this /proc, in the order of their ids; those we may not look into are left out."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            read_state(HostPid(int(name)))
        except Refused:
            continue
        found.append(HostPid(int(name)))
    return tuple(sorted(found))


def application(pid1: HostPid) -> HostPid:
    """Return the application of the init `pid1`.

    The init names it as its own PID namespace numbers it; it is taken only if it is a child of that
    init, in that PID namespace, and started when the init says. Start times are compared as
    differences to the init's own start: the init may live in another time namespace than we.
    Raise `Refused` with ``APP_NOT_FOUND``, or ``APP_IS_PID1`` when `pid1` is no init but runs as PID 1.
    """
    try:
        state = read_state(pid1)
    except Refused as error:
        status = procfs.status(pid1)
        if status is not None and status.ns_pid == 1:
            raise Refused(
                Reason.APP_IS_PID1, f"Process {pid1} is PID 1 of its container and not ChReK's init."
            ) from error
        raise
    if state.app is None:
        raise Refused(Reason.APP_NOT_FOUND, f"The init {pid1} has no application yet (mode {state.mode}).")
    for child in procfs.children(pid1):
        if _is(child, state.app, state.init, pid1):
            return child
    raise Refused(Reason.APP_NOT_FOUND, f"The application {state.app.pid} of the init {pid1} is gone.")


def open_foreign(pid: HostPid, descriptor: int, *, device: int, kind: int, flags: int) -> int | None:
    """Open what another process has at a descriptor, if it is of that device and file type; else None.

    Nothing of a wrong object is opened. `kind` is a file type as `stat.S_IFMT` gives it.
    """
    try:
        held = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(held)
        if found.st_dev != device or stat.S_IFMT(found.st_mode) != kind:
            return None
        return os.open(f"/proc/self/fd/{held}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    finally:
        os.close(held)


def _is(child: HostPid, app: Process, init: Process, pid1: HostPid) -> bool:
    status, start, init_start = procfs.status(child), procfs.start_time(child), procfs.start_time(pid1)
    if status is None or start is None or init_start is None:
        return False
    same_namespace = procfs.namespace(child, "pid") == procfs.namespace(pid1, "pid")
    drift = (start - init_start) - (app.start - init.start)
    return same_namespace and status.parent == pid1 and status.ns_pid == app.pid and abs(drift) <= _TICK_TOLERANCE


def _links(pid: HostPid) -> list[int]:
    """Return the descriptors of a process whose link has the state's name."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []
    return [int(name) for name in names[:_FDS_MAX] if _link(pid, name) == _LINK]


def _link(pid: HostPid, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}")
    except OSError:
        return ""


def _sealed(pid: HostPid, descriptor: int) -> bytes | None:
    """Return the content of a sealed memfd of bounded size, or None if it is anything else."""
    memfd = open_foreign(pid, descriptor, device=_memfd_device(), kind=stat.S_IFREG, flags=os.O_RDONLY)
    if memfd is None:
        return None
    try:
        if fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(memfd).st_size > SIZE_MAX:
            return None
        return os.pread(memfd, SIZE_MAX, 0)
    except OSError:
        return None
    finally:
        os.close(memfd)


def _memfd_device() -> int:
    """Return the device number of the kernel's own tmpfs mount, on which all memfds of a machine lie."""
    memfd = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(memfd).st_dev
    finally:
        os.close(memfd)


def _decode(data: bytes) -> InitState | None:
    """Return the state that a JSON object describes, or None if any value is not what it must be."""
    try:
        fields = json.loads(data)
        if fields["version"] != VERSION or fields["mode"] not in MODES:
            return None
        return InitState(
            mode=fields["mode"],
            init=_process(fields["init"]),
            app=None if fields["app"] is None else _process(fields["app"]),
            checkpoint_id=_text(fields["checkpoint_id"]),
            mailbox=None if fields["mailbox"] is None else _integer(fields["mailbox"], 2**31 - 1),
            claim=_text(fields["claim"]),
            deadline=_seconds(fields["deadline"]),
            reason=_text(fields["reason"]),
            seconds=_seconds(fields["seconds"]),
            reads_format=max(1, _integer(fields.get("reads_format", 1), 2**31 - 1)),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _process(fields: dict[str, object]) -> Process:
    return Process(pid=NsPid(_integer(fields["pid"], _PID_MAX)), start=_integer(fields["start"], 2**63))


def _integer(value: object, maximum: int) -> int:
    if type(value) is not int or not 0 <= value <= maximum:
        raise ValueError(value)
    return value


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < 1e12:  # type: ignore[operator] # NaN compares false
        raise ValueError(value)
    return float(value)  # type: ignore[arg-type]


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise ValueError(value)
    return value
