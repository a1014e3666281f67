"""Where a pool's files are: handed over before a checkpoint, looked for after a restore.

A pool never writes into a checkpoint: that is published in one piece, by whoever takes it. It writes
into the *handover directory* beside it, and the files are adopted from there. Each pool of each
process has a directory of its own in it, ``<name>.<pid>``; the process id is the one inside the
container, the same after a restore.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from chrek.workload.lifecycle import read_marker
from chrek.workload.pool.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIABLE: Final = "CHREK_POOL_DIRECTORY"
LOCATION: Final = "DYN_CHECKPOINT_LOCATION"
HANDOVER: Final = ".handover"
GPU: Final = "gpu"
MARKER_KEY: Final = "gpu_directory"


def home(name: str) -> str:
    """Name of a pool's own directory; raises `PoolError` for a name that cannot be one."""
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise PoolError(f"{name!r} cannot be a pool's name: letters, digits, - and _ only")
    return f"{name}.{os.getpid()}"


def handover_directory() -> str:
    """Where pools leave their files.

    ``CHREK_POOL_DIRECTORY`` if set, else ``<store>/.handover/<id>/gpu`` beside the checkpoint's
    ``DYN_CHECKPOINT_LOCATION`` (names that start with a dot are never checkpoints). Raises `PoolError`
    if neither is set.
    """
    if explicit := os.environ.get(VARIABLE):
        return explicit
    if not (location := os.environ.get(LOCATION, "").rstrip("/")):
        raise PoolError(f"no directory for the pool's files: set {VARIABLE} or {LOCATION}")
    store, identity = os.path.split(location)
    return os.path.join(store, HANDOVER, identity, GPU)


def candidates(directory: str | None, written: str | None) -> Sequence[str]:
    """Directories in which a pool's files may be now, the most likely one first.

    `directory` is the caller's word and excludes the others: what the restore marker names (the
    storage may be mounted elsewhere), the published checkpoint, and `written`, where they were left.
    """
    if directory is not None:
        return [directory]
    marker, location = read_marker().get(MARKER_KEY), os.environ.get(LOCATION)
    published = os.path.join(location, GPU) if location else None
    return [place for place in (marker, published, written) if isinstance(place, str) and place]
