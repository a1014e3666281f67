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

from chrek.criu.images import matching, open_regular, read_all, read_one
from chrek.criu.messages import Core, GhostFile, Inventory, NamespaceIds, PstreeEntry, Seccomp
from chrek.errors import Reason, Refused
from chrek.system import procfs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chrek.criu.messages import Credentials
    from chrek.system.ids import HostPid
    from chrek.system.procfs import Status

_NAMES = re.compile(
    r"(cgroup|files|inventory|pstree|seccomp|remap-fpath|filelocks|fifo-data|pipes-data|sk-queues|memfd|tty-info|tty-data"
    r"|unixsk|eventpoll-tfd|inotify-wd|fanotify-mark|signal-[ps]-\d+|udp-queue|bpfmap-file|bpfmap-data"
    r"|(core|mm|pagemap|pages|fs|ids|fdinfo|timens|ghost-file|pagemap-shmem|tcp-stream|itimers|posix-timers|sigacts|creds"
    r"|rlimit|pidfd)-[0-9a-f]+)\.img"
)
"""Every image that CRIU writes for a tree that shares all its namespaces."""

_SECCOMP_FILTER = 2
_ENDED = {2, 6}
"""Task states dead and zombie (``compel/include/uapi/task-state.h``)."""
_SETGID, _SETUID = 6, 7
_RLIM_INFINITY = (1 << 64) - 1


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


def check_credentials(directory: int, pid1: HostPid) -> set[int]:
    """Check every task and thread against PID 1; return the capabilities that the images' bounding sets have.

    Raises:
        Refused: ``PRIVILEGE_EXCEEDED`` naming process, what it asks for and what PID 1 has.
    """
    limit = procfs.status(pid1)
    if limit is None:
        raise Refused(Reason.CLAIM_LOST, f"Process {pid1} is gone.")
    hard = _hard_limits(pid1)
    score = int(procfs.read_text(pid1, "oom_score_adj") or 0)
    label = _label(pid1)
    filters = _filters(directory)
    bounding: set[int] = set()
    for number, name in matching(directory, r"core-(\d+)\.img").items():
        core = read_one(directory, name, Core)
        creds = core.thread.creds if core.thread else None
        if creds is None and core.task is not None and core.task.state in _ENDED:
            continue  # it will not run again
        if creds is None or core.thread is None:
            raise Refused(Reason.CORRUPT, f"images/{name}: it has no credentials.")
        _check_ids(number, creds, limit)
        _check_capabilities(number, creds, limit)
        _check_label(number, creds, label)
        _check_seccomp(number, core, limit, filters)
        if core.task is not None:
            _check_limits(number, core, hard)
            if (core.task.oom_score_adj or 0) < score:
                raise _exceeded(number, f"an oom_score_adj of {core.task.oom_score_adj}", f"{score}")
        bounding |= _bits(_mask(creds.bounding))
    return bounding


def _exceeded(process: int, asked: str, has: str) -> Refused:
    message = f"Process {process} of the checkpoint asks for {asked}; this container's PID 1 has {has}."
    return Refused(Reason.PRIVILEGE_EXCEEDED, message)


def _check_ids(process: int, creds: Credentials, limit: Status) -> None:
    permitted = limit.capabilities["CapPrm"]
    uids = {creds.uid, creds.euid, creds.suid, creds.fsuid}
    if not permitted >> _SETUID & 1 and not uids <= set(limit.uids):
        raise _exceeded(process, f"user ids {sorted(uids)}", f"{sorted(set(limit.uids))} and not CAP_SETUID")
    gids = {creds.gid, creds.egid, creds.sgid, creds.fsgid, *creds.groups}
    allowed = {*limit.gids, *limit.groups}
    if not permitted >> _SETGID & 1 and not gids <= allowed:
        raise _exceeded(process, f"group ids {sorted(gids)}", f"{sorted(allowed)} and not CAP_SETGID")


def _check_capabilities(process: int, creds: Credentials, limit: Status) -> None:
    bounding, permitted = limit.capabilities["CapBnd"], limit.capabilities["CapPrm"]
    # Root gains its bounding set at every exec, unless no_new_privs forbids; others keep what they have.
    reachable = bounding if 0 in limit.uids and not limit.no_new_privs else permitted | limit.capabilities["CapAmb"]
    for name, most in (
        ("bounding", bounding),
        ("permitted", reachable),
        ("effective", reachable),
        ("ambient", reachable),
        ("inheritable", bounding | limit.capabilities["CapInh"]),
    ):
        more = _mask(getattr(creds, name)) & ~most
        if more:
            raise _exceeded(process, f"{name} capabilities {sorted(_bits(more))}", "not these")
    if limit.no_new_privs and not creds.no_new_privs:
        raise _exceeded(process, "new privileges at exec", "no_new_privs")


def _check_label(process: int, creds: Credentials, label: str | None) -> None:
    wanted = creds.lsm_profile or None
    if wanted not in {None, label, "unconfined"} or (label and wanted != label):
        raise _exceeded(process, f"the security label {wanted!r}", f"{label!r}")


def _check_seccomp(process: int, core: Core, limit: Status, filters: list[int | None]) -> None:
    assert core.thread is not None
    length = 0
    position = core.thread.seccomp_filter if core.thread.seccomp_mode == _SECCOMP_FILTER else None
    while position is not None:
        length += 1
        # In a circle CRIU would go on for ever.
        if position >= len(filters) or length > len(filters):
            raise Refused(Reason.CORRUPT, f"images/seccomp.img: the filters of process {process} have no first one.")
        position = filters[position]
    if limit.seccomp and length < limit.seccomp_filters:
        raise _exceeded(process, f"{length} seccomp filters", f"{limit.seccomp_filters}")


def _filters(directory: int) -> list[int | None]:
    """Return for each filter in the images the number of the one installed before it; CRIU reads one entry."""
    if "seccomp.img" not in os.listdir(directory):
        return []
    return [entry.previous for image in read_all(directory, "seccomp.img", Seccomp)[:1] for entry in image.filters]


def _check_limits(process: int, core: Core, hard: list[int]) -> None:
    assert core.task is not None
    entries = core.task.rlimits.entries if core.task.rlimits else []
    for number, (entry, most) in enumerate(zip(entries, hard, strict=False)):
        if entry.hard > most:
            raise _exceeded(process, f"a hard limit {number} of {entry.hard}", f"{most}")


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


def _mask(words: list[int]) -> int:
    return sum(word << 32 * number for number, word in enumerate(words))


def _bits(mask: int) -> set[int]:
    return {number for number in range(mask.bit_length()) if mask >> number & 1}
