"""What /proc says about processes.

Processes come and go while they are looked at: a process that vanished is ``None`` or left out, never
an error. Source of all fields: proc(5).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chrek.system.ids import HostPid, NsPid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

GONE = (FileNotFoundError, ProcessLookupError)
"""How /proc says that a process is no more: ENOENT on its directory, ESRCH on an open file of it."""


@dataclass(frozen=True)
class Status:
    """The lines of ``/proc/PID/status`` that matter here.

    Attributes:
        ns_pids: the process's ids from our namespace down to its own.
        uids, gids: real, effective, saved, file system.
        capabilities: sets as bit masks, by their name in the file (``CapEff`` and so on).
    """

    pid: HostPid
    name: str
    state: str
    parent: HostPid
    ns_pids: tuple[int, ...]
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    threads: int
    resident: int
    no_new_privs: bool
    seccomp: int
    seccomp_filters: int
    capabilities: dict[str, int]

    @property
    def ns_pid(self) -> NsPid:
        """The id in the process's own PID namespace."""
        return NsPid(self.ns_pids[-1])


def read_text(pid: int, name: str) -> str | None:
    """Return a file of ``/proc/PID`` as it is, or None when the process is gone."""
    try:
        # Names and values in it are the process's own: a carriage return stays one, and ends no line.
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()
    except GONE:
        return None


def lines(pid: int, name: str) -> list[str]:
    """Return the lines of a file of ``/proc/PID``, none when the process is gone.

    Only the newline ends a line: the kernel escapes it in names, and nothing else that `str.splitlines` takes
    for an end, so that a process could make lines of its own.
    """
    text = read_text(pid, name)
    return text.removesuffix("\n").split("\n") if text else []


def status(pid: int) -> Status | None:
    """Return the status of *pid*, or None when it is gone."""
    text = read_text(pid, "status")
    if text is None:
        return None
    fields = dict(line.split(":", 1) for line in text.split("\n") if ":" in line)

    def numbers(key: str) -> tuple[int, ...]:
        return tuple(int(word) for word in fields.get(key, "").split() if word.isdigit())

    return Status(
        pid=HostPid(pid),
        name=fields["Name"].strip(),
        state=fields["State"].strip()[:1],
        parent=HostPid(int(fields["PPid"])),
        ns_pids=numbers("NSpid") or (pid,),
        uids=numbers("Uid"),
        gids=numbers("Gid"),
        groups=numbers("Groups"),
        threads=numbers("Threads")[0],
        resident=(numbers("VmRSS") or (0,))[0] * 1024,
        no_new_privs=numbers("NoNewPrivs") == (1,),
        seccomp=(numbers("Seccomp") or (0,))[0],
        seccomp_filters=(numbers("Seccomp_filters") or (0,))[0],
        capabilities={key: int(value, 16) for key, value in fields.items() if key.startswith("Cap")},
    )


def ns_pid(pid: int) -> NsPid | None:
    """Return the id of *pid* in its own PID namespace, or None when it is gone."""
    state = status(pid)
    return None if state is None else state.ns_pid


def stat_fields(pid: int) -> list[str] | None:
    """Return the fields of ``/proc/PID/stat`` after the command name (the state is first), or None."""
    text = read_text(pid, "stat")
    return None if text is None else text[text.rindex(")") + 2 :].split()


def start_time(pid: int) -> int | None:
    """Return the start time in clock ticks since boot, as this time namespace counts, or None."""
    fields = stat_fields(pid)
    return None if fields is None else int(fields[19])


def command_line(pid: int) -> tuple[str, ...]:
    """Return the arguments of *pid*; empty when it is gone or a kernel thread."""
    text = read_text(pid, "cmdline") or ""
    return tuple(text.rstrip("\0").split("\0")) if text else ()


def environment(pid: int) -> dict[str, str] | None:
    """Return the environment *pid* was started with, the first of equal names winning; None when gone."""
    text = read_text(pid, "environ")
    if text is None:
        return None
    result: dict[str, str] = {}
    for entry in text.split("\0"):
        name, separator, value = entry.partition("=")
        if separator:
            result.setdefault(name, value)
    return result


def threads(pid: int) -> list[int]:
    """Return the thread ids of *pid*."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except GONE:
        return []


def children(pid: int) -> list[HostPid]:
    """Return the children of *pid*, of all its threads."""
    found: list[HostPid] = []
    for thread in threads(pid):
        text = read_text(pid, f"task/{thread}/children") or ""
        found += [HostPid(int(word)) for word in text.split()]
    return found


def tree(root: HostPid) -> list[HostPid]:
    """Return *root* and all its descendants, parents before their children."""
    found, queue = [], [root]
    while queue:
        pid = queue.pop(0)
        found.append(pid)
        queue += children(pid)
    return found


def namespace(pid: int, name: str) -> str | None:
    """Return the identity of a namespace of *pid*, like ``pid:[4026531836]``.

    None when it is gone, or is not ours to look at: one with more capabilities than we have.
    """
    try:
        return os.readlink(f"/proc/{pid}/ns/{name}")
    except (*GONE, PermissionError):
        return None


def members(name: str, pid: HostPid) -> list[HostPid]:
    """Return all processes that are in the same namespace of that kind as *pid*."""
    wanted = namespace(pid, name)
    found = [HostPid(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()]
    return [other for other in found if wanted is not None and namespace(other, name) == wanted]


@dataclass(frozen=True)
class Descriptor:
    """One open file of a process: its number, the link's text, and fdinfo's ``flags`` and ``mnt_id``."""

    number: int
    target: str
    flags: int
    mount: int


def descriptors(pid: HostPid) -> Iterator[Descriptor]:
    """Yield every open file of *pid*."""
    try:
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    except GONE:
        return
    for number in numbers:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{number}")
        except GONE:
            continue
        fields = dict(line.split(":", 1) for line in lines(pid, f"fdinfo/{number}") if ":" in line)
        flags, mount = fields.get("flags", "0").strip(), fields.get("mnt_id", "-1").strip()
        yield Descriptor(number, target, int(flags, 8), int(mount))


def in_namespace(pids: Iterable[HostPid]) -> dict[NsPid, HostPid]:
    """Map each process's id in its own PID namespace to our id for it."""
    found = {}
    for pid in pids:
        state = status(pid)
        if state is not None:
            found[state.ns_pid] = pid
    return found


@dataclass(frozen=True)
class Mapping:
    """One line of ``/proc/PID/maps``: a virtual memory area."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str


_MAPS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+) *(.*)")


def mappings(pid: HostPid) -> list[Mapping]:
    """Return the memory areas of *pid*; empty when it is gone."""
    found = []
    for line in lines(pid, "maps"):
        match = _MAPS.fullmatch(line)
        if match:
            start, end, permissions, offset, device, inode, path = match.groups()
            found.append(Mapping(int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode), path))
    return found
