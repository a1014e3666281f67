"""Writing a checkpoint where nobody reads it, and publishing it in one step.

::

    with Staging.create(store, id) as staging:       the id's lock; debris of dead writers is removed
        ...                                          write files below staging.fd
        files = staging.digest(known=shards)         digests of all that the writers did not digest themselves
        published = staging.publish(Manifest(...))   flushed, renamed, linked
                                                     left without publish: everything written is removed

Only ``rename`` without flags is used. ``RENAME_EXCHANGE`` would swap two directories in one call, but NFS
and FUSE do not have it, and those are what shared stores are on.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chrek.artifact import manifest as manifests
from chrek.artifact import marker as markers
from chrek.artifact import tree
from chrek.artifact.digest import FileEntry, hash_file
from chrek.artifact.names import checkpoint_id as checked_id
from chrek.errors import CaptureFailed, Reason, Refused
from chrek.store import flush, layout, trash
from chrek.store.locks import IdLock, Purpose
from chrek.store.recovery import generations, recover, remove_staging
from chrek.store.space import require_space, write_failed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from chrek.artifact.manifest import Manifest
    from chrek.artifact.marker import Marker
    from chrek.store.layout import Store

_OWN: Final = frozenset({manifests.FILE_NAME, markers.FILE_NAME})


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint that readers now see; *warnings* are things that failed after that moment."""

    checkpoint_id: str
    generation: int
    path: str
    marker: Marker
    warnings: tuple[str, ...] = ()


class Staging:
    """A checkpoint being written: the only writer of its id, until it is published or discarded."""

    def __init__(self, store: Store, lock: IdLock, fd: int) -> None:
        self.fd = fd
        self._store = store
        self._lock = lock

    @classmethod
    def create(
        cls, store: Store, checkpoint_id: str, *, need: int | None = None, largest_file: int = 0, files: int = 0
    ) -> Self:
        """Take the id's lock and make an empty directory.

        *need* and *largest_file* are bytes, and *files* a number, that must fit; see `require_space`.

        Raises:
            UsageError: ``BAD_ID``.
            Refused: ``CAPTURE_IN_PROGRESS``, ``NO_SPACE``, or ``ID_IN_USE_DIFFERENT`` when something that is not a
                checkpoint has the name.
            CaptureFailed: ``WRITE_FAILED`` or ``NO_SPACE``: the store cannot be written.
        """
        checked_id(checkpoint_id)
        try:
            lock = IdLock.acquire(store, checkpoint_id, Purpose.CAPTURE)
            try:
                recover(store, lock)
                _require_replaceable(store, checkpoint_id)
                if need is not None:
                    require_space(store.fd, need, largest_file=largest_file, files=files)
                return cls(store, lock, _make_directory(store, checkpoint_id))
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise write_failed(error, f"into the store {store.path!r}") from error

    @property
    def checkpoint_id(self) -> str:
        """The id that is being written."""
        return self._lock.checkpoint_id

    @property
    def path(self) -> str:
        """The directory's path, for people and for programs that take no descriptor."""
        return f"{self._store.path}/{layout.STAGING}/{self.checkpoint_id}"

    def make_directory(self, path: str) -> int:
        """Make a directory below the checkpoint, with its parents, and open it; the caller closes it.

        Raises:
            OSError: it cannot be made.
        """
        for cut in [index for index, letter in enumerate(path) if letter == "/"] + [len(path)]:
            try:
                os.mkdir(path[:cut], 0o700, dir_fd=self.fd)
            except FileExistsError:
                continue
        return tree.open_directory(self.fd, path)

    def digest(
        self, *, known: Mapping[str, FileEntry] | None = None, workers: int | None = None
    ) -> dict[str, FileEntry]:
        """Return an entry for every file; those in *known* were digested by their writers.

        Directories without files are removed.

        Raises:
            CaptureFailed: ``WRITE_FAILED``: something is no regular file, has a bad name, or cannot be read.
        """
        entries = dict(known or {})
        try:
            found = [entry.path for entry in self._scan() if not entry.is_directory and entry.path not in _OWN]
            with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
                todo = [path for path in found if path not in entries]
                entries.update(zip(todo, pool.map(self._digest_one, todo), strict=True))
        except (OSError, ValueError) as error:
            raise CaptureFailed(Reason.WRITE_FAILED, f"Reading back the checkpoint failed: {error}.") from error
        return dict(sorted(entries.items()))

    def publish(
        self, manifest: Manifest, *, location: str | None = None, extra: Mapping[str, object] | None = None
    ) -> Published:
        """Make this the checkpoint of its id; the old one goes to the trash.

        *location* is what the marker says as ``checkpoint_path`` (default: the path in the store), *extra*
        further keys of the marker. Afterwards this object is closed.

        Raises:
            CaptureFailed: ``NO_SPACE``, ``WRITE_FAILED``, or ``ID_IN_USE_DIFFERENT`` when something else took the name
                meanwhile; the old checkpoint, if there was one, is still in place.
        """
        path = f"{self._store.path}/{self.checkpoint_id}"
        try:
            text, marker = self._describe(manifest, location or path, extra or {})
            self._seal(manifest, text, marker)
            generation = self._install()
            try:
                warnings = self._switch(generation)
            except BaseException:
                self._take_back(generation)
                raise
        except (OSError, ValueError) as error:
            failure = error if isinstance(error, OSError) else OSError(str(error))
            raise write_failed(failure, f"checkpoint {self.checkpoint_id!r}") from error
        except Refused as error:
            # The application has been frozen by now: "nothing was touched" would be wrong.
            raise CaptureFailed(error.reason, error.message, cure=error.cure) from error
        published = Published(
            checkpoint_id=self.checkpoint_id, generation=generation, path=path, marker=marker, warnings=tuple(warnings)
        )
        self._close()
        return published

    def discard(self) -> None:
        """Remove everything that was written and let go of the id; may be called again.

        Raises:
            OSError: something cannot be removed; the next capture of the id tries again.
        """
        if self.fd < 0:
            return
        try:
            remove_staging(self._store, self.checkpoint_id)
        finally:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.discard()
            return
        # What went wrong first is what the user has to know; the next capture removes what is left.
        with contextlib.suppress(OSError):
            self.discard()

    def _scan(self) -> list[tree.Entry]:
        """Everything below; empty directories are removed on the way."""
        entries = list(tree.scan(self.fd))
        used = {path[:cut] for path in _files(entries) for cut in range(len(path)) if path[cut] == "/"}
        for entry in reversed(entries):  # children first
            if entry.is_directory and entry.path not in used:
                os.rmdir(entry.path, dir_fd=self.fd)
        return [entry for entry in entries if not entry.is_directory or entry.path in used]

    def _digest_one(self, path: str) -> FileEntry:
        with tree.opened_file(self.fd, path) as fd:
            return hash_file(fd)

    def _describe(self, manifest: Manifest, location: str, extra: Mapping[str, object]) -> tuple[bytes, Marker]:
        """Return the texts of the manifest and the marker; a reader would accept both."""
        if manifest.checkpoint_id != self.checkpoint_id:
            raise ValueError(f"the manifest is of {manifest.checkpoint_id!r}")
        try:
            text = manifest.to_json()
        except Refused as error:
            raise ValueError(error.message) from error
        marker = markers.Marker(
            checkpoint_id=self.checkpoint_id,
            checkpoint_path=location,
            timestamp=manifest.created,
            success=True,
            manifest_sha256=manifests.manifest_digest(text),
            extra=extra,
        )
        markers.read_sealed_marker(marker.to_sealed_json())
        return text, marker

    def _seal(self, manifest: Manifest, text: bytes, marker: Marker) -> None:
        """Write manifest and marker around files that are already flushed: the marker vouches for them."""
        entries = self._scan()
        _compare(entries, manifest)
        write_file(self.fd, manifests.FILE_NAME, text)
        flush.flush_files(self.fd, [*manifest.files, manifests.FILE_NAME])
        write_file(self.fd, markers.FILE_NAME, marker.to_sealed_json())
        flush.flush_files(self.fd, [markers.FILE_NAME])
        flush.flush_directories(self.fd, [entry.path for entry in entries if entry.is_directory])

    def _install(self) -> int:
        """Rename the directory to a generation of its own; nobody sees it yet."""
        store, checkpoint_id = self._store, self.checkpoint_id
        layout.make_directory(store.fd, f"{layout.GENERATIONS}/{checkpoint_id}")
        number = max(generations(store, checkpoint_id), default=0) + 1
        layout.rename(store, f"{layout.STAGING}/{checkpoint_id}", layout.target(checkpoint_id, number))
        layout.sync_path(store.fd, f"{layout.GENERATIONS}/{checkpoint_id}")
        layout.sync_path(store.fd, layout.STAGING)
        return number

    def _switch(self, generation: int) -> list[str]:
        """Let the id's link point to the generation; returns what failed after that."""
        store, checkpoint_id = self._store, self.checkpoint_id
        _require_replaceable(store, checkpoint_id)
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

    def _take_back(self, generation: int) -> None:
        """Make a generation that could not be linked the staging directory again, so that it is discarded."""
        store, checkpoint_id = self._store, self.checkpoint_id
        if _linked(store, checkpoint_id) == layout.target(checkpoint_id, generation):
            return  # interrupted after the rename: it is published
        with contextlib.suppress(FileNotFoundError), layout.parent(store.fd, f"{layout.LINKS}/x") as (links, _):
            os.unlink(checkpoint_id, dir_fd=links)
        layout.rename(store, layout.target(checkpoint_id, generation), f"{layout.STAGING}/{checkpoint_id}")

    def _close(self) -> None:
        os.close(self.fd)
        self.fd = -1
        self._lock.release()


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


def _make_directory(store: Store, checkpoint_id: str) -> int:
    # All of them now: what publishing and deleting need must not have to be made when the disk is full.
    for name in (layout.GENERATIONS, layout.LINKS, layout.TRASH):
        layout.make_directory(store.fd, name)
    staging = store.private(layout.STAGING, create=True)
    try:
        os.mkdir(checkpoint_id, 0o700, dir_fd=staging)
        return tree.open_directory(staging, checkpoint_id)
    finally:
        os.close(staging)


def _linked(store: Store, checkpoint_id: str) -> str | None:
    try:
        return os.readlink(checkpoint_id, dir_fd=store.fd)
    except OSError:
        return None


def _require_replaceable(store: Store, checkpoint_id: str) -> None:
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


def _files(entries: list[tree.Entry]) -> list[str]:
    return [entry.path for entry in entries if not entry.is_directory]


def _compare(entries: list[tree.Entry], manifest: Manifest) -> None:
    sizes = {entry.path: entry.status.st_size for entry in entries if not entry.is_directory}
    expected = {path: entry.size for path, entry in manifest.files.items()}
    if sizes != expected:
        differing = sorted(path for path in sizes.keys() | expected.keys() if sizes.get(path) != expected.get(path))
        raise ValueError(f"the manifest and the files differ in {', '.join(differing[:5])}")
    for entry in entries:
        if not entry.is_directory and entry.status.st_nlink > 1:
            raise ValueError(f"{entry.path} has {entry.status.st_nlink} hard links")
