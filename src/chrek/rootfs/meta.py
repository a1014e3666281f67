"""What a file is besides its content: mode, owner, time and extended attributes.

Extended attributes are carried by a closed list. ``security.selinux`` and its kin name the container
the file was in, and the next container has other labels; ``security.evm`` signs the inode number. Both
would be wrong in the new place, so of ``security.`` only file capabilities travel.

Inode flags (chattr) and access times are not carried.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import Final

from chrek.rootfs import fd as fds

ACL_ACCESS: Final = "system.posix_acl_access"
ACL_DEFAULT: Final = "system.posix_acl_default"
_CARRIED: Final = ("user.", "trusted.")
_CARRIED_EXACT: Final = ("security.capability", ACL_ACCESS, ACL_DEFAULT)
_UNSUPPORTED: Final = (errno.ENOTSUP, errno.ENODATA)

Xattrs = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Meta:
    """Mode (permission, setuid, setgid, sticky bits), owner, modification time in ns, attributes by name."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Xattrs = ()

    @classmethod
    def of(cls, status: os.stat_result, xattrs: Xattrs) -> Meta:
        """Put a stat result and attributes together."""
        return cls(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)


def is_carried(name: str) -> bool:
    """Tell whether an extended attribute of this name travels with a checkpoint."""
    return name.startswith(_CARRIED) or name in _CARRIED_EXACT


def read_xattrs(where: int | bytes) -> Xattrs:
    """Read the attributes that travel, sorted by name, of a descriptor or of a path (not following it)."""
    follow = isinstance(where, int)
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return ()
        raise
    if not names:
        return ()
    found = []
    for name in sorted(filter(is_carried, names)):
        try:
            found.append((name, os.getxattr(where, name, follow_symlinks=follow)))
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # ENODATA: removed since it was listed
                raise
    return tuple(found)


def read_entry(dir_fd: int, name: bytes, status: os.stat_result) -> Meta:
    """Read the metadata of an entry of any type without opening it."""
    return Meta.of(status, read_xattrs(fds.magic(dir_fd, name)))


def set_xattrs(where: int | bytes, wanted: Xattrs, *, exact: bool) -> list[str]:
    """Set the attributes; with *exact* remove every other one that travels.

    Returns the names that this file system cannot hold (for instance ``user.`` on an old tmpfs): losing
    one is reported, not fatal.
    """
    follow = isinstance(where, int)
    lost = []
    present: Xattrs = ()
    if exact:
        present = read_xattrs(where)
        for name, _ in present:
            if name not in dict(wanted):
                os.removexattr(where, name, follow_symlinks=follow)
    for name, value in wanted:
        if (name, value) in present:
            continue
        try:
            os.setxattr(where, name, value, follow_symlinks=follow)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            lost.append(name)
    return lost


def set_on_fd(fd: int, meta: Meta, *, exact: bool) -> list[str]:
    """Give an open file or directory its metadata; returns the attributes that could not be held.

    The order matters: a change of owner clears setuid bits and capabilities, an ACL is the finer form
    of the mode, and everything before it may touch the time.
    """
    os.fchown(fd, meta.uid, meta.gid)
    os.fchmod(fd, meta.mode)
    lost = set_xattrs(fd, meta.xattrs, exact=exact) if exact or meta.xattrs else []
    os.utime(fd, ns=(meta.mtime_ns, meta.mtime_ns))
    return lost


def set_on_entry(dir_fd: int, name: bytes, meta: Meta, *, exact: bool, chmod: bool) -> list[str]:
    """Give a symbolic link, FIFO, socket or device its metadata, without opening or following it."""
    os.chown(name, meta.uid, meta.gid, dir_fd=dir_fd, follow_symlinks=False)
    if chmod:
        pinned = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            os.chmod(fds.magic(pinned), meta.mode)
        finally:
            os.close(pinned)
    where = fds.magic(dir_fd, name)
    lost = set_xattrs(where, meta.xattrs, exact=exact) if exact or meta.xattrs else []
    os.utime(name, ns=(meta.mtime_ns, meta.mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
    return lost
