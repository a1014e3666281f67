"""Undoing what a restore changed in a container's files, also after the restoring process was killed.

Before anything in a directory tree is changed, a line that says how to undo it is appended to a log, and
what would be overwritten or deleted is moved aside. Both are in a directory ``.chrek-undo.TIME`` at the
tree's root (TIME is the root's own modification time, which making that directory changes). A process
that was killed anywhere leaves a log that any later process can undo: `Journal.find`, `Journal.undo`.

A line of the log says what is *about* to happen, so the last one may describe something that did not. Each
undo step therefore looks at what is there:

========  ============================================  ==============================================
record    before it is written                          undo
========  ============================================  ==============================================
keep P    P is a directory that will change             give P its recorded metadata
new P     nothing is at P                               delete what is at P
move P N  a file is at P, ``saved/N`` does not exist    if ``saved/N``: delete what is at P, rename back
dir P N   an empty directory is at P, no ``saved/N``    if ``saved/N``: delete what is at P, make P, delete
                                                        ``saved/N``
========  ============================================  ==============================================

Undone in reverse order, each step does nothing when it is repeated, so an undo that is killed is simply
started again (but for one system call: a root whose journal is gone keeps the wrong time if the process
dies before setting it). No step needs disk space but for directory entries: undoing works on a full disk.

Why files are moved one by one and not directories as a whole: renaming a directory that lies in a lower
layer of an overlay is EXDEV. Renaming a file of a lower layer copies it up and flushes the copy to disk,
3 ms a file (5,000 deleted files: 21 s, against 2.5 s with copies of our own; 2-core VM under load, ext4);
so on an overlay a file is copied to ``saved/`` and deleted. Either way the copy goes when the container
goes. What counts is what the container sees: contents, metadata, names. Not undone are link counts of hard
links in a lower layer (their files become separate ones), access and change times, inode numbers.

No flush to disk anywhere: the journal guards against a killed process, and after a crash of the machine
the container is gone.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Self

from chrek.errors import Reason, Refused, RestoreFailed
from chrek.rootfs import fd as fds
from chrek.rootfs.copying import copy_attributes, copy_content, is_overlay
from chrek.rootfs.meta import Meta, read_xattrs, set_on_fd
from chrek.rootfs.skip import JOURNAL_PREFIX

_LOG: Final = b"log"
_SAVED: Final = b"saved"
_DONE: Final = b"done."


class Journal:
    """The journal of one directory tree, beneath *root_fd* (which is duplicated).

    Nothing is written before the first change. `Refused` (`UNDO_IMPOSSIBLE`) when an earlier restore's
    journal is still there.
    """

    def __init__(self, root_fd: int) -> None:
        if find_name(root_fd) is not None:
            raise Refused(
                Reason.UNDO_IMPOSSIBLE,
                "The changes of an earlier restore are still in this container's files.",
                cure="Undo them first, or restart the container.",
            )
        self.root = os.dup(root_fd)
        self._name = b""
        self._overlay = is_overlay(root_fd)
        self._dir = self._log = self._saved = -1
        self._count = 0
        self._kept: set[bytes] = set()
        self._moved: set[bytes] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def find(cls, root_fd: int) -> Journal | None:
        """Open the journal that an earlier process left in *root_fd*, to undo it; None when there is none."""
        name = find_name(root_fd)
        if name is None:
            return None
        self = cls.__new__(cls)
        self.root = os.dup(root_fd)
        self._name = name
        self._overlay = False  # matters to recording only
        self._dir = fds.open_beneath(root_fd, name)
        self._log = self._saved = -1
        self._count = 0
        self._kept = set()
        self._moved = set()
        return self

    def close(self) -> None:
        """Close the descriptors; what is on disk stays."""
        for fd in (self.root, self._dir, self._log, self._saved):
            if fd >= 0:
                os.close(fd)
        self.root = self._dir = self._log = self._saved = -1

    # --- recording -----------------------------------------------------------------------------

    def keep_directory(self, path: bytes, fd: int) -> None:
        """Remember the metadata of the directory *path*, open at *fd*, before anything in it changes."""
        if path in self._kept:
            return
        self._begin()
        if path:  # the root is remembered as the journal begins
            self._write("keep", path, meta=Meta.of(os.fstat(fd), read_xattrs(fd)))
        self._kept.add(path)

    def note_new(self, path: bytes) -> None:
        """Remember that nothing was at *path*, before something is made there."""
        if path in self._moved:  # its undo clears the place; a record of its own would delete what is back
            return
        self._begin()
        self._write("new", path)

    def move_aside(self, path: bytes, parent: int) -> None:
        """Move the entry *path* (no directory) out of its directory, open at *parent*."""
        number = self._next("move", path)
        name, saved = fds.split(path)[1], b"%d" % number
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if self._overlay and stat.S_ISREG(status.st_mode):
            self._copy_aside(parent, name, saved)
            os.unlink(name, dir_fd=parent)
        else:
            os.rename(name, saved, src_dir_fd=parent, dst_dir_fd=self._saved)

    def _copy_aside(self, parent: int, name: bytes, saved: bytes) -> None:
        """Copy a file to ``saved/``; only a whole copy gets the name that undo looks for."""
        partial = saved + b".part"
        source = fds.openat2(parent, name, fds.READ, resolve=fds.BENEATH | fds.NO_XDEV)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(partial, flags, 0o600, dir_fd=self._saved)
            try:
                status = os.fstat(source)
                copy_content(source, target, status.st_size)
                os.fchown(target, status.st_uid, status.st_gid)
                os.fchmod(target, stat.S_IMODE(status.st_mode))
                copy_attributes(source, target)
                os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
            finally:
                os.close(target)
        finally:
            os.close(source)
        os.rename(partial, saved, src_dir_fd=self._saved, dst_dir_fd=self._saved)

    def remove_tree(self, path: bytes) -> None:
        """Move everything at the directory *path* aside and remove its directories, the deepest first."""
        directories = [path]
        for directory in directories:  # grows while it is walked
            with fds.opened(self.root, directory) as fd:
                self.keep_directory(directory, fd)
                for child in sorted(map(os.fsencode, os.listdir(fd))):
                    status = os.stat(child, dir_fd=fd, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        directories.append(fds.join(directory, child))
                    else:
                        self.move_aside(fds.join(directory, child), fd)
        for directory in reversed(directories):
            self._remove_empty(directory)

    def _remove_empty(self, path: bytes) -> None:
        parent, name = fds.split(path)
        number = self._next("dir", path)
        with fds.opened(self.root, parent) as fd:
            os.mkdir(b"%d" % number, 0o700, dir_fd=self._saved)
            os.rmdir(name, dir_fd=fd)

    def _next(self, record: str, path: bytes) -> int:
        self._begin()
        self._count += 1
        self._write(record, path, number=self._count)
        self._moved.add(path)
        return self._count

    def _begin(self) -> None:
        """Make the journal's directory; its name keeps the root's time, its first record the rest."""
        if self._log >= 0:
            return
        status = os.fstat(self.root)
        self._name = b"%s%d" % (JOURNAL_PREFIX, status.st_mtime_ns)
        meta = Meta.of(status, read_xattrs(self.root))
        os.mkdir(self._name, 0o700, dir_fd=self.root)
        self._dir = fds.open_beneath(self.root, self._name)
        try:
            os.mkdir(_SAVED, 0o700, dir_fd=self._dir)
            self._saved = fds.open_beneath(self._dir, _SAVED)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._log = os.open(_LOG, flags, 0o600, dir_fd=self._dir)
            self._write("keep", b"", meta=meta)
        except OSError:
            self._abandon(status.st_mtime_ns)
            raise
        self._kept.add(b"")

    def _abandon(self, mtime: int) -> None:
        """Take away a journal that could not be begun, so that the next change begins a whole one."""
        for fd in (self._log, self._saved):
            if fd >= 0:
                os.close(fd)
        self._log = self._saved = -1
        self._drop(mtime)

    def _write(self, record: str, path: bytes, *, number: int = 0, meta: Meta | None = None) -> None:
        fields: dict[str, Any] = {"do": record, "path": path.decode("latin-1")}
        if number:
            fields["number"] = number
        if meta is not None:
            fields["meta"] = [meta.mode, meta.uid, meta.gid, meta.mtime_ns]
            fields["xattrs"] = {name: base64.b64encode(value).decode() for name, value in meta.xattrs}
        text = json.dumps(fields).encode()
        before = os.fstat(self._log).st_size
        try:
            fds.write_all(self._log, b"%08x %s\n" % (zlib.crc32(text), text))
        except OSError:
            os.truncate(self._log, before)  # part of a line before another one would damage the log
            raise

    # --- the end -------------------------------------------------------------------------------

    def commit(self) -> None:
        """Keep the changes and drop what was moved aside; there is no undo after this."""
        if self._dir < 0:
            return
        mtime = os.fstat(self.root).st_mtime_ns
        os.rename(_LOG, b"%s%d" % (_DONE, mtime), src_dir_fd=self._dir, dst_dir_fd=self._dir)
        self._drop(mtime)

    def undo(self) -> None:
        """Bring back what was there before the first record, and remove the journal.

        Raises `RestoreFailed` (`UNDO_IMPOSSIBLE`) naming the first entry that would not go back; the others
        are back then and the journal stays.
        """
        if self._dir < 0:
            return
        done = next((n for n in map(os.fsencode, os.listdir(self._dir)) if n.startswith(_DONE)), None)
        if done is not None:  # killed while committing: only the removal is left to do
            self._drop(_number(done.removeprefix(_DONE)))
            return
        failures = []
        for record in reversed(self._read()):
            try:
                self._undo(record)
            except (OSError, ValueError, OverflowError) as error:
                failures.append(f"{fds.shown(_path(record))}: {getattr(error, 'strerror', None) or error}")
        if failures:
            raise RestoreFailed(
                Reason.UNDO_IMPOSSIBLE,
                f"{len(failures)} file changes could not be undone, the first at {failures[0]}.",
                cure="Restart the container: a new one has the image's own files.",
            )
        self._drop(_number(self._name.removeprefix(JOURNAL_PREFIX)))

    def _read(self) -> list[dict[str, Any]]:
        """Read the log; a last line that was cut off is no record, since nothing was done after it."""
        try:
            with fds.opened(self._dir, _LOG, fds.READ) as fd, os.fdopen(os.dup(fd), "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        records: list[Any] = []
        for line in lines[:-1]:
            good = line[:8] == b"%08x" % zlib.crc32(line[9:])
            records.append(_parse(line[9:]) if good else None)
        if not all(map(_is_well_formed, records)):
            raise Refused(Reason.CORRUPT, "The journal of an earlier restore is damaged.")
        return records

    def _undo(self, record: dict[str, Any]) -> None:
        path = _path(record)
        if record["do"] == "keep":
            self._restore_directory(path, record)
            return
        saved = b"%d" % int(record.get("number", 0))
        parent, name = fds.split(path)
        if record["do"] == "new":
            with suppress(FileNotFoundError), fds.opened(self.root, parent) as fd:  # a new directory, gone already
                delete_tree(fd, name)
            return
        with self._store() as store:
            if fds.lstat(store, saved) is not None:
                with fds.opened(self.root, parent) as fd:
                    delete_tree(fd, name)
                    self._put_back(record["do"], fd, name, store, saved)

    @contextmanager
    def _store(self) -> Iterator[int]:
        """Open the directory of what was moved aside; an earlier undo that was killed may have removed it."""
        if fds.lstat(self._dir, _SAVED) is None:
            os.mkdir(_SAVED, 0o700, dir_fd=self._dir)
        with fds.opened(self._dir, _SAVED) as fd:
            yield fd

    def _put_back(self, record: str, fd: int, name: bytes, store: int, saved: bytes) -> None:
        if record == "move":
            os.rename(saved, name, src_dir_fd=store, dst_dir_fd=fd)
        else:
            os.mkdir(name, 0o700, dir_fd=fd)
            os.rmdir(saved, dir_fd=store)

    def _restore_directory(self, path: bytes, record: dict[str, Any]) -> None:
        mode, uid, gid, mtime = record["meta"]
        xattrs = tuple((name, base64.b64decode(value)) for name, value in record["xattrs"].items())
        # Not there: a directory this restore had made itself, and an undo that was killed has deleted.
        with suppress(FileNotFoundError, NotADirectoryError), fds.opened(self.root, path) as fd:
            set_on_fd(fd, Meta(mode, uid, gid, mtime, xattrs), exact=True)

    def _drop(self, mtime: int) -> None:
        """Remove the journal and give the root the time that its removal changes."""
        for name in sorted(map(os.fsencode, os.listdir(self._dir)), reverse=True):  # the log goes last
            delete_tree(self._dir, name)
        os.rmdir(self._name, dir_fd=self.root)
        os.utime(self.root, ns=(mtime, mtime))
        os.close(self._dir)
        self._dir = -1


def find_name(root_fd: int) -> bytes | None:
    """Give the name of the journal's directory in *root_fd*, if there is one."""
    for name in sorted(map(os.fsencode, os.listdir(root_fd))):
        if name.startswith(JOURNAL_PREFIX) and name.removeprefix(JOURNAL_PREFIX).removeprefix(b"-").isdigit():
            status = fds.lstat(root_fd, name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                return name
    return None


def delete_tree(parent: int, name: bytes) -> None:
    """Delete an entry of any type, with all below it; nothing there is fine. Follows no link."""
    status = fds.lstat(parent, name)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    directories = [name]
    for directory in directories:  # grows while it is walked
        with fds.opened(parent, directory) as fd, os.scandir(fd) as entries:
            for entry in entries:
                child = os.fsencode(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    directories.append(fds.join(directory, child))
                else:
                    os.unlink(child, dir_fd=fd)
    for directory in reversed(directories):
        above, last = fds.split(directory)
        with fds.opened(parent, above) as fd:
            os.rmdir(last, dir_fd=fd)


def _parse(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _number(text: bytes) -> int:
    return int(text) if text.removeprefix(b"-").isdigit() else 0


def _path(record: dict[str, Any]) -> bytes:
    path: str = record["path"]
    return path.encode("latin-1")


def _is_well_formed(record: object) -> bool:
    """Check a record that a container's image could have planted."""
    if not isinstance(record, dict) or not isinstance(record.get("path"), str):
        return False
    path: str = record["path"]
    if "\0" in path or max(path, default="") > "\xff":
        return False
    if path and not {"", ".", ".."}.isdisjoint(path.split("/")):
        return False
    if record.get("do") == "keep":
        meta, xattrs = record.get("meta"), record.get("xattrs")
        return (
            isinstance(meta, list)
            and len(meta) == 4
            and all(type(number) is int for number in meta)
            and isinstance(xattrs, dict)
            and all(isinstance(value, str) for value in xattrs.values())
        )
    return bool(path) and (
        record.get("do") == "new" or (record.get("do") in ("move", "dir") and type(record.get("number")) is int)
    )
