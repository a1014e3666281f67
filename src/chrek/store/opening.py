"""Opening the checkpoint of an id for reading, while others may replace or delete it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from chrek.artifact import tree
from chrek.artifact.checkpoint import Checkpoint, open_checkpoint_directory
from chrek.artifact.names import checkpoint_id as checked_id
from chrek.errors import Reason, Refused
from chrek.store import layout

if TYPE_CHECKING:
    from chrek.store.layout import Store

# Each turn means that the checkpoint was replaced within microseconds; nobody replaces it that often in a row.
_TRIES: Final = 10


def open_checkpoint(store: Store, checkpoint_id: str) -> Checkpoint:
    """Open a complete checkpoint; marker, manifest and format version are checked.

    What is opened stays readable even if it is replaced or deleted meanwhile. Nothing is written.

    Raises:
        UsageError: ``BAD_ID``.
        Refused: ``NOT_FOUND``, ``CORRUPT``, ``FORMAT_TOO_NEW``.
    """
    checked_id(checkpoint_id)
    for _ in range(_TRIES):
        place = layout.find(store, checkpoint_id)
        if place is None:
            break
        try:
            fd = tree.open_directory(store.fd, place.path)
        except FileNotFoundError:
            continue  # replaced between the two: look again
        except OSError as error:
            raise Refused(Reason.CORRUPT, f"{place.path} in {store.path} cannot be opened: {error}.") from error
        return open_checkpoint_directory(fd, checkpoint_id, path=f"{store.path}/{place.path}")
    raise Refused(Reason.NOT_FOUND, f"There is no checkpoint {checkpoint_id!r} in {store.path}.")


def identity(store: Store, checkpoint_id: str) -> str:
    """Return what tells the directory that an id has now from any it had before or gets later; empty for none."""
    place = layout.find(store, checked_id(checkpoint_id))
    if place is None:
        return ""
    try:
        return f"{place.path} {os.stat(place.path, dir_fd=store.fd, follow_symlinks=False).st_ino}"
    except FileNotFoundError:
        return ""
