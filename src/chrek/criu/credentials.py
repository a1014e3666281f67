"""What a checkpoint's images may ask for, bounded by the container's PID 1.

Uids, capabilities, seccomp filters, security labels and limits of restored processes come from the
images, not from the container, and CRIU sets them with the privileges it runs with. Whoever can write
to the store can write images. So before CRIU runs every image is looked at, and what goes beyond what
the container's own PID 1 could give its children is refused. Image files that a capture by ChReK never
writes (mounts, networks, users: things CRIU would rebuild) are refused altogether.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chrek.criu import capabilities
from chrek.criu.capabilities import exceeded
from chrek.criu.images import Image, matching, open_regular, read_all, read_one
from chrek.criu.messages import Core, GhostFile, Inventory, NamespaceIds, PstreeEntry
from chrek.criu.seccomp import Filters
from chrek.errors import Reason, Refused
from chrek.system import procfs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chrek.criu.messages import Credentials, TaskCore
    from chrek.system.ids import HostPid
    from chrek.system.procfs import Status

_NAMES = re.compile(
    r"(cgroup|files|inventory|pstree|seccomp|remap-fpath|filelocks|fifo-data|pipes-data|sk-queues|memfd|tty-info|tty-data"
    r"|bpfmap-data|(core|mm|pagemap|pages|fs|ids|fdinfo|timens|ghost-file|pagemap-shmem|tcp-stream)-[0-9a-f]+)\.img"
)
"""Every image that CRIU 4 writes for a tree that shares all its namespaces.

What older ones had beside these (``creds-N``, ``rlimit-N``, ``sigacts-N`` and so on) it still reads, where it does not
find the same in ``core-N``: nothing here looks into those, so none may be there.
"""

_ENDED = {2, 6}
"""Task states dead and zombie (``compel/include/uapi/task-state.h``)."""
_RLIM_INFINITY = (1 << 64) - 1
_LIMITS = 16
"""RLIM_NLIMITS."""
_NICE, _RTPRIO = 13, 14
_SHARED_POLICIES, _REALTIME_POLICIES = {0, 3, 5}, {1, 2}
"""SCHED_OTHER, _BATCH and _IDLE; SCHED_FIFO and _RR (linux/sched.h)."""
_RESET_ON_FORK = 1 << 30


@dataclass(frozen=True)
class Tree:
    """The process tree in the images: the root's PID, and the highest id that any process or session has."""

    root: int
    pids: tuple[int, ...]
    highest: int


def read_tree(directory: int) -> Tree:
    """Read the process tree.

    Raises:
        Refused: ``CORRUPT``.
    """
    entries = read_all(directory, "pstree.img", PstreeEntry)
    if not entries:
        raise Refused(Reason.CORRUPT, "images/pstree.img: it has no process.")
    # Threads are taken from their core images: a zombie's entry in the tree names one that never was
    # (CRIU 4.2.1 leaves that number uninitialised).
    taken = sorted({e.pid for e in entries} | set(matching(directory, r"core-(\d+)\.img")))
    ids = [*taken, *(number for e in entries for number in (e.pgid, e.sid))]
    if taken[0] <= 0 or not all(0 <= number < 1 << 22 for number in ids):
        raise Refused(Reason.CORRUPT, "images/pstree.img: a process id is out of range.")
    return Tree(root=entries[0].pid, pids=tuple(taken), highest=max(ids))


def check_names(directory: int) -> None:
    """Check that only images of known kinds are there.

    Raises:
        Refused: ``CORRUPT``.
    """
    for name in os.listdir(directory):
        if not _NAMES.fullmatch(name):
            raise Refused(Reason.CORRUPT, f"images/{name[:80]!r} is no image that a ChReK checkpoint has.")


def check_namespaces(directory: int) -> None:
    """Check that CRIU is asked to make no namespace but the one that keeps the clocks.

    Raises:
        Refused: ``CORRUPT``.
    """
    root = read_one(directory, "inventory.img", Inventory).root_ids or NamespaceIds()
    for name in matching(directory, r"ids-(\d+)\.img").values():
        ids = read_one(directory, name, NamespaceIds)
        for kind in ("pid", "net", "ipc", "uts", "mnt", "user"):
            if getattr(ids, kind) != getattr(root, kind):
                raise Refused(Reason.CORRUPT, f"images/{name} asks for a {kind} namespace of its own.")


def check_ghosts(directory: int) -> None:
    """Check that no deleted file in the images is a device: CRIU would make it.

    Raises:
        Refused: ``PRIVILEGE_EXCEEDED`` or ``CORRUPT``.
    """
    for name in os.listdir(directory):
        if name.startswith("ghost-file-"):
            for ghost in read_first(directory, name):
                if stat.S_ISCHR(ghost.mode) or stat.S_ISBLK(ghost.mode):
                    raise Refused(Reason.PRIVILEGE_EXCEEDED, f"images/{name} is a device node.")


def read_first(directory: int, name: str) -> Iterable[GhostFile]:
    """Yield the first entry of a ghost image; what follows it may be raw data.

    Raises:
        Refused: ``CORRUPT``.
    """
    fd = open_regular(directory, name)
    try:
        head = os.pread(fd, 1 << 16, 0)
    finally:
        os.close(fd)
    size = int.from_bytes(head[8:12], "little")
    if len(head) < 12 or 12 + size > len(head):
        raise Refused(Reason.CORRUPT, f"images/{name}: its first entry is cut short.")
    try:
        yield GhostFile.decode(head[12 : 12 + size])
    except ValueError as error:
        raise Refused(Reason.CORRUPT, f"images/{name}: {error}") from error


@dataclass(frozen=True)
class Bounded:
    """Images that ask for no more than PID 1 has.

    Attributes:
        bounding: capabilities that one of the bounding sets has.
        warnings: what was taken from them, by name, and what could not be compared.
    """

    bounding: frozenset[int]
    warnings: tuple[str, ...]


def bound_credentials(directory: int, pid1: HostPid, *, cut: bool = False) -> Bounded:
    """Check every task and thread against PID 1.

    With *cut*, capabilities, no_new_privs, securebits and seccomp filters that exceed PID 1's are cut down to it
    first, in the images, which then must be nobody else's.

    Raises:
        Refused: ``PRIVILEGE_EXCEEDED`` naming process, what it asks for and what PID 1 has; ``CORRUPT``.
    """
    limit = procfs.status(pid1)
    if limit is None:
        raise Refused(Reason.CLAIM_LOST, f"Process {pid1} is gone.")
    checks = _Checks(pid1, limit, Filters.of(directory, pid1, limit))
    cuts = _Cuts()
    bounding: set[int] = set()
    images = {number: _core(directory, name) for number, name in matching(directory, r"core-(\d+)\.img").items()}
    leaders = _leaders(directory)
    for image, core in images.values():
        ended = core.task is not None and core.task.state in _ENDED  # it will not run again
        if not ended and (core.thread is None or core.thread.creds is None):
            raise Refused(Reason.CORRUPT, f"images/{image.name}: it has no credentials.")
    alive = {number: core for number, (_, core) in images.items() if core.thread and core.thread.creds}
    leading = {number: alive.get(leaders[number]) if leaders.get(number, number) != number else None for number in alive}
    if cut:
        for number, core in alive.items():
            if cuts.cut(number, core, leading[number], checks):
                images[number][0].entries[0] = core.encode()
                images[number][0].write(directory)
        checks.filters.write()
    for number, core in alive.items():
        checks.check(number, core, leading[number])
        bounding |= capabilities.bits(capabilities.mask(_credentials(core).bounding))
    return Bounded(frozenset(bounding), (*cuts.words(), *checks.filters.warnings))


def _core(directory: int, name: str) -> tuple[Image[Core], Core]:
    image: Image[Core] = Image.read(directory, name)
    for core in image.decode(Core):
        return image, core
    raise Refused(Reason.CORRUPT, f"images/{name}: it has no entry.")


def _leaders(directory: int) -> dict[int, int]:
    """Return for each thread the first thread of its process."""
    return {thread: entry.pid for entry in read_all(directory, "pstree.img", PstreeEntry) for thread in entry.threads}


@dataclass
class _Checks:
    """What PID 1 has, and every check of a thread against it."""

    pid1: HostPid
    limit: Status
    filters: Filters

    def __post_init__(self) -> None:
        self._hard = _hard_limits(self.pid1)
        self._score = int(procfs.read_text(self.pid1, "oom_score_adj") or 0)
        self._label = _label(self.pid1)
        self._nice = _nice(self.pid1)

    def check(self, number: int, core: Core, leader: Core | None) -> None:
        """Raise `Refused` if the thread asks for more."""
        creds = _credentials(core)
        _check_ids(number, creds, self.limit)
        capabilities.check(number, creds, self.limit)
        _check_label(number, creds, self._label)
        self.filters.check(number, core, leader)
        _check_scheduling(number, core, self.limit, self._hard, self._nice)
        if core.task is None:
            return
        _check_limits(number, core.task, self._hard)
        if (core.task.oom_score_adj or 0) < self._score:
            raise exceeded(number, f"an oom_score_adj of {core.task.oom_score_adj}", f"{self._score}")


def _credentials(core: Core) -> Credentials:
    assert core.thread is not None
    assert core.thread.creds is not None
    return core.thread.creds


class _Cuts:
    """What was taken from threads that exceeded PID 1."""

    def __init__(self) -> None:
        self._lost = 0
        self._changes: set[str] = set()
        self._processes: list[int] = []

    def cut(self, number: int, core: Core, leader: Core | None, checks: _Checks) -> bool:
        """Cut one thread down; return whether anything had to be."""
        lost, changes = capabilities.reduce(_credentials(core), checks.limit)
        if checks.filters.add(number, core, leader):
            changes.append("this container's seccomp filters added")
        if lost or changes:
            self._lost |= lost
            self._changes.update(changes)
            self._processes.append(number)
        return bool(lost or changes)

    def words(self) -> list[str]:
        """Return what there is to tell."""
        if not self._processes:
            return []
        taken = [f"{capabilities.named(self._lost)} taken"] if self._lost else []
        what = "; ".join([*taken, *sorted(self._changes)])
        return [
            f"{Reason.PRIVILEGE_EXCEEDED.code} was allowed: {what} (of processes {', '.join(map(str, self._processes))})"
        ]


def _check_ids(process: int, creds: Credentials, limit: Status) -> None:
    permitted = limit.capabilities["CapPrm"]
    uids = {creds.uid, creds.euid, creds.suid, creds.fsuid}
    if not permitted >> capabilities.SETUID & 1 and not uids <= set(limit.uids):
        raise exceeded(process, f"user ids {sorted(uids)}", f"{sorted(set(limit.uids))} and not CAP_SETUID")
    gids = {creds.gid, creds.egid, creds.sgid, creds.fsgid, *creds.groups}
    allowed = {*limit.gids, *limit.groups}
    if not permitted >> capabilities.SETGID & 1 and not gids <= allowed:
        raise exceeded(process, f"group ids {sorted(gids)}", f"{sorted(allowed)} and not CAP_SETGID")


def _check_label(process: int, creds: Credentials, label: str | None) -> None:
    wanted = creds.lsm_profile or None
    if wanted not in {None, label, "unconfined"} or (label and wanted != label):
        raise exceeded(process, f"the security label {wanted!r}", f"{label!r}")


def _check_scheduling(process: int, core: Core, limit: Status, hard: list[int], nice: int) -> None:
    """Check priorities: a real-time thread would take the node's processors from everybody."""
    assert core.thread is not None
    if limit.capabilities["CapPrm"] >> capabilities.SYS_NICE & 1:
        return
    lowest = min(nice, 20 - min(hard[_NICE], 40))
    if (core.thread.sched_nice or 0) < lowest:
        raise exceeded(process, f"a nice value of {core.thread.sched_nice}", f"{lowest} and not CAP_SYS_NICE")
    policy = (core.thread.sched_policy or 0) & ~_RESET_ON_FORK
    priority = core.thread.sched_priority or 0
    if policy in _SHARED_POLICIES or (policy in _REALTIME_POLICIES and priority <= hard[_RTPRIO]):
        return
    raise exceeded(process, f"scheduling policy {policy} with priority {priority}", "not CAP_SYS_NICE")


def _check_limits(process: int, task: TaskCore, hard: list[int]) -> None:
    entries = task.rlimits.entries if task.rlimits else []
    if len(entries) != _LIMITS and task.state not in _ENDED:
        # One that is missing would stay CRIU's own, which is higher.
        raise Refused(Reason.CORRUPT, f"Process {process} has {len(entries)} limits of {_LIMITS}.")
    for number, (entry, most) in enumerate(zip(entries, hard, strict=False)):
        if entry.hard > most:
            raise exceeded(process, f"a hard limit {number} of {entry.hard}", f"{most}")


def _nice(pid: HostPid) -> int:
    try:
        return os.getpriority(os.PRIO_PROCESS, pid)
    except ProcessLookupError:
        return 0


def _hard_limits(pid: HostPid) -> list[int]:
    """Return PID 1's hard limits in the kernel's order (proc_pid_limits(5) prints them so, CPU time first)."""
    order = ["cpu time", "file size", "data size", "stack size", "core file size", "resident set", "processes"]
    order += ["open files", "locked memory", "address space", "file locks", "pending signals", "msgqueue size"]
    order += ["nice priority", "realtime priority", "realtime timeout"]
    found = {}
    for line in (procfs.read_text(pid, "limits") or "").splitlines()[1:]:
        match = re.match(r"Max (.+?) {2,}(\S+) +(\S+)", line)
        if match:
            value = match.group(3)
            found[match.group(1)] = _RLIM_INFINITY if value == "unlimited" else int(value)
    return [found.get(name, _RLIM_INFINITY) for name in order]


def _label(pid: HostPid) -> str | None:
    try:
        text = Path(f"/proc/{pid}/attr/current").read_text(encoding="utf-8").strip("\0\n")
    except OSError:
        return None
    return None if text in {"", "unconfined", "kernel"} else text.split(" (")[0]


def lsm_option(pid: HostPid) -> str | None:
    """Return CRIU's ``lsm-profile`` that gives restored processes PID 1's label; None without a label."""
    label = _label(pid)
    if label is None:
        return None
    return f"{'selinux' if ':' in label else 'apparmor'}:{label}"
