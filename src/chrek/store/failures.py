"""Failures: word of an id's last capture that came to nothing, for whoever waits for its checkpoint.

One file an id, as the signal file has it, written anew by each capture that fails and removed by one that works. A
waiting container reads it where it sees the store, and so does the agent of its node, whichever node the
capture failed on. It counts for those only who waited before it was written, so an old one says nothing to a new wait.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import TYPE_CHECKING, Final

from chrek.artifact.marker import MAX_BYTES, Marker, read_marker
from chrek.artifact.names import checkpoint_id as checked_id
from chrek.errors import ChrekError
from chrek.store import layout
from chrek.store.publication import write_file
from chrek.store.space import change_failed

if TYPE_CHECKING:
    from chrek.store.layout import Store

KEEP_SECONDS: Final = 3600.0
"""How long a record stays at least; nobody waits that long without having looked."""


def note(store: Store, failure: Marker) -> None:
    """Leave word that a capture failed; it replaces what was said before.

    Raises:
        ChrekError: ``WRITE_FAILED`` or ``NO_SPACE``: the store cannot be written.
    """
    checked_id(failure.checkpoint_id)
    # No id begins with a dot.
    temporary = f".{os.getpid()}.{failure.checkpoint_id}"
    try:
        folder = store.private(layout.FAILED, create=True)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            write_file(folder, temporary, failure.to_json())
            os.rename(temporary, failure.checkpoint_id, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise change_failed(error, f"Noting that {failure.checkpoint_id!r} failed") from error


def forget(store: Store, checkpoint_id: str) -> None:
    """Take back what was said; nothing being there is no error.

    Raises:
        ChrekError: ``WRITE_FAILED``: the store cannot be written.
    """
    checked_id(checkpoint_id)
    try:
        with contextlib.suppress(FileNotFoundError), layout.parent(store.fd, f"{layout.FAILED}/x") as (folder, _):
            os.unlink(checkpoint_id, dir_fd=folder)
    except OSError as error:
        raise change_failed(error, f"Forgetting the failure of {checkpoint_id!r}") from error


def find(store: Store, checkpoint_id: str, *, since: float) -> Marker | None:
    """Return the failure that was noted after *since* (Unix seconds), None when there is none that can be read."""
    try:
        with layout.parent(store.fd, f"{layout.FAILED}/x") as (folder, _):
            fd = os.open(checkpoint_id, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_mtime <= since:
                return None
            found = read_marker(file.read(MAX_BYTES), document=f"{layout.FAILED}/{checkpoint_id}")
    except (OSError, ChrekError):
        return None
    return None if found.success else found


def remove_old(store: Store, *, now: float | None = None) -> None:
    """Remove records that nobody can be waiting for any more; what cannot be removed does no harm."""
    limit = (time.time() if now is None else now) - KEEP_SECONDS
    for name in layout.private_ids(store, layout.FAILED):
        with contextlib.suppress(OSError), layout.parent(store.fd, f"{layout.FAILED}/x") as (folder, _):
            if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < limit:
                os.unlink(name, dir_fd=folder)
