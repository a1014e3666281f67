"""Deleting a checkpoint: gone for whoever opens it from now on, still whole for who has it open."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from chrek.artifact.names import checkpoint_id as checked_id
from chrek.errors import Reason, Refused
from chrek.store import layout, trash
from chrek.store.locks import IdLock, Purpose
from chrek.store.recovery import generations, recover
from chrek.store.space import change_failed

if TYPE_CHECKING:
    from chrek.store.layout import Store


def delete(store: Store, checkpoint_id: str) -> None:
    """Move a checkpoint, whole or broken, to the trash; `collect` removes it from there after the grace period.

    Raises:
        UsageError: ``BAD_ID``.
        Refused: ``NOT_FOUND``, ``CAPTURE_IN_PROGRESS``, or ``CORRUPT`` when something else than a checkpoint has
            the name.
        ChrekError: ``WRITE_FAILED`` or ``NO_SPACE``: the store cannot be written.
    """
    checked_id(checkpoint_id)
    if layout.find(store, checkpoint_id) is None:  # asked first: an id that is not there leaves no lock file
        raise not_found(store, checkpoint_id)
    try:
        with IdLock.acquire(store, checkpoint_id, Purpose.CLEANUP) as lock:
            recover(store, lock)
            delete_locked(store, lock)
            tidy(store, lock)
    except OSError as error:
        raise change_failed(error, f"Deleting {checkpoint_id!r}") from error


def delete_locked(store: Store, lock: IdLock) -> None:
    """Delete the checkpoint whose lock is held and whose debris is gone.

    Raises:
        Refused: as `delete`.
        OSError: the store cannot be written.
    """
    checkpoint_id = lock.checkpoint_id
    place = layout.find(store, checkpoint_id)
    if place is None:
        raise not_found(store, checkpoint_id)
    if place.generation == 0:
        if not layout.looks_like_checkpoint(store.fd, place.path):
            raise Refused(
                Reason.NOT_FOUND,
                f"{store.path}/{checkpoint_id} is a directory, but not a checkpoint.",
                cure="Remove it by hand if nobody needs it.",
            )
        trash.move_to_trash(store, place.path, checkpoint_id)
        layout.sync_directory(store.fd)
        return
    os.unlink(checkpoint_id, dir_fd=store.fd)
    # On stable storage before the generation moves: a power cut must not leave a link to nothing.
    layout.sync_directory(store.fd)
    if layout.exists(store.fd, place.path):
        trash.move_to_trash(store, place.path, checkpoint_id)


def tidy(store: Store, lock: IdLock) -> None:
    """Remove the empty directory and the lock file of an id that has nothing left; ends the use of the lock."""
    if layout.exists(store.fd, lock.checkpoint_id) or generations(store, lock.checkpoint_id):
        return
    with contextlib.suppress(OSError), layout.parent(store.fd, f"{layout.GENERATIONS}/x") as (directory, _):
        os.rmdir(lock.checkpoint_id, dir_fd=directory)
    lock.remove()


def not_found(store: Store, checkpoint_id: str) -> Refused:
    """Return the error to raise when there is no such checkpoint."""
    return Refused(Reason.NOT_FOUND, f"There is no checkpoint {checkpoint_id!r} in {store.path}.")
