"""The directory of a store: its private names, and which directory is the checkpoint of an id.

Reading needs no lock and never writes: a store may be mounted read-only. How a link, a generation and
the window between two renames are read is written down in ``docs/format.md``, section 1.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chrek.artifact import manifest as manifests
from chrek.artifact import marker as markers
from chrek.artifact import tree
from chrek.artifact.names import is_checkpoint_id
from chrek.errors import Reason, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

GENERATIONS: Final = ".generations"
LINKS: Final = ".links"
STAGING: Final = ".staging"
LOCKS: Final = ".locks"
TRASH: Final = ".trash"
PINS: Final = ".pins"
FAILED: Final = ".failed"

PRIVATE: Final = (GENERATIONS, LINKS, STAGING, LOCKS, TRASH, PINS, FAILED)

_TARGET = re.compile(r"\.generations/([^/]+)/([1-9][0-9]{0,8})", re.ASCII)
_NUMBER = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_DIRECTORY_MODE: Final = 0o700


class Store:
    """An open store; close it, or use it as a context manager.

    *path* is for people and for programs that are given paths; everything here works by *fd*.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = False) -> Self:
        """Open the store at *path*; links on the way to it are the administrator's and are followed.

        Raises:
            Refused: ``NOT_FOUND`` when there is no such directory.
        """
        name = os.fspath(path)
        try:
            if create:
                os.makedirs(name, mode=_DIRECTORY_MODE, exist_ok=True)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(
                Reason.NOT_FOUND,
                f"The store {name!r} cannot be opened: {error.strerror}.",
                cure="Create the directory, or name another with --store or CHREK_STORE.",
            ) from error
        return cls(fd, name)

    def private(self, name: str, *, create: bool = False) -> int:
        """Open one of the `PRIVATE` directories; the caller closes it.

        Raises:
            FileNotFoundError: it is not there and *create* is false.
            OSError: it cannot be made or opened.
        """
        if create:
            make_directory(self.fd, name)
        return tree.open_directory(self.fd, name)

    def close(self) -> None:
        """Close the descriptor; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Place:
    """Where the checkpoint of an id is: *path* relative to the store; *generation* is 0 for a plain directory."""

    checkpoint_id: str
    path: str
    generation: int


def target(checkpoint_id: str, generation: int) -> str:
    """Return what the link of an id points to."""
    return f"{GENERATIONS}/{checkpoint_id}/{generation}"


def generation_number(name: str) -> int | None:
    """Return the number that a directory name stands for, or None if it is not one of a generation."""
    return int(name) if _NUMBER.fullmatch(name) else None


def find(store: Store, checkpoint_id: str) -> Place | None:
    """Return where the checkpoint of an id is, or None; it is not opened and may be incomplete.

    Raises:
        Refused: ``CORRUPT`` when something else has the name.
    """
    place = _look(store.fd, checkpoint_id, checkpoint_id)
    if place is None:
        # A publication may be between its last two renames, or may have been killed there.
        place = _look(store.fd, f"{LINKS}/{checkpoint_id}", checkpoint_id)
        if place is not None and (place.generation == 0 or not exists(store.fd, place.path)):
            return None
    return place


def _look(store: int, path: str, checkpoint_id: str) -> Place | None:
    try:
        with parent(store, path) as (directory, name):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                return Place(checkpoint_id, path, 0)
            link = os.readlink(name, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: not a link
            raise Refused(Reason.CORRUPT, f"{path!r} in the store cannot be read: {error.strerror}.") from error
        raise Refused(Reason.CORRUPT, f"{path!r} in the store is a {tree.file_kind(status.st_mode)}.") from error
    number = link_generation(link, checkpoint_id)
    if number is None:
        raise Refused(Reason.CORRUPT, f"{path!r} in the store is a link to {link[:80]!r}, which ChReK did not make.")
    return Place(checkpoint_id, link, number)


def link_generation(link: str, checkpoint_id: str) -> int | None:
    """Return the generation that a link of this id points to, or None if ChReK would not write such a link."""
    match = _TARGET.fullmatch(link)
    return int(match[2]) if match and match[1] == checkpoint_id else None


@contextmanager
def parent(at: int, path: str) -> Iterator[tuple[int, str]]:
    """Open the directory that holds *path* and yield it with the last name, for one call on that name.

    No component on the way may be a link: who can write to the store could make one that leads out of it.
    """
    above, _, name = path.rpartition("/")
    directory = tree.open_directory(at, above or ".")
    try:
        yield directory, name
    finally:
        os.close(directory)


def rename(store: Store, source: str, destination: str) -> None:
    """Move *source* to *destination*, both paths in the store and not links on the way.

    Raises:
        OSError: as rename(2); both are as they were.
    """
    with parent(store.fd, source) as (old, name), parent(store.fd, destination) as (new, new_name):
        os.rename(name, new_name, src_dir_fd=old, dst_dir_fd=new)


def exists(at: int, path: str) -> bool:
    """Whether anything has this name; no link is followed."""
    try:
        with parent(at, path) as (directory, name):
            os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def looks_like_checkpoint(at: int, path: str) -> bool:
    """Whether the directory has a manifest or a marker: only then may it be replaced or deleted."""
    return any(exists(at, f"{path}/{name}") for name in (markers.FILE_NAME, manifests.FILE_NAME))


def names(at: int) -> list[str]:
    """Return the names in an open directory, sorted."""
    # A descriptor of its own: a duplicate would share the position of whoever else reads the directory.
    own = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=at)
    try:
        return sorted(os.listdir(own))
    finally:
        os.close(own)


def private_ids(store: Store, name: str) -> list[str]:
    """Return the names in a private directory that are checkpoint ids; strangers' names are left out."""
    try:
        fd = store.private(name)
    except FileNotFoundError:
        return []
    try:
        return [entry for entry in names(fd) if is_checkpoint_id(entry)]
    finally:
        os.close(fd)


def make_directory(at: int, path: str) -> None:
    """Make a directory with mode 0700, durably, unless it is there."""
    with parent(at, path) as (directory, name):
        try:
            os.mkdir(name, _DIRECTORY_MODE, dir_fd=directory)
        except FileExistsError:
            return
        sync_directory(directory)


def sync_directory(fd: int) -> None:
    """Flush an open directory: the names in it are on stable storage afterwards."""
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems have no such operation on directories, because their servers write through.
        if error.errno not in {errno.EINVAL, errno.EROFS}:
            raise


def sync_path(at: int, path: str) -> None:
    """`sync_directory` by name."""
    fd = tree.open_directory(at, path)
    try:
        sync_directory(fd)
    finally:
        os.close(fd)


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """Yield a descriptor and close it afterwards."""
    try:
        yield fd
    finally:
        os.close(fd)
