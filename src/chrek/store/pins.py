"""Pins: ids that garbage collection never takes, one empty file each."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from chrek.artifact.names import checkpoint_id as checked_id
from chrek.store import layout
from chrek.store.space import change_failed

if TYPE_CHECKING:
    from chrek.store.layout import Store


def pin(store: Store, checkpoint_id: str) -> None:
    """Keep an id from garbage collection; it need not exist yet.

    Raises:
        UsageError: ``BAD_ID``.
        ChrekError: ``WRITE_FAILED`` or ``NO_SPACE``: the store cannot be written.
    """
    checked_id(checkpoint_id)
    try:
        pins = store.private(layout.PINS, create=True)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            os.close(os.open(checkpoint_id, flags, 0o600, dir_fd=pins))
            layout.sync_directory(pins)
        finally:
            os.close(pins)
    except OSError as error:
        raise change_failed(error, f"Pinning {checkpoint_id!r}") from error


def unpin(store: Store, checkpoint_id: str) -> None:
    """Let garbage collection have an id again; not being pinned is no error.

    Raises:
        UsageError: ``BAD_ID``.
        ChrekError: ``WRITE_FAILED`` or ``NO_SPACE``: the store cannot be written.
    """
    checked_id(checkpoint_id)
    try:
        with contextlib.suppress(FileNotFoundError), layout.parent(store.fd, f"{layout.PINS}/x") as (pins, _):
            os.unlink(checkpoint_id, dir_fd=pins)
            layout.sync_directory(pins)
    except OSError as error:
        raise change_failed(error, f"Unpinning {checkpoint_id!r}") from error


def pinned_ids(store: Store) -> frozenset[str]:
    """Return all pinned ids."""
    return frozenset(layout.private_ids(store, layout.PINS))
