"""The messages ChReK reads or writes, each with just the fields it needs.

Field numbers, types and labels: CRIU's ``images/*.proto`` at 4.2.1, with whose descriptors a test compares
them. Everything not named here survives a round trip untouched (see `protobuf`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from chrek.system.protobuf import BOOL, INT32, RAW, TEXT, UINT, UINT32, ZIGZAG, Message, field, nested

# --- rpc.proto --------------------------------------------------------------------------------------


class RequestType(IntEnum):
    """``criu_req_type``; an answer carries the type of what it answers, or NOTIFY."""

    EMPTY = 0
    DUMP = 1
    RESTORE = 2
    CHECK = 3
    NOTIFY = 6
    VERSION = 10


class CgroupMode(IntEnum):
    """``criu_cg_mode``; the rest of the enum manages cgroups, which ChReK never lets CRIU do."""

    IGNORE = 0


class NetworkLock(IntEnum):
    """``criu_network_lock_method``."""

    IPTABLES = 1
    NFTABLES = 2
    SKIP = 3


@dataclass
class InheritFd(Message):
    key: str = field(1, TEXT, required=True)
    fd: int = field(2, INT32, required=True)


@dataclass
class Options(Message):
    """``criu_opts``; what each one is for stands in `chrek.criu.options`."""

    images_dir_fd: int = field(1, INT32, required=True)
    pid: int | None = field(2, INT32)
    leave_running: bool | None = field(3, BOOL)
    ext_unix_sk: bool | None = field(4, BOOL)
    tcp_established: bool | None = field(5, BOOL)
    file_locks: bool | None = field(8, BOOL)
    log_level: int | None = field(9, INT32)
    log_file: str | None = field(10, TEXT)
    notify_scripts: bool | None = field(12, BOOL)
    auto_dedup: bool | None = field(16, BOOL)
    link_remap: bool | None = field(18, BOOL)
    force_irmap: bool | None = field(21, BOOL)
    inherit_fd: list[InheritFd] = nested(27, InheritFd, repeated=True)
    manage_cgroups_mode: int | None = field(34, UINT32)
    ghost_limit: int | None = field(35, UINT32)
    irmap_scan_paths: list[str] = field(36, TEXT, repeated=True)
    external: list[str] = field(37, TEXT, repeated=True)
    timeout: int | None = field(45, UINT32)
    tcp_skip_in_flight: bool | None = field(46, BOOL)
    lazy_pages: bool | None = field(48, BOOL)
    orphan_pts_master: bool | None = field(50, BOOL)
    lsm_profile: str | None = field(53, TEXT)
    network_lock: int | None = field(64, UINT32)
    images_dir: str | None = field(68, TEXT)


@dataclass
class Request(Message):
    type: int = field(1, UINT32, required=True)
    opts: Options | None = nested(2, Options)
    notify_success: bool | None = field(3, BOOL)


@dataclass
class RestoreAnswer(Message):
    pid: int = field(1, INT32, required=True)


@dataclass
class Notification(Message):
    script: str | None = field(1, TEXT)
    pid: int | None = field(2, INT32)


@dataclass
class Version(Message):
    major: int = field(1, INT32, required=True)
    minor: int = field(2, INT32, required=True)
    gitid: str | None = field(3, TEXT)
    sublevel: int | None = field(4, INT32)


@dataclass
class Answer(Message):
    type: int = field(1, UINT32, required=True)
    success: bool = field(2, BOOL, required=True)
    restore: RestoreAnswer | None = nested(4, RestoreAnswer)
    notify: Notification | None = nested(5, Notification)
    errno: int | None = field(7, INT32)
    message: str | None = field(9, TEXT)
    version: Version | None = nested(10, Version)


# --- images -----------------------------------------------------------------------------------------


@dataclass
class PagemapHead(Message):
    pages_id: int = field(1, UINT32, required=True)


@dataclass
class PagemapEntry(Message):
    """A run of pages. ``nr_pages`` moved to field 5 (64 bits) after 4.1; field 2 stays for old readers."""

    vaddr: int = field(1, UINT, required=True)
    compat_nr_pages: int = field(2, UINT32, required=True)
    in_parent: bool | None = field(3, BOOL)
    flags: int | None = field(4, UINT32)
    nr_pages: int | None = field(5, UINT)

    @property
    def pages(self) -> int:
        """Number of pages in the run."""
        return self.nr_pages if self.nr_pages is not None else self.compat_nr_pages or 0


@dataclass
class PstreeEntry(Message):
    pid: int = field(1, UINT32, required=True)
    ppid: int = field(2, UINT32, required=True)
    pgid: int = field(3, UINT32, required=True)
    sid: int = field(4, UINT32, required=True)
    threads: list[int] = field(5, UINT32, repeated=True)


@dataclass
class Credentials(Message):
    uid: int = field(1, UINT32, required=True)
    gid: int = field(2, UINT32, required=True)
    euid: int = field(3, UINT32, required=True)
    egid: int = field(4, UINT32, required=True)
    suid: int = field(5, UINT32, required=True)
    sgid: int = field(6, UINT32, required=True)
    fsuid: int = field(7, UINT32, required=True)
    fsgid: int = field(8, UINT32, required=True)
    inheritable: list[int] = field(9, UINT32, repeated=True)
    permitted: list[int] = field(10, UINT32, repeated=True)
    effective: list[int] = field(11, UINT32, repeated=True)
    bounding: list[int] = field(12, UINT32, repeated=True)
    securebits: int = field(13, UINT32, required=True)
    groups: list[int] = field(14, UINT32, repeated=True)
    lsm_profile: str | None = field(15, TEXT)
    no_new_privs: int | None = field(18, UINT32)
    ambient: list[int] = field(19, UINT32, repeated=True)


@dataclass
class Rseq(Message):
    abi_pointer: int = field(1, UINT, required=True)
    abi_size: int = field(2, UINT32, required=True)


@dataclass
class ThreadCore(Message):
    sched_nice: int | None = field(3, ZIGZAG)
    sched_policy: int | None = field(4, UINT32)
    sched_priority: int | None = field(5, UINT32)
    creds: Credentials | None = nested(10, Credentials)
    seccomp_mode: int | None = field(11, UINT32)
    seccomp_filter: int | None = field(12, UINT32)
    comm: str | None = field(13, TEXT)
    rseq: Rseq | None = nested(15, Rseq)


@dataclass
class Rlimit(Message):
    soft: int = field(1, UINT, required=True)
    hard: int = field(2, UINT, required=True)


@dataclass
class Rlimits(Message):
    entries: list[Rlimit] = nested(1, Rlimit, repeated=True)


@dataclass
class TaskCore(Message):
    state: int = field(1, UINT32, required=True)
    comm: str = field(6, TEXT, required=True)
    rlimits: Rlimits | None = nested(8, Rlimits)
    old_seccomp_mode: int | None = field(11, UINT32)
    old_seccomp_filter: int | None = field(12, UINT32)
    oom_score_adj: int | None = field(14, INT32)


@dataclass
class NamespaceIds(Message):
    pid: int | None = field(5, UINT32)
    net: int | None = field(6, UINT32)
    ipc: int | None = field(7, UINT32)
    uts: int | None = field(8, UINT32)
    mnt: int | None = field(9, UINT32)
    user: int | None = field(10, UINT32)
    cgroup: int | None = field(11, UINT32)
    time: int | None = field(12, UINT32)


@dataclass
class Core(Message):
    machine: int = field(1, UINT32, required=True)
    task: TaskCore | None = nested(3, TaskCore)
    ids: NamespaceIds | None = nested(4, NamespaceIds)
    thread: ThreadCore | None = nested(5, ThreadCore)


@dataclass
class Inventory(Message):
    image_version: int = field(1, UINT32, required=True)
    root_ids: NamespaceIds | None = nested(3, NamespaceIds)
    lsm: int | None = field(6, UINT32)


@dataclass
class Vma(Message):
    start: int = field(1, UINT, required=True)
    end: int = field(2, UINT, required=True)
    offset: int = field(3, UINT, required=True)
    shmid: int = field(4, UINT, required=True)
    protection: int = field(5, UINT32, required=True)
    flags: int = field(6, UINT32, required=True)
    status: int = field(7, UINT32, required=True)


@dataclass
class Memory(Message):
    """``mm_entry``."""

    exe_file_id: int = field(12, UINT32, required=True)
    vmas: list[Vma] = nested(14, Vma, repeated=True)


@dataclass
class RegularFile(Message):
    id: int = field(1, UINT32, required=True)
    flags: int = field(2, UINT32, required=True)
    position: int = field(3, UINT, required=True)
    name: str = field(6, TEXT, required=True)
    mnt_id: int | None = field(7, ZIGZAG)
    size: int | None = field(8, UINT)
    external: bool | None = field(9, BOOL)
    mode: int | None = field(10, UINT32)


@dataclass
class InetSocket(Message):
    id: int = field(1, UINT32, required=True)
    ino: int = field(2, UINT32, required=True)
    family: int = field(3, UINT32, required=True)
    type: int = field(4, UINT32, required=True)
    protocol: int = field(5, UINT32, required=True)
    state: int = field(6, UINT32, required=True)
    source_port: int = field(7, UINT32, required=True)
    destination_port: int = field(8, UINT32, required=True)
    flags: int = field(9, UINT32, required=True)
    backlog: int = field(10, UINT32, required=True)
    source: list[int] = field(11, UINT32, repeated=True)
    destination: list[int] = field(12, UINT32, repeated=True)
    shutdown: int | None = field(19, UINT32)


@dataclass
class File(Message):
    """``file_entry``: one open file description."""

    type: int = field(1, UINT32, required=True)
    id: int = field(2, UINT32, required=True)
    regular: RegularFile | None = nested(3, RegularFile)
    inet: InetSocket | None = nested(4, InetSocket)


@dataclass
class Remap(Message):
    """``remap_file_path_entry``: how the name of an unlinked open file is brought back."""

    original_id: int = field(1, UINT32, required=True)
    remap_id: int = field(2, UINT32, required=True)
    type: int | None = field(3, UINT32)


@dataclass
class GhostFile(Message):
    uid: int = field(1, UINT32, required=True)
    gid: int = field(2, UINT32, required=True)
    mode: int = field(3, UINT32, required=True)
    rdev: int | None = field(6, UINT32)
    size: int | None = field(10, UINT)


@dataclass
class FdInfo(Message):
    id: int = field(1, UINT32, required=True)
    flags: int = field(2, UINT32, required=True)
    type: int = field(3, UINT32, required=True)
    fd: int = field(4, UINT32, required=True)


@dataclass
class SeccompFilter(Message):
    """``seccomp_filter``; *previous* (CRIU's ``prev``) is the one that is installed next."""

    program: bytes = field(1, RAW, required=True)
    previous: int | None = field(2, UINT32)
    flags: int | None = field(3, UINT32)


@dataclass
class Seccomp(Message):
    filters: list[SeccompFilter] = nested(1, SeccompFilter, repeated=True)
