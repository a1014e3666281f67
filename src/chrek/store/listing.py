"""What is in a store, broken checkpoints included, each with what is wrong with it.

Only markers and manifests are read, so listing costs milliseconds a checkpoint; whether the bulk data is what
the manifest says is a matter for `Checkpoint.verify`. Writes nothing and takes no lock.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chrek.artifact.names import is_checkpoint_id, unix_time
from chrek.errors import ChrekError
from chrek.store import layout, pins
from chrek.store.opening import open_checkpoint

if TYPE_CHECKING:
    from chrek.artifact.checkpoint import Checkpoint
    from chrek.store.layout import Store


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The few things of a complete checkpoint that a list shows; sizes in bytes, *created* in Unix seconds."""

    created: float
    stored_bytes: int
    memory_bytes: int
    files: int
    processes: int
    command: tuple[str, ...]
    host: str
    image: str | None
    identity: str
    """The digest of its manifest: a checkpoint that replaced it has another one."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint of a store: a *summary*, or the *problem* that keeps it from being used."""

    checkpoint_id: str
    pinned: bool
    summary: Summary | None = None
    problem: ChrekError | None = None


def list_checkpoints(store: Store) -> tuple[Listed, ...]:
    """Return every checkpoint in the store, by id; other people's files and directories are left out."""
    pinned = pins.pinned_ids(store)
    names = {*layout.names(store.fd), *layout.private_ids(store, layout.LINKS)}
    ids = sorted(name for name in names if is_checkpoint_id(name))
    return tuple(listed for name in ids if (listed := _look_at(store, name, pinned=name in pinned)) is not None)


def summarize(checkpoint: Checkpoint) -> Summary:
    """Return the summary of an open checkpoint."""
    manifest = checkpoint.manifest
    return Summary(
        created=unix_time(manifest.created),
        stored_bytes=manifest.stored_bytes,
        memory_bytes=manifest.memory.bytes,
        files=len(manifest.files),
        processes=len(manifest.application.processes),
        command=manifest.provenance.command,
        host=manifest.provenance.host,
        image=manifest.provenance.image,
        identity=checkpoint.marker.manifest_sha256 or "",
    )


def _look_at(store: Store, checkpoint_id: str, *, pinned: bool) -> Listed | None:
    try:
        with open_checkpoint(store, checkpoint_id) as checkpoint:
            return Listed(checkpoint_id=checkpoint_id, pinned=pinned, summary=summarize(checkpoint))
    except ChrekError as error:
        return (
            Listed(checkpoint_id=checkpoint_id, pinned=pinned, problem=error)
            if _is_ours(store, checkpoint_id)
            else None
        )


def _is_ours(store: Store, name: str) -> bool:
    """Whether it is worth a line: a link, or a directory with a manifest or a marker."""
    try:
        mode = os.stat(name, dir_fd=store.fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and layout.looks_like_checkpoint(store.fd, name))
