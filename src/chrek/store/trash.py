"""Where replaced and deleted checkpoints wait until no replica can still be reading them.

A reader holds a descriptor and no lock (its mount may be read-only), so nothing says when the last one is
done; time has to. The moment of the move is in the name: the times of a renamed directory are its own.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chrek.artifact.names import is_checkpoint_id
from chrek.store import layout

if TYPE_CHECKING:
    from chrek.store.layout import Store

GRACE_SECONDS: Final = 3600.0
"""How long a checkpoint stays in the trash: reading 100 GB at 30 MB/s takes an hour."""

_NAME = re.compile(r"([0-9]{1,12})\.([0-9a-f]{8})\.(.+)", re.ASCII)


@dataclass(frozen=True)
class Trashed:
    """One directory in the trash; *since* is the Unix time in seconds at which it came there."""

    name: str
    checkpoint_id: str
    since: int


def move_to_trash(store: Store, path: str, checkpoint_id: str) -> str:
    """Rename something in the store into the trash; returns its path there.

    Raises:
        OSError: the rename failed; it is still where it was.
    """
    layout.make_directory(store.fd, layout.TRASH)
    trashed = f"{layout.TRASH}/{int(time.time())}.{secrets.token_hex(4)}.{checkpoint_id}"
    layout.rename(store, path, trashed)
    return trashed


def list_trash(store: Store) -> list[Trashed]:
    """Return what ChReK put into the trash, oldest first; strangers' entries are left out."""
    try:
        trash = store.private(layout.TRASH)
    except FileNotFoundError:
        return []
    try:
        matches = [match for name in layout.names(trash) if (match := _NAME.fullmatch(name))]
    finally:
        os.close(trash)
    found = [Trashed(match[0], match[3], int(match[1])) for match in matches if is_checkpoint_id(match[3])]
    return sorted(found, key=lambda trashed: trashed.since)


def purge(store: Store, name: str) -> None:
    """Remove a directory from the trash for good; another process may be doing the same.

    Raises:
        OSError: something in it cannot be removed.
    """
    trash = store.private(layout.TRASH)
    try:
        remove_tree(trash, name)
    finally:
        os.close(trash)


def remove_tree(at: int, name: str) -> None:
    """Remove a directory and all below it, never through a link; not being there is no error.

    Raises:
        OSError: something cannot be removed.
    """
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=at)
        else:
            os.unlink(name, dir_fd=at)
    except FileNotFoundError:
        # Two collectors at once: each finds what the other has just removed. Whoever comes last has it empty.
        if layout.exists(at, name):
            remove_tree(at, name)
    except RecursionError as error:
        raise OSError(f"{name} is nested too deep to be removed") from error
