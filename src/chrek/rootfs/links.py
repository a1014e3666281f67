"""Carrying single files that CRIU leaves in the container between a dump and a restore.

For a name that was unlinked while open CRIU makes a link, ``link_remap.N``, beside where the name was
(often in /dev/shm); the images name it and a restore consumes it. So it is part of the checkpoint, taken
while the tree is frozen (it vanishes before a dump that leaves the application running has ended), and it
is put back before every restore.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from chrek.errors import CaptureFailed, Reason, Refused, RestoreFailed
from chrek.rootfs import fd as fds
from chrek.rootfs.copying import copy_content
from chrek.rootfs.journal import delete_tree
from chrek.rootfs.output import write_failed

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ACROSS_MOUNTS: Final = fds.BENEATH


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the container that is kept as a file of the checkpoint.

    Attributes:
        path: in the container, relative to its root.
        file: name in the checkpoint's directory for such files; its modification time is kept there too.
    """

    path: bytes
    file: str
    mode: int
    uid: int
    gid: int


def save_links(root_fd: int, paths: Iterable[bytes], out_fd: int, *, prefix: str = "side-") -> list[SideFile]:
    """Copy the regular files *paths* under *root_fd* into the directory open at *out_fd*.

    Follows no link; mounts of the container may lie on the way. Raises `CaptureFailed`:
    `FILE_NOT_CARRIED`, `NO_SPACE`, `WRITE_FAILED`.
    """
    saved = []
    for number, path in enumerate(paths, start=1):
        name = f"{prefix}{number}"
        saved.append(_save(root_fd, path.strip(b"/"), out_fd, name))
    return saved


def _save(root_fd: int, path: bytes, out_fd: int, name: str) -> SideFile:
    try:
        source = fds.open_beneath(root_fd, path, fds.READ, resolve=_ACROSS_MOUNTS)
    except OSError as error:
        raise _not_carried(path, error.strerror) from error
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise _not_carried(path, "it is no regular file")
        try:
            _copy_to(source, out_fd, name, status, mode=0o600)
        except OSError as error:
            raise write_failed(name, error) from error
    finally:
        os.close(source)
    return SideFile(path, name, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def _not_carried(path: bytes, why: str | None) -> CaptureFailed:
    return CaptureFailed(Reason.FILE_NOT_CARRIED, f"Copying {fds.shown(path)} failed: {why}.")


def _copy_to(source: int, directory: int, name: str | bytes, status: os.stat_result, *, mode: int) -> None:
    """Copy content and time, holes left out; nothing remains of a copy that failed."""
    target = os.open(name, _CREATE, mode, dir_fd=directory)
    try:
        copy_content(source, target, status.st_size)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    except BaseException:
        os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(target)


def put_back_links(files: Iterable[SideFile], source_fd: int, root_fd: int) -> list[bytes]:
    """Put the files that are missing under *root_fd* back, from the directory open at *source_fd*.

    One that is there is left as it is. Returns the paths that were made: `remove_links` takes them away
    after a failed restore. Raises `RestoreFailed` (`NO_SPACE`, `FILES_NOT_APPLIED`) or `Refused`
    (`CORRUPT`, `MOUNT_MISSING`); what was made until then is removed.
    """
    made: list[bytes] = []
    try:
        for file in files:
            if _put_back(file, source_fd, root_fd):
                made.append(file.path)  # noqa: PERF401 - what was made before a failure has to be known
    except BaseException:
        remove_links(made, root_fd)
        raise
    return made


def _put_back(file: SideFile, source_fd: int, root_fd: int) -> bool:
    if not 0 <= file.mode <= 0o7777 or "/" in file.file or file.path.split(b"/")[-1] in (b"", b".", b".."):
        raise Refused(Reason.CORRUPT, f"The checkpoint's entry for {fds.shown(file.path)} is malformed.")
    parent, name = fds.split(file.path)
    try:
        directory = fds.open_beneath(root_fd, parent, resolve=_ACROSS_MOUNTS)
    except OSError as error:
        raise Refused(Reason.MOUNT_MISSING, f"{fds.shown(parent)} cannot be opened here: {error.strerror}.") from error
    try:
        if fds.lstat(directory, name) is not None:
            return False
        try:
            _copy_back(file, name, source_fd, directory)
        except BaseException:
            delete_tree(directory, name)
            raise
        return True
    finally:
        os.close(directory)


def _copy_back(file: SideFile, name: bytes, source_fd: int, directory: int) -> None:
    try:
        source = fds.openat2(source_fd, os.fsencode(file.file), fds.READ, resolve=fds.BENEATH)
    except OSError as error:
        raise Refused(Reason.CORRUPT, f"{file.file} of the checkpoint cannot be read: {error.strerror}.") from error
    try:
        status = os.fstat(source)
        _copy_to(source, directory, name, status, mode=0o600)
        target = fds.openat2(directory, name, os.O_RDONLY | os.O_NOFOLLOW, resolve=fds.BENEATH)
        try:
            os.fchown(target, file.uid, file.gid)
            os.fchmod(target, file.mode)
        finally:
            os.close(target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise RestoreFailed(
            Reason.NO_SPACE if full else Reason.FILES_NOT_APPLIED,
            f"Putting {fds.shown(file.path)} back failed: {os.strerror(error.errno or 0)}.",
        ) from error
    finally:
        os.close(source)


def remove_links(paths: Iterable[bytes], root_fd: int) -> None:
    """Remove files that `put_back_links` made; one that CRIU consumed is no error."""
    for path in paths:
        parent, name = fds.split(path)
        try:
            with fds.opened(root_fd, parent, resolve=_ACROSS_MOUNTS) as directory:
                delete_tree(directory, name)
        except FileNotFoundError:
            continue
