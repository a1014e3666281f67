"""Cleaning up after a writer that died: finish or forget its publication, remove its debris.

Called only with the id's lock held, so whatever lies about belongs to nobody alive. It may itself be
killed anywhere and is then simply run again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chrek.errors import Refused
from chrek.store import layout, trash

if TYPE_CHECKING:
    from chrek.store.layout import Store
    from chrek.store.locks import IdLock


def recover(store: Store, lock: IdLock) -> list[str]:
    """Bring one id into order; returns a line for each thing that was done.

    Raises:
        OSError: something cannot be moved or removed.
    """
    checkpoint_id = lock.checkpoint_id
    done = [*_settle_link(store, checkpoint_id), *_trash_unlinked(store, checkpoint_id)]
    if checkpoint_id in layout.private_ids(store, layout.STAGING):
        remove_staging(store, checkpoint_id)
        done.append("removed an unfinished capture")
    return done


def remove_staging(store: Store, checkpoint_id: str) -> None:
    """Remove what a capture had written."""
    staging = store.private(layout.STAGING)
    try:
        trash.remove_tree(staging, checkpoint_id)
    finally:
        os.close(staging)


def _settle_link(store: Store, checkpoint_id: str) -> list[str]:
    pending = f"{layout.LINKS}/{checkpoint_id}"
    if not layout.exists(store.fd, pending):
        return []
    if not layout.exists(store.fd, checkpoint_id) and _find(store, checkpoint_id) is not None:
        # Readers already see it through the pending link, so it must stay.
        layout.rename(store, pending, checkpoint_id)
        layout.sync_directory(store.fd)
        return ["finished a publication that was cut off"]
    with layout.parent(store.fd, pending) as (links, name):
        os.unlink(name, dir_fd=links)
    return ["forgot a publication that was cut off"]


def _trash_unlinked(store: Store, checkpoint_id: str) -> list[str]:
    current = _find(store, checkpoint_id)
    unlinked = [number for number in generations(store, checkpoint_id) if current is None or number != current]
    for number in unlinked:
        # It may have been the current one a moment ago and still have readers: not removed at once.
        trash.move_to_trash(store, layout.target(checkpoint_id, number), checkpoint_id)
    return [f"moved generation {number} to the trash" for number in unlinked]


def generations(store: Store, checkpoint_id: str) -> list[int]:
    """Return the numbers of an id's generations in ascending order; strangers' names are left out."""
    try:
        fd = store.private(f"{layout.GENERATIONS}/{checkpoint_id}")
    except FileNotFoundError:
        return []
    try:
        numbers = [layout.generation_number(name) for name in layout.names(fd)]
    finally:
        os.close(fd)
    return sorted(number for number in numbers if number is not None)


def _find(store: Store, checkpoint_id: str) -> int | None:
    try:
        place = layout.find(store, checkpoint_id)
    except Refused:  # a stranger's file has the name
        return None
    return None if place is None else place.generation
