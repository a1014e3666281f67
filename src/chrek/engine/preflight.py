"""What cannot be captured, found before anything is touched.

Each check looks at one thing the kernel shows and raises `Refused` with that thing's reason. They run
while the application runs, so a check is about what is there now; what changes afterwards fails in CRIU
instead, and the application goes on all the same.

Checks whose reason is in *allow* are skipped: the user has said that he knows better.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import stat
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chrek.criu import limits
from chrek.engine.descriptors import undumpable
from chrek.errors import CaptureFailed, Reason, Refused
from chrek.rootfs import fd as fds
from chrek.system import procfs
from chrek.system.queues import posix_queues
from chrek.system.syscalls import LIBC, check

if TYPE_CHECKING:
    from chrek.engine.container import Container
    from chrek.system.ids import HostPid
    from chrek.system.procfs import Descriptor

GHOST_LIMIT = 1 << 32
"""CRIU carries deleted files below this size; see `chrek.criu.process.GHOST_LIMIT`."""

_KERNEL_FILES = ("/memfd:", "/dev/zero (deleted)", "/SYSV", "/[aio]", "/anon_hugepage", "/drm ")
"""Names of files that live on mounts internal to the kernel, and so in no mount namespace."""

_MEMORY_DEVICES = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)}
"""null, zero, full, random, urandom."""
_TERMINAL_MAJORS = {4, 5, *range(136, 144)}
_NVIDIA = re.compile(r"/dev/nvidia|/dev/dri/")
_PROJECTED = re.compile(r"/\.\.(data(_tmp)?|\d{4}_\d\d_\d\d_[\d_.]+)(/|$)")
"""How ConfigMap, Secret and token volumes name their generations: the next pod has others."""


@dataclass
class Subject:
    """What the checks look at, gathered once.

    Attributes:
        tree: the application's processes, parents first.
        files: every open file of each.
        watched: directories and files under inotify watches, filled in by the check of them.
    """

    container: Container
    tree: list[HostPid]
    files: dict[HostPid, list[Descriptor]]
    watched: list[str] = field(default_factory=list)

    @classmethod
    def gather(cls, container: Container, root: HostPid) -> Subject:
        """Look at the tree under *root*."""
        tree = procfs.tree(root)
        return cls(container, tree, {pid: list(procfs.descriptors(pid)) for pid in tree})


def who(pid: HostPid) -> str:
    """Name a process as its container knows it."""
    state = procfs.status(pid)
    return f"process {state.ns_pid} ({state.name})" if state else f"process {pid}"


def refuse(subject: Subject, *, allow: Collection[Reason]) -> None:
    """Run every check.

    Raises:
        Refused: with the reason of the first thing found that is not in *allow*.
    """
    for reason, checker in CHECKS:
        if reason not in allow:
            checker(subject)


def _user_namespace(subject: Subject) -> None:
    ours = procfs.namespace(os.getpid(), "user")
    for pid in (subject.container.pid1, *subject.tree):
        theirs = procfs.namespace(pid, "user")
        if theirs is not None and theirs != ours:
            raise Refused(Reason.USER_NAMESPACE, f"{who(pid)} is in user namespace {theirs}, this program in {ours}.")


def _foreign_namespaces(subject: Subject) -> None:
    for name in ("pid", "ipc", "uts", "net", "mnt"):
        expected = procfs.namespace(subject.container.pid1, name)
        for pid in subject.tree:
            theirs = procfs.namespace(pid, name)
            if theirs is not None and theirs != expected:
                message = f"{who(pid)} is in {name} namespace {theirs}, PID 1 of the container in {expected}."
                raise Refused(Reason.FOREIGN_NAMESPACE, message)


def _traced(subject: Subject) -> None:
    for pid in subject.tree:
        match = re.search(r"^TracerPid:\s*(\d+)", procfs.read_text(pid, "status") or "", re.MULTILINE)
        if match and match.group(1) != "0":
            raise Refused(Reason.BEING_TRACED, f"{who(pid)} is traced by process {match.group(1)}.")


def _owners(subject: Subject) -> None:
    limits.reading_ids(subject.tree)


def _io_uring(subject: Subject) -> None:
    for pid, files in subject.files.items():
        for file in files:
            if file.target == "anon_inode:[io_uring]":
                raise Refused(Reason.IO_URING_IN_USE, f"{who(pid)} has an io_uring as descriptor {file.number}.")


def _unsupported(subject: Subject) -> None:
    for pid, files in subject.files.items():
        for file in files:
            kind = undumpable(pid, file)
            if kind is not None:
                message = f"{who(pid)} has {kind} as descriptor {file.number}."
                raise Refused(Reason.DESCRIPTOR_UNSUPPORTED, message)


def _sysv_ipc(subject: Subject) -> None:
    found = _sysv_objects(subject.container.pid1)
    if found:
        listed = ", ".join(f"{count} {name}" for name, count in found.items())
        raise Refused(Reason.SYSV_IPC_IN_USE, f"The container has {listed}.")


def _sysv_objects(pid: HostPid) -> dict[str, int]:
    """Count the System V objects and the POSIX message queues in the IPC namespace of *pid*.

    /proc/sysvipc shows the namespace of the thread that opens it, so a thread of its own goes there.
    """
    names = {
        "shm": "System V shared memory segments",
        "sem": "System V semaphore sets",
        "msg": "System V message queues",
    }
    found: dict[str, int] = {}
    errors: list[OSError] = []

    def look() -> None:
        try:
            namespace = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
            try:
                check(LIBC.setns(namespace, 0), "setns(ipc)")
            finally:
                os.close(namespace)
            for file, name in names.items():
                with open(f"/proc/sysvipc/{file}", encoding="ascii") as lines:
                    count = sum(1 for _ in lines) - 1
                if count > 0:
                    found[name] = count
            if queues := posix_queues():
                found["POSIX message queues"] = len(queues)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=look, name="sysvipc")
    thread.start()
    thread.join()
    if errors:
        raise CaptureFailed(Reason.NOT_SUPPORTED_HERE, f"System V objects and message queues cannot be counted: {errors[0]}.")
    return found


def _foreign_mounts(subject: Subject) -> None:
    known = {mount.id for mount in subject.container.mounts}
    ends = {(file.target, file.mount) for file in procfs.descriptors(subject.container.pid1) if file.number <= 2}
    for pid, files in subject.files.items():
        for file in files:
            if (file.target, file.mount) in ends:
                continue  # a standard stream: the next container has its own
            if not file.target.startswith("/") or file.target.startswith(_KERNEL_FILES):
                continue
            if file.mount not in known:
                message = f"{who(pid)} holds {file.target} (descriptor {file.number}) of a mount outside the container."
                raise Refused(Reason.FOREIGN_MOUNT, message)


def _big_deleted_files(subject: Subject) -> None:
    for pid, files in subject.files.items():
        for file in files:
            if not file.target.endswith(" (deleted)") or file.target.startswith(_KERNEL_FILES):
                continue
            size = _stat_size(pid, file)
            if size >= GHOST_LIMIT:
                message = f"{who(pid)} holds {file.target} (descriptor {file.number}) of {size} bytes."
                raise Refused(Reason.DELETED_FILE_TOO_BIG, message)


def _stat_size(pid: HostPid, file: Descriptor) -> int:
    try:
        info = os.stat(f"/proc/{pid}/fd/{file.number}")
    except procfs.GONE:
        return 0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


def _devices(subject: Subject) -> None:
    for pid, files in subject.files.items():
        for file in files:
            if not file.target.startswith("/dev/") or file.target.startswith("/dev/shm/"):
                continue
            try:
                info = os.stat(f"/proc/{pid}/fd/{file.number}")
            except procfs.GONE:
                continue
            if not _dumpable(info, file.target):
                raise Refused(Reason.DEVICE_IN_USE, f"{who(pid)} holds {file.target} (descriptor {file.number}).")


def _dumpable(info: os.stat_result, target: str) -> bool:
    if stat.S_ISBLK(info.st_mode):
        return False
    if not stat.S_ISCHR(info.st_mode):
        return True
    number = os.major(info.st_rdev), os.minor(info.st_rdev)
    tunnel = (10, 200)
    # GPU devices are closed by the driver's own checkpoint; whether it can is looked at by that part.
    return number in _MEMORY_DEVICES or number[0] in _TERMINAL_MAJORS or number == tunnel or bool(_NVIDIA.match(target))


def _projected_files(subject: Subject) -> None:
    for pid, files in subject.files.items():
        for file in files:
            if _PROJECTED.search(file.target):
                message = f"{who(pid)} holds {file.target} (descriptor {file.number}) of a ConfigMap, Secret or token volume."
                raise Refused(Reason.WATCH_UNRESTORABLE, message)


_LISTEN = "0A"


def _bound_addresses(subject: Subject) -> None:
    inodes = {
        match.group(1): (pid, file.number)
        for pid, files in subject.files.items()
        for file in files
        if (match := re.fullmatch(r"socket:\[(\d+)\]", file.target))
    }
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in (procfs.read_text(subject.container.pid1, f"net/{protocol}") or "").splitlines()[1:]:
            fields = line.split()
            local, state, inode = fields[1], fields[3], fields[9]
            waiting = protocol.startswith("udp") or state == _LISTEN
            if waiting and inode in inodes and not _any_or_loopback(local.split(":")[0]):
                pid, number = inodes[inode]
                message = f"{who(pid)} waits on {_address(local)}/{protocol} (descriptor {number})."
                raise Refused(Reason.BOUND_TO_POD_IP, message)


def _bytes(hexadecimal: str) -> bytes:
    # The kernel prints each 32-bit word of the address in its own byte order.
    words = [hexadecimal[at : at + 8] for at in range(0, len(hexadecimal), 8)]
    return b"".join(bytes.fromhex(word)[::-1] for word in words)


def _any_or_loopback(hexadecimal: str) -> bool:
    address = _bytes(hexadecimal)
    if len(address) == 16 and address[:12] == b"\0" * 10 + b"\xff\xff":
        address = address[12:]
    if len(address) == 4:
        return address == b"\0\0\0\0" or address[0] == 127
    return address in (bytes(16), bytes(15) + b"\1")


def _address(local: str) -> str:
    host, port = local.split(":")
    address = _bytes(host)
    text = socket.inet_ntop(socket.AF_INET, address) if len(address) == 4 else f"[{socket.inet_ntop(socket.AF_INET6, address)}]"
    return f"{text}:{int(port, 16)}"


def _scratch(subject: Subject) -> None:
    """CRIU makes a directory in /tmp when it looks at the kernel, whatever it is told."""
    root = subject.container.open_root()
    try:
        fd = os.open("tmp", os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    except OSError as error:
        raise Refused(Reason.NO_TMP, f"The container has no directory /tmp ({error.strerror}).") from error
    finally:
        os.close(root)
    try:
        if os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            raise Refused(Reason.NO_TMP, "The container's /tmp is read-only.")
    finally:
        os.close(fd)


_WATCH = re.compile(r"inotify wd:\S+ ino:([0-9a-f]+) sdev:([0-9a-f]+)")
_SEARCH_LIMIT = 50_000
"""Most directory entries looked at for the name of a watched inode: 0.2 s on a 2-core machine."""


def _watches(subject: Subject) -> None:
    wanted: dict[tuple[int, int], HostPid] = {}
    for pid, files in subject.files.items():
        for file in files:
            if file.target == "anon_inode:inotify":
                for inode, device in _WATCH.findall(procfs.read_text(pid, f"fdinfo/{file.number}") or ""):
                    wanted[int(inode, 16), _device(int(device, 16))] = pid
    if not wanted:
        return
    found = _names(subject, set(wanted))
    for key, pid in wanted.items():
        if key not in found:
            message = f"{who(pid)} watches inode {key[0]} of device {key[1]:#x}, whose name was not found."
            raise Refused(Reason.WATCH_UNRESTORABLE, message)
        if _PROJECTED.search(found[key]):
            raise Refused(Reason.WATCH_UNRESTORABLE, f"{who(pid)} watches {found[key]}.")
    subject.watched = sorted(found.values())


def _device(kernel: int) -> int:
    """Turn the kernel's own device number (12 + 20 bits) into the C library's."""
    return os.makedev(kernel >> 20, kernel & 0xFFFFF)


def _names(subject: Subject, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Find names of inodes below the container's root, likely places first; links lead nowhere outside."""
    root = subject.container.open_root()
    try:
        search = _Search(root, wanted)
        for top in dict.fromkeys(_likely(subject)):
            if search.below(top):
                break
        return search.found
    finally:
        os.close(root)


def _likely(subject: Subject) -> list[str]:
    places = ["/etc", "/tmp", "/run", "/dev/shm"]
    places += [os.readlink(f"/proc/{pid}/cwd") for pid in subject.tree if os.path.lexists(f"/proc/{pid}/cwd")]
    places += [os.path.dirname(f.target) for files in subject.files.values() for f in files if f.target.startswith("/")]
    return [*places, *(mount.point for mount in subject.container.mounts), "/"]


class _Search:
    """Looks for inodes below directories until all are found or `_SEARCH_LIMIT` entries were looked at."""

    def __init__(self, root: int, wanted: set[tuple[int, int]]) -> None:
        self.found: dict[tuple[int, int], str] = {}
        self._root = root
        self._wanted = wanted
        self._left = _SEARCH_LIMIT

    def below(self, top: str) -> bool:
        """Look at *top* and below; return whether the search is over."""
        try:
            start = fds.open_in_root(self._root, os.fsencode(top.lstrip("/") or "."))
        except OSError:
            return False
        try:
            for directory, names, files, fd in os.fwalk(".", dir_fd=start):
                here = os.path.normpath(os.path.join(top, directory))
                self._look(here, os.fstat(fd))
                for name in files:
                    with suppress(OSError):
                        self._look(os.path.join(here, name), os.stat(name, dir_fd=fd, follow_symlinks=False))
                names[:] = [name for name in names if here != "/" or name not in {"proc", "sys"}]
                if self._left < 0 or len(self.found) == len(self._wanted):
                    return True
        finally:
            os.close(start)
        return False

    def _look(self, path: str, info: os.stat_result) -> None:
        self._left -= 1
        if (info.st_ino, info.st_dev) in self._wanted:
            self.found.setdefault((info.st_ino, info.st_dev), path)


def _machine(subject: Subject) -> None:  # noqa: ARG001 - one signature for all checks
    if platform.machine() != "x86_64":
        raise Refused(Reason.NOT_SUPPORTED_HERE, f"This machine is {platform.machine()}; only x86_64 is supported.")


CHECKS: tuple[tuple[Reason, Callable[[Subject], None]], ...] = (
    (Reason.NOT_SUPPORTED_HERE, _machine),
    (Reason.USER_NAMESPACE, _user_namespace),
    (Reason.NOT_SUPPORTED_HERE, _owners),
    (Reason.FOREIGN_NAMESPACE, _foreign_namespaces),
    (Reason.BEING_TRACED, _traced),
    (Reason.IO_URING_IN_USE, _io_uring),
    (Reason.DESCRIPTOR_UNSUPPORTED, _unsupported),
    (Reason.SYSV_IPC_IN_USE, _sysv_ipc),
    (Reason.WATCH_UNRESTORABLE, _projected_files),
    (Reason.FOREIGN_MOUNT, _foreign_mounts),
    (Reason.DELETED_FILE_TOO_BIG, _big_deleted_files),
    (Reason.DEVICE_IN_USE, _devices),
    (Reason.BOUND_TO_POD_IP, _bound_addresses),
    (Reason.NO_TMP, _scratch),
    (Reason.WATCH_UNRESTORABLE, _watches),
)
