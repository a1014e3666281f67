"""Writing a checkpoint where nobody reads it, and publishing it in one step.

::

    with Staging.create(store, id) as staging:       the id's lock; debris of dead writers is removed
        ...                                          write files below staging.fd
        files = staging.digest(known=shards)         digests of all that the writers did not digest themselves
        published = staging.publish(Manifest(...))   flushed, renamed, linked
                                                     left without publish: everything written is removed

The steps of the publication itself are in `publication`.
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
from chrek.store import layout
from chrek.store.locks import IdLock, Purpose
from chrek.store.publication import Publication, require_replaceable
from chrek.store.recovery import recover, remove_staging
from chrek.store.space import require_space, write_failed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from chrek.artifact.manifest import Manifest
    from chrek.artifact.marker import Marker
    from chrek.store.layout import Store

_OWN: Final = frozenset({manifests.FILE_NAME, markers.FILE_NAME})

# From this size on all threads digest one file, below it each one of its own.
_LARGE: Final = 64 << 20


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
                require_replaceable(store, checkpoint_id)
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
            found = {entry.path: entry.status.st_size for entry in self._scan() if not entry.is_directory}
            threads = workers or os.cpu_count() or 1
            todo = found.keys() - entries.keys() - _OWN
            large = {path for path in todo if found[path] >= _LARGE}
            if len(large) >= threads:
                large.clear()  # a thread for each keeps all of them busy, and none waits for the end of a file
            with ThreadPoolExecutor(threads) as pool:
                small = sorted(todo - large)
                entries.update(zip(small, pool.map(self._digest_one, small), strict=True))
            entries.update({path: self._digest_one(path, threads) for path in large})
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
        steps = Publication(self._store, self.checkpoint_id, self.fd)
        try:
            text, marker = steps.describe(manifest, location or path, extra or {})
            steps.seal(self._scan(), manifest, text, marker)
            generation = steps.install()
            try:
                warnings = steps.switch(generation)
            except BaseException:
                steps.take_back(generation)
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
        files = [entry.path for entry in entries if not entry.is_directory]
        used = {path[:cut] for path in files for cut in range(len(path)) if path[cut] == "/"}
        for entry in reversed(entries):  # children first
            if entry.is_directory and entry.path not in used:
                os.rmdir(entry.path, dir_fd=self.fd)
        return [entry for entry in entries if not entry.is_directory or entry.path in used]

    def _digest_one(self, path: str, workers: int = 1) -> FileEntry:
        with tree.opened_file(self.fd, path) as fd:
            return hash_file(fd, workers=workers)

    def _close(self) -> None:
        os.close(self.fd)
        self.fd = -1
        self._lock.release()


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
