"""Deciding, before anything is changed, what applying an archive to a tree means.

Every member is compared with what is at its place. That gives the list of actions, what other mounts
cover, whether anything is to be done at all (a read-only root that lacks nothing is fine), and the space
it takes at most: the contents, and the originals that an overlay copies up when they are moved aside.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from chrek.errors import Reason, Refused
from chrek.rootfs import fd as fds
from chrek.rootfs.archive import Archive
from chrek.rootfs.member import ArchiveKind, Kind, Member
from chrek.rootfs.meta import Meta, read_entry, read_xattrs
from chrek.rootfs.skip import Skip

_COMPARE: Final = 1 << 18
_PAGE: Final = 4096


class Do(Enum):
    """What is done at one place."""

    CREATE = "create"
    """Make the entry in a directory that is new itself: its undo is the directory's."""
    NEW = "new"
    """Make the entry where nothing is."""
    REPLACE = "replace"
    REPLACE_TREE = "replace tree"
    REMOVE = "remove"
    REMOVE_TREE = "remove tree"
    MERGE = "merge"
    """Keep the directory, give it other metadata, and delete what an opaque one hides."""
    SAME = "same"


@dataclass(slots=True)
class Action:
    """One member and what is done with it.

    Attributes:
        path: in the target, relative to its root.
        doomed: entries of an opaque directory that are not in the archive.
        joins: for a hard link, the path in the target of the file to join.
    """

    member: Member
    path: bytes
    do: Do
    doomed: tuple[bytes, ...] = ()
    joins: bytes = b""


@dataclass(slots=True)
class Plan:
    """All actions in order, and what they amount to.

    Attributes:
        missing_parents: directories to make before the first action.
        effective: something besides the times of directories changes.
        read_only: the target cannot be written.
    """

    actions: list[Action] = field(default_factory=list)
    missing_parents: list[bytes] = field(default_factory=list)
    shadowed: list[str] = field(default_factory=list)
    effective: bool = False
    read_only: bool = False


def make_plan(archive: Archive, root: int, *, at: bytes, skip: Skip) -> Plan:
    """Compare *archive* with the tree at *root*; raises `Refused` as `apply.apply` says."""
    try:
        return _Planner(archive, root, at, skip).make()
    except OSError as error:
        raise Refused(
            Reason.UNDO_IMPOSSIBLE, f"The container's files cannot be read: {error.strerror} at {error.filename!r}."
        ) from error


class _Planner:
    def __init__(self, archive: Archive, root: int, at: bytes, skip: Skip) -> None:
        self._archive = archive
        self._root = root
        self._at = at
        self._skip = skip
        self._plan = Plan(read_only=bool(os.fstatvfs(root).f_flag & os.ST_RDONLY))
        self._fresh: set[bytes] = set()
        self._hidden: set[bytes] = set()
        self._placed: dict[bytes, bytes] = {}
        self._by_path = {member.path: member for member in archive.members}
        self._joined = {m.link for m in archive.members if m.kind is Kind.HARD_LINK}
        self._parent = -1
        self._parent_path: bytes | None = None
        self._bytes = 0
        self._inodes = 0

    def make(self) -> Plan:
        try:
            self._find_missing_parents()
            for member in self._archive.members:
                self._place(member)
        finally:
            if self._parent >= 0:
                os.close(self._parent)
        self._check_target()
        return self._plan

    def _find_missing_parents(self) -> None:
        """The directory *at* and those above it may have to be made; no link on the way is followed."""
        parts = self._at.split(b"/") if self._at else []
        for path in (b"/".join(parts[: i + 1]) for i in range(len(parts))):
            try:
                os.close(fds.open_beneath(self._root, path, os.O_PATH | os.O_DIRECTORY))
            except FileNotFoundError:
                if path != self._at:
                    self._plan.missing_parents.append(path)
                    self._plan.effective = True
                self._fresh.add(path)

    # --- one member ----------------------------------------------------------------------------

    def _place(self, member: Member) -> None:
        path = fds.join(self._at, member.path) if member.path else self._at
        parent, name = fds.split(path)
        if parent in self._hidden or (path != self._at and self._skip(path, name)):
            self._hide(member, path, report=parent in self._hidden)
            return
        if not path or (path == self._at and path not in self._fresh):
            self._merge(member, path)
            return
        if parent in self._fresh:
            self._add_new(member, path, Do.CREATE)
            return
        fd = self._enter(parent)
        status = fds.lstat(fd, name)
        if status is None:
            self._add_new(member, path, Do.NEW)
        elif fds.is_mount_point(fd, name):
            self._hide(member, path, report=True)
        else:
            self._meet(member, path, name, fd, status)

    def _hide(self, member: Member, path: bytes, *, report: bool) -> None:
        if member.kind is Kind.DIRECTORY:
            self._hidden.add(path)
        if report:
            self._plan.shadowed.append(fds.shown(path))

    def _enter(self, path: bytes) -> int:
        if path != self._parent_path:
            if self._parent >= 0:
                os.close(self._parent)
                self._parent, self._parent_path = -1, None
            self._parent = fds.open_beneath(self._root, path)
            self._parent_path = path
        return self._parent

    def _add_new(self, member: Member, path: bytes, do: Do) -> None:
        if member.kind is Kind.WHITEOUT:
            return
        self._check_device(member, path)
        if member.kind is Kind.DIRECTORY:
            self._fresh.add(path)
        self._add(member, path, do)

    def _add(self, member: Member, path: bytes, do: Do) -> None:
        self._plan.effective = True
        self._inodes += 1
        action = Action(member, path, do)
        if member.kind is Kind.HARD_LINK:
            joins = self._placed.get(member.link)
            if joins is None:  # the file it joins lies under another mount: this name gets the content
                action.member = target = _copy_of(self._by_path[member.link], member.path)
                self._check_device(target, path)
                self._placed[member.link] = path
                self._bytes += _rounded(target.stored)
            else:
                action.joins = joins
        else:
            self._placed[member.path] = path
            self._bytes += _rounded(member.stored)
        self._plan.actions.append(action)

    def _meet(self, member: Member, path: bytes, name: bytes, fd: int, status: os.stat_result) -> None:
        """Decide where something is at the member's place already."""
        is_directory = stat.S_ISDIR(status.st_mode)
        if is_directory and member.kind is Kind.DIRECTORY:
            self._merge(member, path)
            return
        if is_directory and self._holds_mount(path):
            self._hide(member, path, report=True)
            return
        if not is_directory:
            if self._is_same(member, name, fd, status):
                self._placed[member.path] = path
                self._plan.actions.append(Action(member, path, Do.SAME))
                return
            self._bytes += _rounded(status.st_blocks * 512)
        if member.kind is Kind.WHITEOUT:
            self._plan.effective = True
            self._plan.actions.append(Action(member, path, Do.REMOVE_TREE if is_directory else Do.REMOVE))
            return
        self._check_device(member, path)
        if member.kind is Kind.DIRECTORY:
            self._fresh.add(path)
        self._add(member, path, Do.REPLACE_TREE if is_directory else Do.REPLACE)

    def _merge(self, member: Member, path: bytes) -> None:
        doomed: list[bytes] = []
        with fds.opened(self._root, path) as fd:
            before = Meta.of(os.fstat(fd), read_xattrs(fd))
            if member.opaque:
                names = sorted(map(os.fsencode, os.listdir(fd)))
                doomed = [fds.join(path, name) for name in names if self._is_doomed(member, path, name, fd)]
        after = member.meta
        same = (before.mode, before.uid, before.gid, before.xattrs) == (after.mode, after.uid, after.gid, after.xattrs)
        self._plan.effective |= bool(doomed) or not same
        self._plan.actions.append(Action(member, path, Do.MERGE, tuple(doomed)))

    def _is_doomed(self, member: Member, directory: bytes, name: bytes, fd: int) -> bool:
        path = fds.join(directory, name)
        if fds.join(member.path, name) in self._by_path or self._skip(path, name):
            return False
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if fds.is_mount_point(fd, name) or (stat.S_ISDIR(status.st_mode) and self._holds_mount(path)):
            self._plan.shadowed.append(fds.shown(path))
            return False
        if not stat.S_ISDIR(status.st_mode):
            self._bytes += _rounded(status.st_blocks * 512)
        return True

    def _holds_mount(self, path: bytes) -> bool:
        """Tell whether other mounts begin below a directory that is to go, and add up what it holds."""
        directories = [path]
        for directory in directories:  # grows while it is walked
            with fds.opened(self._root, directory) as fd:
                for name in map(os.fsencode, os.listdir(fd)):
                    if fds.is_mount_point(fd, name):
                        return True
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        directories.append(fds.join(directory, name))
                    else:
                        self._bytes += _rounded(status.st_blocks * 512)
        return False

    # --- comparing -----------------------------------------------------------------------------

    def _is_same(self, member: Member, name: bytes, fd: int, status: os.stat_result) -> bool:
        """Tell whether an entry is already what the member asks for (copied up and not really changed)."""
        if _TYPES.get(stat.S_IFMT(status.st_mode)) is not member.kind or member.path in self._joined:
            return False
        present = read_entry(fd, name, status)
        if member.kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):  # made by the runtime: each has a time of its own
            present = dataclasses.replace(present, mtime_ns=member.meta.mtime_ns)
            return present == member.meta and status.st_rdev == os.makedev(*member.device)
        if present != member.meta:
            return False
        if member.kind is Kind.FILE:
            plain = status.st_size == member.size and member.segments is None
            return plain and self._same_content(member, name, fd)
        return member.kind is not Kind.SYMLINK or os.readlink(name, dir_fd=fd) == member.link

    def _same_content(self, member: Member, name: bytes, fd: int) -> bool:
        file = fds.openat2(fd, name, fds.READ, resolve=fds.BENEATH | fds.NO_XDEV)
        try:
            for at in range(0, member.size, _COMPARE):
                count = min(_COMPARE, member.size - at)
                if os.pread(file, count, at) != os.pread(self._archive.fd, count, member.offset + at):
                    return False
            return True
        finally:
            os.close(file)

    def _check_device(self, member: Member, path: bytes) -> None:
        """Refuse to make a device; a character device 0:0 opens nothing (a nested overlay's whiteout)."""
        harmless = self._archive.kind is ArchiveKind.TREE and member.kind is Kind.CHAR_DEVICE
        if member.kind not in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE) or (harmless and not any(member.device)):
            return
        kind = "character" if member.kind is Kind.CHAR_DEVICE else "block"
        major, minor = member.device
        raise Refused(
            Reason.PRIVILEGE_EXCEEDED,
            f"{self._archive.name} would make {fds.shown(path)}, the {kind} device {major}:{minor}.",
            cure="Devices are not made at a restore: let the pod have the device, or leave the file out by a pattern.",
        )

    def _check_target(self) -> None:
        plan = self._plan
        if not plan.effective:
            return
        if plan.read_only:
            raise Refused(
                Reason.UNDO_IMPOSSIBLE,
                f"{self._archive.name} has {len(plan.actions)} changes and the file system they go to is read-only.",
                cure="Let the container write to its root file system, or give it a volume where it wrote.",
            )
        space = os.fstatvfs(self._root)
        free = space.f_bavail * space.f_frsize
        if space.f_blocks and free < self._bytes:
            raise Refused(
                Reason.NO_SPACE,
                f"Applying {self._archive.name} takes up to {self._bytes} bytes; {free} are free in the container.",
                cure="Free space on the node's disk, or raise the size limit of the volume.",
            )
        if space.f_files and space.f_favail < self._inodes:
            raise Refused(
                Reason.NO_SPACE,
                f"Applying {self._archive.name} takes {self._inodes} files; the file system can hold {space.f_favail}.",
                cure="Free files on the node's disk, or raise the limit of the volume.",
            )


_TYPES: Final = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
    stat.S_IFCHR: Kind.CHAR_DEVICE,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
}


def _rounded(size: int) -> int:
    return size + -size % _PAGE


def _copy_of(member: Member, path: bytes) -> Member:
    return dataclasses.replace(member, path=path)
