"""The file part of a restore: archives applied, stale files removed, markers written; all of it undone again.

Each file system that is changed has a journal of its own (`chrek.rootfs.journal`), because originals are
moved aside within it. Nothing is changed on a volume that other pods may share, nor, but for the marker,
below the root of the machine itself where that is the application's too.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Self

from chrek.artifact.names import timestamp
from chrek.engine import sidefiles
from chrek.errors import Reason, Refused, RestoreFailed
from chrek.rootfs import fd as fds
from chrek.rootfs.apply import apply, put_file, take_file
from chrek.rootfs.archive import read_archive
from chrek.rootfs.journal import Journal
from chrek.rootfs.links import remove_links
from chrek.rootfs.member import Kind
from chrek.system import procfs

if TYPE_CHECKING:
    from chrek.artifact import Checkpoint, Volume
    from chrek.engine.container import Container
    from chrek.rootfs.archive import Archive

_CAP_SETUID = 7


class Replay:
    """Changes to a container's files that are undone unless `keep` is called; used as a context."""

    def __init__(self, container: Container, checkpoint: Checkpoint) -> None:
        self._container = container
        self._checkpoint = checkpoint
        self._stack = ExitStack()
        self._journals: dict[str, Journal] = {}
        self._links: list[bytes] = []
        self._kept = False
        self.warnings: list[str] = []

    def __enter__(self) -> Self:
        root = self._container.open_root()
        self._stack.callback(os.close, root)
        self._root = root
        if not self._container.has_machines_root:
            self._journals["/"] = self._stack.enter_context(Journal(root))
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if not self._kept:
                self._undo()
        finally:
            self._stack.close()

    def _undo(self) -> None:
        """Undo everything; a journal that cannot be undone keeps none of the others from it."""
        errors: list[RestoreFailed] = []
        remove_links(self._links, self._root)
        for journal in reversed(self._journals.values()):
            try:
                journal.undo()
            except RestoreFailed as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def keep(self) -> None:
        """Let the changes stay."""
        self._kept = True
        for journal in self._journals.values():
            # An application that ended at once takes its container along, and the runtime the container's files.
            with suppress(FileNotFoundError):
                journal.commit()

    def files(self) -> None:
        """Apply the root file system's changes and the volumes.

        Raises:
            Refused: nothing was changed.
            RestoreFailed: leaving the context undoes what was.
        """
        if "rootfs.tar" in self._checkpoint.manifest.files:
            self._apply("rootfs.tar", self._root_journal("rootfs.tar"), b"")
        for volume in self._checkpoint.manifest.volumes:
            self._volume(volume)
        self._links = sidefiles.put_back(self._checkpoint, self._root)

    def _volume(self, volume: Volume) -> None:
        if volume.path in {path for path, _ in self._container.volumes}:
            directory = fds.open_in_root(self._root, os.fsencode(volume.path.lstrip("/")))
            self._stack.callback(os.close, directory)
            self._journals[volume.path] = self._stack.enter_context(Journal(directory))
            self._apply(volume.archive, self._journals[volume.path], b"")
        else:
            journal = self._root_journal(volume.path)
            self.warnings.append(f"VOLUME_FOLDED: {volume.path} is no volume here; its files go into the root")
            self._apply(volume.archive, journal, os.fsencode(volume.path.strip("/")))

    def _root_journal(self, what: str) -> Journal:
        if "/" not in self._journals:
            message = f"The checkpoint was taken in a container ({what}); the root here is the machine's own."
            raise Refused(Reason.IMAGE_MISMATCH, message, cure="Restore it in a container of the same image.")
        return self._journals["/"]

    def _apply(self, name: str, journal: Journal, at: bytes) -> None:
        fd = self._checkpoint.open(name)
        try:
            archive = read_archive(fd, name=name)
            _refuse_privileged(archive, self._container)
            applied = apply(archive, journal, at=at)
        finally:
            os.close(fd)
        self.warnings += [f"{path} of {name} lies under another mount here" for path in applied.shadowed]
        self.warnings += [f"{path} cannot have the attribute {key} here" for path, key in applied.lost_attributes]

    def read(self, path: str) -> bytes:
        """Return the beginning of a small regular file; empty when there is none."""
        with suppress(OSError), self._place(path) as (_, inner, parent):
            fd = os.open(fds.split(inner)[1], fds.READ | os.O_CLOEXEC, dir_fd=parent)
            try:
                return os.read(fd, 4096) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
            finally:
                os.close(fd)
        return b""

    def remove(self, path: str) -> None:
        """Remove a stale file; one on a volume that others may share stays."""
        with suppress(OSError), self._place(path) as (journal, inner, _):
            if journal is not None:
                take_file(journal, inner)

    def write_marker(self, path: str, **more: str) -> None:
        """Write the file that tells the application it was restored.

        Raises:
            RestoreFailed: ``FILES_NOT_APPLIED``.
        """
        manifest = self._checkpoint.manifest
        content = {
            "checkpoint_id": manifest.checkpoint_id,
            "checkpoint_path": self._checkpoint.marker.checkpoint_path,
            "timestamp": timestamp(time.time()),
            "success": True,
            **more,
        }
        self.write(path, json.dumps(content).encode() + b"\n")

    def write(self, path: str, content: bytes) -> None:
        """Write a small file that everybody may read, in place of one that is there.

        Raises:
            RestoreFailed: ``FILES_NOT_APPLIED``.
        """
        try:
            with self._place(path) as (journal, inner, parent):
                if journal is not None:
                    put_file(journal, inner, content)
                else:
                    write_file(parent, fds.split(inner)[1], content)
        except OSError as error:
            message = f"{path} cannot be written: {error.strerror}."
            raise RestoreFailed(Reason.FILES_NOT_APPLIED, message) from error

    @contextmanager
    def _place(self, path: str) -> Iterator[tuple[Journal | None, bytes, int]]:
        """Yield the journal that covers *path* (None: a volume of others), its path there, and its directory."""
        mount = self._container.mount_of(path)
        point = mount.point if mount else "/"
        journal = self._journals.get(point)
        inner = os.fsencode(path[len(point.rstrip("/")) :].lstrip("/") if journal else path.lstrip("/"))
        base = journal.root if journal else self._root
        parent = fds.open_beneath(base, fds.split(inner)[0], resolve=fds.BENEATH)
        try:
            yield journal, inner, parent
        finally:
            os.close(parent)


def _refuse_privileged(archive: Archive, container: Container) -> None:
    """Refuse programs that would give the application another user's rights when it runs them.

    No application without privileges could have made them, but whoever can write to the store could. Where PID 1
    is root or may become anybody they add nothing, and under no_new_privs nobody gains by them.

    Raises:
        Refused: ``PRIVILEGE_EXCEEDED``, or ``CLAIM_LOST`` when PID 1 is gone.
    """
    limit = procfs.status(container.pid1)
    if limit is None:
        raise Refused(Reason.CLAIM_LOST, f"Process {container.pid1} is gone.")
    if limit.no_new_privs or 0 in limit.uids or limit.capabilities["CapPrm"] >> _CAP_SETUID & 1:
        return
    for member in archive.members:
        mode, owner, group = member.meta.mode, member.meta.uid, member.meta.gid
        as_user = mode & stat.S_ISUID and owner not in limit.uids
        # Without the right to run it for the group, the bit asks for mandatory locks.
        as_group = mode & stat.S_ISGID and mode & stat.S_IXGRP and group not in {*limit.gids, *limit.groups}
        capable = any(key == "security.capability" for key, _ in member.meta.xattrs)
        if member.kind is Kind.FILE and (as_user or as_group or capable):
            what = "file capabilities" if capable else f"mode {mode:o} and owner {owner}:{group}"
            message = f"{archive.name} would make {fds.shown(member.path)} with {what}; PID 1 is user {limit.uids[0]}."
            cure = "Leave the file out by a pattern, or set allowPrivilegeEscalation: false, under which it gives no rights."
            raise Refused(Reason.PRIVILEGE_EXCEEDED, message, cure=cure)


def write_file(directory: int, name: bytes, content: bytes) -> None:
    """Write a new file atomically: under another name first, then renamed; mode 0644.

    Raises:
        OSError: nothing of it is left.
    """
    fresh = b".chrek-" + os.urandom(6).hex().encode()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(fresh, flags, 0o644, dir_fd=directory)
    try:
        try:
            os.fchmod(fd, 0o644)
            fds.write_all(fd, content)
        finally:
            os.close(fd)
        os.rename(fresh, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(fresh, dir_fd=directory)
        raise
