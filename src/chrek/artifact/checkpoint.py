"""An opened checkpoint: its directory by descriptor, its marker and manifest already checked.

Everything is reached through the one descriptor: a checkpoint that is replaced or deleted while it is
read stays the one that was opened. Nothing is ever written. What is read here is trusted only as far
as the digests go, and those protect against damage, not against whoever can write to the store.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from chrek.artifact import manifest as manifests
from chrek.artifact import marker as markers
from chrek.artifact import tree
from chrek.artifact.digest import FileEntry
from chrek.artifact.verify import Level, Progress, Report, verify_files
from chrek.errors import Reason, Refused

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType
    from typing import Self

    from chrek.artifact.manifest import Manifest
    from chrek.artifact.marker import Marker


class Checkpoint:
    """A complete checkpoint, open for reading; close it, or use it as a context manager."""

    def __init__(self, *, fd: int, path: str, manifest: Manifest, marker: Marker) -> None:
        self.fd = fd
        self.path = path
        self.manifest = manifest
        self.marker = marker

    @property
    def id(self) -> str:
        """The checkpoint's id."""
        return self.manifest.checkpoint_id

    def open(self, path: str) -> int:
        """Open a file that the manifest names, for reading; the caller closes the descriptor.

        Raises:
            Refused: ``CORRUPT`` when it is missing, not a regular file, or of another size.
        """
        entry = self._entry(path)
        fd = self._open(path)
        size = os.fstat(fd).st_size
        if size != entry.size:
            os.close(fd)
            raise Refused(Reason.CORRUPT, f"{path} of checkpoint {self.id} has {size} bytes instead of {entry.size}.")
        return fd

    def read(self, path: str, *, limit: int = 64 << 20) -> bytes:
        """Return the contents of a file of at most *limit* bytes, compared with its digest.

        Raises:
            Refused: ``CORRUPT`` as `open`, or when the digest differs or the file is longer.
        """
        entry = self._entry(path)
        if entry.size > limit:
            raise Refused(Reason.CORRUPT, f"{path} of checkpoint {self.id} has {entry.size} bytes, more than {limit}.")
        fd = self.open(path)
        try:
            contents = b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
        finally:
            os.close(fd)
        if not _matches(entry, contents):
            raise Refused(Reason.CORRUPT, f"{path} of checkpoint {self.id} is damaged: its digest differs.")
        return contents

    def verify(
        self,
        level: Level = Level.FULL,
        *,
        workers: int | None = None,
        unread: Collection[str] = (),
        progress: Progress | None = None,
    ) -> Report:
        """Compare the directory with the manifest; every difference is in the report.

        Types, sizes, links, missing and added files are always looked at, and small files are read
        always; *level* says how much bulk data is. The contents of *unread* files are left to whoever reads
        them later and compares them then. *progress* is called with bytes done and to do, by
        one thread at a time.
        """
        return verify_files(
            self.fd,
            self.manifest.files,
            level=level,
            workers=workers or (os.cpu_count() or 1),
            unread=unread,
            progress=progress,
        )

    def close(self) -> None:
        """Close the directory; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, path: str) -> FileEntry:
        try:
            return self.manifest.files[path]
        except KeyError:
            raise Refused(Reason.CORRUPT, f"checkpoint {self.id} has no file {path!r}.") from None

    def _open(self, path: str) -> int:
        try:
            return tree.open_file(self.fd, path)
        except OSError as error:
            raise Refused(Reason.CORRUPT, f"{path} of checkpoint {self.id} cannot be read: {error}.") from error


def open_checkpoint_directory(fd: int, checkpoint_id: str, *, path: str) -> Checkpoint:
    """Check marker and manifest in the directory *fd*, which the result takes over and closes.

    *path* is for people. The version of the format is looked at before anything else in the manifest.

    Raises:
        Refused: ``NOT_FOUND`` without a marker, ``FORMAT_TOO_NEW``, ``CORRUPT``.
    """
    try:
        marker = markers.read_sealed_marker(_read(fd, path, markers.FILE_NAME, markers.MAX_BYTES))
        text = _read(fd, path, manifests.FILE_NAME, manifests.MAX_BYTES)
        if manifests.manifest_digest(text) != marker.manifest_sha256:
            raise Refused(Reason.CORRUPT, f"manifest.json in {path} is damaged: its digest differs.")
        manifest = manifests.read_manifest(text)
        for document, found in (("checkpoint.done", marker.checkpoint_id), ("manifest.json", manifest.checkpoint_id)):
            if found != checkpoint_id:
                raise Refused(
                    Reason.CORRUPT,
                    f"{document} in {path} is of checkpoint {found!r}.",
                    cure=f"Give the directory the name {found!r} again; a checkpoint's id cannot be changed.",
                )
    except BaseException:
        os.close(fd)
        raise
    return Checkpoint(fd=fd, path=path, manifest=manifest, marker=marker)


def _read(fd: int, path: str, name: str, limit: int) -> bytes:
    try:
        return tree.read_file(fd, name, limit=limit)
    except FileNotFoundError as error:
        reason = Reason.NOT_FOUND if name == markers.FILE_NAME else Reason.CORRUPT
        raise Refused(reason, f"There is no {name} in {path}.") from error
    except (OSError, ValueError) as error:
        raise Refused(Reason.CORRUPT, f"{name} in {path} cannot be read: {error}.") from error


def _matches(entry: FileEntry, contents: bytes) -> bool:
    bulk = entry.bulk
    if bulk is None:
        return entry.sha256 == hashlib.sha256(contents).hexdigest()
    view = memoryview(contents)
    return len(contents) == bulk.size and all(
        bulk.verify(index, view[bulk.extent(index)[0] :][: bulk.extent(index)[1]]) for index in range(bulk.count)
    )
