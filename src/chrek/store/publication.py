"""The steps that make a staged directory the checkpoint of its id, in their order.

::

    describe    texts of manifest and marker, read back as a reader would
    seal        files flushed, then the marker written: it vouches for what is on stable storage
    install     renamed to a generation of its own; nobody sees it yet
    switch      the id's link renamed over the old one: this is the moment; the old one goes to the trash
    take_back   undoes install when switch failed

The id's lock is held all the time. Only ``rename`` without flags is used: ``RENAME_EXCHANGE`` would swap two
directories in one call, but NFS and FUSE do not have it, and those are what shared stores are on.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from chrek.artifact import is_pool_blob
from chrek.artifact import manifest as manifests
from chrek.artifact import marker as markers
from chrek.errors import Reason, Refused
from chrek.store import flush, layout, trash
from chrek.store.recovery import generations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chrek.artifact import tree
    from chrek.artifact.manifest import Manifest
    from chrek.artifact.marker import Marker
    from chrek.store.layout import Store


class Publication:
    """The publication of one staged directory *fd*; every step raises OSError or ValueError when it fails."""

    def __init__(self, store: Store, checkpoint_id: str, fd: int) -> None:
        self._store = store
        self._id = checkpoint_id
        self._fd = fd

    def describe(self, manifest: Manifest, location: str, extra: Mapping[str, object]) -> tuple[bytes, Marker]:
        """Return the texts of the manifest and the marker; a reader would accept both."""
        if manifest.checkpoint_id != self._id:
            raise ValueError(f"the manifest is of {manifest.checkpoint_id!r}")
        try:
            text = manifest.to_json()
        except Refused as error:
            raise ValueError(error.message) from error
        marker = markers.Marker(
            checkpoint_id=self._id,
            checkpoint_path=location,
            timestamp=manifest.created,
            success=True,
            manifest_sha256=manifests.manifest_digest(text),
            extra=extra,
        )
        markers.read_sealed_marker(marker.to_sealed_json())
        return text, marker

    def seal(self, entries: Sequence[tree.Entry], manifest: Manifest, text: bytes, marker: Marker) -> None:
        """Flush every file and the manifest, and only then write the marker; *entries* is all that is there."""
        _compare(entries, manifest)
        write_file(self._fd, manifests.FILE_NAME, text)
        flush.flush_files(self._fd, [*manifest.files, manifests.FILE_NAME])
        write_file(self._fd, markers.FILE_NAME, marker.to_sealed_json())
        flush.flush_files(self._fd, [markers.FILE_NAME])
        flush.flush_directories(self._fd, [entry.path for entry in entries if entry.is_directory])

    def install(self) -> int:
        """Rename the directory to a generation of its own; nobody sees it yet."""
        store, checkpoint_id = self._store, self._id
        layout.make_directory(store.fd, f"{layout.GENERATIONS}/{checkpoint_id}")
        number = max(generations(store, checkpoint_id), default=0) + 1
        layout.rename(store, f"{layout.STAGING}/{checkpoint_id}", layout.target(checkpoint_id, number))
        layout.sync_path(store.fd, f"{layout.GENERATIONS}/{checkpoint_id}")
        layout.sync_path(store.fd, layout.STAGING)
        return number

    def switch(self, generation: int) -> list[str]:
        """Let the id's link point to the generation; returns what failed after that."""
        store, checkpoint_id = self._store, self._id
        require_replaceable(store, checkpoint_id)
        old = layout.find(store, checkpoint_id)
        pending = f"{layout.LINKS}/{checkpoint_id}"
        with layout.parent(store.fd, pending) as (links, name):
            os.symlink(layout.target(checkpoint_id, generation), name, dir_fd=links)
        if old is not None and old.generation == 0:
            # A link cannot be renamed over a directory. While neither has the name, readers use the pending link.
            layout.sync_path(store.fd, layout.LINKS)
            trashed = trash.move_to_trash(store, checkpoint_id, checkpoint_id)
            try:
                layout.rename(store, pending, checkpoint_id)
            except BaseException:
                layout.rename(store, trashed, checkpoint_id)
                raise
        else:
            layout.rename(store, pending, checkpoint_id)
        try:
            layout.sync_directory(store.fd)
            if old is not None and old.generation != 0 and layout.exists(store.fd, old.path):
                trash.move_to_trash(store, old.path, checkpoint_id)
        except OSError as error:
            return [f"the replaced checkpoint could not be put away: {error}"]
        return []

    def take_back(self, generation: int) -> None:
        """Make a generation that could not be linked the staging directory again, so that it is discarded."""
        store, checkpoint_id = self._store, self._id
        if _linked(store, checkpoint_id) == layout.target(checkpoint_id, generation):
            return  # interrupted after the rename: it is published
        with contextlib.suppress(FileNotFoundError), layout.parent(store.fd, f"{layout.LINKS}/x") as (links, _):
            os.unlink(checkpoint_id, dir_fd=links)
        layout.rename(store, layout.target(checkpoint_id, generation), f"{layout.STAGING}/{checkpoint_id}")


def write_file(at: int, name: str, contents: bytes) -> None:
    """Write a new file with mode 0600 below the directory *at*; it is not flushed.

    Raises:
        OSError: it exists or cannot be written.
    """
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=at)
    try:
        view = memoryview(contents)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def require_replaceable(store: Store, checkpoint_id: str) -> None:
    """Refuse to replace what is not a checkpoint; an empty directory, made for a mount, is no loss."""
    try:
        place = layout.find(store, checkpoint_id)
    except Refused as error:
        raise Refused(Reason.ID_IN_USE_DIFFERENT, error.message) from error
    if place is None or place.generation != 0 or layout.looks_like_checkpoint(store.fd, place.path):
        return
    try:
        os.rmdir(checkpoint_id, dir_fd=store.fd)
    except OSError as error:
        raise Refused(
            Reason.ID_IN_USE_DIFFERENT,
            f"{store.path}/{checkpoint_id} is a directory, but not a checkpoint.",
            cure="Use another id, or move that directory away.",
        ) from error


def _linked(store: Store, checkpoint_id: str) -> str | None:
    try:
        return os.readlink(checkpoint_id, dir_fd=store.fd)
    except OSError:
        return None


def _compare(entries: Sequence[tree.Entry], manifest: Manifest) -> None:
    sizes = {entry.path: entry.status.st_size for entry in entries if not entry.is_directory}
    expected = {path: entry.size for path, entry in manifest.files.items()}
    if sizes != expected:
        differing = sorted(path for path in sizes.keys() | expected.keys() if sizes.get(path) != expected.get(path))
        raise ValueError(f"the manifest and the files differ in {', '.join(differing[:5])}")
    for entry in entries:
        if not entry.is_directory and entry.status.st_nlink > 1 and not is_pool_blob(entry.path):
            raise ValueError(f"{entry.path} has {entry.status.st_nlink} hard links")
