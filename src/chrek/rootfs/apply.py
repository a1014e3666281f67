"""Replaying an archive of file changes into another container's root, or into a volume.

The target is the merged view, never an upper directory: changing one under a mounted overlay is undefined.
So a whiteout becomes a deletion and an opaque directory the deletion of what else is in it; what the
process had wins over what the image has. It comes in two passes. `plan` looks at every place and decides;
it changes nothing and raises everything that can be known before (devices, a read-only root, too little
space). Then the actions are done in the archive's order, each announced to the journal first; the metadata
of directories comes last, deepest first, since every entry made in one changes its time.

Places where other mounts begin in the target are left alone, with all below them, and reported: what is
there belongs to a volume, which other pods may share.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from chrek.errors import Reason, Refused, RestoreFailed
from chrek.rootfs import fd as fds
from chrek.rootfs.archive import Archive
from chrek.rootfs.journal import Journal
from chrek.rootfs.member import Kind, Member
from chrek.rootfs.meta import ACL_DEFAULT, set_on_entry, set_on_fd
from chrek.rootfs.plan import Action, Do, Plan, make_plan
from chrek.rootfs.skip import INJECTED, Skip

_DIRECT: Final = 1 << 16
"""Up to this size a file is copied through a buffer (one read, one write); `sendfile` has more set-up."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What applying an archive did.

    Attributes:
        counts: actions by name: ``create``, ``replace``, ``remove``, ``merge`` and so on; ``same`` files
            were there already, byte for byte, and stayed.
        shadowed: members left out because another mount covers their place, as people read paths.
        lost_attributes: path and name of each extended attribute that this file system cannot hold.
        seconds: how long it took.
    """

    counts: dict[str, int]
    shadowed: tuple[str, ...]
    lost_attributes: tuple[tuple[str, str], ...]
    seconds: float


def apply(
    archive: Archive,
    journal: Journal,
    *,
    at: bytes = b"",
    exclude: Iterable[str] = (),
) -> Applied:
    """Replay *archive* into the journal's root, or into its directory *at* (made when missing).

    Raises `Refused` before anything is changed: `CORRUPT`, `PRIVILEGE_EXCEEDED` (a device that is not
    there already), `UNDO_IMPOSSIBLE` (read-only root with something to apply), `NO_SPACE`. Raises
    `RestoreFailed` (`NO_SPACE`, `FILES_NOT_APPLIED`) naming the file when a change fails; the caller then
    undoes with the journal.
    """
    start = time.monotonic()
    skip = Skip(INJECTED if not at else (), tuple(exclude))
    plan = make_plan(archive, journal.root, at=at.strip(b"/"), skip=skip)
    worker = _Worker(archive, journal, plan)
    if plan.effective or not plan.read_only:
        worker.run()
    counts: dict[str, int] = {}
    for action in plan.actions:
        counts[action.do.value] = counts.get(action.do.value, 0) + 1
    return Applied(counts, tuple(plan.shadowed), tuple(worker.lost), time.monotonic() - start)


@dataclass(slots=True)
class _Worker:
    archive: Archive
    journal: Journal
    plan: Plan
    lost: list[tuple[str, str]] = field(default_factory=list)
    _parent: int = -1
    _parent_path: bytes | None = None
    _inherits: bool = False
    _now: bytes = b""

    def run(self) -> None:
        try:
            for path in self.plan.missing_parents:
                self._now = path
                self._make_parent(path)
            for action in self.plan.actions:
                self._now = action.path
                self._do(action)
            for action in reversed(self.plan.actions):
                if action.member.kind is Kind.DIRECTORY:
                    self._now = action.path
                    self._finish_directory(action)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RestoreFailed(
                Reason.NO_SPACE if full else Reason.FILES_NOT_APPLIED,
                f"Putting {fds.shown(self._now)} of {self.archive.name} in place failed: "
                f"{os.strerror(error.errno or 0)}.",
            ) from error
        finally:
            self._leave()

    def _make_parent(self, path: bytes) -> None:
        """Make a directory on the way to where a volume's content goes."""
        parent = self._enter(fds.split(path)[0])
        self.journal.keep_directory(fds.split(path)[0], parent)
        self.journal.note_new(path)
        os.mkdir(fds.split(path)[1], 0o755, dir_fd=parent)

    def _enter(self, path: bytes) -> int:
        """Open a directory of the target, or keep the one that is open: members of one come together."""
        if path != self._parent_path:
            self._leave()
            self._parent = fds.open_beneath(self.journal.root, path)
            self._parent_path = path
            self._inherits = _has_default_acl(self._parent)
        return self._parent

    def _leave(self) -> None:
        if self._parent >= 0:
            os.close(self._parent)
        self._parent, self._parent_path = -1, None

    def _do(self, action: Action) -> None:
        journal, path, do = self.journal, action.path, action.do
        if do is Do.SAME:
            return
        if do is Do.MERGE:
            with fds.opened(journal.root, path) as fd:
                journal.keep_directory(path, fd)
            for doomed in action.doomed:
                self._remove(doomed)
            return
        parent_path, name = fds.split(path)
        parent = self._enter(parent_path)
        if do is not Do.CREATE:
            journal.keep_directory(parent_path, parent)
        if do in (Do.REPLACE_TREE, Do.REMOVE_TREE):
            journal.remove_tree(path)
        elif do in (Do.REPLACE, Do.REMOVE):
            journal.move_aside(path, parent)
        elif do is Do.NEW:
            journal.note_new(path)
        if do not in (Do.REMOVE, Do.REMOVE_TREE):
            self._create(action, parent, name)

    def _remove(self, path: bytes) -> None:
        parent_path, name = fds.split(path)
        parent = self._enter(parent_path)
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            self.journal.remove_tree(path)
        else:
            self.journal.move_aside(path, parent)

    def _create(self, action: Action, parent: int, name: bytes) -> None:
        member = action.member
        match member.kind:
            case Kind.DIRECTORY:
                os.mkdir(name, 0o700, dir_fd=parent)
                return
            case Kind.FILE:
                self._create_file(member, parent, name)
                return
            case Kind.HARD_LINK:
                self._create_link(action.joins, parent, name)
                return
            case Kind.SYMLINK:
                os.symlink(member.link, name, dir_fd=parent)
            case _:
                os.mknod(name, _TYPES[member.kind] | 0o600, os.makedev(*member.device), dir_fd=parent)
        chmod = member.kind is not Kind.SYMLINK
        self._lose(set_on_entry(parent, name, member.meta, exact=self._inherits and chmod, chmod=chmod))

    def _create_link(self, target: bytes, parent: int, name: bytes) -> None:
        target_parent, target_name = fds.split(target)
        with fds.opened(self.journal.root, target_parent) as fd:
            os.link(target_name, name, src_dir_fd=fd, dst_dir_fd=parent, follow_symlinks=False)

    def _create_file(self, member: Member, parent: int, name: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            self._fill(fd, member)
            self._lose(set_on_fd(fd, member.meta, exact=self._inherits))
        finally:
            os.close(fd)

    def _fill(self, fd: int, member: Member) -> None:
        at = member.offset
        if member.segments is None:
            self._copy(fd, at, member.size)
            return
        os.truncate(fd, member.size)
        for offset, length in member.segments:
            os.lseek(fd, offset, os.SEEK_SET)
            self._copy(fd, at, length)
            at += length

    def _copy(self, fd: int, at: int, length: int) -> None:
        while length > 0:
            if length <= _DIRECT:
                done = len(data := os.pread(self.archive.fd, length, at))
                fds.write_all(fd, data)
            else:
                done = os.sendfile(fd, self.archive.fd, at, length)
            if not done:
                raise RestoreFailed(Reason.CORRUPT, f"{self.archive.name} became shorter while it was read.")
            at += done
            length -= done

    def _finish_directory(self, action: Action) -> None:
        self._leave()
        with fds.opened(self.journal.root, action.path) as fd:
            self._lose(set_on_fd(fd, action.member.meta, exact=True))

    def _lose(self, names: list[str]) -> None:
        self.lost.extend((fds.shown(self._now), name) for name in names)


_TYPES: Final = {
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
    Kind.CHAR_DEVICE: stat.S_IFCHR,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
}


def _has_default_acl(directory: int) -> bool:
    """Tell whether entries made in a directory begin with an access list that was not asked for."""
    try:
        os.getxattr(directory, ACL_DEFAULT)
    except OSError:
        return False
    return True


def put_file(journal: Journal, path: bytes, data: bytes, *, mode: int = 0o644) -> None:
    """Write a small file (a marker) into the journal's tree; what was there is moved aside.

    Its directory must exist. Raises `RestoreFailed` as `apply`.
    """
    take_file(journal, path)
    parent_path, name = fds.split(path)
    try:
        with fds.opened(journal.root, parent_path) as parent:
            journal.keep_directory(parent_path, parent)
            journal.note_new(path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, mode, dir_fd=parent)
            try:
                fds.write_all(fd, data)
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
    except OSError as error:
        raise _file_failed("Writing", path, error) from error


def take_file(journal: Journal, path: bytes) -> bool:
    """Move a file (a stale marker) aside; returns whether there was one. Raises `RestoreFailed` as `apply`."""
    parent_path, name = fds.split(path)
    try:
        with fds.opened(journal.root, parent_path) as parent:
            status = fds.lstat(parent, name)
            if status is None:
                return False
            if stat.S_ISDIR(status.st_mode):
                raise Refused(Reason.BAD_VALUE, f"{fds.shown(path)} is a directory; a file was expected there.")
            journal.keep_directory(parent_path, parent)
            journal.move_aside(path, parent)
            return True
    except OSError as error:
        raise _file_failed("Removing", path, error) from error


def _file_failed(doing: str, path: bytes, error: OSError) -> RestoreFailed:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return RestoreFailed(
        Reason.NO_SPACE if full else Reason.FILES_NOT_APPLIED,
        f"{doing} {fds.shown(path)} failed: {os.strerror(error.errno or 0)}.",
    )
