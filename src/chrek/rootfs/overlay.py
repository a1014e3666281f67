"""Finding what a container changed: the upper directory of its overlay root.

The container's own mount table names it. The path in there is one of the host (of whoever mounted), so
it is opened from the host's root; the container never sees it. Of the mounts at ``/`` the one that the
process's root really is on counts, found by its mount id: a privileged container can mount over its root.

Without an overlay (native or btrfs snapshotters, FUSE lazy pullers) there is nothing that tells an
image's file from a changed one, and the capture is refused with `NO_OVERLAY`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chrek.errors import Reason, Refused
from chrek.rootfs.meta import Xattrs
from chrek.system import mounts

_BACKSLASH: Final = re.compile(r"\\(.)", re.DOTALL)

TRUSTED: Final = "trusted.overlay."
USER: Final = "user.overlay."
"""Prefix of overlayfs's marks on a mount with the option ``userxattr`` (rootless, or in a user namespace)."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """An overlay root.

    Attributes:
        upper: descriptor of the upper directory.
        merged: descriptor of the root as the container sees it, or None; needed only where the upper
            directory holds metadata without data (mount options metacopy and redirect_dir).
        prefix: how the names of overlayfs's own attributes begin.
    """

    upper: int
    merged: int | None = None
    prefix: str = TRUSTED


@contextmanager
def container_overlay(pid: int, *, host_root: str = "/") -> Iterator[Overlay]:
    """Open the overlay that is the root of process *pid* (as this program's /proc shows it).

    *host_root* is where this program sees the host's root directory. Raises `Refused` (`NO_OVERLAY`).
    """
    try:
        merged = os.open(f"/proc/{pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ESRCH)
        raise Refused(
            Reason.APP_NOT_FOUND if gone else Reason.NOT_SUPPORTED_HERE,
            f"The root of process {pid} cannot be opened: {error.strerror}.",
        ) from error
    try:
        mount = _mount_of(pid, merged)
        upper = _open_upper(mount, host_root)
        try:
            yield Overlay(upper, merged, USER if "userxattr" in mount.super_options else TRUSTED)
        finally:
            os.close(upper)
    finally:
        os.close(merged)


def mount_points(pid: int) -> frozenset[bytes]:
    """Give the places in *pid*'s root where other mounts begin, relative to the root."""
    points = (os.fsencode(mount.point).strip(b"/") for mount in mounts.mounts(pid))
    return frozenset(point for point in points if point)


def mount_id(fd: int) -> int:
    """Give the id of the mount that an open file is on (proc(5), fdinfo)."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "mnt_id":
            return int(value)
    raise Refused(Reason.KERNEL_TOO_OLD, "The kernel does not tell mount ids in /proc/self/fdinfo.")


def _mount_of(pid: int, root: int) -> mounts.Mount:
    number = mount_id(root)
    for mount in mounts.mounts(pid):
        if mount.id == number:
            if mount.kind == "overlay":
                return mount
            raise Refused(Reason.NO_OVERLAY, f"The root of process {pid} is a {mount.kind} file system.")
    raise Refused(Reason.NO_OVERLAY, f"The mount that is the root of process {pid} is not in its mount table.")


def _open_upper(mount: mounts.Mount, host_root: str) -> int:
    value = next((o.removeprefix("upperdir=") for o in mount.super_options if o.startswith("upperdir=")), None)
    if value is None:
        raise Refused(Reason.NO_OVERLAY, "The container's overlay root has no upper directory (it is read-only).")
    # Twice escaped: by mountinfo in octal, and before that (comma, colon, backslash) by whoever mounted.
    plain = mounts.unescape(value)
    for path in dict.fromkeys((plain, _BACKSLASH.sub(r"\1", plain))):
        if path.startswith("/"):
            try:
                return os.open(host_root.rstrip("/") + path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                continue
    raise Refused(
        Reason.NO_OVERLAY,
        f"The upper directory {plain} of the container's root cannot be opened from here.",
        cure="Give this program the runtime's snapshot directories at the paths they have on the host.",
    )


@dataclass(frozen=True, slots=True)
class Marks:
    """What overlayfs wrote on a file of an upper directory."""

    opaque: bool = False
    redirect: bool = False
    metacopy: bool = False
    whiteout: bool = False


NO_MARKS: Final = Marks()


def separate(xattrs: Xattrs, prefix: str) -> tuple[Xattrs, Marks]:
    """Separate a file's own attributes from overlayfs's marks on it.

    A nested overlay's marks are escaped by the outer one since Linux 6.7 (``trusted.overlay.overlay.opaque``)
    and are the file's own: under ``trusted.`` they keep the escaped name in the archive.
    """
    if not any(name.startswith(prefix) for name, _ in xattrs):
        return xattrs, NO_MARKS
    nested = prefix + "overlay."
    own, marks = [], {}
    for name, value in xattrs:
        if name.startswith(nested):
            own.append((name if prefix == TRUSTED else prefix + name.removeprefix(nested), value))
        elif name.startswith(prefix):
            marks[name.removeprefix(prefix)] = value
        else:
            own.append((name, value))
    return tuple(own), Marks(
        opaque=marks.get("opaque") == b"y",  # "x" says that whiteouts may be attributes, not opacity
        redirect="redirect" in marks,
        metacopy="metacopy" in marks,
        whiteout="whiteout" in marks,
    )
