"""What the agent reads and writes inside a container: by descriptors from its root, never followed out of it.

The workload chooses what lies at every one of these paths, at every moment. A name is resolved by one
system call that stays inside the container's root; what it leads to is held without being opened (no FIFO blocks, no
device driver runs) until it is known to be a regular file.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from chrek.engine import signalfile
from chrek.engine.container import Container, closing_fd
from chrek.engine.replay import write_file
from chrek.errors import CaptureFailed, Reason, Refused
from chrek.rootfs import fd as fds

if TYPE_CHECKING:
    from chrek.agent.config import Signals
    from chrek.artifact import Marker
    from chrek.runtime.container import Container as RuntimeContainer

_FOLLOW: Final = fds.IN_ROOT | fds.NO_MAGICLINKS


def is_file(container: Container, path: str) -> bool:
    """Whether there is a regular file at *path* in the container; nothing of it is opened.

    Raises:
        Refused: APP_NOT_FOUND, the container is gone.
    """
    with closing_fd(container.open_root()) as root:
        try:
            held = fds.openat2(root, os.fsencode(path.lstrip("/")), os.O_PATH, resolve=_FOLLOW)
        except OSError:
            return False
        with closing_fd(held):
            return stat.S_ISREG(os.fstat(held).st_mode)


def check_store(container: Container, location: str | None, store: str) -> None:
    """Compare the volume that *location* lies on in the container with the agent's *store*, by device and inode.

    A container that mounts no volume there is fine: the agent writes into its own.

    Raises:
        Refused: STORE_MISMATCH.
    """
    if location is None:
        return
    base = os.path.dirname(location.rstrip("/")) or "/"
    mount = container.mount_of(base)
    if mount is None or mount.point == "/":
        return
    with closing_fd(container.open_root()) as root:
        try:
            held = fds.openat2(root, os.fsencode(base.lstrip("/") or "."), os.O_PATH, resolve=_FOLLOW)
        except OSError:
            return
        with closing_fd(held):
            theirs, ours = os.fstat(held), os.stat(store)
    if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
        message = f"{base} in the container is another directory than the agent's store {store}."
        raise Refused(Reason.STORE_MISMATCH, message)


def write_signal(
    container: Container, marker: Marker, *, signals: Signals, runtime: RuntimeContainer | None
) -> str | None:
    """Write the signal file; return its path in the container, None when the container wants none.

    Where the container's own mount refuses it and it is the node's folder of signals, the agent's mount of that
    folder is used.

    Raises:
        CaptureFailed: WRITE_FAILED.
        Refused: APP_NOT_FOUND, the container is gone.
    """
    path = signalfile.path_in(container)
    if path is None:
        return None
    try:
        signalfile.write(container, marker)
    except CaptureFailed:
        if runtime is None or not signals.mounted_at or not _write_beside(path, marker, signals, runtime):
            raise
    return path


def _write_beside(path: str, marker: Marker, signals: Signals, runtime: RuntimeContainer) -> bool:
    """Write through the agent's own mount of the signals folder; whether *path* lies in it."""
    folder = signals.host_path.rstrip("/")
    for mount in sorted(runtime.mounts, key=lambda each: len(each.container_path), reverse=True):
        point = mount.container_path.rstrip("/")
        if not path.startswith(point + "/"):
            continue
        if mount.host_path.rstrip("/") != folder and not mount.host_path.startswith(folder + "/"):
            return False
        below = (mount.host_path.rstrip("/")[len(folder) :] + "/" + path[len(point) + 1 :]).strip("/")
        parent, name = fds.split(os.fsencode(below))
        try:
            with (
                closing_fd(os.open(signals.mounted_at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as top,
                fds.opened(top, parent) as directory,
            ):
                write_file(directory, name, marker.to_json())
        except OSError:
            return False
        return True
    return False


def read_signal(container: Container) -> dict[str, object]:
    """Return what the container's signal file says; empty when there is none, or it makes no sense.

    Raises:
        Refused: APP_NOT_FOUND, the container is gone.
    """
    path = signalfile.path_in(container)
    data = container.read_file(path) if path else None
    with suppress(ValueError, RecursionError):
        found = json.loads(data or b"{}")
        return found if isinstance(found, dict) else {}
    return {}
