"""A private view of a checkpoint's images: what was checked is what CRIU reads, and may be changed.

CRIU reads images by name, long after they were looked at. Whoever can write to the store could exchange one in
between, so CRIU is given a directory of our own: every image is a copy, made before the first look. Bulk data
(pages, contents of deleted files) can be gigabytes and is not copied but mounted over an empty file. It needs no
such care: pages are whatever the checkpoint's author wanted anyway, and a deleted file can become nothing that
CRIU's own capabilities do not allow (see `chrek.criu.process`).

The directory is a tmpfs of its own, and a detached tree of mounts (open_tree(2), Linux 5.2): no other process sees
it, and it is gone with the last descriptor, whoever is killed. To be put together it is mounted in a mount
namespace that a thread of ours has for itself. It takes 2 ms *(measured)*.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from chrek.criu.images import open_regular
from chrek.errors import Reason, Refused, RestoreFailed
from chrek.system.syscalls import LIBC, check, syscall

MAX_BYTES = 512 << 20
"""Of all images but bulk data: it stays in memory for as long as CRIU works. Real ones have a few megabytes."""

_BULK = re.compile(r"(pages|ghost-file)-[0-9a-f]+\.img")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _AT_RECURSIVE = 1, 0x1000, 0x8000
_MOVE_MOUNT_F_EMPTY_PATH = 4
_CWD = -100
_MODE = 0o600


@contextmanager
def private_images(directory: int, scratch: str | None = None) -> Iterator[int]:
    """Yield a descriptor of a directory that has the same images as the one behind *directory*.

    *scratch* is where copies lie if this program may not mount anything; None is the place of temporary files.

    Raises:
        Refused: ``CORRUPT``: something there is no regular file, or the images are too large.
        RestoreFailed: they could not be copied.
    """
    with ExitStack() as stack:
        try:
            place = _mounted(directory, stack)
            if place is None:
                home = stack.enter_context(tempfile.TemporaryDirectory(prefix="chrek-images-", dir=scratch))
                place = _open(".", os.open(home, _DIRECTORY), stack, own=True)
                for name in _copy_all(directory, place):
                    _copy(directory, place, name, 1 << 62)
        except OSError as error:
            raise RestoreFailed(Reason.RESTORE_FAILED, f"The images could not be copied: {error}.") from error
        yield place


def _open(name: str, directory: int, stack: ExitStack, *, own: bool = False) -> int:
    """Open a directory below another, for as long as the stack lasts; with *own* the other one, too, is closed then."""
    if own:
        stack.callback(os.close, directory)
    fd = os.open(name, _DIRECTORY, dir_fd=directory)
    stack.callback(os.close, fd)
    return fd


def _copy_all(source: int, target: int) -> list[str]:
    """Copy the images, but for bulk data, which becomes empty files; return the names of those."""
    bulk, left = [], MAX_BYTES
    for name in sorted(os.listdir(source)):
        if _BULK.fullmatch(name):
            bulk.append(name)
            os.close(_create(target, name))
        else:
            left = _copy(source, target, name, left)
    return bulk


def _create(directory: int, name: str) -> int:
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE, dir_fd=directory)


def _copy(source: int, target: int, name: str, most: int) -> int:
    """Copy one image of at most *most* bytes; return how much is left of them."""
    with open(open_regular(source, name), "rb") as reading, open(_create(target, name), "wb") as writing:
        while data := reading.read(1 << 20):
            most -= len(data)
            if most < 0:
                message = f"images/{name}: all images together are more than {MAX_BYTES} bytes."
                raise Refused(Reason.CORRUPT, message)
            writing.write(data)
    return most


# --- without a trace in any file system -------------------------------------------------------------


def _mounted(source: int, stack: ExitStack) -> int | None:
    """Return a directory that is nowhere but in this program; None where it may not mount."""
    try:
        tmpfs = _tmpfs()
    except PermissionError:
        return None
    place = _open(".", tmpfs, stack, own=True)
    bulk = _copy_all(source, place)
    if not bulk:
        return place
    with ExitStack() as clones:
        trees = {}
        for name in bulk:
            trees[name] = _clone(source, name)
            clones.callback(os.close, trees[name])
        return _open(".", _assemble(tmpfs, place, trees), stack, own=True)


def _tmpfs() -> int:
    """Return a new tmpfs, mounted nowhere."""
    context = syscall("fsopen", b"tmpfs", 1)
    try:
        syscall("fsconfig", context, _FSCONFIG_SET_STRING, b"source", b"chrek-images", 0)
        syscall("fsconfig", context, _FSCONFIG_SET_STRING, b"mode", b"0700", 0)
        syscall("fsconfig", context, _FSCONFIG_SET_STRING, b"size", b"%d" % (2 * MAX_BYTES), 0)
        syscall("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return syscall("fsmount", context, 1, 0)
    finally:
        os.close(context)


def _clone(directory: int, name: str) -> int:
    """Return one image as a mount of its own, mounted nowhere."""
    fd = open_regular(directory, name)
    try:
        return syscall("open_tree", fd, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)
    finally:
        os.close(fd)


def _assemble(tmpfs: int, place: int, trees: dict[str, int]) -> int:
    """Mount each tree over the file of its name in the tmpfs; return all that as a detached tree."""
    result: list[int | OSError] = []

    def mount() -> None:
        try:
            check(LIBC.unshare(_CLONE_NEWNS), "unshare")
            check(LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount")
            # Any directory does, nobody else sees it; this one is always there.
            syscall("move_mount", tmpfs, b"", _CWD, b"/proc", _MOVE_MOUNT_F_EMPTY_PATH)
            for name, tree in trees.items():
                syscall("move_mount", tree, b"", place, os.fsencode(name), _MOVE_MOUNT_F_EMPTY_PATH)
            flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE
            result.append(syscall("open_tree", place, b"", flags))
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=mount, name="images")
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]
