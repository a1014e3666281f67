"""Trees of files for the tests: what one looks like, to the nanosecond, and overlays of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from chrek.rootfs import fd as fds

Snapshot = dict[bytes, tuple[Any, ...]]


def snapshot(root: str | Path, *, links: bool = True) -> Snapshot:
    """Describe everything visible under *root*: type, mode, owner, time, attributes, content, holes, links."""
    top = os.fsencode(root)
    found: Snapshot = {}
    groups: dict[tuple[int, int], list[bytes]] = {}
    pending = [b""]
    while pending:
        path = pending.pop()
        whole = top + b"/" + path if path else top
        status = os.lstat(whole)
        found[path] = (*_metadata(whole, status), *_content(whole, status))
        if stat.S_ISDIR(status.st_mode):
            pending.extend(path + b"/" + name if path else name for name in os.listdir(whole))
        elif status.st_nlink > 1:
            groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    if links:
        for group in groups.values():
            for path in group:
                found[path] += (tuple(sorted(group)),) if len(group) > 1 else ()
    return found


def _metadata(path: bytes, status: os.stat_result) -> tuple[Any, ...]:
    xattrs = {
        name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
    }
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, tuple(sorted(xattrs.items()))


def _content(path: bytes, status: os.stat_result) -> tuple[Any, ...]:
    if stat.S_ISLNK(status.st_mode):
        return (os.readlink(path),)
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            return status.st_size, hashlib.file_digest(file, "sha256").hexdigest()
    return (status.st_rdev,) if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else ()


def differences(one: Snapshot, other: Snapshot) -> list[tuple[bytes, object, object]]:
    """Name what differs, for a readable assertion."""
    return [(p, one.get(p), other.get(p)) for p in sorted({*one, *other}) if one.get(p) != other.get(p)]


@dataclass(frozen=True)
class OverlayMount:
    """A mounted overlay: its upper directory and its merged view."""

    upper: Path
    merged: Path


@contextlib.contextmanager
def overlay_mount(base: Path, name: str, *, lower: Path, options: str = "") -> Iterator[OverlayMount]:
    """Mount an overlay of *lower* whose other directories lie in *base*."""
    upper, work, merged = (base / f"{name}-{part}" for part in ("upper", "work", "merged"))
    for directory in (upper, work, merged):
        directory.mkdir()
    settings = f"lowerdir={lower},upperdir={upper},workdir={work}{options and ',' + options}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", settings, merged], check=True)
    try:
        yield OverlayMount(upper, merged)
    finally:
        subprocess.run(["umount", "--lazy", merged], check=True)


@contextlib.contextmanager
def tmpfs_mount(at: Path, *, size: int = 64 << 20) -> Iterator[Path]:
    """Mount a tmpfs of *size* bytes."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


@contextlib.contextmanager
def directory(path: str | Path) -> Iterator[int]:
    """Open a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def memory_file() -> Iterator[int]:
    """Give an open file to write an archive to."""
    fd = os.memfd_create("archive")
    try:
        yield fd
    finally:
        os.close(fd)


EVENTS = frozenset(
    (
        *("os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.chown", "os.chmod", "os.utime", "os.setxattr"),
        *("os.removexattr", "open", "os.link", "os.symlink", "os.truncate"),
    )
)


class FailingChange:
    """Makes the *at*-th change of the file system inside its block fail with *error*, as `run_killed` counts."""

    def __init__(self, at: int, error: int) -> None:
        self._left = at
        self._error = error
        self._active = False
        self.failed = False
        sys.addaudithook(self._count)  # there is no way to remove one: it does nothing outside the block

    def _count(self, event: str, _args: object) -> None:
        if self._active and event in EVENTS:
            self._left -= 1
            if self._left == 0:
                self.failed = True
                raise OSError(self._error, os.strerror(self._error))

    def __enter__(self) -> Self:
        self._write_all = fds.write_all
        fds.write_all = self._half_write
        self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False
        fds.write_all = self._write_all

    def _half_write(self, fd: int, data: bytes | memoryview) -> None:
        try:
            self._count("open", None)
        except OSError:
            self._write_all(fd, data[: len(data) // 2])
            raise
        self._write_all(fd, data)


def run_killed(action: Callable[[], object], at: int) -> bool:
    """Run *action* in a process that kills itself before its *at*-th change of the file system.

    Counted are the system calls that Python audits and every write. Returns whether it was killed; raises
    when the action itself failed.
    """
    child = os.fork()
    if child == 0:
        _run_counted(action, at)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the action failed in the child"
    return False


def _run_counted(action: Callable[[], object], at: int) -> None:
    left = at

    def count(event: str, _args: object) -> None:
        nonlocal left
        if event in EVENTS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)

    write_all = fds.write_all

    def counted_write(fd: int, data: bytes | memoryview) -> None:
        count("open", None)
        write_all(fd, data)

    fds.write_all = counted_write
    sys.addaudithook(count)
    try:
        action()
    except BaseException:  # noqa: BLE001 - the parent only sees the status
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)
