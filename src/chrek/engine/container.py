"""A container as the engine sees it: from outside, through /proc of its PID 1.

Nothing here follows a path of the container by name without a descriptor that pins it to the
container's root; nothing believes what the container says of itself beyond what the kernel shows.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from chrek.errors import Reason, Refused
from chrek.rootfs import fd as fds
from chrek.rootfs.overlay import mount_id
from chrek.system import initstate, mounts, procfs
from chrek.system.ids import HostPid, NsPid

if TYPE_CHECKING:
    from chrek.system.mounts import Mount

# What a runtime mounts over a container's root; contents of these are not the application's.
_RUNTIME_MOUNTS = ("/proc", "/sys", "/dev", "/dev/pts", "/dev/mqueue", "/dev/console", "/run/secrets")
OWN_VOLUME = "chrek"
"""Source of a memory file system that `chrek run` mounts for the application alone, as mountinfo shows it."""

_SMALL = 64 << 10
_EMPTY_DIR = "/volumes/kubernetes.io~empty-dir/"


@dataclass(frozen=True)
class Container:
    """One running container, named by its PID 1."""

    pid1: HostPid

    @cached_property
    def mounts(self) -> list[Mount]:
        """Its mounts."""
        return mounts.mounts(self.pid1)

    @cached_property
    def environment(self) -> dict[str, str]:
        """The environment the runtime gave to PID 1; never the application's.

        Raises:
            Refused: ``APP_NOT_FOUND``, when PID 1 is gone.
        """
        found = procfs.environment(self.pid1)
        if found is None:
            raise Refused(Reason.APP_NOT_FOUND, f"Process {self.pid1} is gone.")
        return found

    @cached_property
    def same_namespaces(self) -> bool:
        """Whether the caller is inside this container."""
        return all(procfs.namespace(self.pid1, name) == procfs.namespace(os.getpid(), name) for name in ("pid", "mnt"))

    @cached_property
    def has_own_root(self) -> bool:
        """Whether its root is another file system than ours: a container's, not this machine's own."""
        with closing_fd(self.open_root()) as theirs, closing_fd(os.open("/", os.O_PATH | os.O_CLOEXEC)) as ours:
            return not os.path.sameopenfile(theirs, ours)

    @cached_property
    def has_machines_root(self) -> bool:
        """Whether the caller, outside, sees the same root: then nothing below it is the application's alone."""
        return not self.has_own_root and not self.same_namespaces

    def open_root(self) -> int:
        """Open the container's root directory, mounts included; the caller closes the descriptor.

        Raises:
            Refused: ``APP_NOT_FOUND``, when PID 1 is gone.
        """
        try:
            return os.open(f"/proc/{self.pid1}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(Reason.APP_NOT_FOUND, f"The root of process {self.pid1}: {error.strerror}.") from error

    def read_file(self, path: str) -> bytes | None:
        """Return the first 64 KiB of a regular file in the container, None when there is none.

        It is held before it is opened, so that no FIFO blocks and no device driver runs; no link leads out of the root.

        Raises:
            Refused: ``APP_NOT_FOUND``, when PID 1 is gone.
        """
        with closing_fd(self.open_root()) as root:
            try:
                held = fds.openat2(root, os.fsencode(path.lstrip("/")), os.O_PATH, resolve=fds.IN_ROOT | fds.NO_MAGICLINKS)
            except OSError:
                return None
            with closing_fd(held):
                if not stat.S_ISREG(os.fstat(held).st_mode):
                    return None
                try:
                    with open(f"/proc/self/fd/{held}", "rb", buffering=0) as file:
                        return file.read(_SMALL)
                except OSError:
                    return None

    def application(self) -> HostPid:
        """Return the root of the application's process tree.

        Raises:
            Refused: ``APP_NOT_FOUND`` or ``APP_IS_PID1``.
        """
        return initstate.application(self.pid1)

    def mount_of(self, path: str) -> Mount | None:
        """Return the mount that an absolute, link-free path lies on."""
        best = None
        for mount in self.mounts:
            point = mount.point.rstrip("/")
            # Of two mounts on one point the later one hides the earlier.
            if (path == point or path.startswith(point + "/")) and (
                best is None or len(point) >= len(best.point.rstrip("/"))
            ):
                best = mount
        return best

    @cached_property
    def volumes(self) -> list[tuple[str, str]]:
        """Path and kind of each volume whose contents belong to the application alone.

        These are emptyDir volumes and memory file systems that the runtime mounted writable; kind is
        ``emptyDir`` or ``tmpfs``. What is bound from elsewhere (claims, host paths) is somebody's data. So is, where the
        root is this machine's own, every memory file system but those that `chrek run` mounted for the application: its
        mount namespace is a copy with the mounts of everybody in it, and keeps some that their owners have unmounted.
        """
        found: dict[str, str] = {}
        for mount in self.mounts:
            if mount.read_only or mount.point in _RUNTIME_MOUNTS or mount.point.startswith(("/proc/", "/sys/")):
                continue
            if self.has_machines_root and mount.source != OWN_VOLUME:
                continue
            if _EMPTY_DIR in mount.root or _EMPTY_DIR in mount.source:
                found[mount.point] = "emptyDir"
            elif mount.kind == "tmpfs" and mount.root == "/" and mount.device not in self._bound_memory:
                found[mount.point] = "tmpfs"
        return sorted(item for item in found.items() if self._is_reached(item[0]))

    @cached_property
    def _bound_memory(self) -> set[str]:
        """The devices that the caller, outside, has mounted too, but for emptyDirs: a store in memory, for instance."""
        if self.same_namespaces or self.has_machines_root:
            return set()
        points: dict[str, list[str]] = {}
        for mount in mounts.mounts(os.getpid()):
            points.setdefault(mount.device, []).append(mount.point)
        return {device for device, where in points.items() if not any(_EMPTY_DIR in f"{point}/" for point in where)}

    def _is_reached(self, point: str) -> bool:
        """Whether the way to a mount's point ends on that mount, not on one that hides it."""
        ids = {mount.id for mount in self.mounts if mount.point == point}
        try:
            with (
                closing_fd(self.open_root()) as root,
                closing_fd(fds.open_in_root(root, os.fsencode(point.lstrip("/")))) as directory,
            ):
                return mount_id(directory) in ids
        except OSError:
            return False


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def ns_pid(pid: HostPid) -> NsPid:
    """Return the id of *pid* in its own PID namespace.

    Raises:
        Refused: ``APP_NOT_FOUND``, when it is gone.
    """
    state = procfs.status(pid)
    if state is None:
        raise Refused(Reason.APP_NOT_FOUND, f"Process {pid} is gone.")
    return state.ns_pid
